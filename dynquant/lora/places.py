"""Places of a packed transformers model's weights: GGUF names and order of rows by `state_dict` key, and which of them
llama.cpp applies an adapter to.

llama.cpp's loader takes a pair of factors for any tensor of the model, but only products that its graph makes by
`build_lora_mm` and `build_lora_mm_id` use them; the rest is left out without a word. Found in the source of the graphs,
and by loading an adapter of each tensor in turn and comparing logits (llama-cpp-python 0.3.36;
tests/exporters/test_adapter_gguf.py does it again).
"""

import re
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from dynquant.checkpoints.model import Model
from dynquant.errors import AdapterError
from dynquant.families.common.config import Config
from dynquant.families.text.registry import FAMILIES
from dynquant.packed.layers import PackedLatentProjection
from dynquant.packed.places import Place, build_meta_model, find_places
from dynquant.packed.traced_places import traced_places
from dynquant.running.load import empty_hf

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_LATENT = r"blk\.\d+\.attn_(q|q_a|q_b|kv_a_mqa|kv_b|k_b|v_b)\.weight"
_SPARSE = rf"{_LATENT}|.*indexer.*|output\.weight"
_LEFT_OUT = {
    **dict.fromkeys(("minicpm3", "plm"), _LATENT),
    **dict.fromkeys(("deepseek2", "deepseek2-ocr", "mistral4", "deepseek32", "glm-dsa", "dots3note"), _SPARSE),
    **dict.fromkeys(("kimi-linear", "bailingmoe3", "hy_v4", "glm5-next"), rf"{_SPARSE}|.*\.(attn|ssm)_.+"),
    **dict.fromkeys(("kimi-k3", "graniteswitch"), r".*"),
    "deepseek4": r"blk\.\d+\.attn_output_a\.weight|output\.weight",
    **dict.fromkeys(("gemma3n", "gemma4"), r".*(altup|per_layer_model_proj).*"),
    **dict.fromkeys(("nemotron_h", "nemotron_h_moe"), r".*ffn_latent_.*"),
    **dict.fromkeys(("rwkv6", "rwkv6qwen2", "rwkv7", "arwkv7"), r".*time_mix_.*"),
}
"""Matrices by architecture that its graph multiplies with by itself, as a pattern of names."""


def places_by_key(base: "PreTrainedModel", original: Model | None = None) -> dict[str, Place]:
    """Return the place of every weight of a packed model.

    Of an architecture without a family they are found in the original, the checkpoint that the model was made of.

    Raises:
        AdapterError: an architecture whose tensors dynquant cannot name.
    """
    if original is not None and (original.is_converted or original.has_vision):
        empty = empty_hf(original, dtype=torch.float32)
        return {place.key: place for place in traced_places(original, empty).values()}
    values = base.config.to_dict()
    if values.get("model_type") not in FAMILIES:
        raise AdapterError(
            f"{base.name_or_path} does not record the GGUF names of its tensors, under which their statistics are "
            f"looked up, and its type {values.get('model_type')!r} is not among those that tell them "
            f"({', '.join(FAMILIES)}). Export it again, or keep the adapter beside the model."
        )
    config = Config(Path(base.name_or_path), values, {k: v for k, v in values.items() if k != "quantization_config"})
    has_latent = any(isinstance(module, PackedLatentProjection) for module in base.modules())
    places, _ = find_places(config, build_meta_model(config), whole_kv_b="kv_lora_rank" in values and not has_latent)
    return {place.key: place for place in places.values()}


def gguf_names(base: "PreTrainedModel") -> tuple[str, dict[str, str]]:
    """Return llama.cpp's architecture of a packed model, and the GGUF name of every weight by key.

    Raises:
        AdapterError: they are not known.
    """
    if recorded := getattr(getattr(base.config, "quantization_config", None), "gguf", None):
        return recorded["architecture"], dict(recorded["names"])
    names = {key: place.name for key, place in places_by_key(base).items()}
    return FAMILIES[base.config.model_type].arch, names


def bare_path(path: str) -> str:
    """Return the path of a module without what PEFT put around it."""
    return path.removeprefix("base_model.model.").replace(".base_layer", "")


def takes_adapter(arch: str, name: str) -> bool:
    """Return whether an adapter of the matrix `name` has an effect in `arch`'s graph. An embedding's is not written."""
    return not name.endswith("token_embd.weight") and not re.fullmatch(_LEFT_OUT.get(arch, ""), name)
