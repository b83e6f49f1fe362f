"""The `dynquant` encoder: better blocks for the same bytes, in compiled loops on a CPU, with Triton on a GPU.

With a hessian (second moments of the layer's input) each row loses little in e H eᵀ: scales are fitted on the
diagonal, codewords found with error feedback, super-block scales refitted, and everything visited once more by
coordinate descent. Without one the diagonal alone counts, and the fit goes on until its error stops falling. Experts
and rows are independent, so they are processed together in batches that fit in memory; but with an output hessian rows
make up for errors of rows before them.

Types that this encoder does not search (floats, Q8_0, NVFP4) are ggml's.
"""

from collections.abc import Iterable, Iterator
from threading import Lock
from typing import ClassVar

import numba
import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from dynquant.encoding.ggml import GgmlEncoder
from dynquant.encoding.interface import Encoder, ProtectedWeight, Request, check_finite
from dynquant.encoding.parts import as_slice, ranges
from dynquant.encoding.search.compiled import tiles
from dynquant.encoding.search.compiled.jit import ROWS
from dynquant.encoding.search.descent import descend, descend_scales, refit
from dynquant.encoding.search.feedback import encode_in_turn, feed_back, upper_factor
from dynquant.encoding.search.layouts import LAYOUTS, BlockLayout, Fields
from dynquant.encoding.search.rows import Rows
from dynquant.encoding.search.scales import fit
from dynquant.errors import EncodeError
from dynquant.formats import decode
from dynquant.formats.quant_types import QuantType
from dynquant.session import Progress, ignore_progress
from dynquant.workers import share, side_by_side

_CPU_WEIGHTS = 1 << 18
_GPU_WEIGHTS = 1 << 26
"""Weights in a batch; the search needs about 80 bytes for each, and 1 GiB for scores on a GPU. On a CPU every thread
has a batch of its own, small so that all of them end together."""
_CPU_HESSIAN_BYTES = 1 << 29
_GPU_HESSIAN_BYTES = 1 << 31
"""Float32 hessians in a batch, at least one. Factoring takes five times as much for a moment."""
_PINNED_BYTES = 1 << 25
"""Copied to a GPU at once, while the next pieces are brought into pinned memory."""
_PINNING_THREADS = 8
_TRIAL = 16, 512
"""Weights that are encoded to have kernels compiled: rows and columns that real ones share multiples of 16 with."""
_PROTECTED = 1e5
"""Weight of a protected scalar's error over the mean of the others."""


