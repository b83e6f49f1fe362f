"""The stream of quantized tensors: each is loaded and encoded in parts that whichever exporter writes at once.

Neither the float32 copy of a whole expert stack nor its packed bytes ever exist (`parts`). What an encoder is told of a
part, `PartInput`, can be gathered in one process and encoded in another. A quantized GGUF that already stores the
wanted type gives its own bytes.
"""

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from typing import NamedTuple

import torch

from dynquant.calibration.importance import importance
from dynquant.calibration.second_moments import SecondMoments, hessian
from dynquant.calibration.statistics import CalibrationStats
from dynquant.checkpoints.gguf_source import GGUFSource
from dynquant.checkpoints.model import Model
from dynquant.encoding.interface import Encoder, ProtectedWeight
from dynquant.encoding.parts import PartLimits, TensorPart, as_slice, load_packed_part, load_part
from dynquant.errors import EncodeError, PlanError
from dynquant.formats.quant_types import QuantType
from dynquant.recipes.plan import Plan
from dynquant.session import Progress, ignore_progress

ImportanceLookup = Callable[[str, tuple[int, ...]], torch.Tensor | None]
"""Tensor name and shape -> E[x^2], float32 [experts, row_length]; None when calibration did not see its input."""
HessianLookup = Callable[[str, tuple[int, ...], slice], torch.Tensor | None]
"""Tensor name, shape and experts -> E[x xᵀ], float32 [experts, row_length, row_length]; None when it is not known."""

PartStream = Callable[[Iterable[TensorPart]], Iterable[tuple[TensorPart, torch.Tensor]]]
"""Encodes parts, somewhere and in any order, and gives each with its blocks."""

ENCODERS = ("dynquant", "ggml")


@dataclass(frozen=True)
class Guidance:
    """Guidance of encoders: what they are told of each tensor besides its weights."""

    importance: ImportanceLookup | None = None
    hessian: HessianLookup | None = None
    protected: Mapping[str, tuple[ProtectedWeight, ...]] = field(default_factory=dict)


def guidance_of(
    stats: CalibrationStats | None,
    moments: SecondMoments | None,
    protected: Mapping[str, tuple[ProtectedWeight, ...]] | None = None,
) -> Guidance:
    """Return what calibration knows, for an encoder; `protected` are super weights by tensor."""
    if stats is None:
        return Guidance(protected=protected or {})
    return Guidance(
        importance=partial(importance, stats),
        hessian=None if moments is None else partial(hessian, moments, stats),
        protected=protected or {},
    )


class QuantizedPart(NamedTuple):
    """A part as it is stored. `packed` is uint8 [..., rows, row_bytes]; 1-D tensors have one row."""

    part: TensorPart
    packed: torch.Tensor


@dataclass(frozen=True)
class PartInput:
    """All that decides the blocks of a part beside the encoder: see `Encoder.encode`."""

    part: TensorPart
    weights: torch.Tensor
    importance: torch.Tensor | None
    hessian: torch.Tensor | None
    protected: tuple[ProtectedWeight, ...]


def load_encoder(name: str, device: str | None = None) -> Encoder:
    """Return the encoder of this name; `device` is for those that can use a GPU, and None lets them choose.

    Raises:
        EncodeError: no encoder of that name, or a device that it cannot use.
    """
    if name == "dynquant":
        from dynquant.encoding.dynquant_encoder import DynquantEncoder

        return DynquantEncoder(device)
    if name == "ggml":
        from dynquant.encoding.ggml import GgmlEncoder

        return GgmlEncoder()
    raise EncodeError(f"There is no encoder `{name}`; use one of {', '.join(ENCODERS)}.")


def encoder_version(encoder: Encoder) -> str:
    """Return what decides the encoder's bytes beside dynquant's own version: the release of ggml, or of PyTorch."""
    if encoder.name != "ggml":
        return torch.__version__
    from dynquant.encoding.ggml import ggml_version

    return ggml_version()


