"""Selections: which entry of a checkpoint tensor each entry of a GGUF tensor is, in the cheapest form that says it.

    strided   entry (i, j, ...) lies at offset + i * strides[0] + j * strides[1] + ...: slices, transpositions, views
    outer     entry (r, c) of the rows and columns lies at rows[r] + columns[c]: permutations of rows and of columns
    index     every position by itself

Positions count the entries of the stored tensor in their order. A constant may be added (norms that are stored as the
difference from one), and rows of zeros at the end (tokens without an embedding).
"""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from math import prod

import torch
from torch import Tensor

from dynquant.families.common.strided_maps import contiguous_strides

_MAX_INDEX = 1 << 24


@dataclass(frozen=True, eq=False)
class Selection:
    """A transform of a tensor of `stored_shape` into one of `shape`; leading dimensions before the former stay."""

    stored_shape: tuple[int, ...]
    shape: tuple[int, ...]
    offset: int = 0
    strides: tuple[int, ...] | None = None
    rows: Tensor | None = None
    columns: Tensor | None = None
    index: Tensor | None = None
    added: float = 0.0
    padding: int = 0

    def __call__(self, stored: Tensor) -> Tensor:
        leading = stored.shape[: stored.dim() - len(self.stored_shape)]
        if tuple(stored.shape[len(leading) :]) != self.stored_shape:
            raise ValueError(f"a tensor {list(stored.shape)} is none of {list(self.stored_shape)}")
        selected = self._selected(stored.contiguous(), tuple(leading))
        selected = selected + self.added if self.added else selected
        if not self.padding:
            return selected
        zeros = selected.new_zeros(*leading, self.padding, *self.shape[1:])
        return torch.cat([selected, zeros], dim=len(leading))

    @property
    def is_identity(self) -> bool:
        """True when nothing is moved, left out or added."""
        return self.shape == self.stored_shape and self.is_view

    @property
    def is_view(self) -> bool:
        """True when all entries keep their order, whatever the shape."""
        return (
            self.strides is not None
            and self.offset == 0
            and not self.added
            and prod(self.shape) == prod(self.stored_shape)
            and self.strides == contiguous_strides(self.shape)
        )

    @property
    def moved_shape(self) -> tuple[int, ...]:
        """Shape without the rows of zeros."""
        return (self.shape[0] - self.padding, *self.shape[1:]) if self.padding else self.shape

    def positions(self) -> Tensor:
        """Return the position of every entry in the stored tensor, int64 of `moved_shape`."""
        if self.index is not None:
            return self.index.view(self.moved_shape)
        if self.rows is not None and self.columns is not None:
            return (self.rows[:, None] + self.columns).view(self.moved_shape)
        assert self.strides is not None
        positions = torch.full(self.moved_shape, self.offset, dtype=torch.int64)
        for dimension, (size, stride) in enumerate(zip(self.moved_shape, self.strides, strict=True)):
            steps = torch.arange(size) * stride
            positions += steps.view(-1, *[1] * (len(self.shape) - dimension - 1))
        return positions

    def of_slice(self) -> "Selection | None":
        """Return the selection that every slice of the first dimension is of the stored slice; None where it is not."""
        if self.strides is None or self.padding or len(self.shape) < 2 or len(self.stored_shape) < 2:
            return None
        step = prod(self.stored_shape[1:])
        ends = self.offset + sum(
            (size - 1) * stride for size, stride in zip(self.shape[1:], self.strides[1:], strict=True)
        )
        if self.shape[0] != self.stored_shape[0] or self.strides[0] != step or ends >= step:
            return None
        return Selection(self.stored_shape[1:], self.shape[1:], self.offset, self.strides[1:], added=self.added)

    def of_rows(self, rows: slice) -> "tuple[slice, Selection] | None":
        """Return the stored rows that some rows of the result lie in, and the selection of the latter from them.

        None where that is not known without all positions.
        """
        start, stop, step = rows.indices(self.shape[0])
        if self.strides is None or step != 1 or len(self.shape) < 2 or not self.stored_shape:
            return None
        count = max(0, min(stop, self.moved_shape[0]) - start)
        shape, padding = (max(0, stop - start), *self.shape[1:]), max(0, stop - start) - count
        if not count:  # zeros alone, which need a row to stand beside
            kept, offset = slice(0, 1), 0
        else:
            width, first = prod(self.stored_shape[1:]), self.offset + start * self.strides[0]
            sizes = (count, *self.shape[1:])
            last = first + sum((size - 1) * stride for size, stride in zip(sizes, self.strides, strict=True))
            kept = slice(first // width, last // width + 1)
            offset = first - kept.start * width
        stored = (kept.stop - kept.start, *self.stored_shape[1:])
        return kept, Selection(stored, shape, offset, self.strides, added=self.added, padding=padding)

    def _selected(self, stored: Tensor, leading: tuple[int, ...]) -> Tensor:
        if self.strides is not None:
            step = prod(self.stored_shape)
            outer = tuple(stride * step for stride in contiguous_strides(leading))
            start = stored.storage_offset() + self.offset
            return torch.as_strided(stored, (*leading, *self.moved_shape), (*outer, *self.strides), start)
        if self.rows is not None and self.columns is not None and self._keeps_rows:
            width = self.stored_shape[-1]
            matrix = stored.reshape(*leading, -1, width).index_select(-2, (self.rows // width).to(stored.device))
            if not torch.equal(self.columns, torch.arange(width)):
                matrix = matrix.index_select(-1, self.columns.to(stored.device))
            return matrix.reshape(*leading, *self.moved_shape)
        positions = self.positions().flatten().to(stored.device)
        return stored.reshape(*leading, -1).index_select(-1, positions).reshape(*leading, *self.moved_shape)

    @cached_property
    def _keeps_rows(self) -> bool:
        """True when every row is made of one stored row."""
        assert self.rows is not None and self.columns is not None
        width = self.stored_shape[-1]
        return bool((self.rows % width == 0).all() and (self.columns >= 0).all() and (self.columns < width).all())


def selection_of_positions(positions: Tensor, stored_shape: tuple[int, ...], added: float = 0.0) -> Selection | None:
    """Return the cheapest selection with these positions [..., rows, columns]; None where that is a large index."""
    shape = tuple(positions.shape)
    matrix = positions.reshape(-1, shape[-1]) if shape else positions.reshape(1, 1)
    first = matrix[0, 0] % stored_shape[-1] if stored_shape else matrix[0, 0]  # column of the first entry
    rows, columns = matrix[:, 0] - first, matrix[0] - matrix[0, 0] + first
    if torch.equal(matrix, rows[:, None] + columns):
        strides = _strides_of(positions)
        if strides is not None:
            return Selection(stored_shape, shape, int(matrix[0, 0]), strides, added=added)
        return Selection(stored_shape, shape, rows=rows, columns=columns, added=added)
    if positions.numel() > _MAX_INDEX:
        return None
    return Selection(stored_shape, shape, index=positions.flatten().clone(), added=added)


def _strides_of(positions: Tensor) -> tuple[int, ...] | None:
    """Return the strides of positions that advance by one step along each dimension."""
    strides = []
    for dimension, size in enumerate(positions.shape):
        if size == 1:
            strides.append(0)
            continue
        steps = positions.diff(dim=dimension)
        stride = int(steps.flatten()[0])
        if stride < 0 or not bool((steps == stride).all()):
            return None
        strides.append(stride)
    return tuple(strides)


def as_record(selection: Selection, key: str, tensors: dict[str, Tensor]) -> dict[str, object]:
    """Return a selection as JSON; its index tensors are put under `key` into `tensors`."""
    record: dict[str, object] = {
        "stored": list(selection.stored_shape),
        "shape": list(selection.shape),
        "offset": selection.offset,
        "strides": None if selection.strides is None else list(selection.strides),
        "added": selection.added,
        "padding": selection.padding,
    }
    for part in ("rows", "columns", "index"):
        values = getattr(selection, part)
        if values is not None:
            tensors[f"{key}.{part}"] = values.to(torch.int64).contiguous()
            record["key"] = key
    return record


def from_record(record: Mapping[str, object], tensors: Mapping[str, Tensor]) -> Selection:
    """Return the selection that `as_record` described."""
    key, strides = record.get("key"), record["strides"]
    parts = {part: tensors.get(f"{key}.{part}") for part in ("rows", "columns", "index")} if key else {}
    return Selection(
        tuple(record["stored"]),  # type: ignore[arg-type]
        tuple(record["shape"]),  # type: ignore[arg-type]
        int(record["offset"]),  # type: ignore[call-overload]
        None if strides is None else tuple(strides),  # type: ignore[arg-type]
        added=float(record["added"]),  # type: ignore[arg-type]
        padding=int(record["padding"]),  # type: ignore[call-overload]
        **parts,
    )
