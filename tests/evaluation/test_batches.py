"""Several windows and questions at a time give what one at a time gives, in every kind of model."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from dynquant.evaluation import rendered_model, runners
from dynquant.evaluation.distributions import Distributions
from dynquant.evaluation.runners import HuggingFaceRunner, LogitRunner, open_encoder, open_runner
from dynquant.families.open import open_model
from dynquant.inputs.branches import Branches
from dynquant.inputs.model_inputs import Batch
from tests.helpers.tiny_models import save_tiny, write_f32

PREFIX = 120  # longer than the attention window of the tiny Gemma, 96
TOGETHER = {"mixture of experts": True, "qwen2": True, "gemma3": False, "GGUF": True}
"""Model -> True where several questions share a forward pass: not where attention has a window."""


@pytest.fixture(scope="module")
def tokens(small_moe: Path) -> list[int]:
    with open_encoder(small_moe) as encode:
        return encode((small_moe.parent / "demo_text.txt").read_text(encoding="utf-8")[:6000])


@pytest.fixture(scope="module", params=TOGETHER)
def named(request, small_moe: Path, tmp_path_factory) -> Iterator[tuple[str, LogitRunner]]:
    directory = tmp_path_factory.mktemp("model")
    if request.param == "GGUF":
        path = write_f32(open_model(small_moe), directory / "small.gguf")
    elif request.param == "mixture of experts":
        path = small_moe
    else:
        path = save_tiny(request.param, directory, small_moe)
    runner = open_runner(path, threads=1, device="cpu")
    yield request.param, runner
    runner.close()


@pytest.fixture
def runner(named: tuple[str, LogitRunner]) -> LogitRunner:
    return named[1]


def assert_same(found: torch.Tensor, alone: torch.Tensor) -> None:
    """Compare logits, to some units of float32's last place, and what they say."""
    torch.testing.assert_close(found, alone, rtol=1e-6, atol=3e-5)
    log_p, log_q = alone.double().log_softmax(-1), found.double().log_softmax(-1)
    assert float((log_p.exp() * (log_p - log_q)).sum(-1).abs().max()) < 1e-9


def test_ragged_windows_together_are_those_alone(runner, tokens) -> None:
    lengths = [64, 64, 64, 64, 64, 20, 20, 7]
    starts = [sum(lengths[:i]) for i in range(len(lengths))]
    windows = [tokens[start : start + length] for start, length in zip(starts, lengths, strict=True)]
    batches = [Batch.of_tokens(torch.tensor([window])) for window in windows]
    found = [logits.clone() for logits in runner.scored_logits(batches)]
    assert [len(logits) for logits in found] == [length - 1 for length in lengths]
    for logits, window in zip(found, windows, strict=True):
        assert_same(logits, runner.window_logits(window)[:-1])


def some_trees(tokens: list[int]) -> list[Branches]:
    """Questions of 1 to 40 tokens, with answers of one and of several tokens."""
    answers = [tokens[500:504], tokens[600:601], tokens[700:707]], [tokens[510:511], tokens[610:611]]
    return [Branches(tokens[300 : 301 + 13 * i], answers[i % 2]) for i in range(4)]


def branched(runner: LogitRunner, trees: list[Branches]) -> list[torch.Tensor]:
    found: list[torch.Tensor] = []
    for group, logits in runner.branch_logits(trees):
        found += logits.clone().split([tree.num_rows for tree in group])
    return found


@pytest.mark.parametrize("prefix_length", [0, PREFIX])
def test_questions_together_are_the_whole_sequences(runner, tokens, prefix_length) -> None:
    prefix, trees = tokens[:prefix_length], some_trees(tokens)
    runner.reserve(400)
    runner.hold_prefix(prefix)
    found = branched(runner, trees)
    (last,) = branched(runner, trees[-1:])  # one question alone; those before have left no trace
    assert_same(found[-1], last)
    for tree, rows in zip(trees, found, strict=True):
        assert len(rows) == tree.num_rows
        later = rows[1:].split([len(answer) - 1 for answer in tree.answers])
        for answer, part in zip(tree.answers, later, strict=True):
            whole = runner.window_logits([*prefix, *tree.suffix, *answer])[-len(answer) - 1 : -1]
            assert_same(torch.cat([rows[:1], part]), whole)


