"""The original's next-token distributions, kept small, and the KL divergence of another model's logits from them.

Of every distribution the largest probabilities are kept, and the mass of the rest as one: 8 kB a token instead of
600 kB at a vocabulary of 150,000. The KL of that coarser distribution is a lower bound of the full one and equal to it
where the rest is proportional.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

KEPT_PROBABILITIES = 1024


@dataclass(frozen=True)
class Distribution:
    """Next-token distributions of T tokens: the largest probabilities, and the rest as one."""

    ids: Tensor  # int32 [T, k]
    log_probs: Tensor  # float32 [T, k]
    log_rest: Tensor  # float32 [T]

    def __len__(self) -> int:
        return len(self.log_rest)

    @classmethod
    def of(cls, logits: Tensor, kept: int = KEPT_PROBABILITIES) -> "Distribution":
        """Of the original's logits, float32 [T, vocabulary]; kept on the CPU."""
        log_probs, ids = logits.log_softmax(-1).topk(min(kept, logits.shape[-1]), dim=-1)
        return cls(ids.int().cpu(), log_probs.cpu(), _log_rest(log_probs).cpu())

    def divergences(self, logits: Tensor) -> Tensor:
        """KL(original || model) in nats [T] of logits [T, vocabulary]; tokens outside the kept ones count as one."""
        q = logits.log_softmax(-1).gather(1, self.ids.to(logits.device).long())
        p, rest = self.log_probs.to(logits.device), self.log_rest.to(logits.device)
        kept = (p.exp() * (p - q)).sum(-1)
        if self.ids.shape[1] < logits.shape[-1]:
            kept = kept + rest.exp() * (rest - _log_rest(q))
        return kept

    def agreements(self, logits: Tensor) -> Tensor:
        """Whether the most likely token is the same, bool [T]."""
        return logits.argmax(-1).cpu() == self.ids[:, 0]


def _log_rest(log_probs: Tensor) -> Tensor:
    """log(1 - sum of probabilities), finite."""
    return torch.log1p(-log_probs.exp().sum(-1).clamp(max=1 - 1e-6))
