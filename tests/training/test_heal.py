"""Healing: the original distilled into an adapter on its packed model, stopped, resumed, measured, and refused."""

import hashlib
import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from dynquant.errors import CheckpointError, DataError, EvaluationError, OptionError, TrainingError
from tests.helpers.evaluating import evaluated

pytest.importorskip("trl", reason="trl is not installed")
from contextlib import nullcontext

from dynquant.inputs.text import read_text
from dynquant.session import Session, ignore_progress
from dynquant.training import heal as healing
from dynquant.training.options import HealData, HealOptions, TrainOptions
from dynquant.training.run import TrainingReport


def heal(packed, reference, output, data, options, *, device=None, progress=ignore_progress, **more):
    session = Session(device, stage=lambda kept: nullcontext(progress))
    options = HealOptions(packed=packed, reference=reference, output=output, data=data, training=options, **more)
    return healing.heal(options, session)


OPTIONS = TrainOptions(rank=8, learning_rate=3e-3, max_steps=6, batch_size=8, evaluations=3)
ONE_STEP = replace(OPTIONS, max_steps=1)
UNTRAINED = replace(ONE_STEP, learning_rate=0.0)


@pytest.fixture(scope="module")
def cache(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("reference")


def run(
    crushed, cache, output: Path, options=OPTIONS, *, text=None, progress=ignore_progress, questions=None, **more
) -> TrainingReport:
    data = HealData(
        data=str(crushed.text), tokens=2048, window=64, text=[crushed.held_out] if text is None else text,
        max_tokens=256, mmlu_data=questions, shots=questions, num_shots=1 if questions else 5, cache_dir=cache,
    )  # fmt: skip
    return heal(str(crushed.packed), str(crushed.original), output, data, options, progress=progress, **more)


@pytest.fixture(scope="module")
def healed(crushed, cache, tmp_path_factory):
    output = tmp_path_factory.mktemp("healed") / "adapter"
    before = hashlib.sha256((crushed.packed / "model.safetensors").read_bytes()).hexdigest()
    report = run(crushed, cache, output)
    assert hashlib.sha256((crushed.packed / "model.safetensors").read_bytes()).hexdigest() == before
    return output, report


def test_the_kl_on_held_out_text_falls(healed):
    output, report = healed
    kl = report.changes[0]
    assert kl.name == "KL, held-out.txt" and kl.after.value < kl.before.value
    assert report.gap_closed["held-out.txt"].low > 0
    losses = [point.held_out for point in report.history if point.held_out is not None]
    assert len(losses) == 4 and losses[-1] < losses[0] and report.has_helped
    assert {file.name for file in output.iterdir()} == {
        "adapter_config.json", "adapter_model.safetensors", "training.json", "loss.png", "loss.svg",
    }  # fmt: skip
    assert TrainingReport.model_validate_json((output / "training.json").read_text()) == report
    assert not list(output.parent.glob(".*"))


def test_the_saved_adapter_gives_what_was_reported(crushed, healed):
    output, report = healed
    options = {"tasks": ("kl",), "text": [crushed.held_out], "window": 64, "max_tokens": 256}
    found = evaluated(crushed.packed, crushed.original, adapter=output, **options)
    assert found.texts[0].kl.mean.value == pytest.approx(report.changes[0].after.value, rel=1e-5)
    size = (output / "adapter_model.safetensors").stat().st_size
    assert any(f"whose {size:,} bytes are not among its bytes" in note for note in found.notes)
    bare = evaluated(crushed.packed, crushed.original, **options)
    assert bare.texts[0].kl.mean.value == pytest.approx(report.changes[0].before.value, rel=1e-5)


@pytest.mark.nightly
def test_the_adapter_starts_from_what_quantization_took(crushed, cache, healed, tmp_path, monkeypatch):
    """Without any training it is nearer to the original, which is not loaded: all that it said is cached."""

    def refuse(*_, **__):
        raise AssertionError("the original was loaded")

    monkeypatch.setattr(healing, "open_runner", refuse)
    report = run(crushed, cache, tmp_path / "adapter", UNTRAINED)
    kl = report.changes[0]
    assert kl.after.value < 0.95 * kl.before.value and report.gap_closed["held-out.txt"].low > 0
    with pytest.raises(OptionError, match="--start svd is not known; give one of residual, zero"):
        run(crushed, cache, tmp_path / "other", start="svd")


@pytest.mark.nightly
def test_an_adapter_from_zero_starts_further_away(crushed, cache, healed, tmp_path):
    losses = [point.held_out for point in run(crushed, cache, tmp_path / "zero", UNTRAINED, start="zero").history]
    assert losses[0] > healed[1].history[0].held_out


@pytest.mark.nightly
def test_the_adapter_lies_between_its_start_and_the_trained_one(crushed, cache, healed, tmp_path):
    weights = {}
    for share, steps in ((0, 1), (1, OPTIONS.max_steps)):
        report = run(crushed, cache, tmp_path / str(share), replace(OPTIONS, max_steps=steps), blend=share)
        weights[share] = load_file(tmp_path / str(share) / "adapter_model.safetensors")
        assert any("--blend" in note for note in report.notes) == (share == 0)
    default = load_file(healed[0] / "adapter_model.safetensors")
    assert any(not torch.equal(weights[0][name], weights[1][name]) for name in default)
    for name, weight in default.items():
        torch.testing.assert_close(weight, (weights[0][name] + weights[1][name]) / 2, rtol=1e-3, atol=1e-6)


@pytest.mark.gpu
def test_healing_on_a_gpu(crushed, cache, cuda, tmp_path):
    report = run(crushed, cache, tmp_path / "adapter", device=str(cuda))
    assert report.gap_closed["held-out.txt"].low > 0


@pytest.mark.nightly
def test_answers_are_counted_with_and_without_the_adapter(crushed, cache, tmp_path):
    questions = tmp_path / "questions.jsonl"
    words = ["river", "stone", "garden", "candle", "market", "bridge", "letter"]
    lines = [
        {"subject": "words", "question": f"Which word comes {place}?", "choices": words[i : i + 4], "answer": i % 4}
        for i, place in enumerate(("first", "second", "third", "last"))
    ]
    questions.write_text("".join(json.dumps(line) + "\n" for line in lines))
    options = replace(OPTIONS, max_steps=1, store="bfloat16")
    report = run(crushed, cache, tmp_path / "adapter", options, questions=questions)
    stored = load_file(tmp_path / "adapter" / "adapter_model.safetensors").values()
    assert {tensor.dtype for tensor in stored} == {torch.bfloat16}
    accuracy = report.changes[-1]
    scores = {"tasks": ("mmlu",), "mmlu_data": questions, "shots": questions, "num_shots": 1, "scoring": ("letter",)}
    for adapter, stated in ((None, accuracy.before), (tmp_path / "adapter", accuracy.after)):
        found = evaluated(crushed.packed, crushed.original, adapter=adapter, **scores)
        assert found.multiple_choice[0].candidate.accuracy.value == stated.value
    assert accuracy.name == "accuracy" and any("4 questions" in note and "McNemar" in note for note in report.notes)


@pytest.mark.nightly  # the loop is that of `finetune`, whose test is in every run
def test_an_interrupted_run_goes_on_to_the_same_losses(crushed, cache, healed, tmp_path):
    output = tmp_path / "adapter"

    def interrupt(stage, done, total, **_):
        if stage == "train" and done == 5:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(crushed, cache, output, progress=interrupt)
    assert not output.exists() and (tmp_path / ".adapter.training" / "checkpoint-4").is_dir()
    with pytest.raises(TrainingError, match=r"unfinished run with learning_rate = 0.003; this one has 0.01"):
        run(crushed, cache, output, replace(OPTIONS, learning_rate=0.01))
    steps = []
    resumed = run(crushed, cache, output, progress=lambda stage, done, _, **__: steps.append((stage, done)))
    assert [done for stage, done in steps if stage == "train"] == [4, 5, 6]
    for found, expected in zip(resumed.history, healed[1].history, strict=True):
        assert (found.step, found.train is None) == (expected.step, expected.train is None)
        assert (found.train or found.held_out) == pytest.approx(expected.train or expected.held_out, rel=1e-4)
    weights, others = (load_file(path / "adapter_model.safetensors") for path in (output, healed[0]))
    for name, weight in weights.items():
        torch.testing.assert_close(weight, others[name], rtol=1e-2, atol=1e-4)


@pytest.mark.nightly
def test_training_stops_when_the_held_out_kl_stops_falling(crushed, cache, tmp_path):
    reckless = TrainOptions(rank=8, learning_rate=1.0, max_steps=8, batch_size=4, evaluations=8, patience=2)
    report = run(crushed, cache, tmp_path / "adapter", reckless)
    losses = [point.held_out for point in report.history if point.held_out is not None]
    assert report.steps < 8
    assert losses[report.best_step] == min(losses[1:])


@pytest.mark.nightly
def test_text_that_is_measured_on_is_not_trained_on_and_the_original_writes_more(crushed, cache, tmp_path):
    repeated = tmp_path / "repeated.txt"
    repeated.write_text(read_text(crushed.text, seed=0).documents[0])
    data = HealData(
        data=str(crushed.text), tokens=1024, sampled_tokens=512, window=64, text=[repeated], max_tokens=256,
        cache_dir=cache,
    )  # fmt: skip
    report = heal(str(crushed.packed), str(crushed.original), tmp_path / "adapter", data, ONE_STEP)
    assert 8 < report.trained_examples < 16 + 8
    assert "8 training windows were sampled from the original." in report.notes
    assert any("training windows repeat a passage" in note for note in report.notes)
    data = replace(data, text=[crushed.text], max_tokens=10**6)
    with pytest.raises(DataError, match="nothing is left to train on"):
        heal(str(crushed.packed), str(crushed.original), tmp_path / "other", data, OPTIONS)


@pytest.mark.nightly
def test_without_a_text_the_part_that_was_kept_apart_is_measured_on(crushed, cache, tmp_path):
    report = run(crushed, cache, tmp_path / "adapter", ONE_STEP, text=[])
    assert report.changes[0].name == "KL, held_out.txt"
    assert (tmp_path / "adapter" / "held_out.txt").stat().st_size
    assert any("stricter test" in note for note in report.notes)


def test_questions_that_cannot_be_read_are_refused_before_the_original_runs(crushed, cache, tmp_path, monkeypatch):
    monkeypatch.setattr(healing, "build_teacher_windows", lambda *_, **__: pytest.fail("the original runs"))
    with pytest.raises(EvaluationError, match=r"none\.jsonl does not exist"):
        run(crushed, cache, tmp_path / "adapter", questions=tmp_path / "none.jsonl")


def test_what_cannot_be_healed_is_refused(crushed, cache, tmp_path):
    with pytest.raises(TrainingError, match="holds no packed weights"):
        data = HealData(data=str(crushed.text), tokens=1024, window=64, text=[crushed.held_out], max_tokens=128)
        heal(str(crushed.original), str(crushed.original), tmp_path / "a", data, OPTIONS)
    occupied = tmp_path / "occupied"
    occupied.mkdir()
    (occupied / "precious.txt").write_text("")
    with pytest.raises(TrainingError, match="is not the adapter of an earlier run"):
        run(crushed, cache, occupied)
    with pytest.raises(TrainingError, match="batch of 8 does not divide into micro-batches of 3"):
        run(crushed, cache, tmp_path / "b", replace(OPTIONS, micro_batch=3))
    other = tmp_path / "other"
    shutil.copytree(crushed.original, other)
    tensors = load_file(other / "model.safetensors")
    tensors["model.norm.weight"][0] += 1
    save_file(tensors, other / "model.safetensors", metadata={"format": "pt"})
    data = HealData(data=str(crushed.text), tokens=1024, window=64, text=[crushed.held_out], max_tokens=128)
    with pytest.raises(CheckpointError, match="was made from the checkpoint with fingerprint"):
        heal(str(crushed.packed), str(other), tmp_path / "c", data, OPTIONS)
