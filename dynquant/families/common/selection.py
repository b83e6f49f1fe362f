"""`Selection`: a transform that says which entry of a checkpoint tensor each entry of a GGUF tensor is, as pieces."""

from bisect import bisect_right
from collections.abc import Callable
from dataclasses import dataclass, replace
from math import prod

import torch
from torch import Tensor

from dynquant.families.common.strided_maps import Axis, Piece, StridedMap, joined_pieces, whole

_MAX_PIECES, _MAX_SINGLE = 1 << 12, 1 << 24


@dataclass(frozen=True)
class Selection:
    """A transform of a tensor of `stored_shape` into `entries` of it.

    The source of entries is called "". Entries without a source are zeros: rows for tokens without an embedding.
    """

    stored_shape: tuple[int, ...]
    entries: StridedMap

    def __call__(self, stored: Tensor) -> Tensor:
        if tuple(stored.shape) != self.stored_shape:
            raise ValueError(f"a tensor {list(stored.shape)} is none of {list(self.stored_shape)}")
        stored = stored.contiguous()
        return self.entries.gather(lambda _: stored)

    @property
    def is_identity(self) -> bool:
        """True when nothing is moved, left out or added."""
        return self.entries == whole("", self.stored_shape)

    def with_zeros(self, count: int) -> "Selection":
        """Return the selection with `count` rows of zeros behind all others."""
        first, *others = self.entries.shape
        return replace(self, entries=replace(self.entries, shape=(first + count, *others)))

    def of_rows(self, rows: slice) -> tuple[slice, Callable[[Tensor], Tensor]]:
        """Return the stored rows, [n, ...], that some rows of the result lie in, and what makes the latter of them."""
        part = self.entries.sliced(0, *rows.indices(self.entries.shape[0]))
        if not part.pieces:  # zeros alone, which need a row to stand beside
            return slice(0, 1), lambda stored: stored.new_zeros(part.shape)
        width = prod(self.stored_shape[1:])
        first = min(piece.offset for piece in part.pieces) // width
        last = max(piece.last for piece in part.pieces) // width
        pieces = tuple(replace(piece, offset=piece.offset - first * width) for piece in part.pieces)
        stored_shape = (last + 1 - first, *self.stored_shape[1:])
        return slice(first, last + 1), Selection(stored_shape, replace(part, pieces=pieces))


def selection_of_positions(positions: Tensor, stored_shape: tuple[int, ...], added: float = 0.0) -> Selection | None:
    """Return the selection of entries at `positions` of the stored ones; None where that takes too many pieces."""
    shape = tuple(positions.shape)
    matrix = positions.reshape(-1, shape[-1]) if shape else positions.reshape(1, 1)
    rows, columns = matrix[:, 0], matrix[0] - matrix[0, 0]
    if not torch.equal(matrix, rows[:, None] + columns):  # permutations of rows and of columns are a sum
        rows, columns = matrix.flatten(), matrix.new_zeros(1)
        if len(rows) > _MAX_SINGLE:
            return None
    of_rows, of_columns = _pieces_of(rows), _pieces_of(columns)
    if len(of_rows) * len(of_columns) > _MAX_PIECES:
        return None
    pieces = tuple(
        Piece("", row.offset + column.offset, row.starts + column.starts, row.axes + _shifted(column.axes, 1))
        for row in of_rows
        for column in of_columns
    )
    return Selection(stored_shape, StridedMap((len(rows), len(columns)), pieces, added).viewed(shape))


def selection_of_strides(seen: Tensor, stored_shape: tuple[int, ...]) -> Selection:
    """Return the selection that a view of a contiguous tensor is."""
    axes = tuple(
        Axis(size, stride, dim, 1)
        for dim, (size, stride) in enumerate(zip(seen.shape, seen.stride(), strict=True))
        if size > 1
    )
    piece = Piece("", int(seen.storage_offset()), (0,) * seen.dim(), axes)
    return Selection(stored_shape, StridedMap(tuple(seen.shape), (piece,)))


def _pieces_of(positions: Tensor) -> tuple[Piece, ...]:
    """Return positions [n] as pieces of one dimension, regular runs of runs as one piece."""
    numbers, steps = positions.tolist(), positions.diff()
    ends = [*((steps.diff() != 0).nonzero().flatten() + 1).tolist(), len(numbers) - 1]
    pieces, start = [], 0
    while start < len(numbers):
        step = numbers[start + 1] - numbers[start] if start + 1 < len(numbers) else -1
        last = ends[bisect_right(ends, start)] if step >= 0 else start
        pieces.append(Piece("", numbers[start], (start,), (Axis(last + 1 - start, step, 0, 1),)[: last - start]))
        start = last + 1
    return joined_pieces(pieces)


def _shifted(axes: tuple[Axis, ...], count: int) -> tuple[Axis, ...]:
    return tuple(replace(axis, dim=axis.dim + count) for axis in axes)
