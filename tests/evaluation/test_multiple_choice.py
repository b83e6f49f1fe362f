"""Prompts, tokenization and scores of multiple-choice questions, against lm-evaluation-harness itself."""

import json
import re
from pathlib import Path

import numpy as np
import pytest

from dynquant.errors import EvaluationError
from dynquant.evaluation.evaluate import check_readable
from dynquant.evaluation.options import TaskOptions
from dynquant.evaluation.runners import open_encoder, open_runner
from dynquant.evaluation.tasks.multiple_choice import (
    AnswerScores,
    EncodedQuestion,
    answer_texts,
    encode_questions,
    load_asked,
    render_prompt,
    score_questions,
)
from dynquant.inputs.questions import Question, load_questions, split_shots, take_evenly

SHOT = Question(subject="high_school_physics", question=" What falls? ", choices=("up", "a stone"), answer=1)
ASKED = Question(subject="high_school_physics", question="What is hot?", choices=("the sun", "ice"), answer=0)

LETTER_PROMPT = """The following are multiple choice questions (with answers) about high school physics.

What falls?
A. up
B. a stone
Answer: B

What is hot?
A. the sun
B. ice
Answer:"""

CLOZE_PROMPT = """The following are questions (with answers) about high school physics.

Question: What falls?
Answer: a stone

Question: What is hot?
Answer:"""


def encode_words(text: str, *, add_special: bool = True) -> list[int]:
    return [hash(word) % 1000 for word in text.split(" ")]


def test_prompts_are_those_of_mmlu() -> None:
    assert render_prompt(ASKED, [SHOT], "letter") == LETTER_PROMPT
    assert render_prompt(ASKED, [SHOT], "cloze") == CLOZE_PROMPT


def test_cloze_compares_per_byte_and_letters_do_not() -> None:
    question = Question(subject="s", question="q", choices=("ab", "abcdé"), answer=1)
    scores = AnswerScores(question, np.array([-2.0, -4.0]))
    assert scores.prediction("letter") == 0
    assert scores.prediction("cloze") == 1  # -2/2 against -4/6: é is two bytes
    assert scores.probability_among_choices("letter") == pytest.approx(1 / (1 + np.exp(2)))
    assert scores.probability == pytest.approx(np.exp(-4))


def test_oldest_shots_are_dropped_to_fit_and_counted() -> None:
    shots = [SHOT.model_copy(update={"question": f"Question number {i}?"}) for i in range(4)]
    whole = encode_questions([ASKED], shots, "letter", encode_words, num_shots=4, context_length=1000)[0]
    cut = encode_questions([ASKED], shots, "letter", encode_words, num_shots=4, context_length=len(whole.prompt) - 1)[0]
    assert (whole.dropped_shots, cut.dropped_shots) == (0, 1)
    assert cut.prompt == tuple(encode_words(render_prompt(ASKED, shots[1:], "letter")))
    with pytest.raises(EvaluationError, match="more than the context of 5"):
        encode_questions([ASKED], shots, "letter", encode_words, num_shots=4, context_length=5)


def test_a_subject_without_enough_shots_is_named() -> None:
    with pytest.raises(EvaluationError, match="'high_school_physics' has 1 example questions, but 2"):
        encode_questions([ASKED], [SHOT], "letter", encode_words, num_shots=2, context_length=1000)


def test_the_first_of_each_subject_are_examples_where_no_others_are_given() -> None:
    questions = [ASKED.model_copy(update={"subject": str(i % 3), "question": f"{i}?"}) for i in range(10)]
    shots, others = split_shots(questions, 2)
    assert [shot.question for shot in shots] == [f"{i}?" for i in range(6)] and shots + others == questions
    with pytest.raises(EvaluationError, match="No subject has more than the 4 questions"):
        split_shots(questions, 4)


