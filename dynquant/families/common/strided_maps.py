"""Selections of tensors' entries as strided pieces: which entry of which tensor each entry of another one is.

What loaders and converters do to weights (stack, join, split, transpose, view, interleave, reorder heads) moves regular
blocks of entries. A `StridedMap` says that exactly for any size without values: a 600B model is traced in seconds. Maps
of one checkpoint tensor in two models join into a map from one to the other.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate, pairwise
from math import gcd, prod
from operator import mul

import torch
from torch import Tensor

_SOURCE_BITS = 48  # positions of the second source begin at 1 << 48
_MAX_POSITIONS, _FEW_ROWS = 1 << 20, 16
_FlatAxes = list[tuple[int, int, int]]
"""Axes as (size, stride in the source, stride in the tensor)."""


@dataclass(frozen=True)
class Axis:
    """A direction of a piece: `size` entries, `stride` entries apart in the source, `step` apart in dimension `dim`."""

    size: int
    stride: int
    dim: int
    step: int


@dataclass(frozen=True)
class Piece:
    """Entries of the contiguous tensor `source`, the first at `offset`, that lie from index `starts` of another one."""

    source: str
    offset: int
    starts: tuple[int, ...]
    axes: tuple[Axis, ...]

    @property
    def numel(self) -> int:
        return prod(axis.size for axis in self.axes)

    @property
    def last(self) -> int:
        """The furthest of its entries in the source."""
        return self.offset + sum((axis.size - 1) * axis.stride for axis in self.axes)

    def of_source(self, source: Tensor) -> Tensor:
        """The piece as a view of the tensor that it comes from, of one dimension an axis."""
        sizes, strides = [axis.size for axis in self.axes], [axis.stride for axis in self.axes]
        return _contiguous(source).as_strided(sizes, strides, source.storage_offset() + self.offset)

    def of_target(self, target: Tensor) -> Tensor:
        """The piece as a view of the tensor that it is in."""
        part = target
        for dim, start in enumerate(self.starts):
            part = part.narrow(dim, start, target.shape[dim] - start)
        sizes = [axis.size for axis in self.axes]
        strides = [axis.step * target.stride(axis.dim) for axis in self.axes]
        return target.as_strided(sizes, strides, part.storage_offset())


@dataclass(frozen=True)
class StridedMap:
    """A tensor of `shape` whose entries are those of its disjoint `pieces`, with `added` on top."""

    shape: tuple[int, ...]
    pieces: tuple[Piece, ...]
    added: float = 0.0

    @property
    def is_complete(self) -> bool:
        """True when every entry has a source."""
        return sum(piece.numel for piece in self.pieces) == prod(self.shape)

    def fills(self, tensor: Tensor) -> bool:
        """Return whether it gives every entry of a tensor."""
        return self.is_complete and self.shape == tensor.shape

    @property
    def sources(self) -> tuple[str, ...]:
        """The tensors whose entries it holds, in the order of their pieces."""
        return tuple(dict.fromkeys(piece.source for piece in self.pieces))

    @property
    def is_view(self) -> bool:
        """True when the tensor is a view of a single source."""
        dims = [axis.dim for piece in self.pieces for axis in piece.axes]
        return len(self.pieces) == 1 and len(set(dims)) == len(dims) and self.is_complete and not self.added

    def renamed(self, name: str) -> "StridedMap":
        """The same entries of a source called `name`."""
        return replace(self, pieces=tuple(replace(piece, source=name) for piece in self.pieces))

    def gather(self, read: Callable[[str], Tensor]) -> Tensor:
        """The tensor, of the entries of sources that `read` gives: a view of its source if it can be one."""
        first = read(self.pieces[0].source)
        if self.is_view:
            strides = {axis.dim: axis.stride for axis in self.pieces[0].axes}
            places = [strides.get(dim, 1) for dim in range(len(self.shape))]
            return _contiguous(first).as_strided(self.shape, places, first.storage_offset() + self.pieces[0].offset)
        dtype = torch.float32 if self.added else first.dtype  # norms that are near one would be rounded
        # Entries without a source, as rows for tokens without an embedding, are zeros.
        values = (torch.empty if self.is_complete else torch.zeros)(self.shape, dtype=dtype, device=first.device)
        for piece in self.pieces:
            piece.of_target(values).copy_(piece.of_source(read(piece.source)))
        return values.add_(self.added) if self.added else values

    def positions(self, starts: Mapping[str, int]) -> Tensor:
        """Which entry of its sources each entry is, int64 of `shape`; those of a source begin at `starts[source]`."""
        positions = torch.zeros(self.shape, dtype=torch.int64)
        for piece in self.pieces:
            sizes = [axis.size for axis in piece.axes]
            counted = torch.full(sizes, starts[piece.source] + piece.offset)
            for number, axis in enumerate(piece.axes):
                steps = torch.arange(axis.size) * axis.stride
                counted += steps.view(-1, *[1] * (len(sizes) - number - 1))
            piece.of_target(positions).copy_(counted)
        return positions

    @torch.no_grad()
    def scatter(self, values: Tensor, read: Callable[[str], Tensor]) -> None:
        """Set the entries of sources that the tensor stands for; others stay."""
        if self.added:  # in float32: a norm of Gemma is small beside the one that is taken off
            values = values.float() - self.added
        for piece in self.pieces:
            piece.of_source(read(piece.source)).copy_(piece.of_target(values))

    def permuted(self, order: Sequence[int]) -> "StridedMap":
        """Dimension i becomes what was dimension `order[i]`."""
        place = {old: new for new, old in enumerate(order)}
        pieces = tuple(
            replace(
                piece,
                starts=tuple(piece.starts[old] for old in order),
                axes=tuple(replace(axis, dim=place[axis.dim]) for axis in piece.axes),
            )
            for piece in self.pieces
        )
        return replace(self, shape=tuple(self.shape[old] for old in order), pieces=pieces)

    def viewed(self, shape: Sequence[int]) -> "StridedMap":
        """The same entries in another shape."""
        if tuple(shape) == self.shape:
            return self
        strides = contiguous_strides(self.shape)
        pieces = []
        for piece in self.pieces:
            flat = [(axis.size, axis.stride, axis.step * strides[axis.dim]) for axis in piece.axes]
            start = sum(map(mul, piece.starts, strides))
            pieces += _pieces(piece.source, piece.offset, start, _merged(flat), shape)
        return replace(self, shape=tuple(shape), pieces=joined_pieces(pieces))

    def sliced(self, dim: int, start: int, stop: int, step: int = 1) -> "StridedMap":
        """Indices start, start + step, ... below `stop` of a dimension."""
        cut = [part for piece in self.pieces for part in _sliced(piece, dim, start, stop, step)]
        shape = (*self.shape[:dim], max(0, -(-(stop - start) // step)), *self.shape[dim + 1 :])
        return replace(self, shape=shape, pieces=joined_pieces(cut))

    def picked(self, dim: int, indices: Sequence[int]) -> "StridedMap":
        """Indices of a dimension in any order."""
        runs, first = [], 0
        while first < len(indices):
            step = indices[first + 1] - indices[first] if first + 1 < len(indices) else 1
            last = first + 1
            while step > 0 and last < len(indices) and indices[last] - indices[last - 1] == step:
                last += 1
            runs.append(self.sliced(dim, indices[first], indices[last - 1] + 1, max(step, 1)))
            first = last
        return joined(runs, dim)

    def strided(self, shape: Sequence[int], strides: Sequence[int], offset: int) -> "StridedMap":
        """Return what `Tensor.as_strided` gives. Raises NotImplementedError: irregular, or entries used twice."""
        if prod(shape) == prod(self.shape) and tuple(strides) == contiguous_strides(shape):
            return self.viewed(shape)
        dims = sorted((dim for dim, size in enumerate(shape) if size > 1), key=lambda dim: -strides[dim])
        widths = [prod(self.shape), *(strides[dim] for dim in dims), 1]
        pairs = list(pairwise(widths))
        if any(not inner or outer % inner for outer, inner in pairs):
            raise NotImplementedError("strides that do not divide each other")
        factors = [outer // inner for outer, inner in pairs]
        result = self.viewed(factors)
        for place, (dim, inner, factor) in enumerate(zip([*dims, None], widths[1:], factors, strict=True)):
            size, start = 1 if dim is None else shape[dim], offset // inner % factor
            if start + size > factor:
                raise NotImplementedError("strides that run over the end of a dimension")
            result = result.sliced(place, start, start + size)
        order = sorted(range(len(dims)), key=lambda place: dims[place])
        return result.permuted([*order, len(dims)]).viewed(shape)

    def through(self, sources: Mapping[str, "StridedMap"]) -> "StridedMap":
        """The same entries as those of what `sources` are made of. Raises NotImplementedError: irregular."""
        pieces, added = [], set()
        for piece in self.pieces:
            source, of = sources[piece.source], piece.axes
            added.add(source.added)
            for inner in source.strided([axis.size for axis in of], [axis.stride for axis in of], piece.offset).pieces:
                starts = list(piece.starts)
                for axis, start in zip(of, inner.starts, strict=True):
                    starts[axis.dim] += start * axis.step
                axes = tuple(
                    replace(axis, dim=of[axis.dim].dim, step=axis.step * of[axis.dim].step) for axis in inner.axes
                )
                pieces.append(replace(inner, starts=tuple(starts), axes=axes))
        if len(added) > 1:
            raise NotImplementedError("parts with different constants added")
        return StridedMap(self.shape, joined_pieces(pieces), self.added + sum(added))

    def inverted(self, shapes: Mapping[str, tuple[int, ...]], name: str) -> "dict[str, StridedMap]":
        """The sources as entries of this tensor, which is called `name`."""
        strides = contiguous_strides(self.shape)
        pieces: dict[str, list[Piece]] = {}
        for piece in self.pieces:
            flat = [(axis.size, axis.step * strides[axis.dim], axis.stride) for axis in piece.axes]
            start = sum(map(mul, piece.starts, strides))
            back = _pieces(name, start, piece.offset, _merged(flat), shapes[piece.source])
            pieces.setdefault(piece.source, []).extend(back)
        return {source: StridedMap(shapes[source], tuple(parts), -self.added) for source, parts in pieces.items()}


def by_source(maps: Mapping[str, StridedMap], shapes: Mapping[str, tuple[int, ...]]) -> dict[str, StridedMap]:
    """Return the sources, which have the `shapes`, as entries of the tensors that `maps` has by name."""
    parts: dict[str, list[StridedMap]] = {}
    for name, entries in maps.items():
        for source, part in entries.inverted(shapes, name).items():
            parts.setdefault(source, []).append(part)
    return {
        source: StridedMap(
            several[0].shape, tuple(piece for part in several for piece in part.pieces), several[0].added
        )
        for source, several in parts.items()
    }


@dataclass(frozen=True)
class RowBlock:
    """Rows `rows` of a matrix, which are the rows `stored_rows` of `source`, whose columns they have as `columns`."""

    source: str
    rows: Tensor
    stored_rows: Tensor
    columns: Tensor


def row_blocks(entries: StridedMap, locate: Callable[[str, Tensor], tuple[Tensor, Tensor]]) -> list[RowBlock] | None:
    """Return which rows of its sources the rows of a tensor are; None where they are no selection of one row's entries.

    Leading dimensions count as one. `locate` gives rows and columns of positions in a source. All rows of small tensors
    are looked at, and a few of large ones.
    """
    if not entries.is_complete:
        return None
    flat = entries.viewed((prod(entries.shape[:-1]), entries.shape[-1]))
    starts = {source: number << _SOURCE_BITS for number, source in enumerate(flat.sources)}
    first = flat.sliced(1, 0, 1).positions(starts).flatten()
    positions = flat.positions(starts) if prod(flat.shape) <= _MAX_POSITIONS else None
    blocks = []
    for number, source in enumerate(flat.sources):
        rows = (first >> _SOURCE_BITS == number).nonzero().flatten()
        if not len(rows):
            return None
        stored_rows, _ = locate(source, first[rows] - starts[source])
        sample = torch.arange(0, len(rows), 1 if positions is not None else -(-len(rows) // _FEW_ROWS))
        if positions is None:
            lines = torch.cat([flat.sliced(0, row, row + 1).positions(starts) for row in rows[sample].tolist()])
        else:
            lines = positions[rows]
        of_rows, of_columns = locate(source, lines - starts[source])  # [sample, columns]
        if not (of_rows == stored_rows[sample, None]).all() or not (of_columns == of_columns[0]).all():
            return None
        blocks.append(RowBlock(source, rows, stored_rows, of_columns[0]))
    return blocks


def unless_sorted(order: Tensor, size: int) -> Tensor | None:
    """Return an order of rows or columns, or None where it leaves all `size` of them in place."""
    return None if torch.equal(order, torch.arange(size)) else order


def whole(name: str, shape: Sequence[int]) -> StridedMap:
    """Return a tensor as itself."""
    axes = zip(shape, contiguous_strides(shape), range(len(shape)), strict=True)
    piece = Piece(
        name, 0, (0,) * len(shape), tuple(Axis(size, stride, dim, 1) for size, stride, dim in axes if size > 1)
    )
    return StridedMap(tuple(shape), (piece,))


def joined(parts: Sequence[StridedMap], dim: int) -> StridedMap:
    """Return tensors one after the other in a dimension."""
    if len({part.added for part in parts}) > 1:
        raise ValueError("parts with different constants added")
    pieces, start = [], 0
    for part in parts:
        pieces += [
            replace(piece, starts=(*piece.starts[:dim], piece.starts[dim] + start, *piece.starts[dim + 1 :]))
            for piece in part.pieces
        ]
        start += part.shape[dim]
    shape = (*parts[0].shape[:dim], start, *parts[0].shape[dim + 1 :])
    return StridedMap(shape, joined_pieces(pieces), parts[0].added)


def contiguous_strides(shape: Sequence[int]) -> tuple[int, ...]:
    """Return the strides of a contiguous tensor."""
    return tuple(accumulate(reversed(shape[1:]), mul, initial=1))[::-1] if shape else ()


def _contiguous(tensor: Tensor) -> Tensor:
    if not tensor.is_contiguous():
        raise ValueError("a tensor whose entries do not lie one after the other")
    return tensor


def _pieces(source: str, offset: int, start: int, axes: _FlatAxes, shape: Sequence[int]) -> list[Piece]:
    """Return what axes (size, stride in the source, stride in the tensor) are in a tensor of `shape`."""
    piece = _regular(source, offset, start, axes, shape)
    if piece is not None:
        return [piece]
    (size, stride, width), *inner = axes
    return [
        part
        for number in range(size)
        for part in _pieces(source, offset + number * stride, start + number * width, inner, shape)
    ]


def _regular(source: str, offset: int, start: int, axes: _FlatAxes, shape: Sequence[int]) -> Piece | None:
    strides, inside = contiguous_strides(shape), []
    waiting = list(axes)
    while waiting:
        size, stride, width = waiting.pop()
        dim = next(dim for dim, of in enumerate(strides) if of <= width and shape[dim] > 1)
        room = strides[dim] * shape[dim]
        if width % strides[dim] or (size * width > room and (room % width or size % (room // width))):
            return None
        if size * width > room:  # it runs over the end of a dimension into the next one
            inner = room // width
            waiting += [(size // inner, stride * inner, room), (inner, stride, width)]
        else:
            inside.append(Axis(size, stride, dim, width // strides[dim]))
    starts = tuple(start // stride % size for stride, size in zip(strides, shape, strict=True))
    last = list(starts)
    for axis in inside:
        last[axis.dim] += (axis.size - 1) * axis.step
    if any(index >= size for index, size in zip(last, shape, strict=True)):
        return None
    return Piece(source, offset, starts, tuple(sorted(inside, key=lambda axis: (axis.dim, -axis.step))))


def _merged(flat: Iterable[tuple[int, int, int]]) -> _FlatAxes:
    """Join axes that continue each other; widest first."""
    axes: _FlatAxes = []
    for size, stride, width in sorted((axis for axis in flat if axis[0] > 1), key=lambda axis: -axis[2]):
        if axes and axes[-1][1:] == (size * stride, size * width):
            axes[-1] = (axes[-1][0] * size, stride, width)
        else:
            axes.append((size, stride, width))
    return axes


def _sliced(piece: Piece, dim: int, start: int, stop: int, step: int) -> list[Piece]:
    inside = [axis for axis in piece.axes if axis.dim == dim]
    first = piece.starts[dim]
    last = first + sum((axis.size - 1) * axis.step for axis in inside)

    def moved(offset: int, position: int, axes: tuple[Axis, ...]) -> Piece:
        starts = (*piece.starts[:dim], (position - start) // step, *piece.starts[dim + 1 :])
        return Piece(piece.source, offset, starts, axes)

    if last < start or first >= stop:
        return []
    if step == 1 and start <= first and last < stop:
        return [moved(piece.offset, first, piece.axes)]
    if len(inside) > 1:
        outer = max(inside, key=lambda axis: axis.step)
        axes = tuple(axis for axis in piece.axes if axis is not outer)
        starts = [list(piece.starts) for _ in range(outer.size)]
        for number, of in enumerate(starts):
            of[dim] += number * outer.step
        single = (
            Piece(piece.source, piece.offset + number * outer.stride, tuple(of), axes)
            for number, of in enumerate(starts)
        )
        return [part for each in single for part in _sliced(each, dim, start, stop, step)]
    axis = inside[0] if inside else Axis(1, 0, dim, 1)
    lowest, end = max(0, -((first - start) // axis.step)), min(axis.size, -((first - stop) // axis.step))
    apart = step // gcd(step, axis.step)
    numbers = range(lowest, min(end, lowest + apart))
    hits = range(next((n for n in numbers if (first + n * axis.step - start) % step == 0), end), end, apart)
    if not hits:
        return []
    cut = Axis(len(hits), axis.stride * apart, dim, max(1, axis.step * apart // step))
    axes = tuple(cut if other is axis else other for other in piece.axes)
    axes = tuple(other for other in axes if other.size > 1)
    return [moved(piece.offset + hits[0] * axis.stride, first + hits[0] * axis.step, axes)]


def joined_pieces(pieces: Sequence[Piece]) -> tuple[Piece, ...]:
    """Make one piece of several that follow each other at equal distances: of the experts of a stack, for example."""
    result: list[list[Piece]] = []
    for piece in pieces:
        run = result[-1] if result else []
        if run and _continues(run, piece):
            run.append(piece)
        else:
            result.append([piece])
    joined_runs = tuple(map(_one_piece, result))
    return joined_pieces(joined_runs) if len(joined_runs) < len(pieces) else joined_runs  # runs of runs


def _distance(piece: Piece, other: Piece) -> tuple[int, tuple[int, ...]]:
    return other.offset - piece.offset, tuple(b - a for a, b in zip(piece.starts, other.starts, strict=True))


def _continues(run: list[Piece], piece: Piece) -> bool:
    if piece.source != run[0].source or piece.axes != run[0].axes:
        return False
    distance = _distance(run[-1], piece)
    if len(run) > 1:
        return distance == _distance(run[0], run[1])
    return distance[0] > 0 and sum(step != 0 for step in distance[1]) == 1 and max(distance[1]) > 0


def _one_piece(run: list[Piece]) -> Piece:
    if len(run) == 1:
        return run[0]
    stride, steps = _distance(run[0], run[1])
    along = max(range(len(steps)), key=steps.__getitem__)
    axes = [*run[0].axes, Axis(len(run), stride, along, steps[along])]
    of_dims = ([(axis.size, axis.stride, axis.step) for axis in axes if axis.dim == dim] for dim in range(len(steps)))
    merged = (
        Axis(size, stride, dim, step) for dim, of_dim in enumerate(of_dims) for size, stride, step in _merged(of_dim)
    )
    return replace(run[0], axes=tuple(merged))
