"""Tasks of lm-evaluation-harness on our runners: the harness's own model class gives the same answers and scores."""

import json
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from dynquant.errors import EvaluationError
from dynquant.evaluation.report import EvalReport
from dynquant.evaluation.tasks.harness_results import summarize_task
from tests.helpers.commands import linked_copy
from tests.helpers.evaluating import evaluated

RUN = {"threads": 1, "device": "cpu"}
CHOICES = """
task: local_choices
dataset_path: json
dataset_kwargs: {data_files: {test: QUESTIONS}}
output_type: multiple_choice
test_split: test
doc_to_text: "Question: {{question}}\\nAnswer:"
doc_to_choice: "{{choices}}"
doc_to_target: "{{answer}}"
metric_list: [{metric: acc}, {metric: acc_norm}]
"""
TEXTS = """
task: local_texts
dataset_path: json
dataset_kwargs: {data_files: {test: TEXTS}}
output_type: loglikelihood_rolling
test_split: test
doc_to_text: ""
doc_to_target: "{{question}}"
metric_list: [{metric: byte_perplexity}]
"""
CODE = """
task: local_code
dataset_path: json
dataset_kwargs: {data_files: {test: QUESTIONS}}
output_type: generate_until
unsafe_code: true
test_split: test
doc_to_text: "{{question}}"
doc_to_target: ""
generation_kwargs: {max_gen_toks: 4, until: ["\\n\\n"]}
process_results: !function scorer.runs
metric_list: [{metric: runs, aggregation: mean, higher_is_better: true}]
"""


@pytest.fixture(scope="module")
def folder(small_moe: Path, tmp_path_factory) -> Path:
    """Task files, and data of gsm8k as the hub has them."""
    folder = tmp_path_factory.mktemp("harness")
    lines = (small_moe.parent / "demo_questions.jsonl").read_text().splitlines()[:6]
    (folder / "questions.jsonl").write_text("\n".join(lines) + "\n")
    for name, text in (("choices", CHOICES), ("texts", TEXTS), ("code", CODE)):
        named = text.replace("QUESTIONS", str(folder / "questions.jsonl")).replace("TEXTS", str(folder / "texts.jsonl"))
        (folder / f"{name}.yaml").write_text(named)
    longer = (small_moe.parent / "demo_text.txt").read_text()[:6000]  # than the context of 1,024 tokens
    (folder / "texts.jsonl").write_text("".join(json.dumps({"question": text}) + "\n" for text in (longer, "A word.")))
    (folder / "scorer.py").write_text("def runs(doc, results):\n    return {'runs': float(eval('1 + 1') == 2)}\n")
    sums = [
        {"question": f"Tom has {a} apples, and gets 2. How many has he?", "answer": f"#### {a + 2}"} for a in range(9)
    ]
    (folder / "gsm8k" / "main").mkdir(parents=True)
    for split, rows in (("test", sums[:4]), ("train", sums[4:])):
        text = "".join(json.dumps(row) + "\n" for row in rows)
        (folder / "gsm8k" / "main" / f"{split}-00000.jsonl").write_text(text)
    return folder


@pytest.fixture(scope="module")
def lm_eval():
    return pytest.importorskip("lm_eval", reason="lm-evaluation-harness is not installed (extra `tasks`)")


