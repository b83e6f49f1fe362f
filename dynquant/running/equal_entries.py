"""Places of a GGUF file's tensors in a running model, found by their values where no conversion is known.

Candidates are the parameters of the tensor's layer: whole, one half of fused experts (one after the other or
interleaved), transposed, or with rows and columns in another order, which the sums of rows and columns show. A place
counts only when all of its values are equal.
"""

import re
from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from dynquant.checkpoints.model import Model
from dynquant.checkpoints.tensor_roles import gguf_name_of, layer_of
from dynquant.families.common.strided_maps import StridedMap, whole

_LAYER = re.compile(r"(?:^|\.)(\d+)\.")


class EqualEntries:
    """The parameters of a model, by layer, and the GGUF names that gguf-py has for them."""

    def __init__(self, model: Model, hf_model: Any) -> None:
        self._tensors = hf_model.state_dict()
        self._source = model.source
        self._by_layer: dict[int | None, list[str]] = {}
        self._named: dict[str, str] = {}
        for name in self._tensors:
            match = _LAYER.search(name)
            self._by_layer.setdefault(int(match.group(1)) if match else None, []).append(name)
            gguf_name = gguf_name_of(name, model.arch, model.hyper.n_layer)
            if gguf_name is not None:
                self._named.setdefault(gguf_name, name)

    def is_expected(self, name: str, stored: Tensor) -> bool:
        """True when the model has a parameter that the tensor should be: of its name, or experts for a stack.

        What is no weight may be computed from one (`ssm_a`).
        """
        of_layer = [self._tensors[other] for other in self._by_layer.get(layer_of(name), [])]
        has_experts = any(held.dim() == 3 and len(held) == len(stored) for held in of_layer)
        return name.endswith(".weight") and (name in self._named or (stored.dim() == 3 and has_experts))

    def entries(self, name: str, stored: Tensor) -> StridedMap | None:
        """Return the entries of a parameter that have the values of a GGUF tensor, or None where none do."""
        ends = {index: stored[index] for index in (0, len(stored) - 1)} if stored.dim() == 3 else {}
        return next((each for each in self._alike(name, stored, ends) if self._are_equal(name, each, stored)), None)

    def entries_of_stack(self, name: str) -> StridedMap | None:
        """Return what `entries` does for a stack of experts, of which only the first and the last are decoded."""
        shape = self._source.info(name).shape
        ends = {index: self._source.load(name, index) for index in (0, shape[0] - 1)}
        return next(self._alike(name, torch.empty(shape, device="meta"), ends), None)

    def _alike(self, name: str, stored: Tensor, experts: Mapping[int, Tensor]) -> Iterator[StridedMap]:
        """Yield entries of parameters that may be a tensor, as far as these experts of it say."""
        first = [self._named[name]] if name in self._named else []
        for parameter in dict.fromkeys((*first, *self._by_layer.get(layer_of(name), []))):
            held = as_in_file(self._tensors[parameter], self._source.info(name).dtype)
            for entries in _candidates(parameter, held, stored):
                parts = ((entries.sliced(0, index, index + 1), values[None]) for index, values in experts.items())
                if all(self._are_equal(name, part, values) for part, values in parts):
                    yield entries

    def _are_equal(self, name: str, entries: StridedMap, values: Tensor) -> bool:
        held = as_in_file(entries.gather(self._tensors.__getitem__), self._source.info(name).dtype)
        return torch.equal(held, values.to(held.device, held.dtype))


def as_in_file(values: Tensor, stored_type: str) -> Tensor:
    """Return values as a file of a float type has them: F16 has not all that BF16 has, 2^-24 being its smallest."""
    return values.to(torch.float16).to(values.dtype) if stored_type == "F16" else values


def _candidates(name: str, held: Tensor, stored: Tensor) -> Iterator[StridedMap]:
    """Yield what of a parameter has the shape of a GGUF tensor, in the order that is most likely."""
    shape = tuple(stored.shape)
    plain = whole(name, tuple(held.shape))
    if held.numel() == stored.numel():
        yield plain.viewed(shape)
        if len(shape) == 1:  # norms that are stored as the difference from one
            yield replace(plain.viewed(shape), added=1.0)
    if held.dim() == 3 and held.shape[1] == 1 and stored.dim() == 2:  # the kernel of a convolution along time
        held = held.squeeze(1)
        plain = plain.viewed(tuple(held.shape))
    if held.dim() == 3 or (held.dim() == 2 and stored.dim() == 3):
        yield from _of_experts(plain, shape)
    elif held.dim() <= 2 and stored.dim() <= 2 and held.dim() == stored.dim():
        yield from _reordered(plain, held, stored)


def _of_experts(plain: StridedMap, shape: tuple[int, ...]) -> Iterator[StridedMap]:
    last = len(plain.shape) - 1
    for entries in (plain, plain.permuted([*range(last - 1), last, last - 1])):
        dims = [dim for dim in range(1, len(shape)) if len(entries.shape) == len(shape)]
        for dim in dims:
            length = entries.shape[dim]
            others = entries.shape[:dim] + entries.shape[dim + 1 :] == shape[:dim] + shape[dim + 1 :]
            if others and length == shape[dim]:
                yield entries
            elif others and length == 2 * shape[dim]:
                yield entries.sliced(dim, 0, length // 2)
                yield entries.sliced(dim, length // 2, length)
                yield entries.sliced(dim, 0, length, 2)
                yield entries.sliced(dim, 1, length, 2)


def _reordered(plain: StridedMap, held: Tensor, stored: Tensor) -> Iterator[StridedMap]:
    """Yield rows, and columns if all rows are there, in the order that their sums have in the file."""
    if held.shape[-1] != stored.shape[-1] and held.dim() == 2:
        return
    # Of a function under which few sums are alike, as those of absolute values of short rows are.
    here, there = (2 + torch.tanh(v) + torch.sin(137 * v) for v in (held.cpu().double(), stored.cpu().double()))
    orders = []
    for dim in range(held.dim()):
        if dim and here.shape[0] != there.shape[0]:
            orders.append(list(range(held.shape[1])))
            continue
        others = [other for other in range(held.dim()) if other != dim]
        sums = [values.sum(others) if others else values for values in (here, there)]
        order = _matching(*sums)
        if order is None:
            return
        orders.append(order)
    entries = plain
    for dim, order in enumerate(orders):
        entries = entries.picked(dim, order)
    yield entries


def _matching(here: Tensor, there: Tensor) -> list[int] | None:
    """Return the places in `here` of the numbers of `there`, up to rounding of sums; None where one is missing."""
    ordered, places = here.sort()
    near = torch.searchsorted(ordered, there * (1 - 1e-12)).clamp(max=len(ordered) - 1)
    if not torch.allclose(ordered[near], there, rtol=1e-10, atol=0.0):
        return None
    indices = places[near]
    return indices.tolist() if len(indices.unique()) == len(indices) else None
