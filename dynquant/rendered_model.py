"""A running transformers model that takes on the weights of any plan, tensor by tensor, and is scored on text.

Blocks come from an `EncodedStore`, so that a plan costs the decoding of the tensors in which it differs from the one
before, and a forward pass. Activations are float32, as in llama.cpp with F32 KV; what is scored is what the file holds.
"""

from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn

from dynquant.architecture import layer_of
from dynquant.distribution import Distribution
from dynquant.encoded_store import EncodedStore
from dynquant.layer_replay import LayerReplay
from dynquant.live_weights import LiveWeights

BATCH_TOKENS = 1024

Progress = Callable[[int, int], None]


class RenderedModel:
    """`hf_model`, the original in float32, which ends up with the weights that were installed last.

    Args:
        store: encoded tensors of the same checkpoint.
        windows: token ids [n, window] to score on.

    Raises:
        CheckpointError: the original is not a Hugging Face checkpoint.
        StatsError: the model's decoder layers cannot be found.
    """

    def __init__(self, hf_model: nn.Module, store: EncodedStore, windows: Tensor) -> None:
        self._live = LiveWeights(store.model, hf_model)
        self._store = store
        self._names = set(self._live.names())
        self._types: dict[str, str] = {}
        self.window_lengths = [windows.shape[1]] * len(windows)
        self._replay = LayerReplay(hf_model, windows.split(max(1, BATCH_TOKENS // windows.shape[1])))
        self._targets = [Distribution.of(logits) for logits in self._replay.keep()]

    @property
    def num_layers(self) -> int:
        return self._replay.num_layers

    def install(self, types: Mapping[str, str]) -> None:
        """Give every named tensor these types' weights; tensors that are not named become the original's again."""
        for name in sorted((self._types.keys() | types.keys()) & self._names):
            wanted = types.get(name)
            if wanted != self._types.get(name):
                self._write(name, wanted)
        self._types = {name: wanted for name, wanted in types.items() if name in self._names}

    def score(self) -> tuple[Tensor, Tensor]:
        """KL(original || rendered) in nats and whether the top token agrees, both [tokens].

        The layers' inputs are kept for `divergences_with`.
        """
        divergences, agreements = [], []
        for logits, target in zip(self._replay.keep(), self._targets, strict=True):
            divergences.append(target.divergences(logits).cpu())
            agreements.append(target.agreements(logits))
        return torch.cat(divergences), torch.cat(agreements)

    def divergences_with(self, changes: Mapping[str, str]) -> Tensor:
        """KL in nats [tokens] with some tensors in other types, all else as it was in the last `score`."""
        before = {name: self._types.get(name) for name in changes}
        try:
            for name, wanted in changes.items():
                self._write(name, wanted)
            first = self._first_layer(changes)
            found = [
                target.divergences(self._replay.logits(index, first)).cpu()
                for index, target in enumerate(self._targets)
            ]
        finally:
            for name, wanted in before.items():
                self._write(name, wanted)
        return torch.cat(found)

    def _first_layer(self, names: Mapping[str, str]) -> int:
        """The first layer that a change touches; the embedding lies before, final norm and head behind all."""
        return min(0 if name == "token_embd.weight" else _layer_or_end(name, self.num_layers) for name in names)

    def _write(self, name: str, type_name: str | None) -> None:
        if name in self._names:
            self._live.write(
                name, self._store.model.source.load(name) if type_name is None else self._store.decoded(name, type_name)
            )


def _layer_or_end(name: str, num_layers: int) -> int:
    layer = layer_of(name)
    return num_layers if layer is None else layer