@pytest.mark.nightly
def test_both_runners_answer_as_the_model_class_of_the_harness(lm_eval, small_moe, f32_moe, folder, tmp_path) -> None:
    from lm_eval.models.huggingface import HFLM

    asked = {"tasks": [str(folder / "choices.yaml"), str(folder / "texts.yaml"), "gsm8k"], "task_data": folder}
    options = asked | {"new_tokens": 12, "num_shots": 2, "reference_cache": tmp_path, **RUN}
    report = evaluated(f32_moe, small_moe, **options)
    assert EvalReport.model_validate_json(report.to_json()) == report
    choices, texts, sums = report.harness
    assert (choices.name, choices.tasks, sums.name, sums.num_shots) == ("choices", {"local_choices": 6}, "gsm8k", 2)

    train = {"train": str(folder / "gsm8k" / "main" / "train-00000.jsonl")}
    files = {"test": str(folder / "gsm8k" / "main" / "test-00000.jsonl"), **train}
    overrides = {"dataset_path": "json", "dataset_name": None, "dataset_kwargs": {"data_files": files}}
    theirs = lm_eval.simple_evaluate(
        HFLM(pretrained=str(small_moe), dtype="float32", device="cpu", batch_size=1),
        tasks=[
            str(folder / "choices.yaml"),
            str(folder / "texts.yaml"),
            {"group": "sums", "task": [{"task": "gsm8k", **overrides}]},
        ],
        gen_kwargs={"max_gen_toks": 12},
        num_fewshot=2,
        bootstrap_iters=0,
    )
    for metric in choices.metrics:
        expected = [float(sample[metric.name]) for sample in theirs["samples"]["local_choices"]]
        assert list(metric.reference_values) == list(metric.candidate_values) == expected
    (perplexity,) = texts.metrics
    expected = theirs["results"]["local_texts"]["byte_perplexity,none"]
    np.testing.assert_allclose([perplexity.reference.value, perplexity.candidate.value], expected, rtol=1e-4)
    answers = {sample["doc_id"]: sample["resps"][0][0] for sample in theirs["samples"]["gsm8k"]}
    assert {answer.question: answer.reference for answer in sums.answers} == answers
    assert [answer.candidate for answer in sums.answers] == [answer.reference for answer in sums.answers]
    assert {metric.filter for metric in sums.metrics} == {"strict-match", "flexible-extract"}
    assert any("exact_match, strict-match" in row[0] for row in report.rows())
    assert evaluated(f32_moe, small_moe, **options).harness == report.harness  # the original's from the cache


@pytest.mark.nightly
def test_a_quantized_file_is_compared_on_few_questions_of_one_file(lm_eval, small_moe, packed_moe, folder) -> None:
    asked = {"tasks": ["gsm8k"], "task_data": folder / "gsm8k" / "main" / "train-00000.jsonl", "limit": 2}
    report = evaluated(packed_moe.gguf, small_moe, num_shots=3, new_tokens=4, **asked, **RUN)
    (result,) = report.harness
    assert [answer.question for answer in result.answers] == [1, 3] or result.num_questions == 2
    assert any("Shots of gsm8k are other questions" in note for note in report.notes)
    assert result.metrics[0].mcnemar_p is not None


@pytest.mark.nightly
def test_questions_are_asked_in_the_chat_template_of_the_original(lm_eval, small_moe, folder, tmp_path) -> None:
    original = linked_copy(small_moe, tmp_path / "chat")
    settings = json.loads((original / "tokenizer_config.json").read_text())
    settings["chat_template"] = "{% for m in messages %}<{{ m.role }}> {{ m.content }}\n{% endfor %}<assistant>"
    (original / "tokenizer_config.json").unlink()
    (original / "tokenizer_config.json").write_text(json.dumps(settings))
    asked = {"tasks": ["gsm8k"], "task_data": folder, "num_shots": 1, "new_tokens": 4, "limit": 2, **RUN}
    plain, chat = (evaluated(original, original, chat=is_chat, **asked).harness[0] for is_chat in (False, True))
    assert plain.tasks == chat.tasks == {"gsm8k": 2} and plain.sha256 != chat.sha256
    assert all(answer.reference == answer.candidate for answer in chat.answers)


@pytest.mark.nightly
def test_code_runs_only_where_that_is_allowed(lm_eval, small_moe, folder) -> None:
    asked = {"tasks": [str(folder / "code.yaml")], "limit": 2, **RUN}
    with pytest.raises(EvaluationError, match="--allow-code-execution"):
        evaluated(small_moe, small_moe, **asked)
    (result,) = evaluated(small_moe, small_moe, allow_code_execution=True, **asked).harness
    assert result.metrics[0].reference.value == 1


