"""Compact distributions: the error of their KL against the exact one, and zero against themselves."""

from pathlib import Path

import numpy as np
import pytest
import torch

from dynquant.errors import EvaluationError
from dynquant.evaluation import distributions
from dynquant.evaluation.distributions import Distributions, log_probs_at
from dynquant.evaluation.runners import open_encoder, open_runner
from tests.helpers.representatives import represented_by

WINDOW = 256


def round_to_bits(weights: torch.Tensor, bits: int) -> torch.Tensor:
    """Round to the nearest of evenly spaced levels, one scale a row."""
    scale = weights.abs().amax(dim=-1, keepdim=True).clamp(min=1e-12) / (2 ** (bits - 1) - 0.5)
    return (weights / scale).round() * scale


def exact_divergence(reference: torch.Tensor, candidate: torch.Tensor) -> np.ndarray:
    log_p, log_q = reference.double().log_softmax(-1), candidate.double().log_softmax(-1)
    return (log_p.exp() * (log_p - log_q)).sum(-1).numpy()


@pytest.fixture(scope="module")
def windows(small_moe: Path) -> list[list[int]]:
    text = (small_moe.parent / "demo_text.txt").read_text(encoding="utf-8")[:12000]
    with open_encoder(small_moe) as encode:
        tokens = encode(text)
    return [tokens[i : i + WINDOW] for i in range(0, 4 * WINDOW, WINDOW)]


def logits_of(small_moe: Path, windows: list[list[int]], *, bits: int | None) -> torch.Tensor:
    runner = open_runner(small_moe, threads=1, device="cpu")
    if bits:
        with torch.no_grad():
            for name, weights in runner.hf_model.named_parameters():
                if weights.dim() > 1 and "embed" not in name:
                    weights.copy_(round_to_bits(weights, bits))
    logits = torch.cat([runner.window_logits(window)[:-1] for window in windows])
    runner.close()
    return logits


@pytest.fixture(scope="module")
def original(small_moe: Path, windows: list[list[int]]) -> tuple[torch.Tensor, torch.Tensor]:
    targets = torch.tensor([token for window in windows for token in window[1:]])
    return logits_of(small_moe, windows, bits=None), targets


@pytest.mark.parametrize("bits", represented_by([4], [8, 4, 2]))
def test_mean_kl_is_within_one_percent_of_the_exact_one(small_moe, windows, original, bits) -> None:
    logits, targets = original
    candidate = logits_of(small_moe, windows, bits=bits)
    exact = exact_divergence(logits, candidate)
    reference = Distributions.of(logits)
    divergence = reference.kl(candidate).numpy()
    assert divergence.mean() == pytest.approx(exact.mean(), rel=0.01)
    assert np.quantile(divergence, 0.99) == pytest.approx(np.quantile(exact, 0.99), rel=0.03)
    assert torch.equal(reference.agreements(candidate), candidate.argmax(-1) == logits.argmax(-1))
    log_q = candidate.double().log_softmax(-1)[torch.arange(len(targets)), targets]
    given = log_probs_at(candidate, targets[:, None])[:, 0]
    np.testing.assert_allclose(given.numpy(), log_q.numpy(), atol=1e-9)


def test_a_model_against_itself_diverges_by_nothing(original) -> None:
    logits, _ = original
    reference = Distributions.of(logits)
    assert reference.kl(logits).abs().max() < 1e-12
    assert reference.agreements(logits).all()


@pytest.mark.parametrize("spread", [0.05, 0.5, 3.0])
def test_tail_estimate_is_unbiased(spread: float) -> None:
    generator = torch.Generator().manual_seed(1)
    logits = torch.randn(1, 600, generator=generator) * 1.5
    candidate = logits + spread * torch.randn(1, 600, generator=generator)
    draws = [float(Distributions.of(logits, num_top=8, num_tail=4, seed=seed).kl(candidate)) for seed in range(600)]
    standard_error = np.std(draws) / np.sqrt(len(draws))
    assert standard_error > 0
    assert abs(np.mean(draws) - exact_divergence(logits, candidate)[0]) < 4 * standard_error


def test_a_vocabulary_within_the_top_is_exact() -> None:
    logits, candidate = torch.randn(2, 63, 100, generator=torch.Generator().manual_seed(0)) * 3
    divergence = Distributions.of(logits).kl(candidate)
    np.testing.assert_allclose(divergence.numpy(), exact_divergence(logits, candidate), atol=1e-12)


def test_rows_are_the_same_in_chunks(monkeypatch) -> None:
    logits, candidate = torch.randn(2, 50, 700, generator=torch.Generator().manual_seed(0))
    whole = Distributions.of(logits, seed=3).kl(candidate)
    monkeypatch.setattr(distributions, "_CPU_CHUNK_ELEMENTS", 7 * 700)
    chunked = Distributions.of(logits, seed=3).kl(candidate)
    np.testing.assert_allclose(chunked.numpy(), whole.numpy(), rtol=1e-12)


def test_nan_logits_are_refused() -> None:
    logits = torch.zeros(4, 300)
    logits[2, 5] = float("nan")
    with pytest.raises(EvaluationError, match="NaN or infinity"):
        Distributions.of(logits)


def test_without_draws_there_is_a_bound_and_no_estimate() -> None:
    logits, candidate = torch.randn(2, 20, 700, generator=torch.Generator().manual_seed(0))
    target = Distributions.of(logits, num_top=64, num_tail=0)
    candidate.requires_grad_(True)
    bound = target.kl_lower_bound(candidate)
    assert (bound.detach().numpy() <= exact_divergence(logits, candidate.detach())).all()
    bound.sum().backward()
    assert candidate.grad.abs().sum() > 0
    with pytest.raises(ValueError, match="lower bound"):
        target.kl(candidate)


@pytest.mark.parametrize("num_columns", [300, 8192, 50_001])
def test_draws_are_those_of_the_whole_cumulative_sum(num_columns: int) -> None:
    logits = torch.randn(20, num_columns, generator=torch.Generator().manual_seed(0)) * 3
    found = Distributions.of(logits, num_top=16, num_tail=128, seed=5)
    tail = logits.double().softmax(-1).scatter(1, logits.topk(16, dim=-1).indices, 0.0)
    cumulative = tail.cumsum(-1)
    offsets = torch.from_numpy(np.random.default_rng(5).random(20))
    points = (offsets[:, None] + torch.arange(128)) / 128 * cumulative[:, -1:]
    expected = torch.searchsorted(cumulative, points, right=True)
    assert (found.tail_ids == expected).float().mean() > 0.999  # float32 probabilities move a draw to its neighbour
    assert not (found.tail_ids[:, :, None] == found.top_ids[:, None]).any()
