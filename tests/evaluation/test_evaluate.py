"""The whole comparison, its statistics, its cache, and what it refuses."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from dynquant.errors import EvaluationError
from dynquant.evaluation import evaluate as evaluate_module
from dynquant.evaluation import statistics
from dynquant.evaluation.evaluate import common_columns
from dynquant.evaluation.report import EvalReport
from dynquant.evaluation.runners import ModelInfo
from dynquant.evaluation.statistics import block_sums, bootstrap_mean, mcnemar_exact, wilson_interval
from dynquant.families.linear_layers import linear_checkpoint
from dynquant.families.open import open_model
from dynquant.inputs.text import evaluation_windows
from dynquant.recipes.build_plan import plan_for_vllm, uniform_schemes
from tests.helpers.commands import refused
from tests.helpers.edited_checkpoints import edited_config
from tests.helpers.evaluating import evaluated
from tests.helpers.packed_models import plan_of
from tests.helpers.tiny_models import save_tiny, write_f32

SMALL = {"window": 128, "max_tokens": 600, "threads": 1, "device": "cpu"}


@pytest.fixture(scope="module")
def data(small_moe: Path) -> dict:
    folder = small_moe.parent
    files = {"text": [folder / "demo_text.txt"], "mmlu_data": folder / "demo_questions.jsonl"}
    return files | {"shots": folder / "demo_shots.jsonl", "num_shots": 2, "limit": 6}


@pytest.fixture(scope="module")
def run(small_moe, packed_moe, data, tmp_path_factory) -> tuple[EvalReport, Path, list[tuple[str, int, int]]]:
    """The packed GGUF against the Hugging Face original, all tasks, with a cache."""
    cache = tmp_path_factory.mktemp("cache")
    calls: list[tuple[str, int, int]] = []
    report = evaluated(
        packed_moe.gguf, small_moe, tasks={"kl", "ppl", "mmlu"}, reference_cache=cache, **data, **SMALL,
        progress=lambda stage, done, total, **_: calls.append((stage, done, total)),
    )  # fmt: skip
    return report, cache, calls


def test_gguf_candidate_against_hugging_face_reference(run) -> None:
    report, _, calls = run
    [text] = report.texts
    assert (report.reference.runner, report.candidate.runner) == ("transformers", "llama.cpp")
    assert (text.scored_tokens, text.windows) == (595, 5)
    assert 0.001 < text.kl.median < text.kl.mean.value < text.kl.p99_9 <= text.kl.maximum
    assert text.kl.mean.low < text.kl.mean.value < text.kl.mean.high
    assert 0.5 < text.kl.top1_agreement.value < 1
    assert text.perplexity_ratio.value == pytest.approx(
        text.candidate_perplexity.value / text.reference_perplexity.value
    )
    letter, cloze = report.multiple_choice
    assert (letter.scoring, cloze.scoring) == ("letter", "cloze")
    for result in (letter, cloze):
        right = [p == a for p, a in zip(result.candidate.predictions, result.right_answers, strict=True)]
        assert result.candidate.accuracy.value == pytest.approx(np.mean(right))
        subjects = result.subjects.values()
        assert sum(s.questions for s in subjects) == result.questions == 6
        assert sum(s.only_reference_right for s in subjects) == result.only_reference_right
        assert sum(s.only_candidate_right for s in subjects) == result.only_candidate_right
    assert letter.candidate.summed_accuracy == letter.candidate.accuracy
    assert calls[5] == ("reference, demo_text.txt", 5, 5)
    assert calls[-1] == ("candidate, cloze questions", 6, 6)


def test_report_survives_json_and_fills_a_table(run) -> None:
    report, _, _ = run
    assert EvalReport.model_validate(json.loads(report.to_json())) == report
    metrics = [metric for rows in report.sections().values() for metric, *_ in rows]
    assert metrics[:3] == ["bytes", "perplexity", "mean KL (nats)"]
    assert metrics.count("accuracy") == 2


def test_cached_reference_is_not_loaded_again_and_changes_nothing(
    run, small_moe, packed_moe, data, monkeypatch
) -> None:
    first, cache, _ = run
    opened = []
    runners = evaluate_module.runners
    original = runners.open_runner
    monkeypatch.setattr(
        runners, "open_runner", lambda path, **options: opened.append(path) or original(path, **options)
    )
    second = evaluated(packed_moe.gguf, small_moe, tasks={"kl", "ppl", "mmlu"}, reference_cache=cache, **data, **SMALL)
    assert opened == [packed_moe.gguf]
    assert second.model_copy(update={"seconds": {}}) == first.model_copy(update={"seconds": {}})


def test_a_model_equals_itself(small_moe, data) -> None:
    report = evaluated(
        small_moe, small_moe, tasks={"kl", "mmlu"}, scoring=["letter"], **data, **SMALL | {"max_tokens": 128}
    )
    assert report.texts[0].kl.maximum < 1e-12
    assert report.texts[0].kl.top1_agreement.value == 1
    assert report.multiple_choice[0].mcnemar_p == 1
    assert report.multiple_choice[0].same_prediction == 1


def test_a_limit_of_0_takes_all_questions(small_moe, data, tmp_path) -> None:
    few = tmp_path / "questions.jsonl"
    few.write_text("\n".join(data["mmlu_data"].read_text().splitlines()[:3]) + "\n")
    asked = {**data, **SMALL, "mmlu_data": few, "limit": 0, "num_shots": 0, "text": []}
    report = evaluated(small_moe, small_moe, tasks={"mmlu"}, scoring=["letter"], **asked)
    assert report.multiple_choice[0].questions == 3


def test_intervals_are_the_same_in_pieces(monkeypatch) -> None:
    values = np.random.default_rng(3).normal(size=5000)
    whole = bootstrap_mean(values, [5000])
    monkeypatch.setattr(statistics, "_PICKS_AT_ONCE", 7 * 79)
    assert bootstrap_mean(values, [5000]) == whole


def test_perplexity_alone_reports_no_divergence(small_moe, data) -> None:
    report = evaluated(small_moe, small_moe, tasks=["ppl"], text=data["text"], **SMALL | {"max_tokens": 64})
    assert report.texts[0].kl is None
    assert report.multiple_choice == []


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"tasks": set()}, r"--tasks names none; give some of generate, kl"),
        ({"tasks": {"kl"}, "text": []}, "need a text"),
        ({"tasks": {"kl"}, "window": 4096}, "does not fit the context of 1024"),
        ({"tasks": {"mmlu"}, "shots": None, "num_shots": 1000}, "No subject has more than the 1000 questions"),
        ({"tasks": {"kl"}, "text": [Path("absent.txt")]}, "There is no text"),
    ],
)
def test_unusable_options_are_refused_before_any_model_is_loaded(small_moe, data, options, reason, monkeypatch) -> None:
    monkeypatch.setattr(evaluate_module.runners, "open_runner", lambda *_: pytest.fail("a model was loaded"))
    with pytest.raises(EvaluationError, match=reason):
        evaluated(small_moe, small_moe, **{**data, **SMALL, **options})


@pytest.mark.parametrize("output", ["model.gguf", "out/ -f compressed-tensors"])
def test_a_plan_of_a_language_model_is_to_be_exported_first(small_moe, moe_model, data, tmp_path, output) -> None:
    plan, checkpoint = tmp_path / "plan.json", linear_checkpoint(moe_model)
    for_vllm = plan_for_vllm(moe_model, checkpoint, uniform_schemes("uniform-w4a16", checkpoint), recipe="test")
    (plan_of(moe_model, "Q8_0") if output == "model.gguf" else for_vllm).save(plan)
    pictures = tmp_path / "pictures.jsonl"
    for candidate in (plan, tmp_path):
        for how in (("--text", data["text"][0]), ("--data", pictures, "--tasks", "kl")):
            said = refused("eval", candidate, "--reference", small_moe, *how)
            assert f"{candidate} is a plan, and plans are evaluated as they are only of vision-language models" in said
            assert f"Export it (`dynquant export {small_moe} --plan {plan} -o {output}`)" in said


def info(vocab_size: int, num_named: int, name: str) -> ModelInfo:
    return ModelInfo(Path(name), "llama.cpp", vocab_size, 512, num_named)


def test_vocabularies_may_differ_only_by_padding() -> None:
    plain, padded = info(100, 100, "plain"), info(128, 100, "padded")
    assert common_columns(plain, plain) == (100, [])
    for pair in ((plain, padded), (padded, plain)):
        columns, [note] = common_columns(*pair)
        assert columns == 100
        assert "padded: the last 28 logits" in note
    with pytest.raises(EvaluationError, match=r"plain has .* 100 tokens and larger one of 128"):
        common_columns(plain, replace(info(128, 128, "larger")))


def test_windows_cut_the_text_and_start_with_bos_only_if_the_tokenizer_adds_it(tmp_path: Path) -> None:
    path = tmp_path / "t.jsonl"
    path.write_text('{"text": "abcdefg"}\n{"text": "hi"}\n')

    def plain(text: str, *, add_special: bool = True) -> list[int]:
        return [ord(c) for c in text]

    def with_bos(text: str, *, add_special: bool = True) -> list[int]:
        return [1] * add_special + plain(text)

    def windows(path: Path, *arguments, **limits) -> list[list[int]]:
        return [batch.ids[0].tolist() for batch in evaluation_windows(path, *arguments, **limits)]

    joined = [ord(c) for c in "abcdefg\n\nhi"]
    assert windows(path, plain, window=4, max_tokens=9) == [joined[:4], joined[4:8]]
    assert windows(path, with_bos, window=4, max_tokens=7) == [[1, *joined[:3]], [1, *joined[3:6]], [1, 103]]
    path.write_text('{"text": "a\u2028b"}\n\n', encoding="utf-8")
    assert windows(path, plain, window=4, max_tokens=9) == [[97, 0x2028, 98]]
    path.write_text('{"words": "x"}\n')
    with pytest.raises(EvaluationError, match=r't\.jsonl, line 1 .*"text"'):
        windows(path, plain, window=4, max_tokens=7)


def test_blocks_never_cross_a_window() -> None:
    sums, sizes = block_sums(np.ones(300), [150, 150])
    assert sizes.tolist() == [64, 64, 22, 64, 64, 22]
    assert sums.tolist() == sizes.tolist()
    with pytest.raises(ValueError, match="300"):
        block_sums(np.ones(300), [150])


def test_block_bootstrap_sees_that_neighbours_are_correlated() -> None:
    rng = np.random.default_rng(0)
    block_means = rng.normal(size=100)
    values = np.repeat(block_means, 64)
    estimate = bootstrap_mean(values, [6400])
    half_width = 1.96 / np.sqrt(100)  # the means vary with standard deviation 1; treating tokens as independent: / 8
    assert estimate.value == pytest.approx(block_means.mean())
    assert (estimate.high - estimate.low) / 2 == pytest.approx(half_width, rel=0.2)


def test_wilson_interval_has_the_published_values() -> None:
    estimate = wilson_interval(8, 10)
    assert (estimate.value, estimate.low, estimate.high) == pytest.approx((0.8, 0.4902, 0.9433), abs=1e-4)
    assert wilson_interval(0, 5).low == 0
    assert wilson_interval(5, 5).high == 1
    with pytest.raises(ValueError, match="6 of 5"):
        wilson_interval(6, 5)


@pytest.mark.parametrize(
    ("only_first", "only_second", "p"), [(0, 0, 1.0), (1, 9, 22 / 1024), (9, 1, 22 / 1024), (5, 5, 1.0), (0, 6, 2 / 64)]
)
def test_mcnemar_is_the_exact_binomial_test(only_first: int, only_second: int, p: float) -> None:
    assert mcnemar_exact(only_first, only_second) == pytest.approx(p)


def test_mcnemar_survives_large_counts() -> None:
    assert 0 < mcnemar_exact(3000, 3300) < 0.001


def test_models_of_two_kinds_are_named_before_anything_runs(packed_moe, small_moe, data, tmp_path, monkeypatch) -> None:
    """Two architectures may share a vocabulary: a comparison would say nothing of quantization."""
    monkeypatch.setattr(evaluate_module.runners, "open_runner", lambda *_, **__: pytest.fail("a model was loaded"))
    llama = save_tiny("llama", tmp_path / "llama", small_moe)
    shallow = edited_config(small_moe, tmp_path / "shallow", lambda config: config.update(num_hidden_layers=5))
    for candidate, reference, words in (
        (packed_moe.gguf, llama, ["`llama` with", "`deepseek2` with 6 layers and a width of 256"]),
        (llama, small_moe, ["`llama` with", "`deepseek_v3` (`deepseek2` in GGUF) with 6 layers"]),
        (packed_moe.gguf, shallow, ["with 5 layers", "with 6 layers"]),
    ):
        with pytest.raises(
            EvaluationError, match=r"two different models: .*as --reference.*--allow-difference"
        ) as said:
            evaluated(candidate, reference, tasks=["kl"], text=data["text"], **SMALL)
        assert all(word in str(said.value) for word in [*words, str(candidate), str(reference)])
    said = refused("tune", packed_moe.gguf, "--reference", llama, "-o", tmp_path / "tuned.gguf")
    assert "`llama`" in said and "`deepseek2`" in said
    said = refused("heal", packed_moe.gguf, "--reference", llama, "-o", tmp_path / "healed")
    assert "`llama`" in said and "`deepseek2`" in said
    base = write_f32(open_model(llama), tmp_path / "base.gguf")
    for step, name in (("plan", "out"), ("calibrate", "out.safetensors"), ("export", "out.gguf")):
        budget = {"plan": ["--bpw", 4], "export": ["--preset", "f16"]}.get(step, [])
        said = refused(step, small_moe, "--base-gguf", base, *budget, "-o", tmp_path / name)
        assert "`llama`" in said and "`deepseek2`" in said and "as --base-gguf" in said
    assert not any(
        (tmp_path / name).exists() for name in ("tuned.gguf", "healed", "out", "out.safetensors", "out.gguf")
    )


def test_a_difference_of_kinds_that_is_allowed_is_noted(small_moe, data, tmp_path) -> None:
    llama = save_tiny("llama", tmp_path / "llama", small_moe, max_position_embeddings=256)
    asked = {**SMALL, "max_tokens": 64, "window": 64}
    report = evaluated(llama, small_moe, tasks=["kl"], text=data["text"], allow_difference=True, **asked)
    assert report.texts[0].kl.mean.value > 1
    assert any("`llama`" in note and "`deepseek_v3`" in note for note in report.notes)


@pytest.mark.parametrize(
    "name, content", [("e.txt", ""), ("b.txt", " \n\n\t\n"), ("b.jsonl", '{"text": " "}\n{"text": ""}\n')]
)
def test_a_text_of_nothing_but_space_measures_nothing(name: str, content: str, tmp_path: Path) -> None:
    (tmp_path / name).write_text(content)
    with pytest.raises(EvaluationError, match=rf"The text {name} is empty"):
        evaluation_windows(tmp_path / name, lambda text, **_: [*text.encode()], window=8, max_tokens=8)
