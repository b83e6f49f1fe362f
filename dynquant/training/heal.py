"""Heal a packed model: its original is distilled into a LoRA adapter on the packed base.

    original over training windows -> distributions on disk -> freed -> base + adapter, trained on the KL to them

The adapter starts as the low-rank part of what quantization took (`lora.residual`), for which the original's weights
are read one by one; original and base are never in memory together. The held-out KL decides when to stop and which
step is kept; the adapter is a blend of that step and the start. What it does is then measured by `evaluate` on held-out
text, with and without it.
"""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from hashlib import sha256
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from dynquant.errors import DataError
from dynquant.evaluation.distributions import NUM_TAIL
from dynquant.evaluation.evaluate import common_columns, evaluate
from dynquant.evaluation.options import EvalOptions, QuestionOptions
from dynquant.evaluation.reference_cache import model_fingerprint
from dynquant.evaluation.report import EvalReport, MultipleChoiceResult
from dynquant.evaluation.runners import TRANSFORMERS, describe_model, open_encoder, open_runner
from dynquant.evaluation.statistics import Estimate, bootstrap_ratio, mcnemar_exact, only_one
from dynquant.families.open import locate_model, open_model
from dynquant.inputs.held_out import split_documents, without_repeats
from dynquant.inputs.text import CalibrationText, evaluation_windows, pack_windows, read_text
from dynquant.resources import chosen_device
from dynquant.session import SILENT, Progress, Session
from dynquant.storage.atomic import write_atomically
from dynquant.training.base import (
    check_context,
    check_packed,
    open_tokenizer,
    open_with_adapter,
    require_training_packages,
)
from dynquant.training.options import KEPT, RESIDUAL, HealData, HealOptions, TrainOptions

if TYPE_CHECKING:
    from dynquant.evaluation.reference_cache import TeacherWindows
    from dynquant.training.run import Change, RunDirectory, TrainingReport

HELD_OUT_NAME = "held_out.txt"
_HELD_OUT_SHARE = 0.1
_CHECK_WINDOWS = 16
"""Held-out windows that are run at every check; 8,192 tokens, as `eval` takes by default."""


def heal(options: HealOptions, session: Session = SILENT) -> "TrainingReport":
    """Train the adapter and write it to the output.

    Raises:
        TrainingError: no packed weights, a package of the extra `train` is missing, an unfinished run that differs, or
            no such start or blend.
        AdapterError: the reference is not the model that was quantized.
        DataError, StatsError: text is missing, or too short.
        CheckpointError, EvaluationError: a model cannot be loaded, or the two cannot be compared.
        WriteError: the output cannot be written.
    """
    require_training_packages()
    training = replace(options.training, seed=session.seed)
    with session.stage(KEPT) as progress:
        return _heal(options, training, chosen_device(session.device), progress)


def _heal(options: HealOptions, training: TrainOptions, device: str, progress: Progress) -> "TrainingReport":
    began = time.perf_counter()
    data, share = options.data, options.share
    base, original = locate_model(options.packed), locate_model(options.reference)
    check_packed(base)
    check_context(base, data.window, "--window")
    num_columns, notes = common_columns(
        describe_model(original, runner=TRANSFORMERS), describe_model(base, runner=TRANSFORMERS)
    )
    text = read_text(data.data, seed=training.seed, max_tokens=data.tokens)
    cache = data.cache_dir or options.output.with_name(f"{options.output.name}.reference")
    split = _split(text, original, data, cache)
    if data.sampled_tokens:
        split = _with_samples(split, original, data, cache, num_columns, device, training.seed, progress)

    from dynquant.training import run as training_run

    identity = {
        "task": "heal", "base": model_fingerprint(base), "reference": model_fingerprint(original),
        "data": text.sha256, "tokens": data.tokens, "sampled_tokens": data.sampled_tokens,
        "windows": sha256(split.train.numpy()).hexdigest(),
        "start": options.start, "blend": share, "device": device, **asdict(training),
    }  # fmt: skip
    run = training_run.RunDirectory(options.output, identity, resume=options.resume)
    train, held = _teacher(original, split, cache, num_columns, device, progress)
    judge = _Judge(base, original, split.texts, data, cache, device, training.seed, progress)
    before = judge(None)
    kept = run.checkpoints / "best"
    trained = _train(
        base, train, held, run, training, kept, num_columns=num_columns, device=device, progress=progress,
        beginning=original if options.start == RESIDUAL else None, share=share,
    )  # fmt: skip
    changes, gaps, remarks = _compare(before, judge(kept))
    if share < 1:
        remarks.append(
            f"The adapter lies {share:g} of the way from its start to step {trained['best_step']} (--blend)."
        )
    result = training_run.TrainingReport(
        task="heal", base=base.name, identity=run.identity,
        options=asdict(training) | {"start": options.start, "blend": share} | _described(data),
        trained_examples=len(train), held_out_examples=len(held), **trained,
        changes=changes, gap_closed=gaps, notes=[*notes, *split.notes, *remarks],
        seconds=round(time.perf_counter() - began, 1),
    )  # fmt: skip

    def write(directory: Path) -> None:
        for file in (*kept.glob("adapter_*"), *((split.own,) if split.own else ())):
            (directory / file.name).write_bytes(file.read_bytes())
        training_run.write_report(directory, result, measure="KL to the original (nats per token)")

    run.finish(write)
    return result


