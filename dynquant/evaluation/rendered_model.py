"""A running transformers model that takes on the weights of any plan, tensor by tensor, and its KL on text or pictures.

Blocks come from an `EncodedStore`, so that a plan costs the decoding of the tensors in which it differs from the one
before, and a forward pass. Activations are float32, as in llama.cpp with F32 KV; what is scored is what the file holds.
"""

from collections.abc import Iterator, Mapping

import torch
from torch import Tensor, nn

from dynquant.checkpoints.tensor_roles import layer_of
from dynquant.encoding.store import EncodedStore
from dynquant.evaluation.distributions import Distributions
from dynquant.formats.quant_types import QUANT_TYPES
from dynquant.inputs.model_inputs import Batch, ModelInputs
from dynquant.running.layer_replay import LayerReplay
from dynquant.running.live_weights import LiveWeights

BATCH_TOKENS = 1024


class RenderedModel:
    """`hf_model`, the original in float32, which ends up with the weights that were installed last.

    Raises CheckpointError when the original's weights cannot be followed into the running model.
    """

    def __init__(self, hf_model: nn.Module, store: EncodedStore) -> None:
        self.hf_model = hf_model
        self._live = LiveWeights(store.model, hf_model)
        self._store = store
        self._names = set(self._live.names())
        self.types: dict[str, str] = {}

    def install(self, types: Mapping[str, str]) -> None:
        """Give every named tensor these types' weights; tensors that are not named become the original's again.

        Raises:
            CheckpointError: a tensor in a quantized type has no place in the running model.
        """
        self._live.check(name for name, type_name in types.items() if not QUANT_TYPES[type_name].is_float)
        placed = {name: type_name for name, type_name in types.items() if name in self._names}
        for name in sorted(self.types.keys() | placed.keys()):
            if placed.get(name) != self.types.get(name):  # decoding is what a plan costs
                self.write(name, placed.get(name))
        self.types = placed

    def write(self, name: str, type_name: str | None) -> None:
        """One tensor's weights in a type, or the original's, without a change of `types`."""
        if name in self._names:
            model = self._store.model
            self._live.write(
                name, model.source.load(name) if type_name is None else self._store.decoded(name, type_name)
            )


class ScoredInputs:
    """Text or samples with pictures, the original's distributions on them, and the KL of whatever is installed.

    Scored are all positions of text windows, and of pictures every text token that is followed by one.

    Raises:
        ValueError: a plan is installed already, so that the original cannot be run.
        StatsError: the decoder layers of a language model cannot be found.
    """

    def __init__(self, rendered: RenderedModel, inputs: ModelInputs) -> None:
        if rendered.types:
            raise ValueError("`rendered` holds a plan's weights; make its texts before anything is installed")
        self.rendered, self._inputs = rendered, inputs
        # Layers below a change are not run again for text; the towers of other models differ too much for that.
        self._replay = None
        if not inputs.has_pictures:
            at_once = max(1, BATCH_TOKENS // inputs.longest)
            self._replay = LayerReplay(rendered.hf_model, inputs.windows.split(at_once))
        self._targets = [Distributions.of(logits, seed=seed) for seed, logits in enumerate(self._logits())]
        is_text = self._replay is not None
        self.lengths = [inputs.longest] * len(inputs) if is_text else [len(target) for target in self._targets]
        """Scored positions of each window or sample."""

    @property
    def num_tokens(self) -> int:
        return sum(self.lengths)

    def score(self) -> tuple[Tensor, Tensor]:
        """Return KL(original || rendered) in nats and whether the top token agrees, both [tokens].

        The layers' inputs are kept for `divergences_with`.
        """
        divergences, agreements = [], []
        for logits, target in zip(self._logits(), self._targets, strict=True):
            divergences.append(target.kl(logits).cpu())
            agreements.append(target.agreements(logits))
        return torch.cat(divergences), torch.cat(agreements)

    def divergences_with(self, changes: Mapping[str, str]) -> Tensor:
        """Return KL in nats [tokens] of text with some tensors in other types, all else as in the last `score`."""
        assert self._replay is not None
        before = {name: self.rendered.types.get(name) for name in changes}
        try:
            for name, type_name in changes.items():
                self.rendered.write(name, type_name)
            # The embedding lies before all layers, final norm and head behind them.
            layers = [0 if name == "token_embd.weight" else layer_of(name) for name in changes]
            first = min(self._replay.num_layers if layer is None else layer for layer in layers)
            divergences = [target.kl(self._replay.logits(i, first)).cpu() for i, target in enumerate(self._targets)]
        finally:
            for name, type_name in before.items():
                self.rendered.write(name, type_name)
        return torch.cat(divergences)

    def _logits(self) -> Iterator[Tensor]:
        if self._replay is not None:
            return self._replay.keep()
        return (scored_logits(self.rendered.hf_model, batch) for batch in self._inputs)


@torch.inference_mode()
def scored_logits(hf_model: nn.Module, batch: Batch) -> Tensor:
    """Return logits float32 [n, vocabulary] at the scored positions of a batch of one, on the model's device."""
    logits = hf_model(**batch.on(hf_model.device), use_cache=False).logits[0].float()
    return logits[batch.scored.to(logits.device)]
