"""`merge`: an adapter becomes part of the packed weights, which are encoded again in the types that they have.

W + scale B A is rounded as W was, by an encoder under the importance and second moments of calibration. Rounding can
cost more than the adapter changed: at low bits a small change may be lost. Keep the adapter beside the model where that
matters.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from peft import PeftModel
from peft.tuners.lora import LoraLayer
from torch import Tensor

from dynquant.calibration.second_moments import load_beside
from dynquant.calibration.statistics import CalibrationStats
from dynquant.checkpoints.model import Model
from dynquant.checkpoints.tensor_source import TensorInfo
from dynquant.encoding.stream import Guidance, TensorEncoder, guidance_of, load_encoder
from dynquant.errors import AdapterError, StatsError
from dynquant.formats.quant_types import quant_type
from dynquant.kernels.planes import pack_planes
from dynquant.lora.layers import PackedLoraEmbedding, PackedLoraExperts, PackedLoraLinear
from dynquant.lora.places import bare_path, gguf_names
from dynquant.packed.joined_rows import PackedRows
from dynquant.packed.layers import PLANES, PackedLatentProjection, PackedModule
from dynquant.storage.atomic import file_hash

if TYPE_CHECKING:
    from transformers import PreTrainedModel

Delta = Callable[[int | None], Tensor]
"""The sum that adapters add to a weight, or to one slice of a stack, float32."""


@dataclass(frozen=True)
class _Part:
    """One packed weight and what is added to it."""

    module: PackedModule
    attribute: str
    key: str
    delta: Delta

    @property
    def type_name(self) -> str:
        return self.module.types[self.attribute]


def merge(
    model: PeftModel, *, stats: str | Path | None = None, encoder: str = "dynquant", device: str | None = None
) -> "PreTrainedModel":
    """Encode every adapted weight again with its active adapters in it, and return the model without adapters.

    Types, sizes and all other weights stay. One matrix, or one expert, is decoded at a time; until all are encoded the
    model is as it was. `save_pretrained` then writes a packed checkpoint.

    Args:
        model: from `add_adapter`, `load_adapter` or PEFT, on a packed model.
        stats: stats.safetensors under which the model was exported, with the second moments beside it. It may be left
            out where the model was made without.
        encoder: "dynquant" or "ggml".
        device: where the dynquant encoder runs.

    Raises:
        AdapterError: no adapter on packed weights, or an architecture that dynquant cannot name tensors of.
        StatsError: statistics are missing, or others than those of the export.
        EncodeError: the adapter holds NaN, or a type needs statistics that there are none of for a tensor.
    """
    layers = {path: layer for path, layer in model.named_modules() if isinstance(layer, _LAYERS)}
    if not layers:
        raise AdapterError("There is no adapter on packed weights to merge; call merge_and_unload of PEFT instead.")
    base = model.get_base_model()
    _, names = gguf_names(base)
    parts = {}
    for part in (part for path, layer in layers.items() for part in _parts(bare_path(path), layer)):
        if part.key not in names:
            raise AdapterError(f"`{part.key}` has no name in GGUF, so no statistics. Keep the adapter.")
        parts[names[part.key]] = part
    guidance = _guidance(base, parts, None if stats is None else Path(stats))
    merged = Model(Path(base.name_or_path), _MergedSource(parts), (), lambda name: (name,))
    tensors = TensorEncoder(merged, guidance, load_encoder(encoder, device))
    encoded = {
        name: tensors.tensor(name, quant_type(part.type_name))
        for name, part in parts.items()
        if part.attribute in part.module.packed_names
    }
    with torch.no_grad():
        for name, part in parts.items():
            _write(part, encoded.get(name))
    for layer in layers.values():
        layer.merged_adapters.extend(_active(layer))
    config = getattr(base.config, "quantization_config", None)
    if config is not None:
        adapter = ", ".join(f"LoRA rank {lora.r}, alpha {lora.lora_alpha}" for lora in model.peft_config.values())
        config.provenance = {**config.provenance, "merged_adapter": adapter}
    return model.merge_and_unload()


_LAYERS = (PackedLoraLinear, PackedLoraEmbedding, PackedLoraExperts)


class _MergedSource:
    """The changed weights as a source of tensors: decoded, with what the adapter adds, when they are asked for."""

    def __init__(self, parts: dict[str, _Part]) -> None:
        self._parts = parts

    @property
    def fingerprint(self) -> str:
        raise NotImplementedError("weights of a model in memory have no fingerprint")

    def names(self) -> list[str]:
        return list(self._parts)

    def info(self, name: str) -> TensorInfo:
        part = self._parts[name]
        return TensorInfo(name, part.module.shape_of(part.attribute), "F32")

    @torch.no_grad()
    def load(self, name: str, index: int | None = None) -> Tensor:
        part = self._parts[name]
        return (part.module.dense(part.attribute, torch.float32, index) + part.delta(index)).cpu()


def _parts(path: str, layer: LoraLayer) -> Iterator[_Part]:
    module, active = layer.get_base_layer(), _active(layer)
    if isinstance(layer, PackedLoraExperts):
        for name in layer.part_names:
            yield _Part(module, name, f"{path}.{name}", partial(_experts_delta, layer, active, name))
        return

    def whole(_: int | None = None) -> Tensor:
        return sum(layer.get_delta_weight(name).float() for name in active)

    for name in module.types:
        delta = whole
        if isinstance(module, PackedLatentProjection):
            delta = partial(_latent_delta, module, whole, name)
        elif isinstance(module, PackedRows):
            delta = partial(_rows_delta, module, whole, name)
        yield _Part(module, name, f"{path}.{name}", delta)


def _active(layer: LoraLayer) -> list[str]:
    return [name for name in layer.active_adapters if name in layer.lora_A or name in layer.lora_embedding_A]


def _latent_delta(module: PackedLatentProjection, whole: Delta, name: str, index: int | None) -> Tensor:
    heads, rank, nope = module.shape_of("k_b")
    per_head = whole(None).reshape(heads, -1, rank)
    delta = per_head[:, :nope].transpose(1, 2) if name == "k_b" else per_head[:, nope:]
    return delta if index is None else delta[index]


def _rows_delta(module: PackedRows, whole: Delta, name: str, _: int | None = None) -> Tensor:
    return module.in_stored_order(whole(None))[name]


def _experts_delta(layer: PackedLoraExperts, active: list[str], name: str, index: int | None) -> Tensor:
    experts = slice(None) if index is None else index
    total = 0
    for adapter in active:
        a, b = (factor[experts].float() for factor in layer.factors(adapter))
        if layer.parameter_name == "gate_up_proj":
            b = layer.experts.split(b.transpose(-1, -2))[name == "up_proj"].transpose(-1, -2)
        total = total + layer.scaling[adapter] * (b @ a)
    return total


def _guidance(base: "PreTrainedModel", parts: dict[str, _Part], path: Path | None) -> Guidance:
    provenance = getattr(getattr(base.config, "quantization_config", None), "provenance", {})
    recorded = provenance.get("stats_hash")
    if path is None:
        needy = [name for name, part in parts.items() if quant_type(part.type_name).uses_imatrix]
        if needy and recorded != "":
            raise StatsError(
                f"`{needy[0]}` ({parts[needy[0]].type_name}) was encoded under statistics of calibration, and "
                "merging encodes it again. Give the stats.safetensors of its export as `stats`, keep the adapter "
                "beside the model, or write it for llama.cpp with `dynquant export-adapter`."
            )
        return Guidance()
    if not path.is_file():
        raise StatsError(f"There is no {path}. Give the stats.safetensors under which the model was exported.")
    if recorded and file_hash(path) != recorded:
        raise StatsError(
            f"{path} has the hash {file_hash(path)[:12]}, but the model was exported under statistics {recorded[:12]}. "
            "Give the stats.safetensors that was written beside its plan."
        )
    stats = CalibrationStats.load(path)
    return guidance_of(stats, load_beside(path, stats))


def _write(part: _Part, packed: Tensor | None) -> None:
    weight = getattr(part.module, part.attribute)
    if packed is None:
        weight.add_(part.delta(None).to(weight.dtype))
        return
    packed = packed.to(weight.device).reshape(*part.module.shape_of(part.attribute)[:-1], -1)
    weight.copy_(pack_planes(part.type_name, packed) if part.module.layout == PLANES else packed)