def parts_of_plan(
    plan: Plan, guidance: Guidance, encoder: Encoder, limits: PartLimits | None = None, *, whole: Collection[str] = ()
) -> dict[str, list[TensorPart]]:
    """Return the parts of every tensor by its name. Tensors named in `whole` have one, whatever the limits.

    Raises:
        ExportError: the limits are too tight for a tensor.
    """
    limits = limits or PartLimits()
    return {
        name: [TensorPart.whole(name, entry.shape, stored)]
        if name in whole
        else limits.parts(name, entry.shape, stored, hessians=_uses_hessian(guidance, encoder, stored))
        for entry in plan.entries
        for name, stored in [(entry.name, entry.quant_type)]
    }


def quantize(
    model: Model,
    plan: Plan,
    guidance: Guidance,
    encoder: Encoder,
    *,
    parts: Mapping[str, list[TensorPart]] | None = None,
    threads: int | None = None,
    progress: Progress = ignore_progress,
    skip: Collection[str] = (),
) -> Iterator[QuantizedPart]:
    """Yield every part of every tensor of the plan in the model's order, encoded in this process.

    `parts` are by default those of `parts_of_plan`; keys of parts and names of tensors in `skip` are left out, but
    count in `progress`.

    Raises:
        PlanError: the plan is of another checkpoint, or gives a tensor another shape.
        EncodeError: NaN or Inf weights, or a type that needs statistics the model has none of; both name the tensor.
    """
    check_plan(model, plan)
    check_importance(plan, guidance.importance, skip=skip)
    missing = _missing(model, parts or parts_of_plan(plan, guidance, encoder), skip)
    counter = _Counter(plan, missing, progress)
    for part in missing:
        counter.tensor = part.name
        counter.add(0)
        packed = encode_part(model, part, guidance, encoder, threads=threads, on_weights=counter.add)
        yield QuantizedPart(part, packed)


def quantize_elsewhere(
    model: Model,
    plan: Plan,
    elsewhere: PartStream,
    parts: Mapping[str, list[TensorPart]],
    *,
    progress: Progress = ignore_progress,
    skip: Collection[str] = (),
) -> Iterator[QuantizedPart]:
    """Yield every part of every tensor of the plan as `elsewhere` is done with it; see `quantize`."""
    missing = _missing(model, parts, skip)
    counter = _Counter(plan, missing, progress)
    counter.add(0)  # the stage begins before workers do
    for part, packed in elsewhere(missing):
        counter.tensor = part.name
        counter.add(part.num_weights)
        yield QuantizedPart(part, packed)


def _missing(model: Model, parts: Mapping[str, list[TensorPart]], skip: Collection[str]) -> list[TensorPart]:
    every = [part for name in model.source.names() for part in parts[name]]
    return [part for part in every if part.key not in skip and part.name not in skip]


def check_plan(model: Model, plan: Plan) -> None:
    """Refuse a plan that is not exactly of this model.

    Raises:
        PlanError: another fingerprint, a missing or unknown tensor, or another shape.
    """
    plan.check_covers(model.source.names(), model.fingerprint, model.name)
    for entry in plan.entries:
        shape = model.source.info(entry.name).shape
        if entry.shape != tuple(shape):
            raise PlanError(
                f"The plan gives `{entry.name}` the shape {entry.shape}, but {model.name} stores {tuple(shape)}. "
                f"Run `dynquant plan` on {model.name}."
            )


def check_importance(plan: Plan, importance: ImportanceLookup | None, *, skip: Collection[str] = ()) -> None:
    """Refuse, before hours of encoding, types that ggml cannot encode without an importance matrix.

    Raises:
        EncodeError: naming the tensor and its type.
    """
    for entry in plan.entries:
        if not entry.quant_type.needs_imatrix or entry.name in skip:
            continue
        if importance is None or importance(entry.name, entry.shape) is None:
            raise EncodeError(
                f"`{entry.name}` is planned as {entry.type}, which needs an importance matrix, but there are no "
                "statistics of its input. Calibrate the model and give the statistics, or choose another type."
            )


