"""Pictures with text on which a running vision-language model is scored: KL of whatever weights are installed.

Scored is every text token that is followed by one; image tokens predict nothing.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from dynquant.evaluation.distributions import Distributions
from dynquant.evaluation.rendered_model import RenderedModel
from dynquant.inputs.pictures import Encoded


def scored_positions(is_text: Tensor) -> Tensor:
    """Positions of text tokens that are followed by one, from bool [T]."""
    return (is_text[:-1] & is_text[1:]).nonzero().flatten()


def logits_at(hf_model: Any, sample: Encoded, positions: Tensor) -> Tensor:
    """Logits float32 [n, vocabulary] of a sample at `positions` [n], on the model's device."""
    logits = hf_model(**sample.inputs_on(hf_model.device), use_cache=False).logits[0].float()
    return logits[positions.to(logits.device)]


def text_logits(hf_model: Any, sample: Encoded) -> Tensor:
    """Logits float32 [n, vocabulary] of the sample's scored positions, on the model's device."""
    return logits_at(hf_model, sample, scored_positions(~sample.is_image))


class ScoredPictures:
    """Samples, the original's distributions on them, and the KL of whatever is installed.

    Raises:
        ValueError: a plan is installed already, so that the original cannot be run.
    """

    def __init__(self, rendered: RenderedModel, samples: Sequence[Encoded]) -> None:
        if rendered.types:
            raise ValueError("`rendered` holds a plan's weights; score its pictures before anything is installed")
        self._hf_model, self._samples = rendered.hf_model, samples
        with torch.inference_mode():
            self._targets = [Distributions.of(text_logits(self._hf_model, sample)) for sample in samples]
        self.sample_lengths = [len(target) for target in self._targets]

    @property
    def num_tokens(self) -> int:
        """Scored positions of all samples."""
        return sum(self.sample_lengths)

    def score(self) -> tuple[Tensor, Tensor]:
        """KL(original || rendered) in nats and whether the top token agrees, both [tokens]."""
        divergences, agreements = [], []
        with torch.inference_mode():
            for sample, target in zip(self._samples, self._targets, strict=True):
                logits = text_logits(self._hf_model, sample)
                divergences.append(target.kl(logits).cpu())
                agreements.append(target.agreements(logits))
        return torch.cat(divergences), torch.cat(agreements)