def _teacher(
    original: Path, split: "_Split", cache: Path, num_columns: int, device: str, progress: Progress
) -> "tuple[TeacherWindows, TeacherWindows]":
    """Training and held-out windows with the original's distributions; runs it where the cache lacks some."""
    from dynquant.evaluation.reference_cache import build_teacher_windows

    def open_original():
        return open_runner(original, device=device, runner=TRANSFORMERS)

    train, held = (
        build_teacher_windows(
            original, open_original, windows, cache, num_columns=num_columns, num_tail=num_tail, stage=stage,
            progress=progress,
        )
        for windows, num_tail, stage in (
            (split.train, 0, "original, training text"), (split.held, NUM_TAIL, "original, held-out text"),
        )
    )  # fmt: skip
    return train, held


def _train(
    base: Path,
    train: "TeacherWindows",
    held: "TeacherWindows",
    run: "RunDirectory",
    options: TrainOptions,
    kept: Path,
    *,
    num_columns: int,
    device: str,
    progress: Progress,
    beginning: Path | None,
    share: float,
) -> dict[str, Any]:
    """Train an adapter, which starts from the residual of the original `beginning`, and save to `kept` what lies
    `share` of the way from there to the best step.

    The base is freed. Gives steps, best step and losses.
    """
    from transformers import TrainingArguments

    from dynquant.lora import AdapterStart, save_adapter, start_from_residual
    from dynquant.training import run as training_run
    from dynquant.training.teacher import DistillationTrainer

    adapted = open_with_adapter(base, options, device=device)
    if beginning is not None:
        start_from_residual(adapted, open_model(beginning), progress=progress)
    begun = AdapterStart(adapted)
    num_weights = sum(parameter.numel() for parameter in adapted.parameters())
    settings = training_run.trainer_settings(
        options, run.checkpoints, num_examples=len(train), num_weights=num_weights, device=device
    )
    trainer = DistillationTrainer(
        adapted, TrainingArguments(**settings), num_columns=num_columns, train_dataset=train, eval_dataset=held,
        callbacks=training_run.callbacks(options, progress),
    )  # fmt: skip
    best = training_run.train(trainer, run)
    begun.blend(adapted, share)
    save_adapter(adapted, kept, options.stored_dtype)
    return {
        "steps": trainer.state.global_step,
        "best_step": best,
        "history": training_run.loss_history(trainer.state.log_history),
    }


@dataclass(frozen=True)
class _Split:
    train: torch.Tensor
    held: torch.Tensor
    measured_on: list[torch.Tensor]
    """Token ids of everything held out, as runs [*]."""
    texts: tuple[Path, ...]
    own: Path | None
    """The held-out part as a file, when it is what is measured on."""
    notes: list[str] = field(default_factory=list)


def _split(text: CalibrationText, original: Path, data: HealData, cache: Path) -> _Split:
    """Windows to train on and to check with, and the texts to measure on, which share no run of tokens."""
    tokenizer = open_tokenizer(original)
    train_text, held_text = split_documents(text, _HELD_OUT_SHARE)
    held = pack_windows(held_text, tokenizer, window=data.window, max_tokens=_CHECK_WINDOWS * data.window)
    train = pack_windows(train_text, tokenizer, window=data.window, max_tokens=data.tokens)
    notes = []
    texts = tuple(data.text)
    own = None
    if not texts:
        own = cache / f"held-out-{text.sha256[:12]}" / HELD_OUT_NAME
        write_atomically(own, "\n\n".join(held_text.documents))
        texts = (own,)
        notes.append(
            f"Measured on {HELD_OUT_NAME}, the part of {text.name} that was kept apart. Its first windows also chose "
            "which adapter was kept; a text of its own (--text) is a stricter test."
        )
    with open_encoder(original) as encode:
        measured = [evaluation_windows(path, encode, window=data.window, max_tokens=data.max_tokens) for path in texts]
    measured_on = [*held, *(batch.ids[0] for text in measured for batch in text)]
    clean = without_repeats(train, measured_on)
    if len(clean) < len(train):
        notes.append(
            f"{len(train) - len(clean)} of {len(train)} training windows repeat a passage of the held-out text and "
            "were left out."
        )
    if not len(clean):
        raise DataError(
            f"Every window of {text.name} repeats a passage of the text that is measured on, so nothing is left to "
            "train on. Give another --text, or other --data."
        )
    if held.shape[1] != clean.shape[1]:
        raise DataError(
            f"{text.name} is too short: one of its parts (training {clean.shape[1]} tokens, held out {held.shape[1]}) "
            f"does not fill a window of {data.window}. Give more text, or a smaller --window."
        )
    return _Split(clean, held, measured_on, texts, own, notes)


