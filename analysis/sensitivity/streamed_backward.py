"""Gradients of a scalar of the logits, multiplied with given differences of weights, layer by layer.

From the last decoder layer to the first, each runs again from its kept input, gets the gradients of its output for all
batches, and leaves those of its input; the gradients of its weights are multiplied with the differences and forgotten.
In memory at a time: 4 bytes a weight of one layer, for each difference and for the gradient.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from dynquant.checkpoints.tensor_roles import layer_of
from dynquant.running.linear_hooks import frozen_weights
from dynquant.running.live_weights import LiveWeights
from dynquant.running.load import tf32_products
from dynquant.running.streaming.layer_replay import LayerReplay
from dynquant.session import Progress


@dataclass
class StreamedBackward:
    """A backward pass on all batches of `replay`, which has kept its layers' inputs."""

    hf_model: nn.Module
    live: LiveWeights
    replay: LayerReplay
    names: set[str]  # GGUF tensors that have a place in the running model
    differences: Callable[[str], Tensor]  # what the gradients of a tensor are multiplied with, [types, weights]
    products: dict[str, Tensor] = field(default_factory=dict)  # by tensor, float64 [types, batches]
    _flowing: list[Tensor] = field(default_factory=list)  # gradients between two layers, one a batch

    def run(self, loss: Callable[[Tensor], Tensor], stage: str, progress: Progress) -> None:
        """Run it; `loss` maps logits [tokens, vocabulary] of a batch to a scalar, batch after batch."""
        total = self.replay.num_layers + 1  # the embedding counts as a layer
        progress(stage, 0, total, unit="layers")
        with frozen_weights(self.hf_model):
            self._head(loss)
            for done, layer in enumerate(reversed(range(self.replay.num_layers)), start=1):
                self._layer(layer)
                progress(stage, done, total, unit="layers")
            self._embedding()
            progress(stage, total, total, unit="layers")

    def _head(self, loss: Callable[[Tensor], Tensor]) -> None:
        is_tied = self.hf_model.get_input_embeddings().weight is self.hf_model.get_output_embeddings().weight
        with self._measured(["token_embd.weight" if is_tied else "output.weight"]) as collect:
            for index in range(len(self.replay.batches)):
                with torch.no_grad():
                    hidden = self.replay.layer(index, self.replay.num_layers - 1)
                hidden.requires_grad_(True)
                with torch.enable_grad():
                    total = loss(self.replay.head(index, hidden))
                self._run_backward(total)
                self._flowing.append(hidden.grad)
                collect()

    def _layer(self, layer: int) -> None:
        below = []
        with self._measured([name for name in self.names if layer_of(name) == layer]) as collect:
            for index, gradient in enumerate(self._flowing):
                hidden = self.replay.layer_input(index, layer).detach().requires_grad_(True)
                with torch.enable_grad():
                    out = self.replay.layer(index, layer, hidden)
                self._run_backward(out, gradient)
                below.append(hidden.grad)  # flows into the layer below
                collect()
        self._flowing = below

    def _embedding(self) -> None:
        if "token_embd.weight" not in self.names:  # nothing is below it that a gradient flows to
            return
        with self._measured(["token_embd.weight"]) as collect:
            for index, gradient in enumerate(self._flowing):
                with torch.enable_grad():
                    embedded = self.replay.embedded(index)
                self._run_backward(embedded, gradient)
                collect()

    def _run_backward(self, out: Tensor, gradient: Tensor | None = None) -> None:
        with tf32_products(self.replay.device):
            out.backward(gradient)

    @contextmanager
    def _measured(self, names: list[str]) -> Iterator[Callable[[], None]]:
        """Context manager: yields a function to call after each batch's backward pass, which adds to `products`.

        A tied embedding gets its products in two parts, through the head and at last.
        """
        names = sorted(self.names & set(names))
        parameters = [parameter for name in names for parameter in self.live.parameters(name)]
        differences = {name: self.differences(name) for name in names}
        batches = iter(range(len(self.replay.batches)))

        def collect() -> None:
            batch = next(batches)
            for name, by_type in differences.items():
                shape = len(by_type), len(self.replay.batches)
                products = self.products.setdefault(name, by_type.new_zeros(shape, dtype=torch.float64))
                products[:, batch] += by_type @ self.live.gradient(name).flatten()
            for parameter in parameters:
                parameter.grad = None

        for parameter in parameters:
            parameter.requires_grad_(True)
        try:
            yield collect
        finally:
            for parameter in parameters:
                parameter.requires_grad_(False)
