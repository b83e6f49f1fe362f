"""Explains lazy tensors of llama.cpp's converter: which checkpoint tensors they are made of, and each entry's position.

The converter keeps every output as a graph of functions over lazy leaves (gguf-py's `LazyBase`). A graph is evaluated
on a leaf without data whose strides say where everything is; where it copies, on codes, the position of every entry in
float64. Codes are run three times, once counted backwards and once as negative fractions: only what moves entries
gives the same positions each time.
Runs in the worker, beside the converter's own gguf-py; nothing here imports either.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from math import prod
from typing import Any

import torch
from torch import Tensor

from dynquant.families.common.selection import Selection, selection_of_positions, selection_of_strides
from dynquant.resources import free_memory

_CASTS = frozenset({"to", "float", "double", "half", "bfloat16", "type", "cpu", "detach", "numpy", "astype"})
"""Functions that give every entry another type at most, which a position has not."""
_COPIES = frozenset({"contiguous", "clone"})
_LAST_CODE = float(1 << 50)
_MAX_CODED = 1 << 29
"""Entries of the largest tensor that is coded."""
_CODED_BYTES = 80
"""Memory for an entry that is coded: codes of two runs, what the graph makes of them, and positions."""


@dataclass(frozen=True)
class Leaf:
    """A checkpoint tensor; `read` gives its values."""

    name: str
    shape: tuple[int, ...]
    read: Callable[[], Tensor]


@dataclass(frozen=True)
class Explained:
    """`parts` are stacked when there are several, each under the same selection; None for values that are computed."""

    parts: tuple[str, ...]
    selection: Selection | None


class NotExplainedError(Exception):
    """A tensor is no selection of one checkpoint tensor, nor a stack of such."""


class _Codes(torch.Tensor):
    """A tensor that ignores conversions of types, and copies where a view of its entries is not to be had."""

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = getattr(func, "__name__", "")
        if name in _CASTS:
            return args[0]
        if name == "view":
            if any(isinstance(argument, torch.dtype) for argument in args[1:]):
                raise NotExplainedError("its bytes are read as another type")
            func = torch.Tensor.reshape
        return super().__torch_function__(func, types, args, kwargs or {})

    def astype(self, *_: Any, **__: Any) -> Tensor:
        return self


class _Strides(_Codes):
    """A tensor without data, which shows by its strides where entries lie as long as none is written."""

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = getattr(func, "__name__", "")
        if name in _COPIES:
            return args[0]
        if name == "__setitem__" or name.startswith("__i") or (name.endswith("_") and not name.endswith("__")):
            raise NotExplainedError("entries are written in place")
        return super().__torch_function__(func, types, args, kwargs)


class Tracer:
    """Explains nodes of graphs; graphs that differ only in the names of their leaves are explained once."""

    def __init__(self, lazy_base: type) -> None:
        self._lazy_base = lazy_base
        self._explained: dict[object, Selection | None] = {}

    def explain(self, node: Any) -> Explained:
        """Return what a tensor is made of. Raises NotExplainedError: a mixture of several checkpoint tensors."""
        body = self._peeled(node)
        elements = body._args[0] if _name_of(body._func) == "stack" and _is_first(body) else ()
        if len(elements) > 1 and all(isinstance(element, self._lazy_base) for element in elements):
            each = [self._explain_single(element) for element in elements]
            if any(selection is not each[0][1] for _, selection in each) or each[0][1] is None:
                raise NotExplainedError("its slices are made in different ways")
            return Explained(tuple(name for name, _ in each), each[0][1])
        name, selection = self._explain_single(node)
        return Explained((name,) if selection is not None else (), selection)

    def values(self, node: Any) -> Any:
        """Return the tensor itself, from the values of its leaves."""
        return self._evaluate(node, lambda leaf: leaf.read())

    def leaves(self, node: Any) -> list[Leaf]:
        """Return the checkpoint tensors of a graph in order, each once."""
        return list({leaf.name: leaf for leaf in self._walk(node)}.values())

    def _explain_single(self, node: Any) -> tuple[str, Selection | None]:
        leaves = self.leaves(node)
        if not leaves:
            return "", None
        key = self._signature(self._peeled(node), {leaf.name: number for number, leaf in enumerate(leaves)})
        if key not in self._explained:
            self._explained[key] = self._trace(node, leaves)
        return leaves[0].name, self._explained[key]

    def _trace(self, node: Any, leaves: list[Leaf]) -> Selection | None:
        if len(leaves) == 1 and (selection := self._padded(node, leaves[0])) is not None:
            return selection
        count = sum(prod(leaf.shape) for leaf in leaves)
        if count > (most := min(_MAX_CODED, free_memory() // _CODED_BYTES)):
            raise NotExplainedError(f"it is too large to be traced, with {count:,} entries of {most:,} at most")
        forward, below_zero = self._coded(node, leaves, 0.0), count + 0.25
        if forward is None or not _is_moved(forward, self._coded(node, leaves, -below_zero), below_zero):
            return None
        backward = self._coded(node, leaves, _LAST_CODE, step=-1)
        if backward is None or not bool(forward.isfinite().all() and backward.isfinite().all()):
            return None
        padding = _num_zero_rows(forward, backward)
        forward, backward = (codes[: len(codes) - padding] for codes in (forward, backward))
        # What is added counts twice in the sum: a constant shows, and anything that is no constant as well.
        shift = (forward + backward - _LAST_CODE) / 2
        added = float(shift.flatten()[0]) if shift.numel() else 0.0
        if not bool((shift == added).all()):
            return None
        positions = forward - added
        if not torch.equal(positions, positions.round()) or int(positions.min()) < 0:
            return None
        if len(leaves) > 1:
            raise NotExplainedError(f"it joins {' and '.join(leaf.name for leaf in leaves[:4])}")
        if int(positions.max()) >= prod(leaves[0].shape) or (padding and added):
            return None
        selection = selection_of_positions(positions.to(torch.int64), leaves[0].shape, added)
        return selection.with_zeros(padding) if selection and padding else selection

    def _padded(self, node: Any, leaf: Leaf) -> Selection | None:
        """Return `_strided` of a graph that may end in rows of zeros behind all others, as tables of tokens do."""
        body = self._peeled(node)
        parts = body._args[0] if isinstance(body, self._lazy_base) and _name_of(body._func) == "cat" else ()
        if len(parts) != 2 or not _is_first(body) or self.leaves(parts[1]):
            return self._strided(node, leaf)
        selection, zeros = self._strided(parts[0], leaf), self.values(parts[1])
        if selection is None or len(selection.entries.shape) < 2 or not isinstance(zeros, Tensor) or bool(zeros.any()):
            return None
        return selection.with_zeros(len(zeros))

    def _strided(self, node: Any, leaf: Leaf) -> Selection | None:
        """Return the selection of a graph that only looks at its leaf in another way; nothing is computed."""
        stored = torch.empty(leaf.shape, device="meta").as_subclass(_Strides)
        try:
            seen = self._evaluate(node, lambda _: stored)
        except (NotExplainedError, RuntimeError, NotImplementedError, TypeError, ValueError):
            return None  # it needs values, mixes devices or writes
        if not isinstance(seen, _Strides) or seen.untyped_storage()._cdata != stored.untyped_storage()._cdata:
            return None
        return selection_of_strides(seen, leaf.shape)

    def _coded(self, node: Any, leaves: list[Leaf], first: float, *, step: int = 1) -> Tensor | None:
        """Return the graph's value on positions counted through all leaves; None where it is no tensor of codes."""
        starts, total = {}, 0
        for leaf in leaves:
            starts[leaf.name], total = total, total + prod(leaf.shape)

        def codes(leaf: Leaf) -> Tensor:
            count = prod(leaf.shape)
            positions = torch.arange(starts[leaf.name], starts[leaf.name] + count, dtype=torch.float64)
            return positions.mul_(step).add_(first).view(leaf.shape).as_subclass(_Codes)

        try:
            values = self._evaluate(node, codes)
        except NotExplainedError:
            return None
        return values.as_subclass(Tensor) if isinstance(values, _Codes) else None

    def _evaluate(self, node: Any, leaf_values: Callable[[Leaf], Any], memo: dict[int, Any] | None = None) -> Any:
        """Return the value of a graph, which stays as it is, unlike under gguf-py's `to_eager`."""
        memo = {} if memo is None else memo
        if isinstance(node, list | tuple):
            return type(node)(self._evaluate(item, leaf_values, memo) for item in node)
        if isinstance(node, Leaf):
            return leaf_values(node)
        if not isinstance(node, self._lazy_base):
            return node
        if id(node) not in memo:
            if node._data is not None:
                memo[id(node)] = node._data
            else:
                arguments = self._evaluate(node._args, leaf_values, memo)
                memo[id(node)] = node._func(*arguments, **node._kwargs)
        return memo[id(node)]

    def _walk(self, node: Any, seen: set[int] | None = None) -> Iterator[Leaf]:
        seen = set() if seen is None else seen
        if isinstance(node, list | tuple):
            for item in node:
                yield from self._walk(item, seen)
        elif isinstance(node, Leaf):
            yield node
        elif isinstance(node, self._lazy_base) and id(node) not in seen:
            seen.add(id(node))
            if node._data is None:
                yield from self._walk(node._args, seen)

    def _peeled(self, node: Any) -> Any:
        """Return the node below functions that move nothing."""
        while (
            isinstance(node, self._lazy_base)
            and node._data is None
            and _name_of(node._func) in _CASTS | _COPIES
            and node._args
            and isinstance(node._args[0], self._lazy_base)
        ):
            node = node._args[0]
        return node

    def _signature(self, node: Any, numbers: dict[str, int]) -> object:
        """Return what a graph does, without the names of its leaves."""
        if isinstance(node, Leaf):
            return "leaf", numbers[node.name], node.shape
        if isinstance(node, list | tuple):
            return type(node).__name__, *(self._signature(item, numbers) for item in node)
        if not isinstance(node, self._lazy_base):
            return _constant(node)
        if node._data is not None:
            return "data", _constant(node._data)
        arguments = self._signature(node._args, numbers)
        options = tuple((name, _constant(value)) for name, value in sorted(node._kwargs.items()))
        return _function(node._func), arguments, options


