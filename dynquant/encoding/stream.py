"""The stream of quantized tensors: each is loaded and encoded in parts that whichever exporter writes at once.

Neither the float32 copy of a whole expert stack nor its packed bytes ever exist (`parts`). What an encoder is told of a
part can be gathered in one process and encoded in another. A quantized GGUF that already stores the wanted type gives
its own bytes, and so does a checkpoint of MXFP4 experts.
"""

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from threading import Lock
from typing import Any, NamedTuple

import torch

from dynquant.calibration.importance import importance
from dynquant.calibration.second_moments import SecondMoments, hessian, output_hessian
from dynquant.calibration.statistics import CalibrationStats
from dynquant.checkpoints.gguf_source import GGUFSource
from dynquant.checkpoints.model import Model
from dynquant.checkpoints.tensor_roles import Role
from dynquant.encoding.interface import Encoder, ProtectedWeight, Sides
from dynquant.encoding.parts import (
    PartLimits,
    TensorPart,
    WeightChecks,
    WeightSums,
    as_slice,
    load_packed_part,
    load_part,
)
from dynquant.errors import EncodeError, PlanError
from dynquant.families.common.conversion import ConvertedSource
from dynquant.formats.quant_types import QuantType
from dynquant.options import ENCODERS
from dynquant.recipes.plan import Plan
from dynquant.resources import free_memory, usable_cores
from dynquant.session import Progress, ignore_progress
from dynquant.workers import side_by_side

ImportanceLookup = Callable[[str, tuple[int, ...]], torch.Tensor | None]
"""Tensor name and shape -> E[x^2], float32 [experts, row_length]; None when calibration did not see its input."""
HessianLookup = Callable[[str, tuple[int, ...], slice], torch.Tensor | None]
"""Tensor name, shape and experts -> E[x xᵀ] of inputs, float32 [experts or 1, row_length, row_length], or E[g gᵀ] of
gradients of outputs, [experts or 1, rows, rows]; None when it is not known."""
Target = Callable[[str, torch.Tensor, slice], torch.Tensor]
"""Tensor name, weights and their experts -> the weights that are encoded in place of them."""

PartStream = Callable[[Iterable[TensorPart]], Iterable[tuple[TensorPart, torch.Tensor]]]
"""Encodes parts, somewhere and in any order, and gives each with its blocks."""

_PARTS_IN_MEMORY = 4
"""Parts that are to fit within a limit of memory together; threads without a part of their own help with these."""
_LOADED_AHEAD = 4
"""Parts in work for a GPU: it encodes faster than one thread reads, widens, compares and pins weights."""


@dataclass(frozen=True)
class Guidance:
    """Guidance of encoders: what they are told of each tensor besides its weights."""

    importance: ImportanceLookup | None = None
    hessian: HessianLookup | None = None
    protected: Mapping[str, tuple[ProtectedWeight, ...]] = field(default_factory=dict)
    target: Target | None = None
    output_hessian: HessianLookup | None = None
    with_outputs: Collection[str] = ()
    """Weights that have an output hessian."""


def guidance_of(
    stats: CalibrationStats | None,
    moments: SecondMoments | None,
    protected: Mapping[str, tuple[ProtectedWeight, ...]] | None = None,
) -> Guidance:
    """Return what calibration knows, for an encoder; `protected` are super weights by tensor."""
    if stats is None:
        return Guidance(protected=protected or {})
    hessians = None if moments is None else partial(hessian, moments, stats)
    guidance = Guidance(partial(importance, stats), hessians, protected or {})
    if moments is None or not (outputs := moments.outputs()):
        return guidance
    return replace(guidance, output_hessian=partial(output_hessian, moments), with_outputs=outputs)


class QuantizedPart(NamedTuple):
    """A part as it is stored. `packed` is uint8 [..., rows, row_bytes]; 1-D tensors have one row."""

    part: TensorPart
    packed: torch.Tensor


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


