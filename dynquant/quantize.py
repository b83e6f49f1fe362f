"""The stream of quantized tensors: each is loaded, encoded once, and handed to whichever exporter writes it.

Stacked tensors are loaded and encoded a few experts at a time, so that the float32 copy of a whole expert stack never
exists; only its packed bytes do. A quantized GGUF that already stores the wanted type gives its own bytes.
"""

import importlib
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from math import prod

import torch

from dynquant.codecs.encoder import Encoder, ProtectedWeight
from dynquant.errors import EncodeError, PlanError
from dynquant.gguf_source import GGUFSource
from dynquant.importance import importance
from dynquant.model import Model
from dynquant.plan import Plan, PlanEntry
from dynquant.progress import Progress
from dynquant.quant_types import QuantType
from dynquant.second_moments import SecondMoments, hessian
from dynquant.statistics import CalibrationStats

ImportanceLookup = Callable[[str, tuple[int, ...]], torch.Tensor | None]
"""Tensor name and shape -> E[x^2], float32 [experts, row_length]; None when calibration did not see its input."""
HessianLookup = Callable[[str, tuple[int, ...], slice], torch.Tensor | None]
"""Tensor name, shape and experts -> E[x xᵀ], float32 [experts, row_length, row_length]; None when it is not known."""

BATCH_WEIGHTS = 1 << 26
"""Float32 weights of a stack that are in memory at a time (256 MiB), at least one expert."""

_ENCODERS = {
    "ggml": ("dynquant.codecs.ggml_encoder", "GgmlEncoder"),
    "dynquant": ("dynquant.encoding.encoder", "DynquantEncoder"),
}


@dataclass(frozen=True)
class Guidance:
    """What encoders are told of each tensor besides its weights."""

    importance: ImportanceLookup | None = None
    hessian: HessianLookup | None = None
    protected: Mapping[str, tuple[ProtectedWeight, ...]] = field(default_factory=dict)


def guidance_of(
    stats: CalibrationStats | None,
    moments: SecondMoments | None,
    protected: Mapping[str, tuple[ProtectedWeight, ...]] | None = None,
) -> Guidance:
    """What calibration knows, for an encoder; `protected` are super weights by tensor."""
    if stats is None:
        return Guidance(protected=protected or {})
    return Guidance(
        importance=partial(importance, stats),
        hessian=None if moments is None else partial(hessian, moments, stats),
        protected=protected or {},
    )


@dataclass(frozen=True)
class QuantizedTensor:
    """One tensor as it is stored. `packed` is uint8 [..., rows, row_bytes]; 1-D tensors have one row."""

    name: str
    shape: tuple[int, ...]
    quant_type: QuantType
    packed: torch.Tensor


def load_encoder(name: str, device: str | None = None) -> Encoder:
    """The encoder of this name; `device` is for those that can use a GPU, and None lets them choose.

    Raises:
        EncodeError: no encoder of that name, or a device that it cannot use.
    """
    if name not in _ENCODERS:
        raise EncodeError(f"There is no encoder `{name}`; use one of {', '.join(_ENCODERS)}.")
    module_name, class_name = _ENCODERS[name]
    encoder_class = getattr(importlib.import_module(module_name), class_name)
    return encoder_class(device) if encoder_class.uses_hessians else encoder_class()


def encoder_version(encoder: Encoder) -> str:
    """What decides the encoder's bytes beside dynquant's own version: the release of ggml, or of PyTorch."""
    if encoder.name != "ggml":
        return torch.__version__
    from dynquant.codecs.ggml_encoder import ggml_version

    return ggml_version()