def test_a_prompt_is_encoded_behind_the_last_lines_of_its_shots() -> None:
    """Also by tokenizers that join a newline to the full stop before it, as those of Qwen and Llama 3."""
    lengths: list[int] = []

    def encode(text: str, *, add_special: bool = True) -> list[int]:
        lengths.append(len(text))
        return [hash(piece) % 1000 for piece in re.findall(r" ?\w+|[^\w\s]+\n*|\s+", text)]

    long = SHOT.model_copy(update={"question": "Of two bodies, which one falls?" * 10, "choices": ("up.", "a stone.")})
    asked = [ASKED.model_copy(update={"choices": (f"the sun {i}.", "ice.")}) for i in range(20)]
    encoded = encode_questions(asked, [long], "letter", encode, num_shots=1, context_length=1000)
    assert sum(length > 300 for length in lengths) == 1
    for item in encoded:
        text = render_prompt(item.question, [long], "letter")
        assert list(item.prompt) == encode(text)
        assert [[*item.prompt, *answer] for answer in item.answers] == [encode(f"{text} A"), encode(f"{text} B")]


def test_limit_keeps_every_subject() -> None:
    questions = [ASKED.model_copy(update={"subject": str(i // 10)}) for i in range(100)]
    taken = take_evenly(questions, 20)
    assert [q.subject for q in taken] == [str(i // 2) for i in range(20)]
    assert take_evenly(questions, None) == questions
    with pytest.raises(EvaluationError, match="at least 1"):
        take_evenly(questions, 0)


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ("{", "Expecting"),
        ('{"subject": "s", "question": "q", "choices": ["a", "b"], "answer": 2}', "answer 2 is not an index"),
        ('{"subject": "s", "question": "q", "choices": ["a", " "], "answer": 0}', "a choice is empty"),
        ('{"subject": "s", "question": "q", "answer": 0}', "`choices` is missing"),
    ],
)
def test_malformed_lines_are_named(tmp_path: Path, line: str, reason: str) -> None:
    path = tmp_path / "q.jsonl"
    path.write_text(ASKED.model_dump_json() + "\n" + line + "\n")
    with pytest.raises(EvaluationError, match=rf"q\.jsonl, line 2 .*{reason}"):
        load_questions(path)


def test_missing_and_empty_files_are_refused(tmp_path: Path) -> None:
    with pytest.raises(EvaluationError, match="does not exist"):
        load_questions(tmp_path / "absent.jsonl")
    (tmp_path / "empty.jsonl").write_text("\n")
    with pytest.raises(EvaluationError, match="no questions"):
        load_questions(tmp_path / "empty.jsonl")


@pytest.fixture(scope="module")
def questions(small_moe: Path) -> list[Question]:
    return take_evenly(load_questions(small_moe.parent / "demo_questions.jsonl"), 12)


@pytest.fixture(scope="module")
def shots(small_moe: Path) -> list[Question]:
    return load_questions(small_moe.parent / "demo_shots.jsonl")


def encode_for(small_moe: Path, questions, shots, scoring) -> list[EncodedQuestion]:
    with open_encoder(small_moe) as encode:
        return encode_questions(questions, shots, scoring, encode, num_shots=3, context_length=1024)


@pytest.mark.parametrize("scoring", ["letter", "cloze"])
def test_answers_are_what_they_add_to_the_whole_prompt(small_moe, questions, shots, scoring) -> None:
    with open_encoder(small_moe) as encode:
        for item in encode_for(small_moe, questions, shots, scoring):
            given = [shot for shot in shots if shot.subject == item.question.subject][item.dropped_shots : 3]
            text = render_prompt(item.question, given, scoring)
            assert item.prompt == tuple(encode(text))
            for answer, ids in zip(answer_texts(item.question, scoring), item.answers, strict=True):
                assert ids == tuple(encode(f"{text} {answer}")[len(item.prompt) :])


def test_sharing_the_prefix_changes_no_score(small_moe, questions, shots) -> None:
    encoded = encode_for(small_moe, questions[:4], shots, "cloze")
    runner = open_runner(small_moe, threads=1, device="cpu")
    found = score_questions(runner, encoded, 8192, lambda *_: None)
    for item, scores in zip(encoded, found, strict=True):
        for answer, log_prob in zip(item.answers, scores.log_probs, strict=True):
            logits = runner.window_logits([*item.prompt, *answer]).double().log_softmax(-1)
            rows = range(len(item.prompt) - 1, len(item.prompt) + len(answer) - 1)
            alone = sum(float(logits[row, token]) for row, token in zip(rows, answer, strict=True))
            assert log_prob == pytest.approx(alone, abs=1e-4)


def harness_task(name: str, scoring: str, subject: str, files: dict[str, str]) -> dict:
    """The harness's own MMLU template (tasks/mmlu), pointed at local files of one subject."""
    kind = "multiple choice questions" if scoring == "letter" else "questions"
    letters = (
        "{{question.strip()}}\nA. {{choices[0]}}\nB. {{choices[1]}}\nC. {{choices[2]}}\nD. {{choices[3]}}\nAnswer:"
    )
    data = {"dataset_path": "json", "dataset_kwargs": {"data_files": files}, "test_split": "test"}
    shots = {"fewshot_split": "dev", "fewshot_config": {"sampler": "first_n"}, "num_fewshot": 3}
    return {
        **data,
        **shots,
        "task": name,
        "output_type": "multiple_choice",
        "description": f"The following are {kind} (with answers) about {subject}.\n\n",
        "doc_to_text": letters if scoring == "letter" else "Question: {{question.strip()}}\nAnswer:",
        "doc_to_choice": ["A", "B", "C", "D"] if scoring == "letter" else "{{choices}}",
        "doc_to_target": "answer" if scoring == "letter" else "{{answer}}",
        "metric_list": [{"metric": "acc"}, {"metric": "acc_bytes"}],
    }


@pytest.mark.nightly  # every run compares the prompts with those of MMLU, and the scores with the model's logits
@pytest.mark.parametrize("scoring", ["letter", "cloze"])
def test_scores_and_accuracy_equal_lm_evaluation_harness(small_moe, shots, scoring, tmp_path) -> None:
    lm_eval = pytest.importorskip("lm_eval", reason="lm-evaluation-harness is not installed (extra `dev`)")
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    questions = load_questions(small_moe.parent / "demo_questions.jsonl")
    subjects = list(dict.fromkeys(q.subject for q in questions))[:3]
    asked = take_evenly([q for q in questions if q.subject in subjects], 9)
    tasks = []
    for subject in subjects:
        files = {}
        for split, rows in (("test", asked), ("dev", shots)):
            file = tmp_path / f"{len(tasks)}-{split}.jsonl"
            file.write_text("".join(json.dumps(q.model_dump()) + "\n" for q in rows if q.subject == subject))
            files[split] = str(file)
        tasks.append(harness_task(f"local_{len(tasks)}", scoring, subject, files))
    model = HFLM(pretrained=str(small_moe), dtype="float32", device="cpu", batch_size=1)
    results = lm_eval.simple_evaluate(
        model, tasks=tasks, task_manager=TaskManager(include_defaults=False), log_samples=True, bootstrap_iters=0
    )
    theirs = {
        sample["doc"]["question"]: ([score for score, _ in sample["filtered_resps"]], sample)
        for samples in results["samples"].values()
        for sample in samples
    }

    encoded = encode_for(small_moe, asked, shots, scoring)
    runner = open_runner(small_moe, threads=1, device="cpu")
    ours = score_questions(runner, encoded, 8192, lambda *_: None)
    runner.close()
    assert len(ours) == len(theirs) == 9
    for scores in ours:
        log_probs, sample = theirs[scores.question.question]
        np.testing.assert_allclose(scores.log_probs, log_probs, atol=1e-3)
        right = scores.prediction(scoring) == scores.question.answer
        assert float(right) == sample["acc" if scoring == "letter" else "acc_bytes"]


def test_shots_of_a_data_set_are_those_of_its_split_for_them(tmp_path, monkeypatch):
    """Also when they are looked at before anything runs."""
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    question = {"subject": "s", "question": "Which?", "choices": ["a", "b"], "answer": 0}
    (tmp_path / "test.jsonl").write_text(json.dumps(question) + "\n")
    shots, split = tmp_path / "shots", {"split": "dev", "path": "dev.jsonl"}
    shots.mkdir()
    (shots / "dev.jsonl").write_text(json.dumps(question | {"question": "Where?"}) + "\n")
    configs = json.dumps([{"config_name": "all", "data_files": [split]}])
    (shots / "README.md").write_text(f"---\nconfigs: {configs}\n---\n")
    options = TaskOptions(tasks=("mmlu",), mmlu_data=str(tmp_path / "test.jsonl"), shots=str(shots))
    check_readable(options)
    asked, examples = load_asked(options)
    assert [[each.question for each in questions] for questions in (asked, examples)] == [["Which?"], ["Where?"]]