@dataclass(frozen=True)
class TensorEncoder:
    """An encoder, the model whose tensors it encodes, and what it is told of them."""

    model: Model
    guidance: Guidance
    encoder: Encoder
    threads: int | None = None
    checks: WeightChecks | WeightSums | None = None
    """Are told of all weights that are read."""
    limits: PartLimits = field(default_factory=PartLimits)
    on_encoded: Callable[[TensorPart, Mapping[str, Any], torch.Tensor], None] = lambda part, arguments, packed: None
    """Is told of every part that is encoded here, with the arguments of the encoder and the blocks."""
    _turn: Lock = field(default_factory=Lock, repr=False, compare=False)
    """Taken by the part that a GPU encodes."""

    def parts(
        self, plan: Plan, *, whole: Collection[str] = (), at_once: int | None = None
    ) -> dict[str, list[TensorPart]]:
        """Return the parts of every tensor by its name. Tensors named in `whole` have one, whatever the limits.
        `at_once` parts are to fit in memory together; by default so many that reading, encoding and writing overlap.

        Raises:
            ExportError: the limits are too tight for a tensor.
        """
        at_once = at_once or min(self.workers, _PARTS_IN_MEMORY)
        return {
            entry.name: [TensorPart.whole(entry.name, entry.shape, entry.quant_type)]
            if entry.name in whole
            else self._parts_of(entry.name, entry.shape, entry.quant_type, self.limits, at_once)
            for entry in plan.entries
        }

    def quantize(
        self,
        plan: Plan,
        parts: Mapping[str, list[TensorPart]] | None = None,
        *,
        elsewhere: PartStream | None = None,
        progress: Progress = ignore_progress,
        skip: Collection[str] = (),
    ) -> Iterator[QuantizedPart]:
        """Yield every part of every tensor of the plan: in the model's order, or as `elsewhere` is done with it.

        `parts` are by default those of `self.parts`; keys of parts and names of tensors in `skip` are left out, but
        count in `progress`.

        Raises:
            PlanError: the plan is of another checkpoint, or gives a tensor another shape.
            EncodeError: NaN or Inf weights, or a type without the statistics that it needs; the tensor is named.
        """
        check_plan(self.model, plan)
        check_importance(self.model, plan, self.guidance.importance, skip=skip)
        parts = parts or self.parts(plan)
        every = [part for name in self.model.source.names() for part in parts[name]]
        missing = [part for part in every if part.key not in skip and part.name not in skip]
        done = plan.num_weights - sum(part.num_weights for part in missing)

        reporting = Lock()

        def report(tensor: str, num_weights: int) -> None:
            nonlocal done
            with reporting:
                done += num_weights
                progress("quantize", done, plan.num_weights, unit="weights", tensor=tensor)

        if elsewhere is not None:
            report("", 0)  # the stage begins before workers do
            for part, packed in elsewhere(missing):
                report(part.name, part.num_weights)
                yield QuantizedPart(part, packed)
            return

        def encode(part: TensorPart) -> torch.Tensor:
            report(part.name, 0)
            return self.part(part, partial(report, part.name))

        encoded = (part.quant_type for part in missing if not self.is_stored(part))
        self.encoder.prepare(dict.fromkeys(encoded), progress)
        budget = free_memory() // 2 if self.limits.memory is None else self.limits.memory
        packed_parts = side_by_side(encode, missing, self.workers, cost=self.needed_bytes, budget=budget)
        yield from map(QuantizedPart, missing, packed_parts)

    def part(self, part: TensorPart, on_weights: Callable[[int], None] = lambda count: None) -> torch.Tensor:
        """Return a part's blocks, uint8 [..., rows, row_bytes]; `on_weights` hears how many weights each step encoded.

        Raises:
            EncodeError: NaN or Inf weights, or a type that needs statistics the tensor has none of.
        """
        if not self.is_stored(part):
            arguments = self.arguments(part)
            if self.encoder.device.type == "cpu":
                packed = self.encoder.encode(**arguments, threads=self.threads, progress=on_weights)
                self.on_encoded(part, arguments, packed)
                return packed
            # The GPU takes what is pinned in a tenth of the time.
            arguments["weights"] = arguments["weights"].pin_memory()
            sides = Sides.of(arguments["hessian"])
            arguments["hessian"] = Sides(*(side if side is None else side.pin_memory() for side in sides))
            with self._turn:
                packed = self.encoder.encode(**arguments, progress=on_weights)
                self.on_encoded(part, arguments, packed)
                return packed
        if self.checks is not None:
            self.checks.add(part.name, part.shape, part.experts, load_part(self.model.source, part), part.rows)
        on_weights(part.num_weights)
        assert isinstance(self.model.source, GGUFSource | ConvertedSource)
        return load_packed_part(self.model.source, part)

    def tensor(self, name: str, stored: QuantType) -> torch.Tensor:
        """Return one tensor's blocks, uint8 [..., rows, row_bytes], encoded part by part, or as the source has them.

        Raises:
            EncodeError: NaN or Inf weights, or a type that needs statistics the tensor has none of.
        """
        shape = tuple(self.model.source.info(name).shape)
        parts = self.parts_of(name, stored)
        encoded = map(self.part, parts)
        if len(parts) == 1:
            return next(encoded)
        packed = torch.empty(stored.tensor_bytes(shape), dtype=torch.uint8)
        for part, blocks in zip(parts, encoded, strict=True):
            packed[part.offset : part.offset + part.num_bytes] = blocks.reshape(-1)
        return packed.view(*shape[:-1], -1)

    def parts_of(self, name: str, stored: QuantType) -> list[TensorPart]:
        """Return the parts of one tensor. Raises ExportError: the limits are too tight for it."""
        return self._parts_of(name, tuple(self.model.source.info(name).shape), stored, self.limits)

    def is_stored(self, part: TensorPart) -> bool:
        """Return whether the source holds the wanted blocks."""
        return holds_blocks(self.model, part.name, part.quant_type)

    def arguments(self, part: TensorPart) -> dict[str, Any]:
        """Read what `Encoder.encode` needs for a part; beside the encoder it decides the blocks."""
        stored, experts = part.quant_type, as_slice(part.experts)
        importance = hessian = None
        if self.guidance.importance and (stored.uses_imatrix or (self.encoder.uses_hessians and not stored.is_float)):
            importance = self.guidance.importance(part.name, part.shape)
            if importance is not None and len(part.shape) == 3:
                importance = importance[0] if len(importance) == 1 else importance[experts]
        if self.guidance.hessian and self._uses_hessian(stored):
            hessian = self.guidance.hessian(part.name, part.shape, experts)
            if self.guidance.output_hessian is not None and len(part.shape) <= 3:
                outputs, rows = self.guidance.output_hessian(part.name, part.shape, experts), as_slice(part.rows)
                hessian = Sides(hessian, None if outputs is None else outputs[:, rows, rows].contiguous())
        protected = tuple(
            replace(scalar, expert=(scalar.expert or 0) - part.experts.start, row=scalar.row - part.rows.start)
            for scalar in self.guidance.protected.get(part.name, ())
            if (scalar.expert or 0) in part.experts and scalar.row in part.rows
        )
        weights = load_part(self.model.source, part)
        if self.checks is not None:
            self.checks.add(part.name, part.shape, part.experts, weights, part.rows)
        if self.guidance.target is not None:
            weights = self.guidance.target(part.name, weights, experts)
        return {
            "quant_type": stored, "weights": weights, "importance": importance,
            "name": part.name, "hessian": hessian, "protected": protected,
        }  # fmt: skip

    @property
    def workers(self) -> int:
        """Parts that are in work at a time, one to a thread."""
        workers = self.threads or usable_cores()
        return workers if self.encoder.device.type == "cpu" else min(_LOADED_AHEAD, workers)

    def needed_bytes(self, part: TensorPart) -> int:
        """Return the memory that encoding a part takes."""
        return part.needed_bytes(**self._moments_of(part.name, part.quant_type))

    def _parts_of(
        self, name: str, shape: tuple[int, ...], stored: QuantType, limits: PartLimits, at_once: int = 1
    ) -> list[TensorPart]:
        return limits.parts(name, shape, stored, **self._moments_of(name, stored), at_once=at_once)

    def _moments_of(self, name: str, stored: QuantType) -> dict[str, bool]:
        """Return which second moments are held for a part of a tensor of this type."""
        uses = self._uses_hessian(stored)
        return {"hessians": uses, "output_hessians": uses and name in self.guidance.with_outputs}

    def _uses_hessian(self, stored: QuantType) -> bool:
        return self.guidance.hessian is not None and self.encoder.uses_hessians and not stored.is_float


