"""Decoder layers that can run one at a time: each takes the hidden states that the layer before it gives, and no more.

A model is asked by running it on two texts with stand-ins for its layers. What else a layer is called with (masks,
position embeddings) has to be the same for both, because it is computed once for all texts of a shape.
"""

import inspect
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

from dynquant.errors import StatsError

StandIn = Callable[[Tensor, dict[str, Any]], Any]
"""Hidden states and the other arguments of a layer, by name -> what the layer gives."""

_TEXTS = (((0, 1, 2, 3),) * 3, ((4, 5, 6, 7),) * 3)
"""Three windows, so that a model that unpacks what a layer gives cannot take a window for it."""


@dataclass(frozen=True)
class _Call:
    hidden: Tensor
    others: dict[str, Any]
    given: Tensor


@contextmanager
def standing_in(layers: Iterable[nn.Module], stand_in: StandIn) -> Iterator[None]:
    """Context manager: the layers return what `stand_in` does and do not run."""
    layers = list(layers)
    try:
        for layer in layers:
            # An attribute of the object hides the method of its class; removing it brings the method back.
            layer.__dict__["forward"] = _calling(stand_in, list(inspect.signature(layer.forward).parameters))
        yield
    finally:
        for layer in layers:
            layer.__dict__.pop("forward", None)


def gives_tuples(hf_model: Any, layers: nn.ModuleList, dtype: torch.dtype, device: torch.device) -> bool:
    """Return whether a model expects tuples of its layers, of which the first is hidden states, or those alone.

    Weights of the embedding and of the layers are not used.

    Raises:
        StatsError: its layers cannot run one after the other on all texts.
    """
    faults = []
    for with_tuples in (False, True):
        calls = [_stand_in_calls(hf_model, layers, torch.tensor(text), with_tuples, dtype, device) for text in _TEXTS]
        fault = _fault(hf_model, len(layers), *calls)
        if not fault:
            return with_tuples
        faults.append(fault)
    raise StatsError(
        f"{type(hf_model).__name__} cannot be calibrated layer by layer: {faults[0]}. Load the model whole: leave out "
        "--max-memory, on a machine that has the memory for it; export without --asymmetric."
    )


def hidden_and_others(
    names: Sequence[str], args: Sequence[Any], kwargs: Mapping[str, Any]
) -> tuple[Tensor, dict[str, Any]]:
    """Return the hidden states that a layer is called with, and its other arguments by name; `names` are those of all
    its parameters."""
    others = dict(zip(names, args, strict=False)) | kwargs
    return others.pop(names[0]), others


def _calling(stand_in: StandIn, names: Sequence[str]) -> Callable[..., Any]:
    def call(*args: Any, **kwargs: Any) -> Any:
        return stand_in(*hidden_and_others(names, args, kwargs))

    return call


def _stand_in_calls(
    hf_model: Any, layers: nn.ModuleList, text: Tensor, with_tuples: bool, dtype: torch.dtype, device: torch.device
) -> list[_Call] | None:
    """Return what layers are called with when each gives random numbers; None where that stops the model."""
    calls: list[_Call] = []
    embedding = hf_model.get_input_embeddings()
    generator = torch.Generator().manual_seed(int(text[0, 0]))

    def numbers(shape: Sequence[int]) -> Tensor:
        return torch.randn(shape, generator=generator).to(device, dtype)

    def note(hidden: Tensor, others: dict[str, Any]) -> Any:
        calls.append(_Call(hidden, others, numbers(hidden.shape)))
        return (calls[-1].given,) if with_tuples else calls[-1].given

    embedded = embedding.register_forward_hook(lambda *call: numbers(call[-1].shape))
    try:
        with standing_in(layers, note), torch.no_grad():
            hf_model.base_model(input_ids=text.to(device), use_cache=False)
    except (ValueError, TypeError, RuntimeError, IndexError, KeyError, AttributeError):
        return None  # it takes more from its layers, as what they have selected
    finally:
        embedded.remove()
    return calls


def _fault(hf_model: Any, num_layers: int, first: list[_Call] | None, second: list[_Call] | None) -> str | None:
    """Return why layers cannot run one at a time on all texts, from their calls on two of them."""
    if getattr(hf_model.config.get_text_config(), "num_kv_shared_layers", 0):
        return "its layers use the keys and values of other layers"
    if first is None or second is None or len(first) != num_layers:
        return "its layers pass on more than hidden states"
    channels = hf_model.get_input_embeddings().embedding_dim
    shape = (len(_TEXTS[0]), len(_TEXTS[0][0]), channels)
    if any(call.hidden.shape != shape for call in first):
        return f"its layers do not pass on hidden states of {channels} channels a token alone"
    if any(not torch.equal(before.given, after.hidden) for before, after in pairwise(first)):
        return "it computes between its layers"
    for call, other in zip(first, second, strict=True):
        for name, value in call.others.items():
            if not _same(value, other.others.get(name)):
                return f"its layers also take `{name}`, which depends on the text"
    return None


def _same(first: Any, second: Any) -> bool:
    """Return whether two arguments are the same; those that are neither tensors nor made of them count as such."""
    if isinstance(first, Tensor):
        return isinstance(second, Tensor) and torch.equal(first, second)
    if isinstance(first, Mapping):
        return first.keys() == second.keys() and all(_same(value, second[key]) for key, value in first.items())
    if isinstance(first, list | tuple):
        return len(first) == len(second) and all(map(_same, first, second))
    return True