class DynquantEncoder(Encoder):
    """See the module; `device` None takes a CUDA device where there is one.

    With `is_plain` PyTorch does everything: that is what compiled loops and kernels are tested against.
    """

    name: ClassVar[str] = "dynquant"
    uses_hessians: ClassVar[bool] = True

    def __init__(self, device: str | None = None, *, is_plain: bool = False) -> None:
        self._is_plain = is_plain
        self._factored = WeakTensorKeyDictionary()
        self.device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        if self.device.type == "cpu" and not is_plain and numba.config.DISABLE_JIT:
            raise EncodeError(
                "NUMBA_DISABLE_JIT is set, but dynquant's encoder on a CPU is compiled by numba. Unset it, or give "
                "--encoder ggml."
            )

    def prepare(self, quant_types: Iterable[QuantType], progress: Progress = ignore_progress) -> None:
        """Compile the kernels or loops that blocks of these types are searched with, side by side; they are kept."""
        searched, workers = [quant_type for quant_type in quant_types if quant_type.name in LAYOUTS], None
        if not searched:
            return
        if self.device.type == "cpu":  # loops are the same for types of one kind, and compiled one after the other
            searched, workers = list({_kind(LAYOUTS[each.name]): each for each in searched}.values()), 1
        progress("compiling kernels", 0, len(searched), unit="types")
        weights, hessian = torch.randn(_TRIAL, generator=torch.Generator().manual_seed(0)), torch.eye(_TRIAL[1])
        upper_factor(hessian.to(self.device))  # PyTorch loads its linear algebra at the first use, which must be one
        packed = side_by_side(
            lambda each: self.encode(each, weights, threads=1, hessian=hessian[None]), searched, workers
        )
        for done, _ in enumerate(packed, 1):
            progress("compiling kernels", done, len(searched), unit="types")

    def encode_stack(self, request: Request) -> Tensor:
        """Search the blocks of batches of experts and rows, and then those of rows with a protected scalar again."""
        layout = LAYOUTS.get(request.quant_type.name)
        if layout is None:
            return GgmlEncoder().encode_stack(request)
        weights, hessian, outputs = request.weights, request.hessian, request.output_hessian
        packed = torch.empty((*weights.shape[:2], request.quant_type.row_bytes(weights.shape[-1])), dtype=torch.uint8)

        def loss_of(experts: slice, *, protected_column: int | None = None) -> Loss:
            importance = None if request.importance is None else request.importance[experts]
            is_every = experts == slice(0, len(weights))
            moments = hessian if hessian is None or len(hessian) == 1 or is_every else hessian[experts]
            shape = weights[experts].shape
            if moments is not None and protected_column is None:
                return _loss_of(shape, *self._factors_of(moments))
            return loss_under(shape, importance, moments, self.device, protected_column=protected_column)

        def encode_experts(experts: slice) -> None:
            loss = loss_of(experts)
            at_once = max(1, self._weights_at_once // (len(weights[experts]) * weights.shape[-1]))
            if self.device.type == "cpu":
                at_once = -(-at_once // ROWS) * ROWS  # compiled loops take so many rows at once, or fewer in that time

            def encode_rows(rows: slice) -> None:
                part = weights[experts, rows]
                packed[experts, rows] = self._encode(layout, part, loss, request.name)
                request.progress(part.numel())

            if hessian is None or outputs is None:
                share(encode_rows, list(map(as_slice, ranges(weights.shape[1], at_once))), threads)
                return

            def encode_target(rows: slice, target: Tensor) -> Tensor:
                blocks = self._encode(layout, target, loss, request.name)
                encoded.append(blocks)
                request.progress(target.numel())
                return decode(layout.name, blocks, tuple(target.shape))

            moments = outputs if len(outputs) == 1 else outputs[experts]
            encoded: list[Tensor] = []
            encode_in_turn(*(_moved(t, self.device) for t in (weights[experts], moments)), encode_target)
            packed[experts] = torch.cat(encoded, dim=1)  # at once: a GPU is not waited for after each group

        def encode_protected(scalar: ProtectedWeight) -> None:
            expert, row = scalar.expert or 0, scalar.row
            place = slice(expert, expert + 1), slice(row, row + 1)
            loss = loss_of(place[0], protected_column=scalar.column)
            packed[place] = self._encode(layout, weights[place], loss, request.name)

        threads = request.threads if self.device.type == "cpu" else 1  # a GPU has threads enough
        share(encode_experts, list(self._expert_batches(weights, hessian, outputs)), threads)
        for scalar in request.protected:  # one after the other: two may be in one row
            encode_protected(scalar)
        return packed

    def _factors_of(self, hessian: Tensor) -> tuple[Tensor, Tensor]:
        """Return a hessian normalized, and its factor: as long as the caller keeps it, who may ask for other types."""
        version, factors = self._factored.get(hessian, (-1, None))
        if factors is None or version != hessian._version:
            normalized = _normalized(hessian, self.device)
            factors = normalized, upper_factor(normalized)
            self._factored[hessian] = hessian._version, factors
        return factors

    def _encode(self, layout: BlockLayout, weights: Tensor, loss: "Loss", name: str) -> Tensor:
        """Block bytes [E, R, row_bytes]; rows that do not fit in the GPU's memory are halved."""
        try:
            x = _moved(weights, self.device)
            _check_weights(layout, x, name)
            rows = Rows.of(layout, x, is_plain=self._is_plain)
            return rows.packed(*loss.blocks(rows))
        except torch.OutOfMemoryError:
            half = weights.shape[1] // 2
            if not half:
                raise
        torch.cuda.empty_cache()
        halves = [self._encode(layout, part, loss, name) for part in (weights[:, :half], weights[:, half:])]
        return torch.cat(halves, dim=1)

    def _expert_batches(self, weights: Tensor, hessian: Tensor | None, outputs: Tensor | None) -> Iterator[slice]:
        count = self._weights_at_once // max(1, weights[:1].numel())
        if moments := sum(sides[:1].nbytes for sides in (hessian, outputs) if sides is not None):
            limit = _CPU_HESSIAN_BYTES if self.device.type == "cpu" else _GPU_HESSIAN_BYTES
            count = min(count, limit // moments)
        return map(as_slice, ranges(weights.shape[0], max(1, count)))

    @property
    def _weights_at_once(self) -> int:
        return _CPU_WEIGHTS if self.device.type == "cpu" else _GPU_WEIGHTS


def _kind(layout: BlockLayout) -> tuple[bool, ...]:
    """Return what decides which loops search a type on a CPU."""
    return bool(layout.num_mins), len(layout.multipliers) > 1, layout.has_power_of_two_scale


class Loss:
    """Loss that the rows of a batch of experts should keep small, and the way it is brought down."""

    def __init__(self, metric: Tensor, hessian: Tensor | None = None, factor: Tensor | None = None) -> None:
        self._metric, self._hessian, self._factor = metric, hessian, factor
        self._lock = Lock()
        self._prepared: tuple[BlockLayout, list[tiles.TileLoss]] | None = None

    def blocks(self, rows: Rows) -> tuple[Fields, Tensor]:
        """Fields and values of all rows."""
        if tiles.serves(rows):
            return tiles.blocks(rows, self._of_tiles(rows.layout))
        if self._hessian is None or self._factor is None:
            return fit(rows, self._metric, candidates=8, rounds=4)
        is_scalar = rows.layout.codebook.group == 1
        fields, _ = fit(rows, self._metric, candidates=8 if is_scalar else 4, rounds=1 if is_scalar else 0)
        values = feed_back(rows, fields, self._factor)
        fields = refit(rows, fields, values, self._hessian)
        values = descend(rows, fields, values, self._hessian)
        fields, values = descend_scales(rows, fields, values, self._hessian)
        fields = refit(rows, fields, values, self._hessian)
        return fields, descend(rows, fields, values, self._hessian)

    def _of_tiles(self, layout: BlockLayout) -> list[tiles.TileLoss]:
        """The loss as compiled loops need it, made once for all batches of rows, which come layout by layout."""
        with self._lock:
            if self._prepared is None or self._prepared[0] is not layout:
                self._prepared = layout, tiles.tile_losses(layout, self._metric, self._hessian, self._factor)
            return self._prepared[1]


def loss_under(
    shape: tuple[int, ...],
    importance: Tensor | None,
    hessian: Tensor | None,
    device: torch.device,
    *,
    protected_column: int | None = None,
) -> Loss:
    """The loss of weights of `shape` [E, R, C] under hessians [E or 1, C, C], else importance [E, C], else plain."""
    num_experts, columns = shape[0], shape[-1]
    if hessian is not None:
        h = _normalized(hessian, device)
        if protected_column is not None:
            h[:, protected_column, protected_column] += _PROTECTED
        return _loss_of(shape, h, upper_factor(h))
    metric = torch.ones(num_experts, columns) if importance is None else importance.clone()
    metric = (metric / metric.mean(-1, keepdim=True)).to(device)  # a factor on the loss chooses nothing else
    if protected_column is not None:
        metric[:, protected_column] += _PROTECTED
    return Loss(metric)


def _normalized(hessian: Tensor, device: torch.device) -> Tensor:
    """The hessian in float32 on a device, with a mean of 1 along its diagonal."""
    h = _moved(hessian, device)
    return h / h.diagonal(dim1=-2, dim2=-1).mean(-1)[:, None, None]


def _loss_of(shape: tuple[int, ...], hessian: Tensor, factor: Tensor) -> Loss:
    """The loss of weights [E, R, C] under normalized hessians [E or 1, C, C] and their factors."""
    h, factor = (t.expand(shape[0], shape[-1], shape[-1]) for t in (hessian, factor))
    return Loss(h.diagonal(dim1=-2, dim2=-1).contiguous(), h, factor)


def _moved(t: Tensor, device: torch.device) -> Tensor:
    """The tensor in float32 on a device; to a GPU it goes by way of pinned memory, which takes a tenth of the time."""
    if device.type != "cuda" or t.device.type != "cpu" or t.is_pinned():
        return t.to(device, torch.float32, non_blocking=True)
    moved = torch.empty(t.shape, dtype=t.dtype, device=device)
    rows = t.reshape(-1, t.shape[-1])
    step = max(1, _PINNED_BYTES // max(1, rows[:1].nbytes))
    pinned = side_by_side(Tensor.pin_memory, rows.split(step), _PINNING_THREADS)
    for source, target in zip(pinned, moved.view(rows.shape).split(step), strict=True):
        target.copy_(source, non_blocking=True)
    return moved.to(torch.float32)


def _check_weights(layout: BlockLayout, x: Tensor, name: str) -> None:
    peak = check_finite(x, name=name)
    if peak > layout.largest_weight:
        raise EncodeError(
            f"`{name}` cannot be encoded as {layout.name}: the scale of a block is beyond float16 (the largest weight "
            f"here is {peak:.3g}). Keep this tensor as F32 or BF16."
        )
