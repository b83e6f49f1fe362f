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


def _reshaping(function: Callable[..., torch.Tensor]) -> Callable[..., StridedMap]:
    """Return the rule of a function that gives all entries another shape, which it is asked on the meta device."""

    def rule(traced: StridedMap, *arguments: Any, **_: Any) -> StridedMap:
        shape = function(torch.empty(traced.shape, device="meta"), *arguments).shape
        if prod(shape) != prod(traced.shape):
            raise NotImplementedError("entries that are used several times")
        return traced.viewed(shape)

    return rule


def _viewing(function: Callable[..., Any]) -> Callable[..., Any]:
    """Return the rule of a function that gives views, whose strides it is asked on the meta device."""

    def rule(traced: StridedMap, *arguments: Any) -> Any:
        views = function(torch.empty(traced.shape, device="meta"), *arguments)
        return tree_map_only(torch.Tensor, lambda v: traced.strided(v.shape, v.stride(), v.storage_offset()), views)

    return rule


def _slice(
    traced: StridedMap, dim: int = 0, start: int | None = None, stop: int | None = None, step: int = 1
) -> StridedMap:
    dim %= len(traced.shape)
    return traced.sliced(dim, *slice(start, stop, step).indices(traced.shape[dim]))


def _cat(parts: list[StridedMap], dim: int = 0) -> StridedMap:
    return joined(parts, dim % len(parts[0].shape))


def _stack(parts: list[StridedMap], dim: int = 0) -> StridedMap:
    shape = parts[0].shape
    dim %= len(shape) + 1
    return joined([part.viewed((*shape[:dim], 1, *shape[dim:])) for part in parts], dim)


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
    **{
        function: _reshaping(function)
        for function in (
            aten.view.default,
            aten._unsafe_view.default,
            aten.reshape.default,
            aten._reshape_alias.default,
            aten.squeeze.default,
            aten.squeeze.dim,
            aten.squeeze.dims,
            aten.unsqueeze.default,
            aten.expand.default,
        )
    },
    **{
        function: _viewing(function)
        for function in (
            aten.t.default,
            aten.transpose.int,
            aten.permute.default,
            aten.select.int,
            aten.split.Tensor,
            aten.split_with_sizes.default,
            aten.unbind.int,
        )
    },
    aten.slice.Tensor: _slice,
    aten.cat.default: _cat,
    aten.stack.default: _stack,
    aten.index.Tensor: _index,
    aten.flip.default: _flip,
    aten.new_zeros.default: _zeros,
    aten.add.Tensor: _add,
    aten.sub.Tensor: _sub,
}
