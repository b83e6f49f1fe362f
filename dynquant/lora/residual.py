"""Start an adapter from what quantization took: B A is the best approximation of W - Q(W) of its rank.

A singular value decomposition U D Vᵀ of the residual, cut to the rank r, gives B = U sqrt(D) and A = sqrt(D) Vᵀ (LoftQ,
Li et al. 2023). Training then begins nearer to the original than the packed model is. Weighting the residual by the
inputs' second moments or mean squares (QERA, Zhang et al. 2024) brought nothing where it was measured: an encoder with
error feedback has left nothing that they could tell apart (reports/finetune.md).
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor

from dynquant.checkpoints.model import Model
from dynquant.errors import AdapterError
from dynquant.formats.quant_types import QUANT_TYPES
from dynquant.lora.layers import PackedLoraExperts, PackedLoraLinear
from dynquant.lora.places import bare_path, places_by_key
from dynquant.packed.joined_rows import PackedRows
from dynquant.packed.layers import LATENT_PARTS, PackedLatentProjection, PackedModule
from dynquant.packed.places import Place
from dynquant.session import Progress, ignore_progress

_MORE_COLUMNS, _POWER_ITERATIONS = 16, 4
"""Settings of the randomized decomposition (Halko et al. 2011): its error is far below that of the cut."""


@torch.no_grad()
def start_from_residual(adapted: PeftModel, original: Model, *, progress: Progress = ignore_progress) -> None:
    """Set the factors of the active adapter of every packed linear layer and of routed experts.

    One matrix of the original, or one expert, is in memory at a time. Adapted embeddings keep their start.

    Args:
        adapted: a fresh adapter on a packed model, from `add_adapter`.
        original: the model that was quantized.
        progress: called with the layers that are done.

    Raises:
        AdapterError: an architecture that dynquant cannot name tensors of, or another model than the original.
        CheckpointError: the original's weights cannot be read.
    """
    layers = [
        (bare_path(path), layer)
        for path, layer in adapted.named_modules()
        if isinstance(layer, PackedLoraLinear | PackedLoraExperts)
    ]
    names = set(original.source.names())
    by_key = places_by_key(adapted.get_base_model(), original)
    places = {key: place for key, place in by_key.items() if place.name in names}
    residuals = _Residuals(original, places)
    progress("residual", 0, len(layers), unit="layers")
    for done, (path, layer) in enumerate(layers, 1):
        for matrix, (a, b), scaling in _matrices(residuals, path, layer):
            _fill(a, b, scaling, matrix)
        progress("residual", done, len(layers), unit="layers")


@dataclass(frozen=True)
class _Residuals:
    """W - Q(W) of weights by `state_dict` key, float32 on the device of Q(W)."""

    original: Model
    places: dict[str, Place]

    def of(self, module: PackedModule, attribute: str, key: str, index: int | None = None) -> Tensor:
        if key not in self.places:
            raise AdapterError(f"{self.original.name} has no weight for `{key}`. Give the model that was quantized.")
        place = self.places[key]
        shape, packed_shape = tuple(self.original.source.info(place.name).shape), module.shape_of(attribute)
        if shape != packed_shape:
            raise AdapterError(
                f"`{key}` of the packed model has the shape {packed_shape}, but `{place.name}` of "
                f"{self.original.name} has {shape}. Give the model that was quantized."
            )
        values = self.original.source.load(place.name, index).float().contiguous()
        if index is None:  # rows of experts are never moved
            values = place.from_gguf(QUANT_TYPES["F32"], values.view(torch.uint8))
        packed = module.dense(attribute, torch.float32, index)
        return values.to(packed.device) - packed


def _matrices(residuals: _Residuals, path: str, layer: Any) -> Iterator[tuple[Tensor, tuple[Tensor, Tensor], float]]:
    """Residual [N, C], factors A [r, C] and B [N, r], and scaling, of each matrix."""
    module = layer.get_base_layer()
    for adapter in (name for name in layer.active_adapters if name in layer.lora_A):
        scaling = layer.scaling[adapter]
        if isinstance(layer, PackedLoraExperts):
            a, b = layer.factors(adapter)
            for expert in range(len(a)):
                parts = [residuals.of(module, name, f"{path}.{name}", expert) for name in layer.part_names]
                whole = module.joined(*(part.T for part in parts)).T if len(parts) > 1 else parts[0]
                yield whole, (a[expert], b[expert]), scaling
            continue
        if isinstance(module, PackedLatentProjection):  # rows of the whole kv_b_proj; its key part is stored transposed
            k_b, v_b = (residuals.of(module, name, f"{path}.{name}") for name in LATENT_PARTS)
            residual = torch.cat([k_b.transpose(1, 2), v_b], dim=1).flatten(0, 1)
        elif isinstance(module, PackedRows):
            residual = module.in_order(torch.cat([residuals.of(module, n, f"{path}.{n}") for n in module.types]))
        else:
            residual = residuals.of(module, "weight", f"{path}.weight")
        yield residual, (layer.lora_A[adapter].weight, layer.lora_B[adapter].weight), scaling


def _fill(a: Tensor, b: Tensor, scaling: float, residual: Tensor) -> None:
    """Write A [r, C] and B [N, r] whose scaled product approximates a residual [N, C]."""
    rank = min(len(a), *residual.shape)  # a small matrix has no more directions
    u, d, v = torch.svd_lowrank(residual, q=min(rank + _MORE_COLUMNS, *residual.shape), niter=_POWER_ITERATIONS)
    share = (d[:rank] / scaling).sqrt()
    a.zero_()
    b.zero_()
    a[:rank], b[:, :rank] = (v[:, :rank] * share).T.to(a.dtype), (u[:, :rank] * share).to(b.dtype)