@pytest.mark.parametrize("name", ["mamba", "falcon_h1"])
def test_states_that_cannot_be_repeated_or_gone_on_from(name: str) -> None:
    from transformers import AutoConfig, AutoModelForCausalLM

    sizes = {"vocab_size": 512, "hidden_size": 64, "num_hidden_layers": 2, "intermediate_size": 64}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "mamba_d_ssm": 64, "mamba_n_heads": 4}
    config = AutoConfig.for_model(name, **sizes, **({"mamba_d_head": 16} | heads if name == "falcon_h1" else {}))
    torch.manual_seed(0)
    runner = HuggingFaceRunner(AutoModelForCausalLM.from_config(config).eval())
    tokens = torch.randint(0, 512, (60,), generator=torch.Generator().manual_seed(0)).tolist()
    trees = [Branches(tokens[10:20], [tokens[20:23], tokens[30:32]]), Branches(tokens[10:14], [[1], [2]])]
    runner.hold_prefix(tokens[:10])
    first, second = branched(runner, trees)
    assert_same(first[:3], runner.window_logits(tokens[:22])[-3:])
    assert_same(first[3:], runner.window_logits([*tokens[:20], tokens[30]])[-1:])
    assert_same(second, runner.window_logits(tokens[:14])[-1:])


def test_sizes_of_groups(named, tokens) -> None:
    name, runner = named
    runner.reserve(400)
    runner.hold_prefix(tokens[:PREFIX])
    groups = [len(group) for group, _ in runner.branch_logits(some_trees(tokens))]
    assert (max(groups) > 1) == TOGETHER[name]
    assert sum(groups) == 4


def test_batches_are_bounded_by_memory(small_moe, tokens, monkeypatch) -> None:
    monkeypatch.setattr(rendered_model, "_CPU_BYTES", 2 * 32 * 8192 * 4)
    monkeypatch.setitem(runners.ROW_TOKENS, "cpu", 60)
    runner = open_runner(small_moe, threads=1, device="cpu")
    calls: list[torch.Size] = []
    runner.hf_model.register_forward_pre_hook(
        lambda _model, _inputs, arguments: calls.append(arguments["input_ids"].shape), with_kwargs=True
    )
    batches = [Batch.of_tokens(torch.tensor([tokens[i : i + 32]])) for i in range(0, 160, 32)]
    assert len(list(runner.scored_logits(batches))) == 5
    assert calls == [(2, 32), (2, 32), (1, 32)]
    runner.hold_prefix([])
    assert [len(group) for group, _ in runner.branch_logits(some_trees(tokens))] == [2, 1, 1]


def test_estimates_do_not_depend_on_the_batch(small_moe, tokens) -> None:
    runner = open_runner(small_moe, threads=1, device="cpu")
    batches = [Batch.of_tokens(torch.tensor([tokens[i : i + 64]])) for i in range(0, 256, 64)]
    together = [Distributions.of(logits, seed=i) for i, logits in enumerate(runner.scored_logits(batches))]
    alone = [Distributions.of(runner.window_logits(b.ids[0].tolist())[:-1], seed=i) for i, b in enumerate(batches)]
    with torch.no_grad():
        runner.hf_model.get_output_embeddings().weight.mul_(1.02)
    candidate = list(runner.scored_logits(batches))
    first, second = (
        torch.cat([said.kl(logits) for said, logits in zip(reference, candidate, strict=True)])
        for reference in (together, alone)
    )
    assert float(first.mean()) == pytest.approx(float(second.mean()), abs=1e-6)
    for ours, theirs in zip(together, alone, strict=True):
        torch.testing.assert_close(ours.top_log_probs, theirs.top_log_probs, rtol=0, atol=1e-5)
        assert (ours.tail_ids == theirs.tail_ids).float().mean() > 0.99  # rounding moves a draw to its neighbour
