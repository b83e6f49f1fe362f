"""Graphs of lazy tensors are explained by where their entries lie, and nothing that computes passes for a selection.

The lazy tensors are those of the installed gguf-py, driven as llama.cpp's converter drives its own.
"""

from collections.abc import Callable

import gguf
import pytest
import torch

from dynquant.families.converter import tracing
from dynquant.families.converter.tracing import Leaf, NotExplainedError, Tracer


class LazyTensor(gguf.LazyBase):
    """A tensor of PyTorch that is computed later, as `LazyTorchTensor` of llama.cpp."""

    _tensor_type = torch.Tensor

    @classmethod
    def meta_with_dtype_and_shape(cls, dtype, shape):
        return torch.empty(shape, dtype=dtype, device="meta")

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        return cls._wrap_fn(func)(*args, **(kwargs or {}))


def leaf(name: str, *shape: int) -> tuple[LazyTensor, torch.Tensor]:
    """A checkpoint tensor without data, and its values."""
    values = torch.randn(*shape, generator=torch.Generator().manual_seed(len(name)), dtype=torch.bfloat16)
    read = lambda value: value.read() if isinstance(value, Leaf) else value  # noqa: E731
    meta = LazyTensor.meta_with_dtype_and_shape(torch.bfloat16, shape)
    return LazyTensor(meta=meta, args=(Leaf(name, shape, lambda: values),), func=read), values


def interleaved(weight):
    return weight.reshape(4, 2, 3, 8).swapaxes(1, 2).reshape(24, 8)


OFFSETS = LazyTensor.from_eager(torch.arange(8))
MOVES: dict[str, Callable] = {
    "nothing": lambda w: w.to(torch.float32),
    "range": lambda w: w.to(torch.float32)[4:12],
    "transposition": lambda w: w.T.contiguous(),
    "rotary heads": lambda w: interleaved(w.float()),
    "part": lambda w: torch.split(w, [8, 16], dim=0)[1],
    "reordered part": lambda w: torch.cat([w[:12], w[12:].reshape(2, 6, 8).transpose(0, 1).reshape(12, 8)]),
    "columns": lambda w: w.reshape(24, 2, 4).transpose(1, 2).contiguous().reshape(24, 8),
    "convolution": lambda w: w.unsqueeze(1).squeeze(),
    "index": lambda w: w[torch.arange(23, -1, -1)],
    "added one": lambda w: w.to(torch.float32) + 1,
}
COMPUTED: dict[str, Callable] = {
    "exponential": lambda w: -torch.exp(w.float()),
    "scaled": lambda w: w * 2,
    "halved": lambda w: w / 2,
    "negative": lambda w: -w,
    "sum of rows": lambda w: w[:12] + w[12:],
    "normed": lambda w: w / w.float().norm(dim=1, keepdim=True),
    "added vector": lambda w: w.float() + (torch.arange(8) if type(w) is torch.Tensor else OFFSETS),
    "constant": lambda w: w * 0,
    "absolute": lambda w: w.abs(),
    "positive": lambda w: torch.relu(w),
    "rounded": lambda w: w.round(),
}


@pytest.mark.parametrize("move", MOVES)
def test_moves_are_explained_exactly(move: str) -> None:
    lazy, values = leaf("weight", 24, 8)
    tracer = Tracer(gguf.LazyBase)
    explained = tracer.explain(MOVES[move](lazy))
    assert explained.parts == ("weight",)
    assert torch.equal(explained.selection(values.float()), MOVES[move](values).float())
    assert explained.selection.is_identity == (move in ("nothing", "convolution"))


@pytest.mark.parametrize("function", COMPUTED)
def test_what_computes_is_no_selection(function: str) -> None:
    lazy, values = leaf("weight", 24, 8)
    tracer = Tracer(gguf.LazyBase)
    node = COMPUTED[function](lazy)
    explained = tracer.explain(node)
    assert explained.selection is None and explained.parts == ()
    assert torch.equal(tracer.values(node), COMPUTED[function](values))


def test_experts_that_are_stacked_are_parts() -> None:
    experts = [leaf(f"expert.{number}", 6, 8) for number in range(4)]
    tracer = Tracer(gguf.LazyBase)
    explained = tracer.explain(torch.stack([lazy.T for lazy, _ in experts], dim=0).to(torch.float32))
    assert explained.parts == tuple(f"expert.{number}" for number in range(4))
    for _, values in experts:
        assert torch.equal(explained.selection(values), values.T)


def test_layers_that_are_made_alike_share_a_selection() -> None:
    tracer = Tracer(gguf.LazyBase)
    first, second = (tracer.explain(interleaved(leaf(name, 24, 8)[0])) for name in ("one", "two"))
    other = tracer.explain(leaf("three", 24, 8)[0].reshape(4, 3, 2, 8).swapaxes(1, 2).reshape(24, 8))
    assert first.selection is second.selection and second.parts == ("two",)
    assert other.selection is not first.selection


def test_two_tensors_side_by_side_are_refused_by_name() -> None:
    (query, _), (key, _) = leaf("query", 4, 8), leaf("keys", 4, 8)
    with pytest.raises(NotExplainedError, match="query and keys"):
        Tracer(gguf.LazyBase).explain(torch.cat([query, key]))


def test_rows_of_zeros_are_padding() -> None:
    lazy, values = leaf("embedding", 5, 8)
    padding = LazyTensor.from_eager(torch.zeros(2, 8, dtype=torch.bfloat16))
    explained = Tracer(gguf.LazyBase).explain(torch.cat([lazy, padding]))
    assert torch.equal(explained.selection(values), torch.cat([values, values.new_zeros(2, 8)]))


def test_large_tables_are_padded_without_codes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tracing, "_MAX_CODED", 8)
    lazy, values = leaf("embedding", 5, 8)
    zeros = LazyTensor._wrap_fn(torch.zeros)(2, 8, dtype=torch.bfloat16)
    explained = tracing.Tracer(gguf.LazyBase).explain(torch.cat([lazy.to(torch.float32), zeros], dim=0).contiguous())
    assert explained.selection.entries.shape == (7, 8) and len(explained.selection.entries.pieces) == 1
    assert torch.equal(explained.selection(values), torch.cat([values, values.new_zeros(2, 8)]))
    for other in (torch.cat([zeros, lazy]), torch.cat([lazy, LazyTensor.from_eager(torch.ones(2, 8))])):
        with pytest.raises(NotExplainedError, match="too large"):
            tracing.Tracer(gguf.LazyBase).explain(other)


def test_writing_in_place_is_seen() -> None:
    lazy, values = leaf("weight", 24, 8)
    node = lazy.clone()
    swapped = LazyTensor._wrap_fn(swap_first_rows)(node)
    explained = Tracer(gguf.LazyBase).explain(swapped)
    assert torch.equal(explained.selection(values), swap_first_rows(values.clone()))


def swap_first_rows(weight: torch.Tensor) -> torch.Tensor:
    weight[0], weight[1] = weight[1].clone(), weight[0].clone()
    return weight


def test_the_limit_of_codes_is_that_of_the_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tracing, "free_memory", lambda: tracing._CODED_BYTES * 100)
    with pytest.raises(NotExplainedError, match="192 entries of 100 at most"):
        tracing.Tracer(gguf.LazyBase).explain(interleaved(leaf("weight", 24, 8)[0]))
