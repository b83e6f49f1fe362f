"""A running transformers model that takes on the weights of any plan, tensor by tensor, and is scored on text.

Blocks come from an `EncodedStore`, so that a plan costs the decoding of the tensors in which it differs from the one
before, and a forward pass. Activations are float32, as in llama.cpp with F32 KV; what is scored is what the file holds.
"""

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor, nn

from dynquant.checkpoints.tensor_roles import layer_of
from dynquant.encoding.store import EncodedStore
from dynquant.evaluation.distributions import Distributions
from dynquant.running.layer_replay import LayerReplay
from dynquant.running.live_weights import LiveWeights

BATCH_TOKENS = 1024


class RenderedModel:
    """`hf_model`, the original in float32, which ends up with the weights that were installed last.

    Raises:
        CheckpointError: the original's weights cannot be followed into the running model.
    """

    def __init__(self, hf_model: nn.Module, store: EncodedStore) -> None:
        self.hf_model = hf_model
        self._live = LiveWeights(store.model, hf_model)
        self._store = store
        self._names = set(self._live.names())
        self.types: dict[str, str] = {}

    def install(self, types: Mapping[str, str]) -> None:
        """Give every named tensor these types' weights; tensors that are not named become the original's again."""
        wanted = {name: type_name for name, type_name in types.items() if name in self._names}
        for name in sorted(self.types.keys() | wanted.keys()):
            if wanted.get(name) != self.types.get(name):
                self.write(name, wanted.get(name))
        self.types = wanted

    def write(self, name: str, type_name: str | None) -> None:
        """One tensor's weights in a type, or the original's, without a change of `types`."""
        if name in self._names:
            model = self._store.model
            self._live.write(
                name, model.source.load(name) if type_name is None else self._store.decoded(name, type_name)
            )


class ScoredText:
    """Token ids [n, window], the original's distributions on them, and the KL of whatever is installed.

    Raises:
        ValueError: a plan is installed already, so that the original cannot be run.
        StatsError: the model's decoder layers cannot be found.
    """

    def __init__(self, rendered: RenderedModel, windows: Tensor) -> None:
        if rendered.types:
            raise ValueError("`rendered` holds a plan's weights; make its texts before anything is installed")
        self._rendered = rendered
        self.window_lengths = [windows.shape[1]] * len(windows)
        self._replay = LayerReplay(rendered.hf_model, windows.split(max(1, BATCH_TOKENS // windows.shape[1])))
        self._targets = [Distributions.of(logits) for logits in self._replay.keep()]

    @property
    def num_tokens(self) -> int:
        return sum(self.window_lengths)

    def score(self) -> tuple[Tensor, Tensor]:
        """KL(original || rendered) in nats and whether the top token agrees, both [tokens].

        The layers' inputs are kept for `divergences_with`.
        """
        divergences, agreements = [], []
        for logits, target in zip(self._replay.keep(), self._targets, strict=True):
            divergences.append(target.kl(logits).cpu())
            agreements.append(target.agreements(logits))
        return torch.cat(divergences), torch.cat(agreements)

    def divergences_with(self, changes: Mapping[str, str]) -> Tensor:
        """KL in nats [tokens] with some tensors in other types, all else as it was in the last `score`."""
        before = {name: self._rendered.types.get(name) for name in changes}
        try:
            for name, wanted in changes.items():
                self._rendered.write(name, wanted)
            first = _first_layer(changes, self._replay.num_layers)
            found = [target.kl(self._replay.logits(index, first)).cpu() for index, target in enumerate(self._targets)]
        finally:
            for name, wanted in before.items():
                self._rendered.write(name, wanted)
        return torch.cat(found)


def _first_layer(names: Iterable[str], num_layers: int) -> int:
    """The first layer that a change touches; the embedding lies before, final norm and head behind all."""
    layers = {name: 0 if name == "token_embd.weight" else layer_of(name) for name in names}
    return min(num_layers if layer is None else layer for layer in layers.values())
