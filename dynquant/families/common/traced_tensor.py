"""A tensor without values that learns where each entry comes from, through functions of PyTorch that only move them."""

from collections.abc import Callable
from math import prod
from typing import Any

import torch
from torch.utils._pytree import tree_map_only

from dynquant.families.common.strided_maps import StridedMap, joined

aten = torch.ops.aten
_WITHOUT_EFFECT = {"dtype", "layout", "device", "pin_memory", "non_blocking", "memory_format", "implicit"}
"""Keywords that leave every entry what it is."""


class TracedTensor(torch.Tensor):
    """Stand-in for a tensor of `map.shape`; what is computed from it is traced too, or raises NotImplementedError."""

    map: StridedMap

    @staticmethod
    def __new__(cls, traced: StridedMap, dtype: torch.dtype = torch.float32) -> "TracedTensor":
        return torch.Tensor._make_wrapper_subclass(cls, traced.shape, dtype=dtype)  # type: ignore[attr-defined]

    def __init__(self, traced: StridedMap, dtype: torch.dtype = torch.float32) -> None:
        self.map = traced

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        rule = _RULES.get(func)
        first = args[0][0] if isinstance(args[0], list | tuple) else args[0]
        if rule is None or not isinstance(first, TracedTensor):
            raise NotImplementedError(f"{func} does more than to move entries")
        kwargs = kwargs or {}
        if others := kwargs.keys() - _WITHOUT_EFFECT:
            raise NotImplementedError(f"{func} with {', '.join(sorted(others))}")
        if isinstance(args[0], list | tuple) and not all(isinstance(part, TracedTensor) for part in args[0]):
            raise NotImplementedError(f"{func} of tensors of which some are not traced")
        dtype = kwargs.get("dtype") or first.dtype
        if not dtype.is_floating_point:
            raise NotImplementedError(f"{func} rounds to {dtype}")
        maps = tree_map_only(TracedTensor, lambda tensor: tensor.map, args)
        return tree_map_only(StridedMap, lambda traced: TracedTensor(traced, dtype), rule(*maps))


def _same(traced: StridedMap, *_: Any) -> StridedMap:
    return traced


def _view(traced: StridedMap, shape: list[int], *_: Any) -> StridedMap:
    return traced.viewed(torch.empty(traced.shape, device="meta").view(shape).shape)  # it knows what -1 stands for


def _transpose(traced: StridedMap, first: int, second: int) -> StridedMap:
    order = list(range(len(traced.shape)))
    order[first], order[second] = order[second], order[first]
    return traced.permuted(order)


def _permute(traced: StridedMap, order: list[int]) -> StridedMap:
    return traced.permuted([dim % len(order) for dim in order])


def _slice(
    traced: StridedMap, dim: int = 0, start: int | None = None, stop: int | None = None, step: int = 1
) -> StridedMap:
    dim %= len(traced.shape)
    return traced.sliced(dim, *slice(start, stop, step).indices(traced.shape[dim]))


def _select(traced: StridedMap, dim: int, index: int) -> StridedMap:
    dim %= len(traced.shape)
    index %= traced.shape[dim]
    return _squeeze(traced.sliced(dim, index, index + 1), dim)


def _squeeze(traced: StridedMap, dims: int | list[int] | None = None) -> StridedMap:
    shape = torch.empty(traced.shape, device="meta")
    return traced.viewed((shape.squeeze() if dims is None else shape.squeeze(dims)).shape)


def _unsqueeze(traced: StridedMap, dim: int) -> StridedMap:
    return traced.viewed(torch.empty(traced.shape, device="meta").unsqueeze(dim).shape)


def _cat(parts: list[StridedMap], dim: int = 0) -> StridedMap:
    return joined(parts, dim % len(parts[0].shape))


def _stack(parts: list[StridedMap], dim: int = 0) -> StridedMap:
    dim %= len(parts[0].shape) + 1
    return joined([_unsqueeze(part, dim) for part in parts], dim)


def _split(traced: StridedMap, size: int, dim: int = 0) -> list[StridedMap]:
    length = traced.shape[dim]
    return _split_sizes(traced, [min(size, length - start) for start in range(0, length, size)], dim)


def _split_sizes(traced: StridedMap, sizes: list[int], dim: int = 0) -> list[StridedMap]:
    parts, start = [], 0
    for size in sizes:
        parts.append(traced.sliced(dim % len(traced.shape), start, start + size))
        start += size
    return parts


def _unbind(traced: StridedMap, dim: int = 0) -> list[StridedMap]:
    return [_select(traced, dim, index) for index in range(traced.shape[dim])]


def _expand(traced: StridedMap, shape: list[int], **_: Any) -> StridedMap:
    expanded = torch.empty(traced.shape, device="meta").expand(shape)
    if expanded.numel() != prod(traced.shape):
        raise NotImplementedError("entries that are used several times")
    return traced.viewed(expanded.shape)


def _index(traced: StridedMap, indices: list[torch.Tensor | None]) -> StridedMap:
    by_dim = [(dim, index) for dim, index in enumerate(indices) if index is not None]
    if len(by_dim) != 1 or by_dim[0][1].dim() != 1 or by_dim[0][1].dtype == torch.bool:
        raise NotImplementedError("an index in several dimensions")
    return traced.picked(by_dim[0][0], by_dim[0][1].tolist())


def _flip(traced: StridedMap, dims: list[int]) -> StridedMap:
    for dim in dims:
        traced = traced.picked(dim % len(traced.shape), range(traced.shape[dim])[::-1])
    return traced


def _zeros(traced: StridedMap, shape: list[int], **_: Any) -> StridedMap:
    return StridedMap(tuple(shape), (), traced.added)


def _add(traced: StridedMap, number: Any, *_: Any) -> StridedMap:
    if not isinstance(number, int | float):
        raise NotImplementedError("a sum of tensors")
    return StridedMap(traced.shape, traced.pieces, traced.added + number)


def _sub(traced: StridedMap, number: Any, *_: Any) -> StridedMap:
    return _add(traced, -number if isinstance(number, int | float) else number)


_RULES: dict[Any, Callable[..., Any]] = {
    **dict.fromkeys(
        (
            aten.clone.default,
            aten.detach.default,
            aten.alias.default,
            aten._to_copy.default,
            aten.lift_fresh.default,
            aten.contiguous.default,
        ),
        _same,
    ),
    **dict.fromkeys(
        (aten.view.default, aten._unsafe_view.default, aten.reshape.default, aten._reshape_alias.default), _view
    ),
    aten.t.default: lambda traced: traced.permuted(range(len(traced.shape))[::-1]),
    aten.transpose.int: _transpose,
    aten.permute.default: _permute,
    aten.slice.Tensor: _slice,
    aten.select.int: _select,
    aten.squeeze.default: _squeeze,
    aten.squeeze.dim: _squeeze,
    aten.squeeze.dims: _squeeze,
    aten.unsqueeze.default: _unsqueeze,
    aten.cat.default: _cat,
    aten.stack.default: _stack,
    aten.split.Tensor: _split,
    aten.split_with_sizes.default: _split_sizes,
    aten.unbind.int: _unbind,
    aten.expand.default: _expand,
    aten.index.Tensor: _index,
    aten.flip.default: _flip,
    aten.new_zeros.default: _zeros,
    aten.add.Tensor: _add,
    aten.sub.Tensor: _sub,
}
