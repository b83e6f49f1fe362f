"""The compact reference: its KL error against the exact one, zero against itself, and its files."""

import os
from pathlib import Path

import numpy as np
import pytest
import torch

from dynquant.errors import EvaluationError, WriteError
from dynquant.evaluation import reference_cache
from dynquant.evaluation.reference_cache import compress, score
from dynquant.evaluation.runners import HuggingFaceRunner, open_encoder

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
    runner = HuggingFaceRunner(small_moe, threads=1, device="cpu")
    if bits:
        with torch.no_grad():
            for name, weights in runner._model.named_parameters():
                if weights.dim() > 1 and "embed" not in name:
                    weights.copy_(round_to_bits(weights, bits))
    logits = torch.cat([runner.window_logits(window)[:-1] for window in windows])
    runner.close()
    return logits


@pytest.fixture(scope="module")
def original(small_moe: Path, windows: list[list[int]]) -> tuple[torch.Tensor, np.ndarray]:
    targets = np.concatenate([window[1:] for window in windows])
    return logits_of(small_moe, windows, bits=None), targets


@pytest.mark.parametrize("bits", [8, 4, 2])
def test_mean_kl_is_within_one_percent_of_the_exact_one(small_moe, windows, original, bits) -> None:
    logits, targets = original
    candidate = logits_of(small_moe, windows, bits=bits)
    exact = exact_divergence(logits, candidate)
    scores = score(compress(logits, targets, seed=0), candidate, targets)
    assert scores.divergence.mean() == pytest.approx(exact.mean(), rel=0.01)
    assert np.quantile(scores.divergence, 0.99) == pytest.approx(np.quantile(exact, 0.99), rel=0.03)
    np.testing.assert_array_equal(scores.same_top, (candidate.argmax(-1) == logits.argmax(-1)).numpy())
    log_q = candidate.double().log_softmax(-1)[torch.arange(len(targets)), torch.from_numpy(targets)]
    np.testing.assert_allclose(scores.target_log_prob, log_q.numpy(), atol=1e-9)


def test_a_model_against_itself_diverges_by_nothing(original) -> None:
    logits, targets = original
    scores = score(compress(logits, targets, seed=0), logits, targets)
    assert np.abs(scores.divergence).max() < 1e-12
    assert scores.same_top.all()


@pytest.mark.parametrize("spread", [0.05, 0.5, 3.0])
def test_tail_estimate_is_unbiased(spread: float) -> None:
    generator = torch.Generator().manual_seed(1)
    logits = torch.randn(1, 600, generator=generator) * 1.5
    candidate = logits + spread * torch.randn(1, 600, generator=generator)
    targets = np.zeros(1, dtype=np.int64)
    draws = [
        score(compress(logits, targets, seed=seed, num_top=8, num_tail=4), candidate, targets).divergence[0]
        for seed in range(600)
    ]
    standard_error = np.std(draws) / np.sqrt(len(draws))
    assert standard_error > 0
    assert abs(np.mean(draws) - exact_divergence(logits, candidate)[0]) < 4 * standard_error


def test_a_vocabulary_within_the_top_is_exact() -> None:
    logits, candidate = torch.randn(2, 63, 100, generator=torch.Generator().manual_seed(0)) * 3
    targets = np.arange(63)
    scores = score(compress(logits, targets, seed=0), candidate, targets)
    np.testing.assert_allclose(scores.divergence, exact_divergence(logits, candidate), atol=1e-12)


def test_rows_are_the_same_in_chunks(monkeypatch) -> None:
    logits, candidate = torch.randn(2, 50, 700, generator=torch.Generator().manual_seed(0))
    targets = np.arange(50)
    whole = score(compress(logits, targets, seed=3), candidate, targets)
    monkeypatch.setattr(reference_cache, "_CHUNK_ELEMENTS", 7 * 700)
    chunked = score(compress(logits, targets, seed=3), candidate, targets)
    np.testing.assert_allclose(chunked.divergence, whole.divergence, rtol=1e-12)


def test_nan_logits_are_refused() -> None:
    logits = torch.zeros(4, 300)
    logits[2, 5] = float("nan")
    with pytest.raises(EvaluationError, match="NaN or infinity"):
        compress(logits, np.zeros(4, dtype=np.int64), seed=0)


def test_entries_come_back_unchanged_and_damage_is_named(tmp_path: Path) -> None:
    stored = compress(torch.randn(5, 300), np.arange(5), seed=0).arrays()
    assert reference_cache.load_cached(tmp_path / "cache", "k") is None
    reference_cache.save_cached(tmp_path / "cache", "k", stored)
    loaded = reference_cache.load_cached(tmp_path / "cache", "k")
    assert loaded.keys() == stored.keys()
    for name, array in stored.items():
        np.testing.assert_array_equal(loaded[name], array)
    [file] = (tmp_path / "cache").iterdir()
    os.truncate(file, 100)
    with pytest.raises(EvaluationError, match="damaged"):
        reference_cache.load_cached(tmp_path / "cache", "k")


def test_an_unwritable_cache_is_refused_with_its_reason(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(WriteError, match="could not be written"):
        reference_cache.save_cached(tmp_path / "file", "k", {"a": np.zeros(3)})


def test_key_depends_on_model_tokens_and_options(tmp_path: Path) -> None:
    model = tmp_path / "m-00001-of-00002.gguf"
    second = tmp_path / "m-00002-of-00002.gguf"
    model.write_bytes(b"a" * 10)
    second.write_bytes(b"b" * 10)
    keys = [
        reference_cache.cache_key(model, [1, 2], window=512),
        reference_cache.cache_key(model, [1, 3], window=512),
        reference_cache.cache_key(model, [1, 2], window=256),
    ]
    second.write_bytes(b"c" * 10)
    keys.append(reference_cache.cache_key(model, [1, 2], window=512))
    assert len(set(keys)) == 4
    assert reference_cache.cache_key(model, [1, 2], window=512) == keys[-1]
