"""Parts of tensors, the unit of encoding, writing and recording: experts of a stack, or rows of a matrix.

A stack of experts of a large model takes gigabytes even packed, and four times as much as bfloat16. Its experts do not
depend on each other, nor do rows under one hessian, so parts have the bytes of the whole tensor: on a CPU to the bit,
which a test holds; on a GPU as long as the parts are the same, because products of other shapes may round otherwise.
"""

from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from math import prod
from threading import Lock
from typing import NamedTuple

import torch

from dynquant.checkpoints.gguf_source import GGUFSource
from dynquant.checkpoints.tensor_source import TensorSource
from dynquant.errors import ExportError
from dynquant.families.common.conversion import ConvertedSource
from dynquant.formats import decode
from dynquant.formats.checksum import checksum
from dynquant.formats.quant_types import QuantType

PART_WEIGHTS = 1 << 26
"""Weights of a part at most, but at least an expert: what a GPU encodes at once."""
FEWEST_ROWS = 16
_BYTES_PER_WEIGHT = 12
"""As it is stored, as float32, and as the encoder's own float32 copy."""
BYTES_PER_MOMENT = 32
"""For each entry of a hessian: the sums that it is made from, and its factors in float64."""


@dataclass(frozen=True)
class TensorPart:
    """Experts and rows of the tensor `name` of `shape`; a matrix is one expert, a vector one row, and of a convolution
    [out, in, height, width] every line is a row."""

    name: str
    shape: tuple[int, ...]
    quant_type: QuantType
    experts: range
    rows: range

    @classmethod
    def whole(cls, name: str, shape: tuple[int, ...], quant_type: QuantType) -> "TensorPart":
        experts, rows, _ = _stacked(shape)
        return cls(name, shape, quant_type, range(experts), range(rows))

    @property
    def is_whole(self) -> bool:
        num_experts, num_rows, _ = _stacked(self.shape)
        return len(self.experts) == num_experts and len(self.rows) == num_rows

    @property
    def key(self) -> str:
        """The tensor's name, and what of it this is."""
        if self.is_whole:
            return self.name
        experts = f" experts {_span(self.experts)}" if len(self.shape) == 3 else ""
        rows = "" if len(self.rows) == _stacked(self.shape)[1] else f" rows {_span(self.rows)}"
        return f"{self.name}{experts}{rows}"

    @property
    def num_weights(self) -> int:
        return len(self.experts) * len(self.rows) * self.shape[-1]

    @property
    def num_bytes(self) -> int:
        """Size of the encoded part in bytes."""
        return len(self.experts) * len(self.rows) * self.quant_type.row_bytes(self.shape[-1])

    @property
    def offset(self) -> int:
        """First byte of the part, counted from that of the tensor."""
        num_rows = _stacked(self.shape)[1]
        return (self.experts.start * num_rows + self.rows.start) * self.quant_type.row_bytes(self.shape[-1])

    def needed_bytes(self, *, hessians: bool, output_hessians: bool = False) -> int:
        """Memory that encoding the part takes."""
        moments = hessians * self.shape[-1] ** 2 + output_hessians * len(self.rows) ** 2
        return _BYTES_PER_WEIGHT * self.num_weights + len(self.experts) * BYTES_PER_MOMENT * moments