def holds_blocks(model: Model, name: str, wanted: QuantType) -> bool:
    """Return whether a tensor is stored in a wanted quant type, whose blocks are then copied and lose nothing. Floats
    go through the encoder, which checks for NaN."""
    source = model.source
    if isinstance(source, ConvertedSource):
        return wanted.name == "MXFP4" and source.holds_mxfp4(name)
    return isinstance(source, GGUFSource) and not wanted.is_float and source.info(name).dtype == wanted.name


def check_plan(model: Model, plan: Plan) -> None:
    """Refuse a plan that is not exactly of this model.

    Raises:
        PlanError: another fingerprint, a missing or unknown tensor, or another shape.
    """
    plan.check_covers(model.source.names(), model)
    for entry in plan.entries:
        shape = model.source.info(entry.name).shape
        if entry.shape != tuple(shape):
            raise PlanError(
                f"The plan gives `{entry.name}` the shape {entry.shape}, but {model.name} stores {tuple(shape)}. "
                f"Run `dynquant plan` on {model.name}."
            )


def check_importance(
    model: Model, plan: Plan, importance: ImportanceLookup | None, *, skip: Collection[str] = ()
) -> None:
    """Refuse, before hours of encoding, types that ggml cannot encode without an importance matrix.

    Raises:
        EncodeError: naming the tensor and its type.
    """
    for entry in plan.entries:
        if not entry.quant_type.needs_imatrix or entry.name in skip:
            continue
        if holds_blocks(model, entry.name, entry.quant_type):
            continue
        if importance is None or importance(entry.name, entry.shape) is None:
            way_out = "Calibrate the model and give the statistics, or choose another type."
            if entry.role is Role.MTP:
                way_out = (
                    "Calibration does not run this layer, which predicts tokens ahead: choose another type, or leave "
                    "it out with --no-mtp."
                )
            raise EncodeError(
                f"`{entry.name}` is planned as {entry.type}, which needs an importance matrix, but there are no "
                f"statistics of its input. {way_out}"
            )
