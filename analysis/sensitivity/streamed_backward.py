"""Weight gradients of a loss on many windows, one decoder layer at a time.

From the last layer to the first, each layer runs again from its kept input, takes
the gradients of its output for all windows, and leaves those of its input; the gradients of its weights are handed on
and forgotten. In memory at a time: 4 bytes a weight of one layer and window.
"""

from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from dynquant.checkpoints.tensor_roles import layer_of
from dynquant.running.layer_replay import LayerReplay
from dynquant.running.linear_hooks import frozen_weights
from dynquant.running.live_weights import LiveWeights

Loss = Callable[[Tensor], Tensor]
"""Logits [tokens, vocabulary] of a window -> a scalar."""


def streamed_gradients(
    hf_model: nn.Module,
    live: LiveWeights,
    windows: Tensor,
    loss: Loss,
    names: Collection[str],
    consume: Callable[[str, Tensor], None],
    on_layer: Callable[[int, int], None],
) -> None:
    """Give `consume` every named tensor's gradients, [windows, weights], once.

    Args:
        windows: token ids [n, window]; each runs alone.
        names: GGUF tensors; those without a place in the running model are left out.
        on_layer: told how many stages of how many are done: the layers, and the embedding.

    Raises:
        StatsError: the model's decoder layers cannot be found.
    """
    backward = _Backward(
        hf_model, live, LayerReplay(hf_model, windows.split(1)), set(names) & set(live.names()), consume
    )
    backward.run(loss, on_layer)


class _Backward:
    """The stages of one pass. `_flowing` holds the gradients between two stages, one a window."""

    def __init__(
        self,
        hf_model: nn.Module,
        live: LiveWeights,
        replay: LayerReplay,
        names: set[str],
        consume: Callable[[str, Tensor], None],
    ) -> None:
        self._hf_model, self._live, self._replay = hf_model, live, replay
        self._names, self._consume = names, consume
        self._flowing: list[Tensor] = []
        self._parts: dict[str, Tensor] = {}

    def run(self, loss: Loss, on_layer: Callable[[int, int], None]) -> None:
        stages = self._replay.num_layers + 1
        with frozen_weights(self._hf_model):
            for _ in self._replay.keep():
                pass
            self._head(loss)
            for done, layer in enumerate(reversed(range(self._replay.num_layers)), start=1):
                self._layer(layer)
                on_layer(done, stages)
            self._embedding()
            on_layer(stages, stages)

    def _head(self, loss: Loss) -> None:
        """A tied embedding's part through the head is kept for the last stage."""
        is_tied = self._live.parameter("token_embd.weight") is self._hf_model.get_output_embeddings().weight
        with self._measured(["token_embd.weight" if is_tied else "output.weight"], is_whole=not is_tied) as taken:
            for index in range(len(self._replay.batches)):
                with torch.no_grad():
                    hidden = self._replay.layer(index, self._replay.num_layers - 1)
                hidden.requires_grad_(True)
                with torch.enable_grad():
                    loss(self._replay.head(index, hidden)).backward()
                self._flowing.append(hidden.grad)
                taken()

    def _layer(self, layer: int) -> None:
        below = []
        with self._measured([name for name in self._names if layer_of(name) == layer]) as taken:
            for index, gradient in enumerate(self._flowing):
                hidden = self._replay.layer_input(index, layer).detach().requires_grad_(True)
                with torch.enable_grad():
                    self._replay.layer(index, layer, hidden).backward(gradient)
                below.append(hidden.grad)
                taken()
        self._flowing = below

    def _embedding(self) -> None:
        """The last stage; a tied embedding's two parts are added here."""
        with self._measured(["token_embd.weight"]) as taken:
            for index, gradient in enumerate(self._flowing):
                with torch.enable_grad():
                    self._replay.embedded(index).backward(gradient)
                taken()

    @contextmanager
    def _measured(self, names: list[str], *, is_whole: bool = True) -> Iterator[Callable[[], None]]:
        """Inside, call the function after each window's backward pass; gradients are handed on at the end, unless a
        later stage has the other part of them."""
        wanted = sorted(set(names) & self._names)
        gradients: dict[str, list[Tensor]] = {name: [] for name in wanted}
        parameters = [self._live.parameter(name) for name in wanted]

        def take() -> None:
            for name in wanted:
                gradients[name].append(self._live.gradient(name).flatten().cpu())
            for parameter in parameters:
                parameter.grad = None

        for parameter in parameters:
            parameter.requires_grad_(True)
        yield take
        for parameter in parameters:
            parameter.requires_grad_(False)
        for name in wanted:
            total = torch.stack(gradients.pop(name))
            total += self._parts.pop(name, torch.zeros(()))
            if is_whole:
                self._consume(name, total)
            else:
                self._parts[name] = total