def quantize(
    model: Model,
    plan: Plan,
    guidance: Guidance,
    encoder: Encoder,
    *,
    threads: int | None = None,
    progress: Progress | None = None,
    skip: Collection[str] = (),
) -> Iterator[QuantizedTensor]:
    """Every tensor of the plan in the model's order, without those in `skip`.

    Raises:
        PlanError: the plan is of another checkpoint, or gives a tensor another shape.
        EncodeError: NaN or Inf weights, or a type that needs statistics the model has none of; both name the tensor.
    """
    check_plan(model, plan)
    check_importance(plan, guidance.importance, skip=skip)
    entries = {entry.name: entry for entry in plan.entries}
    counter = _Counter(
        progress, plan.num_weights, sum(prod(entry.shape) for name, entry in entries.items() if name in skip)
    )
    for name in model.source.names():
        entry = entries[name]
        if name in skip:
            continue
        counter.begin(name)
        packed = _stored_bytes(model, entry)
        if packed is None:
            packed = encode_tensor(
                model, name, entry.quant_type, guidance, encoder, threads=threads, on_weights=counter.add
            )
        else:
            counter.add(prod(entry.shape))
        yield QuantizedTensor(name, entry.shape, entry.quant_type, packed)


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


@dataclass
class _Counter:
    """Weights done, those of an earlier run included, and the tensor that is being encoded."""

    progress: Progress | None
    total: int
    done: int
    tensor: str = ""

    def begin(self, tensor: str) -> None:
        self.tensor = tensor
        self.add(0)

    def add(self, num_weights: int) -> None:
        self.done += num_weights
        if self.progress is not None:
            self.progress("quantize", self.done, self.total, unit="weights", tensor=self.tensor)


def _stored_bytes(model: Model, entry: PlanEntry) -> torch.Tensor | None:
    """The source's own blocks when it holds the wanted type; floats go through the encoder, which checks for NaN."""
    source = model.source
    if isinstance(source, GGUFSource) and not entry.quant_type.is_float and source.info(entry.name).dtype == entry.type:
        return source.load_packed(entry.name)
    return None


def encode_tensor(
    model: Model,
    name: str,
    stored: QuantType,
    guidance: Guidance,
    encoder: Encoder,
    *,
    threads: int | None = None,
    on_weights: Callable[[int], None] | None = None,
) -> torch.Tensor:
    """One tensor's blocks, uint8 [..., rows, row_bytes]; `on_weights` hears how many weights each step encoded.

    Raises:
        EncodeError: NaN or Inf weights, or a type that needs statistics the tensor has none of.
    """
    shape = tuple(model.source.info(name).shape)
    uses_importance = stored.uses_imatrix or (encoder.uses_hessians and not stored.is_float)
    importance = guidance.importance(name, shape) if guidance.importance and uses_importance else None
    protected = guidance.protected.get(name, ())

    def encoded(weights: torch.Tensor, experts: slice, part: torch.Tensor | None) -> torch.Tensor:
        hessian = None
        if guidance.hessian is not None and encoder.uses_hessians and not stored.is_float:
            hessian = guidance.hessian(name, shape, experts)
        inside = [p for p in protected if (p.expert or 0) in _numbers(experts)]
        scalars = [replace(p, expert=(p.expert or 0) - experts.start) for p in inside]
        return encoder.encode(
            stored, weights, part, threads, name=name, hessian=hessian, protected=scalars, progress=on_weights
        )

    if len(shape) != 3:
        return encoded(model.source.load(name).reshape(-1, shape[-1]), slice(0, 1), importance)
    num_experts, num_rows, row_length = shape
    packed = torch.empty((num_experts, num_rows, stored.row_bytes(row_length)), dtype=torch.uint8)
    batch = max(1, BATCH_WEIGHTS // (num_rows * row_length))
    for start in range(0, num_experts, batch):
        experts = slice(start, min(start + batch, num_experts))
        weights = torch.stack([model.source.load(name, expert) for expert in _numbers(experts)])
        part = importance
        if importance is not None:
            part = importance[0] if len(importance) == 1 else importance[experts]
        packed[experts] = encoded(weights, experts, part)
    return packed


def _numbers(experts: slice) -> range:
    return range(experts.start, experts.stop)