def _is_moved(forward: Tensor, below: Tensor | None, shift: float) -> bool:
    """Return whether codes that are `shift` below come out where positions do; what is 0 of both has no code."""
    if below is None or below.shape != forward.shape:
        return False
    return bool(((below + shift == forward) | ((below == 0) & (forward == 0))).all())


def _num_zero_rows(forward: Tensor, backward: Tensor) -> int:
    """Return how many rows at the end are zeros under either count: they are of no checkpoint tensor."""
    if forward.dim() < 2:
        return 0
    is_zero = ((forward == 0) & (backward == 0)).flatten(1).all(1)
    return len(is_zero) - int(is_zero.logical_not().nonzero().max()) - 1 if not bool(is_zero.all()) else 0


def _is_first(node: Any) -> bool:
    """Return whether a node stacks along a new first dimension."""
    dimension = node._kwargs.get("dim", node._args[1] if len(node._args) > 1 else 0)
    return dimension == 0


def _name_of(function: Any) -> str:
    """Return the name of the tensor's method or function that a graph's function calls."""
    code = getattr(function, "__code__", None)
    if code is not None and "name" in code.co_freevars:
        return str(function.__closure__[code.co_freevars.index("name")].cell_contents)
    if code is not None and function.__name__ == "<lambda>":
        return "numpy" if code.co_names == ("numpy",) else ""
    return getattr(function, "__name__", "")


def _function(function: Any) -> object:
    cells = [cell.cell_contents for cell in getattr(function, "__closure__", None) or ()]
    inner = tuple(_function(cell) if callable(cell) else _constant(cell) for cell in cells)
    return getattr(function, "__code__", function), inner


def _constant(value: Any) -> object:
    if isinstance(value, Tensor):
        return str(value.dtype), tuple(value.shape), value.contiguous().view(-1).tolist().__repr__()
    if isinstance(value, list | tuple):
        return type(value).__name__, *map(_constant, value)
    if isinstance(value, slice):
        return "slice", value.start, value.stop, value.step
    try:
        hash(value)
    except TypeError:
        return object()  # equal to nothing
    return type(value).__name__, value
