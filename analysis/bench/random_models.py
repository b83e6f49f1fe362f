"""Models with random weights, in float or packed: time and memory do not depend on the values of weights."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from dynquant.formats.quant_types import quant_type
from dynquant.formats.scale_fields import num_scales, with_scales
from dynquant.packed.layers import EXPERT_PARTS, PackedModule, choose_layout
from dynquant.packed.places import pack_modules

SHAPES = ("8b", "7b-a1b")
"""A dense model in the shape of Llama 3.1 8B, and a mixture of 64 experts with one billion active weights of seven."""


def shape_config(name: str) -> Any:
    """The transformers configuration of one of `SHAPES`."""
    from transformers import LlamaConfig, Qwen3MoeConfig

    if name == "8b":
        return LlamaConfig(
            vocab_size=128_256, hidden_size=4096, num_hidden_layers=32, num_attention_heads=32, num_key_value_heads=8,
            head_dim=128, intermediate_size=14_336, max_position_embeddings=8192, tie_word_embeddings=False,
        )  # fmt: skip
    return Qwen3MoeConfig(
        vocab_size=50_304, hidden_size=2048, num_hidden_layers=16, num_attention_heads=16, num_key_value_heads=16,
        head_dim=128, intermediate_size=4096, num_experts=64, num_experts_per_tok=8, moe_intermediate_size=1024,
        max_position_embeddings=4096, tie_word_embeddings=False,
    )  # fmt: skip


def random_model(config: Any, device: str = "cuda") -> nn.Module:
    """bfloat16 weights."""
    return _filled(_empty(config), device)


def random_packed(config: Any, types: Mapping[str, str], device: str = "cuda") -> nn.Module:
    """Packed weights: `types["experts"]` for routed experts, `types["rest"]` for all other matrices.

    Routers stay in bfloat16, and so does MLA's latent projection: packed, it is two tensors that a file has to make
    of it.
    """
    model = _empty(config)
    chosen: dict[str, str] = {}
    for path, module in model.named_modules():
        if isinstance(module, nn.Linear | nn.Embedding) and not path.endswith(("mlp.gate", "kv_b_proj")):
            chosen[f"{path}.weight"] = types["rest"]
        elif hasattr(module, "gate_up_proj"):
            chosen |= {f"{path}.{part}": types["experts"] for part in EXPERT_PARTS}
    pack_modules(model, chosen, dtype=torch.bfloat16)
    return _filled(model, device)


def _empty(config: Any) -> nn.Module:
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)


def _filled(model: Any, device: str) -> nn.Module:
    """Random weights of a plausible size; the rotary tables are computed anew."""
    rotary = type(model.model.rotary_emb)
    model.to_empty(device=device)
    for buffer in model.buffers():
        buffer.zero_()
    model.model.rotary_emb = rotary(config=model.config).to(device)
    packed = {
        id(getattr(module, name)): module.types[name]
        for module in model.modules()
        if isinstance(module, PackedModule)
        for name in module.packed_names
    }
    with torch.no_grad():
        for parameter in model.parameters():
            if id(parameter) in packed:
                _fill_blocks(parameter.data, packed[id(parameter)])
            else:
                parameter.normal_(1.0 if parameter.dim() == 1 else 0.0, 0.0 if parameter.dim() == 1 else 0.02)
    choose_layout(model)
    return model.eval()


def _fill_blocks(weight: Tensor, type_name: str) -> None:
    stored = quant_type(type_name)
    for part in weight.reshape(-1, stored.block_bytes).split(1 << 20):
        part.random_(0, 256)
        if num_scales(type_name):
            scales = torch.full((len(part), num_scales(type_name)), 1e-3, device=part.device)
            part.copy_(with_scales(type_name, part, scales))