@pytest.mark.nightly
@pytest.mark.parametrize(
    ("asked", "said"),
    [
        ({"tasks": ["gsm8q"]}, "nearest names are gsm8k"),
        ({"tasks": ["missing.yaml"]}, "no task file missing.yaml"),
        ({"tasks": ["arc_easy"], "task_data": True}, "neither arc_easy.jsonl nor arc_easy/test.jsonl"),
        ({"tasks": ["gsm8k"], "task_data": True, "chat": True}, "no chat template"),
        ({"tasks": ["gsm8k"], "task_data": True, "new_tokens": 100_000}, "Give --new-tokens with a smaller number"),
        ({"tasks": ["humaneval"]}, "runs the code that models write"),
        ({"tasks": ["humaneval"], "allow_code_execution": True}, "put code_eval/ of huggingface/evaluate"),
    ],
)
def test_what_a_task_lacks_is_said(lm_eval, small_moe, folder, asked, said) -> None:
    if "task_data" in asked:
        asked = asked | {"task_data": folder}
    with pytest.raises(EvaluationError, match=said):
        evaluated(small_moe, small_moe, **asked, **RUN)


@pytest.mark.nightly
def test_tasks_that_would_take_each_others_place_are_refused(lm_eval, small_moe, folder, tmp_path) -> None:
    other = tmp_path / "other.yaml"
    other.write_text((folder / "choices.yaml").read_text())
    with pytest.raises(EvaluationError, match=r"other\.yaml has the name of another task"):
        evaluated(small_moe, small_moe, tasks=[str(folder / "choices.yaml"), str(other)], **RUN)
    with pytest.raises(EvaluationError, match="is one file, and several tasks"):
        evaluated(small_moe, small_moe, tasks=["mmlu_stem"], task_data=folder / "questions.jsonl", **RUN)


def test_the_extra_is_named_where_the_harness_is_not_installed(small_moe, monkeypatch) -> None:
    for name in [name for name in sys.modules if name.startswith("dynquant.evaluation.tasks.harness")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    with pytest.raises(EvaluationError, match=r"gsm8k is none of .*need the package lm_eval.*\[tasks\]"):
        evaluated(small_moe, small_moe, tasks=["gsm8k"], **RUN)


def test_questions_are_compared_one_by_one_and_scores_of_all_by_drawing() -> None:
    def root(values: list[tuple[float, float]]) -> float:
        return sum(a for a, _ in values) / sum(b for _, b in values)

    def mean(values: list[float]) -> float:
        return sum(values) / len(values)

    task = SimpleNamespace(
        config=SimpleNamespace(num_fewshot=3),
        OUTPUT_TYPE="generate_until",
        higher_is_better=lambda: {"right": True, "ratio": False},
        aggregation=lambda: {"right": mean, "ratio": root, "score": mean},
    )

    def logged(number: int, right: int, ratio: float) -> dict:
        return {
            "doc_id": number, "target": "4", "resps": [[f"It is {right}."]], "filter": "none", "right": right,
            "metrics": ["right", "ratio", "score"], "ratio": (ratio, 1 + number), "score": right + 0.5,
            "doc_hash": "a", "prompt_hash": "b", "target_hash": "c",
        }  # fmt: skip

    before = {"sums": [logged(i, i % 2, 1.0 + i) for i in range(8)]}
    after = {"sums": [logged(i, int(i == 0), 2.0 + 2 * i) for i in range(8)]}
    result = summarize_task("sums", {"sums": task}, before, after)
    right, ratio, score = result.metrics
    assert (right.only_reference_right, right.only_candidate_right) == (4, 1)
    assert (right.reference.value, right.candidate.value, right.difference.value) == (0.5, 0.125, -0.375)
    assert (ratio.reference.value, ratio.candidate.value, ratio.difference.value) == (1.0, 2.0, 1.0)
    assert ratio.difference.low == pytest.approx(1) and not ratio.higher_is_better and ratio.mcnemar_p is None
    assert score.mcnemar_p is None and score.reference.value == 1
    assert (result.num_questions, result.num_shots, result.answers[0].candidate) == (8, 3, "It is 1.")
