"""Passes through one stage of a model: hidden states before every decoder layer are kept, and used again.

`LayerReplay.keep` runs the model once and keeps each layer's input; `layer`, `head` and `embedded` then run one stage
each, for a backward pass that is streamed stage by stage. Masks, position embeddings and the head are the model's own,
whose forward runs with the layers replaced by those states. A GPU multiplies in TF32, whose rounding is small
beside that of weights; where tokens are drawn from the logits it has to be exact, because a thousandth more or less
draws others. 4 bytes a channel, layer and token: 92 MB for 4,096 tokens of 11 layers of 512 channels.
"""

import inspect
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, nullcontext
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from dynquant.running.load import tf32_products
from dynquant.running.streaming.chained_layers import hidden_and_others, standing_in
from dynquant.running.streaming.layer_stream import decoder_layers

_Call = tuple[Tensor, dict[str, Any]]
"""Hidden states [windows, window, channels] and the other arguments that a layer was called with."""


class LayerReplay:
    """The decoder layers of `hf_model`, and what entered them on each of `batches` (token ids [windows, window]).

    With `is_exact` forward passes are in float32 on a GPU too.

    Raises:
        StatsError: the decoder layers cannot be found.
    """

    def __init__(self, hf_model: nn.Module, batches: Sequence[Tensor], *, is_exact: bool = False) -> None:
        self._hf_model, self._is_exact = hf_model, is_exact
        self.device = next(hf_model.parameters()).device
        self.batches = tuple(batches)
        self.layers = decoder_layers(hf_model)
        self._calls: list[list[_Call]] = []
        self._gives_tuples = False

    @property
    def num_layers(self) -> int:
        return len(self.layers)

    def keep(self) -> Iterator[Tensor]:
        """Run every batch with the weights as they are and keep the layers' inputs; gives the logits of each."""
        self._calls = []
        for batch in self.batches:
            calls: list[_Call] = []
            with ExitStack() as hooks, torch.no_grad():
                for layer in self.layers:
                    hooks.enter_context(layer.register_forward_pre_hook(partial(_note, calls), with_kwargs=True))
                hooks.enter_context(self.layers[-1].register_forward_hook(self._note_kind))
                logits = self._forward(batch)
            self._calls.append(calls)
            yield logits

    def layer(self, index: int, layer: int, hidden: Tensor | None = None) -> Tensor:
        """Output of one layer on its kept input, or on `hidden` in its place."""
        layer_input, others = self._calls[index][layer]
        with self._products():
            out = self.layers[layer](layer_input if hidden is None else hidden, **others)
        return out[0] if self._gives_tuples else out

    def layer_input(self, index: int, layer: int) -> Tensor:
        """Return what entered a layer in `keep`, [windows, window, channels]."""
        return self._calls[index][layer][0]

    def head(self, index: int, hidden: Tensor) -> Tensor:
        """Logits [tokens, vocabulary] of the final norm and head on `hidden`, the last layer's output."""
        out = (hidden,) if self._gives_tuples else hidden
        with standing_in(self.layers, lambda _hidden, _others: out):
            return self._forward(self.batches[index])

    def embedded(self, index: int) -> Tensor:
        """Compute what enters the first layer again."""
        calls: list[_Call] = []
        with self.layers[0].register_forward_pre_hook(partial(_note, calls), with_kwargs=True):
            self.head(index, self.layer_input(index, 0))
        return calls[0][0]

    def _forward(self, batch: Tensor) -> Tensor:
        with self._products():
            return self._hf_model(input_ids=batch.to(self.device), use_cache=False).logits.float().flatten(0, 1)

    def _products(self) -> AbstractContextManager[None]:
        return nullcontext() if self._is_exact else tf32_products(self.device)

    def _note_kind(self, _module: nn.Module, _inputs: tuple, out: Any) -> None:
        self._gives_tuples = isinstance(out, tuple)  # stand-ins must give what the layers of this model give


def _note(calls: list[_Call], module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
    calls.append(hidden_and_others([*inspect.signature(module.forward).parameters], args, kwargs))