@dataclass(frozen=True)
class PartLimits:
    """Limits of the size of parts. `memory` in bytes holds for all parts that are encoded at a time with all that this
    takes, hessians included; None leaves `PART_WEIGHTS` alone."""

    memory: int | None = None

    def parts(
        self,
        name: str,
        shape: tuple[int, ...],
        quant_type: QuantType,
        *,
        hessians: bool = False,
        output_hessians: bool = False,
        at_once: int = 1,
    ) -> list[TensorPart]:
        """Return a tensor's parts in the order of their bytes.

        Args:
            name: The tensor's name.
            shape: Its shape.
            quant_type: The type of its blocks.
            hessians: Whether each expert is encoded under one.
            output_hessians: Whether under one of its outputs, too.
            at_once: So many parts are to fit in `memory` together; fewer when that leaves no part FEWEST_ROWS rows.

        Raises:
            ExportError: the smallest part takes more than `memory`.
        """
        if at_once > 1 and self.memory is not None:
            under = {"hessians": hessians, "output_hessians": output_hessians}
            with suppress(ExportError):
                return PartLimits(self.memory // at_once).parts(name, shape, quant_type, **under)
            return self.parts(name, shape, quant_type, **under, at_once=at_once // 2)
        if len(shape) > 3:
            return [TensorPart.whole(name, shape, quant_type)]
        num_experts, num_rows, columns = _stacked(shape)
        hessian = BYTES_PER_MOMENT * (hessians * columns**2 + output_hessians * num_rows**2)
        row = _BYTES_PER_WEIGHT * columns
        experts = max(1, PART_WEIGHTS // (num_rows * columns))
        rows = num_rows if len(shape) == 3 else min(num_rows, max(1, PART_WEIGHTS // columns))
        if self.memory is not None:
            experts = min(experts, max(1, self.memory // (num_rows * row + hessian)))
            rows = min(rows, (self.memory - hessian) // row)
            if rows < min(num_rows, FEWEST_ROWS):
                needed = min(num_rows, FEWEST_ROWS) * row + hessian
                raise ExportError(
                    f"`{name}` of shape {list(shape)} needs {needed:,} bytes to encode {FEWEST_ROWS} of its rows"
                    f"{' under its second moments' if hessians else ''}, but --max-memory leaves {self.memory:,}. "
                    "Allow more memory" + (", or calibrate with --hessians none." if hessians else ".")
                )
        return [
            TensorPart(name, shape, quant_type, some, several)
            for some in ranges(num_experts, experts)
            for several in ranges(num_rows, rows)
        ]


class SummedRows(NamedTuple):
    """Checksum of the rows of a tensor from `first` to before `last`, counted over all experts."""

    first: int
    last: int
    checksum: int

    @classmethod
    def of(
        cls, shape: tuple[int, ...], experts: range, weights: torch.Tensor, rows: range | None = None
    ) -> "SummedRows":
        """Sum a part, which has all rows of several experts, or rows of one."""
        _, num_rows, columns = _stacked(shape)
        first = experts.start * num_rows + (0 if rows is None else rows.start)
        return cls(first, first + weights.numel() // max(1, columns), checksum(weights, first))


class WeightSums:
    """Sums the weights of a part in a process that has nothing to compare them with."""

    def __init__(self) -> None:
        self.rows: SummedRows | None = None

    def add(
        self, name: str, shape: tuple[int, ...], experts: range, weights: torch.Tensor, rows: range | None = None
    ) -> None:
        """Sum the weights that are read."""
        self.rows = SummedRows.of(shape, experts, weights, rows)


class WeightChecks:
    """Compares weights, as they are read part by part, with those that a plan was made from (`Plan.checksums`).

    Threads may read parts side by side.
    """

    def __init__(self, expected: Mapping[str, str], model_name: str) -> None:
        self._expected, self._model_name = expected, model_name
        self._lock = Lock()
        self.is_needed = bool(expected)
        self._read: dict[str, tuple[list[tuple[int, int]], int]] = {}  # name -> spans of rows, and their checksum

    def add(
        self, name: str, shape: tuple[int, ...], experts: range, weights: torch.Tensor, rows: range | None = None
    ) -> None:
        """Take down weights of some experts, or of some rows; errors are those of `take`."""
        if name in self._expected:
            self.take(name, shape, SummedRows.of(shape, experts, weights, rows))

    def take(self, name: str, shape: tuple[int, ...], rows: SummedRows) -> None:
        """Take down rows that were summed here or in another process.

        Raises:
            ExportError: with these the tensor is complete, and its weights are others.
        """
        first, last, added = rows
        num_experts, num_rows, _ = _stacked(shape)
        with self._lock:
            spans, total = self._read.get(name, ([], 0))
            if any(start < last and first < stop for start, stop in spans):
                spans, total = [], 0  # the tensor is read again, in other parts
            total = (total + added) % (1 << 64)
            spans = _joined([*spans, (first, last)])
            self._read[name] = spans, total
        is_whole = spans == [(0, num_experts * num_rows)]
        if is_whole and (now := f"{total:016x}") != self._expected[name]:
            raise ExportError(
                f"The weights of `{name}` in {self._model_name} changed since the plan was made: their checksum was "
                f"{self._expected[name]}, now it is {now}. Plan again from this checkpoint, or bring the old one back."
            )


def _joined(spans: list[tuple[int, int]]) -> list[tuple[int, int]]:
    """Return the spans in order, those that adjoin as one: few, because parts come nearly in order."""
    joined: list[tuple[int, int]] = []
    for first, last in sorted(spans):
        start = joined.pop()[0] if joined and joined[-1][1] == first else first
        joined.append((start, last))
    return joined


def load_part(source: TensorSource, part: TensorPart) -> torch.Tensor:
    """Return the weights of a part, float32 [experts, rows, row_length] of a stack, else [rows, row_length]."""
    columns, is_every_row = part.shape[-1], len(part.rows) == _stacked(part.shape)[1]
    if len(part.shape) != 3:
        if isinstance(source, GGUFSource) and not is_every_row:
            packed = source.load_packed(part.name, as_slice(part.rows))
            return decode(source.info(part.name).dtype, packed, (len(part.rows), columns)).reshape(-1, columns)
        return source.load(part.name, None if is_every_row else as_slice(part.rows)).reshape(-1, columns)
    weights = torch.empty(len(part.experts), len(part.rows), columns)
    for place, expert in enumerate(part.experts):
        weights[place] = source.load(part.name, expert)[as_slice(part.rows)]
    return weights


def load_packed_part(source: GGUFSource | ConvertedSource, part: TensorPart) -> torch.Tensor:
    """Return a part's blocks in a file that stores the tensor in the type of the part, uint8 [..., row_bytes]."""
    if len(part.shape) != 3:
        return source.load_packed(part.name, None if part.is_whole else as_slice(part.rows))
    if part.is_whole:
        return source.load_packed(part.name)
    packed = [source.load_packed(part.name, expert)[as_slice(part.rows)] for expert in part.experts]
    return torch.stack(packed)


def _stacked(shape: tuple[int, ...]) -> tuple[int, int, int]:
    """Experts, rows and row length."""
    if len(shape) > 3:
        return 1, prod(shape[:-1]), shape[-1]
    experts, rows, columns = (1, 1, 1, *shape)[-3:]
    return experts, rows, columns


def ranges(count: int, step: int) -> Iterator[range]:
    """Cut the numbers below `count` into ranges of `step`; the last may be shorter."""
    return (range(start, min(start + step, count)) for start in range(0, count, step))


def as_slice(numbers: range) -> slice:
    """Return the index that picks these neighbours of a tensor's first dimension."""
    return slice(numbers.start, numbers.stop)


def _span(numbers: range) -> str:
    return f"{numbers.start}-{numbers.stop - 1}"