def _with_samples(
    split: "_Split",
    original: Path,
    data: HealData,
    cache: Path,
    num_columns: int,
    device: str,
    seed: int,
    progress: Progress,
) -> "_Split":
    """More windows to train on, sampled from the original; what it knows by heart of held-out text is left out."""
    from dynquant.training.sampling import sampled_windows

    count = -(-data.sampled_tokens // data.window)
    windows = sampled_windows(
        original, split.train, count, cache, num_columns=num_columns, device=device, seed=seed,
        stage="original, writing", progress=progress,
    )  # fmt: skip
    clean = without_repeats(windows, split.measured_on)
    notes = [f"{len(clean)} training windows were sampled from the original."]
    if len(clean) < count:
        notes.append(f"{count - len(clean)} sampled windows repeat a passage of the held-out text and were left out.")
    return replace(split, train=torch.cat([split.train, clean]), notes=[*split.notes, *notes])


@dataclass(frozen=True)
class _Judge:
    """`evaluate` with everything fixed but the adapter."""

    base: Path
    original: Path
    texts: tuple[Path, ...]
    data: HealData
    cache: Path
    device: str
    seed: int
    progress: Progress

    def __call__(self, adapter: Path | None) -> EvalReport:
        name = "with the adapter" if adapter else "before"
        tasks = ["kl", "ppl", *(["mmlu"] if self.data.mmlu_data else [])]
        questions = QuestionOptions(
            tasks=tuple(tasks), text=self.texts, max_tokens=self.data.max_tokens, mmlu_data=self.data.mmlu_data,
            shots=self.data.shots, num_shots=self.data.num_shots, limit=self.data.limit, scoring=("letter",),
        )  # fmt: skip
        options = EvalOptions(
            candidate=str(self.base), reference=str(self.original), questions=questions, window=self.data.window,
            reference_cache=self.cache, runner=TRANSFORMERS, adapter=adapter,
        )  # fmt: skip

        @contextmanager
        def stage(_kept: str) -> Iterator[Progress]:
            yield lambda step, done, total, **where: self.progress(f"{name}: {step}", done, total, **where)

        return evaluate(options, Session(device=self.device, seed=self.seed, stage=stage))


def _compare(before: EvalReport, after: EvalReport) -> tuple[list["Change"], dict[str, Estimate], list[str]]:
    """Return what changed, the share of the KL that is gone on each text, and what the questions say."""
    from dynquant.training.run import Change

    changes, gaps = [], {}
    for old, new in zip(before.texts, after.texts, strict=True):
        name = old.name
        changes += [
            Change(name=f"KL, {name}", before=old.kl.mean, after=new.kl.mean),
            Change(name=f"top-1 agreement, {name}", before=old.kl.top1_agreement, after=new.kl.top1_agreement),
            Change(name=f"perplexity, {name}", before=old.candidate_perplexity, after=new.candidate_perplexity),
        ]
        ratio = bootstrap_ratio(np.array(new.kl.block_sums), np.array(old.kl.block_sums))
        gaps[name] = Estimate(value=1 - ratio.value, low=1 - ratio.high, high=1 - ratio.low)
    remarks = []
    for old, new in zip(before.multiple_choice, after.multiple_choice, strict=True):
        changes.append(Change(name="accuracy", before=old.candidate.accuracy, after=new.candidate.accuracy))
        remarks.append(_paired(old, new))
    return changes, gaps, remarks


def _paired(old: MultipleChoiceResult, new: MultipleChoiceResult) -> str:
    right = old.right_answers
    was = [a == b for a, b in zip(old.candidate.predictions, right, strict=True)]
    now = [a == b for a, b in zip(new.candidate.predictions, right, strict=True)]
    lost, won = only_one(was, now)
    return (
        f"{old.questions} questions: the original answers {old.reference.accuracy.value:.1%}; the adapter wins {won} "
        f"and loses {lost}, McNemar p = {mcnemar_exact(lost, won):.3g}."
    )


def _described(data: HealData) -> dict[str, Any]:
    return {
        "data": data.data or "built-in text", "tokens": data.tokens, "sampled_tokens": data.sampled_tokens,
        "window": data.window, "text": [Path(path).name for path in data.text], "limit": data.limit,
        "num_shots": data.num_shots,
    }  # fmt: skip
