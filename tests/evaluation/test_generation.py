"""Continuations that two models write after the same prompts."""

from pathlib import Path

import pytest

from dynquant.errors import EvaluationError
from dynquant.evaluation.report import EvalReport
from dynquant.evaluation.runners import open_runner
from dynquant.evaluation.tasks.generation import Continuations, Prompts, summarize_generation
from dynquant.inputs.written import is_loop
from tests.helpers.commands import succeed
from tests.helpers.evaluating import evaluated

SMALL = {"tasks": {"generate"}, "max_tokens": 1024, "prompts": 6, "new_tokens": 12, "threads": 1, "device": "cpu"}


@pytest.fixture(scope="module")
def text(small_moe: Path) -> dict:
    return {"text": [small_moe.parent / "demo_text.txt"], **SMALL}


def test_loops_are_blocks_that_stand_at_the_end_three_times() -> None:
    other = list(range(100, 130))
    assert is_loop(other + [7] * 24)
    assert is_loop(other + [1, 2, 3] * 8)
    assert is_loop(other + list(range(10)) * 3)
    assert not is_loop(other + list(range(10)) * 2)
    assert not is_loop(other + [7] * 20)  # a line of a table
    assert not is_loop([7] * 24 + other)
    assert not is_loop([])


def test_models_are_compared_prompt_by_prompt() -> None:
    stop = frozenset({9})
    before = Continuations([[1, 2, 9], [1, 2, 3, 4], [5, 5, 5, 5]], stop)
    after = Continuations([[1, 2, 9], [1, 2, 4, 4], [5, 9]], stop)
    result = summarize_generation(Prompts("text", "hash", [[0]] * 3), before, after, 4)
    assert result.shared_tokens.value == pytest.approx((4 + 2 + 1) / 3)  # the first pair never parts
    assert result.quartiles == (1.5, 2.0, 3.0)
    assert result.never_part.value == pytest.approx(1 / 3)
    assert result.reference.ends.value == pytest.approx(1 / 3)
    assert result.candidate.ends.value == pytest.approx(2 / 3)
    assert result.candidate.length.value == pytest.approx(3)
    assert Continuations.from_tensors(**after.tensors()) == after


def test_an_unquantized_file_writes_what_its_original_does(small_moe: Path, f32_moe: Path, text, tmp_path) -> None:
    report = evaluated(f32_moe, small_moe, reference_cache=tmp_path, **text)
    (result,) = report.generated
    assert (result.prompts, result.new_tokens, result.never_part.value) == (6, 12, 1.0)
    assert result.reference == result.candidate
    assert EvalReport.model_validate_json(report.to_json()) == report
    cached = evaluated(f32_moe, small_moe, reference_cache=tmp_path, **text)
    assert cached.generated == report.generated


@pytest.mark.nightly
def test_a_quantized_file_parts_in_both_programs(small_moe: Path, packed_moe, text) -> None:
    results = [evaluated(packed_moe.gguf, small_moe, runner=name, **text) for name in ("llama.cpp", "transformers")]
    for result in (report.generated[0] for report in results):
        assert 0 < result.shared_tokens.value < 12
        assert result.never_part.value < 1
    assert "never part" in [row[0].strip() for row in results[0].rows()]


@pytest.mark.nightly
def test_the_cache_of_keys_and_values_is_measured_with_the_weights(small_moe: Path, f32_moe: Path, text) -> None:
    options = text | {"tasks": {"kl"}, "max_tokens": 256, "window": 128}
    exact, eight, four = (
        evaluated(f32_moe, small_moe, kv_type=types, **options).texts[0].kl.mean.value
        for types in ((), ("q8_0",), ("q4_0", "q4_0"))
    )
    assert abs(exact) < 1e-6 < eight < four


@pytest.mark.nightly
def test_the_report_of_a_plan_shows_what_its_file_writes(small_moe: Path, tiny_moe: Path, tmp_path) -> None:
    few = ("--tokens", 512, "--window", 128, "--hessians", "none", "--encoder", "ggml", "--types", "q4_k,q6_k")
    succeed("plan", tiny_moe, "--bpw", "5.5", *few, "-o", tmp_path)
    file = tmp_path / "model.gguf"
    succeed("export", tiny_moe, "--plan", tmp_path / "plan.json", "--encoder", "ggml", "-o", file)
    text = ("--text", small_moe.parent / "demo_text.txt", "--prompts", 2, "--new-tokens", 4)
    succeed("eval", file, "--reference", tiny_moe, "--tasks", "generate", *text)
    page = (tmp_path / "report.html").read_text()
    assert "tokens until they part" in page and "end in a loop" in page


@pytest.mark.nightly
def test_the_same_tokens_are_scored_behind_every_length_of_context(small_moe: Path, f32_moe: Path, text) -> None:
    options = text | {"tasks": {"kl"}, "max_tokens": 2048, "contexts": ("512", "1024", "16384"), "kv_type": ("q8_0",)}
    report = evaluated(f32_moe, small_moe, **options)
    short, long = report.texts
    assert (short.window, long.window, short.windows, long.windows) == (512, 1024, 2, 2)
    assert short.scored_tokens == long.scored_tokens == 2 * 256
    assert short.reference_perplexity.value > long.reference_perplexity.value  # more is known of the same tokens
    assert min(short.kl.mean.value, long.kl.mean.value) > 1e-6
    assert any("have 1,024 tokens of context" in note for note in report.notes)


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"kv_type": ("q8_0", "q4_0")}, "different K .* and V .* Give another, as q8_0"),  # of this architecture
        ({"contexts": ("100",)}, "--contexts 100: give whole numbers of tokens from 512 on"),
        ({"tasks": {"kl"}, "contexts": ("4096",)}, "the models have 1,024 tokens of context; give shorter ones"),
        ({"kv_type": ("q8_0",) * 3}, "--kv-type q8_0,q8_0,q8_0: give one type"),
        ({"new_tokens": 100_000}, "do not fit the context"),
        ({"kv_type": ("q8_0",), "runner": "transformers"}, "no GGUF file that runs there"),
    ],
)
def test_what_cannot_be_done_is_refused(small_moe: Path, f32_moe: Path, text, changed, said) -> None:
    with pytest.raises(EvaluationError, match=said):
        evaluated(f32_moe, small_moe, **text | changed)


@pytest.mark.parametrize("program", ["transformers", "llama.cpp"])
def test_prompts_of_several_lengths_are_gone_on_from_together(small_moe: Path, f32_moe: Path, program) -> None:
    runner = open_runner(small_moe if program == "transformers" else f32_moe, threads=1, device="cpu")
    prompts = [[5, 6, 7, 8], [5, 6, 7, 9, 10, 11], [5, 6], [40, 41, 42, 43, 44]]
    together = [ids for group in runner.write(prompts, 6, frozenset()) for ids in group]
    alone = [ids for prompt in prompts for group in runner.write([prompt], 6, frozenset()) for ids in group]
    assert together == alone and {len(ids) for ids in alone} == {6}
    third = alone[0][2]
    ended = [ids for group in runner.write(prompts, 6, frozenset(), lambda ids: third in ids) for ids in group]
    runner.close()
    for ids, whole in zip(ended, alone, strict=True):
        end = whole.index(third) + 1 if third in whole else len(whole)
        assert ids[:end] == whole[:end]
    assert len(set(map(len, ended))) > 1 or program == "transformers"  # which fills rows up to the longest
