"""Next-token distributions of a reference model, kept small, and the KL divergence of any other model from them.

Per token: the NUM_TOP most likely tokens with their log-probabilities, and NUM_TAIL tokens drawn from the rest in
proportion to their probability. With the exact log-softmax q of the other model,

    KL(p || q) = sum over the top of p (log p - log q)  +  tail_p * mean over the draws of (log p - log q),

where the second term is an unbiased estimate of the tail's share; `_tail_divergences` lowers its variance. The draws
are systematic (one uniform offset a token, equal steps through the tail's cumulative probability). On textbook-moe-16m
(1,533 tokens each of two texts, weights rounded to 8, 4, 3 and 2 bits, KL 0.001 to 4) the mean KL differs from the
exact one by at most 0.2 %, the 99.9th percentile by at most 2 %. A model compared with itself gives zero.

Every KL that is shown is this estimate. What trains goes by `kl_lower_bound`, which needs no draws: 1 kB a token.
"""

from dataclasses import dataclass, fields
from math import isqrt

import numpy as np
import torch
from torch import Tensor, nn

from dynquant.errors import EvaluationError

NUM_TOP = 256
NUM_TAIL = 128
_CPU_CHUNK_ELEMENTS = 2**20  # a thread: a few MB of float32, most of which stay in its cache
_GPU_CHUNK_ELEMENTS = 2**26  # enough rows to fill a GPU; at most six copies of 256 MB at a time
_NO_MASS = 1e-12


@dataclass(frozen=True)
class Distributions:
    """Distributions after T tokens, on the CPU; log-probabilities in float64, or in float32 where nothing is drawn."""

    top_ids: Tensor  # int32 [T, num_top], by falling probability
    top_log_probs: Tensor  # [T, num_top]
    tail_ids: Tensor  # int32 [T, num_tail]
    tail_log_probs: Tensor  # [T, num_tail]

    def __len__(self) -> int:
        return len(self.top_ids)

    def __getitem__(self, rows: slice) -> "Distributions":
        return Distributions(**{name: tensor[rows] for name, tensor in self.tensors().items()})

    def tensors(self) -> dict[str, Tensor]:
        """Return the fields by name, as they are stored."""
        return {field.name: getattr(self, field.name) for field in fields(self)}

    @classmethod
    def concatenate(cls, parts: list["Distributions"]) -> "Distributions":
        return cls(**{field.name: torch.cat([getattr(part, field.name) for part in parts]) for field in fields(cls)})

    @classmethod
    def of(
        cls,
        logits: Tensor,
        *,
        num_top: int = NUM_TOP,
        num_tail: int = NUM_TAIL,
        seed: int = 0,
        normalizers: Tensor | None = None,
    ) -> "Distributions":
        """Reduce logits [T, vocabulary], with or without their normalizers; `seed` decides the draws. Raise
        EvaluationError for NaN and infinite sums."""
        normalizers = log_normalizers(logits) if normalizers is None else normalizers
        offsets = torch.from_numpy(np.random.default_rng(seed).random(len(logits))).to(logits.device)
        num_top = min(num_top, logits.shape[1])
        parts = [
            _reduced(logits[rows], normalizers[rows], offsets[rows], num_top, num_tail) for rows in _chunks(logits)
        ]
        return cls.concatenate([cls(*(tensor.cpu() for tensor in part)) for part in parts])

    def kl(self, logits: Tensor, normalizers: Tensor | None = None) -> Tensor:
        """Return unbiased KL(reference || model) in nats, float64 [T], of logits [T, vocabulary], with or without
        their normalizers; raise EvaluationError for NaN, or for more or fewer logits than distributions."""
        if len(self) != len(logits):
            raise EvaluationError(f"{len(self)} reference tokens cannot be compared with {len(logits)} candidate rows.")
        normalizers = log_normalizers(logits) if normalizers is None else normalizers
        return torch.cat([self[rows]._kl(logits[rows], normalizers[rows]) for rows in _chunks(logits)])

    def _kl(self, logits: Tensor, normalizers: Tensor) -> Tensor:
        log_q = log_probs_at(logits, torch.cat([self.top_ids, self.tail_ids], dim=1), normalizers)
        q_top, q_tail = log_q.split([self.top_ids.shape[1], self.tail_ids.shape[1]], dim=1)
        p_top = self.top_log_probs.to(logits.device).double()
        top = (p_top.exp() * (p_top - q_top)).sum(1)
        if self.top_ids.shape[1] == logits.shape[1]:
            return top
        if not self.tail_ids.shape[1]:
            raise ValueError("nothing was drawn from the tail, so there is only a lower bound of the KL")
        log_ratio = q_tail - self.tail_log_probs.to(logits.device).double()
        return top + _tail_divergences(top, _rest(p_top), _rest(q_top), log_ratio)

    def kl_lower_bound(self, logits: Tensor) -> Tensor:
        """Return the KL [T] with all tokens outside the top merged into one, for training on logits [T, vocabulary].

        It is a lower bound of the KL, and equal to it where the merged probabilities are proportional.
        """
        q = logits.log_softmax(-1).gather(1, self.top_ids.to(logits.device).long())
        p = self.top_log_probs.to(logits.device)
        divergences = (p.exp() * (p - q)).sum(-1)
        if self.top_ids.shape[1] < logits.shape[-1]:
            rest = _log_rest(p)
            divergences = divergences + rest.exp() * (rest - _log_rest(q))
        return divergences

    def agreements(self, logits: Tensor) -> Tensor:
        """Return where the most likely token of logits [T, vocabulary] is the reference's, bool [T] on the CPU."""
        return logits.argmax(-1).cpu() == self.top_ids[:, 0]


