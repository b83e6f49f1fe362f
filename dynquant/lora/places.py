"""Origin of the weights of a packed transformers model: GGUF names and order of rows by `state_dict` key."""

from pathlib import Path
from typing import TYPE_CHECKING

from dynquant.errors import AdapterError
from dynquant.families.common.config import Config
from dynquant.families.text.registry import FAMILIES
from dynquant.packed.layers import PackedLatentProjection
from dynquant.packed.places import Place, build_meta_model, places

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def places_by_key(base: "PreTrainedModel") -> dict[str, Place]:
    """The place of every weight of a packed model.

    Raises:
        AdapterError: an architecture whose tensors dynquant cannot name.
    """
    values = base.config.to_dict()
    if values.get("model_type") not in FAMILIES:
        raise AdapterError(
            f"The model type {values.get('model_type')!r} is not among those whose tensors dynquant can name "
            f"({', '.join(FAMILIES)}), so nothing can be looked up under their names. Keep the adapter beside the "
            "model, and start healing with --start zero."
        )
    config = Config(Path(base.name_or_path), values, {k: v for k, v in values.items() if k != "quantization_config"})
    has_latent = any(isinstance(module, PackedLatentProjection) for module in base.modules())
    found, _ = places(config, build_meta_model(config), whole_kv_b="kv_lora_rank" in values and not has_latent)
    return {place.key: place for place in found.values()}


def bare_path(path: str) -> str:
    """The path of a module without what PEFT put around it."""
    return path.removeprefix("base_model.model.").replace(".base_layer", "")