class _Counter:
    """Weights done, those of an earlier run included, and the tensor that is being encoded."""

    def __init__(self, plan: Plan, missing: Iterable[TensorPart], progress: Progress) -> None:
        self.progress, self.total, self.tensor = progress, plan.num_weights, ""
        self.done = self.total - sum(part.num_weights for part in missing)

    def add(self, num_weights: int) -> None:
        self.done += num_weights
        self.progress("quantize", self.done, self.total, unit="weights", tensor=self.tensor)


def encode_tensor(
    model: Model, name: str, stored: QuantType, guidance: Guidance, encoder: Encoder, *, threads: int | None = None
) -> torch.Tensor:
    """Return one tensor's blocks, uint8 [..., rows, row_bytes], encoded part by part.

    Raises:
        EncodeError: NaN or Inf weights, or a type that needs statistics the tensor has none of.
    """
    shape = tuple(model.source.info(name).shape)
    parts = PartLimits().parts(name, shape, stored, hessians=_uses_hessian(guidance, encoder, stored))
    encoded = (encode_input(gather(model, part, guidance, encoder), encoder, threads=threads) for part in parts)
    if len(parts) == 1:
        return next(encoded)
    packed = torch.empty(stored.tensor_bytes(shape), dtype=torch.uint8)
    for part, blocks in zip(parts, encoded, strict=True):
        packed[part.offset : part.offset + part.num_bytes] = blocks.reshape(-1)
    return packed.view(*shape[:-1], -1)


def encode_part(
    model: Model,
    part: TensorPart,
    guidance: Guidance,
    encoder: Encoder,
    *,
    threads: int | None = None,
    on_weights: Callable[[int], None] | None = None,
) -> torch.Tensor:
    """Return a part's blocks, uint8 [..., rows, row_bytes]; `on_weights` hears how many weights each step encoded.

    Raises:
        EncodeError: NaN or Inf weights, or a type that needs statistics the tensor has none of.
    """
    if not is_stored(model, part):
        part_input = gather(model, part, guidance, encoder)
        return encode_input(part_input, encoder, threads=threads, on_weights=on_weights)
    if on_weights is not None:
        on_weights(part.num_weights)
    assert isinstance(model.source, GGUFSource)
    return load_packed_part(model.source, part)


def is_stored(model: Model, part: TensorPart) -> bool:
    """Return whether the source holds the wanted blocks; floats go through the encoder, which checks for NaN."""
    holds_blocks = isinstance(model.source, GGUFSource) and not part.quant_type.is_float
    return holds_blocks and model.source.info(part.name).dtype == part.quant_type.name


def gather(model: Model, part: TensorPart, guidance: Guidance, encoder: Encoder) -> PartInput:
    """Read what an encoder needs for a part."""
    stored, experts = part.quant_type, as_slice(part.experts)
    uses_importance = stored.uses_imatrix or (encoder.uses_hessians and not stored.is_float)
    importance = guidance.importance(part.name, part.shape) if guidance.importance and uses_importance else None
    if importance is not None and len(part.shape) == 3:
        importance = importance[0] if len(importance) == 1 else importance[experts]
    hessian = None
    if guidance.hessian is not None and _uses_hessian(guidance, encoder, stored):
        hessian = guidance.hessian(part.name, part.shape, experts)
    protected = tuple(
        replace(scalar, expert=(scalar.expert or 0) - part.experts.start, row=scalar.row - part.rows.start)
        for scalar in guidance.protected.get(part.name, ())
        if (scalar.expert or 0) in part.experts and scalar.row in part.rows
    )
    return PartInput(part, load_part(model.source, part), importance, hessian, protected)


def encode_input(
    part_input: PartInput,
    encoder: Encoder,
    *,
    threads: int | None = None,
    on_weights: Callable[[int], None] | None = None,
) -> torch.Tensor:
    """Return the blocks of a part from what was gathered for it, uint8 [..., rows, row_bytes]."""
    return encoder.encode(
        part_input.part.quant_type, part_input.weights, part_input.importance, threads,
        name=part_input.part.name, hessian=part_input.hessian, protected=part_input.protected, progress=on_weights,
    )  # fmt: skip


def _uses_hessian(guidance: Guidance, encoder: Encoder, stored: QuantType) -> bool:
    return guidance.hessian is not None and encoder.uses_hessians and not stored.is_float