def reduced(logits: Tensor, followed_by: Tensor, seed: int) -> tuple[Distributions, Tensor]:
    """Return the distributions of logits [T, vocabulary], and the log-probabilities of what follows, [T] on the CPU."""
    normalizers = log_normalizers(logits)
    of_targets = log_probs_at(logits, followed_by[:, None], normalizers)[:, 0].cpu()
    return Distributions.of(logits, seed=seed, normalizers=normalizers), of_targets


def compared(reference: Distributions, logits: Tensor, followed_by: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return KL and agreement of logits [T, vocabulary] with a reference, and log-probabilities of what follows.

    All are [T] on the CPU.
    """
    normalizers = log_normalizers(logits)
    of_targets = log_probs_at(logits, followed_by[:, None], normalizers)[:, 0]
    return reference.kl(logits, normalizers).cpu(), reference.agreements(logits), of_targets.cpu()


def log_probs_at(logits: Tensor, ids: Tensor, normalizers: Tensor | None = None) -> Tensor:
    """Return log-probabilities float64 of `ids` [T, n] under logits [T, vocabulary], with or without their normalizers;
    raise EvaluationError for NaN."""
    normalizers = log_normalizers(logits) if normalizers is None else normalizers
    return logits.gather(1, ids.to(logits.device).long()).double() - normalizers


def log_normalizers(logits: Tensor) -> Tensor:
    """Return log(sum(exp(logits))), float64 [T, 1], for all that is computed of logits [T, vocabulary].

    Exponentials are float32, which cost a fraction of float64's on a CPU and on most GPUs, and added up in float64: the
    result is within 1e-7 of the value in float64. Raises EvaluationError for NaN and infinite sums.
    """
    parts = []
    for rows in _chunks(logits):
        highest = logits[rows].amax(-1, keepdim=True)
        sums = (logits[rows] - highest).float().exp_().sum(-1, keepdim=True, dtype=torch.float64)
        parts.append(sums.log_() + highest)
    normalizers = torch.cat(parts) if parts else logits.new_empty(0, 1, dtype=torch.float64)
    if not torch.isfinite(normalizers).all():
        row = int((~torch.isfinite(normalizers)).nonzero()[0, 0])
        raise EvaluationError(
            f"The model's logits contain NaN or infinity (first at row {row} of the batch). "
            "Its weights are damaged or overflow; check the file before comparing it."
        )
    return normalizers


def _chunks(logits: Tensor) -> list[slice]:
    """Rows that are worked on together: copies of a whole text would not fit beside a large vocabulary's logits."""
    elements = _GPU_CHUNK_ELEMENTS if logits.is_cuda else _CPU_CHUNK_ELEMENTS * torch.get_num_threads()
    size = max(1, elements // logits.shape[1])
    return [slice(start, start + size) for start in range(0, len(logits), size)]


def _reduced(
    logits: Tensor, normalizer: Tensor, offsets: Tensor, num_top: int, num_tail: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    if not num_tail:
        # A target for training, whose loss is computed in the type of the logits.
        log_probs, ids = logits.log_softmax(-1).topk(num_top, dim=-1)
        return ids.int(), log_probs, ids[:, :0].int(), log_probs[:, :0]
    top_logits, top_ids = logits.topk(num_top, dim=-1)
    tail_ids = _drawn((logits - normalizer.float()).exp_().scatter_(1, top_ids, 0.0), offsets, num_tail)
    tail_logits = logits.gather(1, tail_ids)
    return top_ids.int(), top_logits.double() - normalizer, tail_ids.int(), tail_logits.double() - normalizer


def _drawn(masses: Tensor, offsets: Tensor, num_draws: int) -> Tensor:
    """Return columns [T, draws] of masses [T, vocabulary], at equal steps through their sum from `offsets` [T] on.

    Sums are float64, first over blocks of columns and then within those that are hit: cumulative sums over the whole
    of a large vocabulary would take ten times the memory and time.
    """
    width = max(1, isqrt(masses.shape[1] // num_draws))  # the fewest cumulative sums of both kinds together
    blocks = nn.functional.pad(masses, (0, -masses.shape[1] % width)).unflatten(1, (-1, width))
    sums = blocks.sum(-1, dtype=torch.float64)
    cumulative = sums.cumsum(-1)
    points = (offsets[:, None] + torch.arange(num_draws, device=masses.device)) / num_draws * cumulative[:, -1:]
    block = _first_above(cumulative, points)
    within = blocks.gather(1, block[..., None].expand(-1, -1, width)).cumsum(-1, dtype=torch.float64)
    rest = points - cumulative.gather(1, block) + sums.gather(1, block)
    return block * width + _first_above(within, rest[..., None])[..., 0]


def _first_above(cumulative: Tensor, points: Tensor) -> Tensor:
    """Return the first entry whose cumulative mass exceeds each point: never one of zero mass, unless all are."""
    last = torch.searchsorted(cumulative, cumulative[..., -1:].contiguous())  # rounding may put a point at the end
    return torch.minimum(torch.searchsorted(cumulative, points, right=True), last)


def _rest(log_probs: Tensor) -> Tensor:
    """Return the probability of everything else, [T]."""
    return (1 - log_probs.exp().sum(1)).clamp(min=0)


def _log_rest(log_probs: Tensor) -> Tensor:
    """Return log(1 - sum of probabilities) [T], finite."""
    return torch.log1p(-log_probs.exp().sum(-1).clamp(max=1 - 1e-6))


def _tail_divergences(top: Tensor, tail_p: Tensor, tail_q: Tensor, log_ratio: Tensor) -> Tensor:
    """Return an estimate of the sum over the tail of p (log p - log q), [T], from draws of log q - log p, [T, draws].

    The mean of q/p over the draws has the known expectation tail_q / tail_p, which makes it a control variate. Its
    weight is the optimum for a log-normal q/p with variance 2 D, where D is the divergence between the distributions
    with the tail merged into one token; D does not depend on the draws, so the estimate stays unbiased.
    """
    has_mass = (tail_p > _NO_MASS) & (tail_q > _NO_MASS)
    merged = tail_p * torch.log(torch.where(has_mass, tail_p, 1.0) / torch.where(has_mass, tail_q, 1.0))
    doubled = (2 * (top + merged)).clamp(1e-9, 100.0)  # 2 D; expm1(0) would be divided by
    weight = torch.where(has_mass, doubled / torch.expm1(doubled), 0.0)
    ratio = log_ratio.clamp(max=700.0).exp().mean(1)  # exp(710) overflows float64
    estimate = tail_p * (weight * ratio - log_ratio.mean(1)) - weight * tail_q
    return torch.where(tail_p > _NO_MASS, estimate, 0.0)
