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
from dataclasses import asdict, dataclass, replace
from functools import partial
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np
import torch

from dynquant.errors import DataError
from dynquant.evaluation.distributions import NUM_TAIL
from dynquant.evaluation.evaluate import check_readable, common_columns, evaluate
from dynquant.evaluation.options import TRANSFORMERS, EvalOptions, TaskOptions
from dynquant.evaluation.reference_cache import TeacherWindows, build_teacher_windows, cache_key, model_fingerprint
from dynquant.evaluation.report import EvalReport, MultipleChoiceResult
from dynquant.evaluation.runners import describe_model, load_model, open_encoder, open_runner
from dynquant.evaluation.statistics import Estimate, bootstrap_ratio, mcnemar_exact, only_one
from dynquant.families.model_kind import check_same_kind
from dynquant.families.open import check_original, locate_model, open_model
from dynquant.inputs.held_out import split_documents, without_repeats
from dynquant.inputs.text import MIX, CalibrationText, evaluation_windows, pack_windows, read_text
from dynquant.inputs.written import Writer
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
from dynquant.training.options import KEPT, RESIDUAL, HealOptions
from dynquant.training.run import Change, RunDirectory, TrainingReport

HELD_OUT_NAME = "held_out.txt"
_HELD_OUT_SHARE = 0.1
_CHECK_WINDOWS = 16
"""Held-out windows that are run at every check; 8,192 tokens, as `eval` takes by default."""


def heal(options: HealOptions, session: Session = SILENT) -> TrainingReport:
    """Train the adapter and write it to the output.

    Raises:
        TrainingError: no packed weights, a package of the extra `train` is missing, or an unfinished run that differs.
        AdapterError: the reference is not the model that was quantized.
        DataError, StatsError: text is missing, or too short.
        CheckpointError, EvaluationError: a model cannot be loaded, or the two cannot be compared.
        WriteError: the output cannot be written.
    """
    require_training_packages()
    began = time.perf_counter()
    with session.stage(KEPT) as progress:
        healing = _Healing(options, session, progress)
        text = read_text(options.data.data, seed=session.seed, max_tokens=options.data.tokens)
        split = healing.split(text)
        run = RunDirectory(options.output, healing.identity(text, split), resume=options.resume)
        train, held = healing.teacher_windows(split)
        before = healing.evaluate(split.texts, adapter=None)
        best = run.checkpoints / "best"
        trained = healing.train(train, held, run, best)
        changes, gaps, remarks = _compare(before, healing.evaluate(split.texts, adapter=best))
        if options.share < 1:
            way = f"{options.share:g} of the way from its start to step {trained['best_step']}"
            remarks.append(f"The adapter lies {way} (--blend).")

        def save(directory: Path) -> None:
            for file in (*best.glob("adapter_*"), *(() if options.data.text else split.texts)):
                (directory / file.name).write_bytes(file.read_bytes())

        return run.finish(
            save,
            measure="KL to the original (nats per token)",
            task="heal",
            base=healing.base.name,
            options=healing.described_options(),
            **trained,
            changes=changes,
            gap_closed=gaps,
            notes=[*healing.notes, *split.notes, *remarks],
            seconds=round(time.perf_counter() - began, 1),
        )


@dataclass(frozen=True)
class _Split:
    """Windows to train on and to check with, and the texts to measure on, which share no run of tokens."""

    train: torch.Tensor
    held: torch.Tensor
    measured_on: list[torch.Tensor]
    """Token ids of everything held out, as runs [*]."""
    texts: tuple[Path, ...]
    notes: list[str]


class _Healing:
    """Both models, found and checked, and how they are run; the session's seed becomes that of the training."""

    def __init__(self, options: HealOptions, session: Session, progress: Progress) -> None:
        self.base, self.original = locate_model(options.packed), locate_model(options.reference)
        check_packed(self.base)
        check_same_kind(self.base, self.original, "Give the model that was quantized as --reference.")
        check_original(self.base, open_model(self.original))
        check_context(self.base, options.data.window, "--window", self.original)
        where = {"runner": TRANSFORMERS, "base": self.original}
        described = (describe_model(path, **where) for path in (self.original, self.base))
        self.num_columns, self.notes = common_columns(*described)  # leading logits that both models have
        self.options = replace(options, training=replace(options.training, seed=session.seed))
        self.device, self.progress = chosen_device(session.device), progress
        check_readable(self._asked(tuple(options.data.text)))

    def identity(self, text: CalibrationText, split: _Split) -> dict[str, object]:
        """Return all that decides the result."""
        options = self.options
        return {
            "task": "heal", "base": model_fingerprint(self.base), "reference": model_fingerprint(self.original),
            "data": text.sha256, "tokens": options.data.tokens, "sampled_tokens": options.data.sampled_tokens,
            "windows": sha256(split.train.numpy()).hexdigest(),
            "start": options.start, "blend": options.share, "device": self.device, **asdict(options.training),
        }  # fmt: skip

    def described_options(self) -> dict[str, Any]:
        """Return the options as the report lists them."""
        data = self.options.data
        return {
            **asdict(self.options.training), "start": self.options.start, "blend": self.options.share,
            "data": data.data or MIX, "tokens": data.tokens, "sampled_tokens": data.sampled_tokens,
            "window": data.window, "text": [Path(path).name for path in data.text], "limit": data.limit,
            "num_shots": data.num_shots,
        }  # fmt: skip

    def split(self, text: CalibrationText) -> _Split:
        """Split the text and leave out of the training part what repeats a passage of the texts to measure on."""
        data, tokenizer = self.options.data, open_tokenizer(self.original)
        train_text, held_text = split_documents(text, _HELD_OUT_SHARE)
        held = pack_windows(held_text, tokenizer, window=data.window, max_tokens=_CHECK_WINDOWS * data.window)
        train = pack_windows(train_text, tokenizer, window=data.window, max_tokens=data.tokens)
        texts, notes = self._measured_texts(text, held_text)
        with open_encoder(self.original) as encode:
            measured = [
                evaluation_windows(path, encode, window=data.window, max_tokens=data.max_tokens) for path in texts
            ]
        measured_on = [*held, *(batch.ids[0] for windows in measured for batch in windows)]
        clean = without_repeats(train, measured_on)
        if len(clean) < len(train):
            count = f"{len(train) - len(clean)} of {len(train)}"
            notes.append(f"{count} training windows repeat a passage of the held-out text and were left out.")
        _check_lengths(text, clean, held, data.window)
        split = _Split(clean, held, measured_on, texts, notes)
        return self._with_samples(split) if data.sampled_tokens else split

    def _measured_texts(self, text: CalibrationText, held_text: CalibrationText) -> tuple[tuple[Path, ...], list[str]]:
        """Return the texts to measure on, and a note when that is the held-out part, which becomes a file."""
        if self.options.data.text:
            return tuple(self.options.data.text), []
        file = self.options.reference_cache / f"held-out-{text.sha256[:12]}" / HELD_OUT_NAME
        write_atomically(file, "\n\n".join(held_text.documents))
        note = (
            f"Measured on {HELD_OUT_NAME}, the part of {text.name} that was kept apart. Its first windows also chose "
            "which adapter was kept; a text of its own (--text) is a stricter test."
        )
        return (file,), [note]

    def _with_samples(self, split: _Split) -> _Split:
        """Add windows sampled from the original; what it knows by heart of held-out text is left out."""
        data = self.options.data
        count = -(-data.sampled_tokens // data.window)
        key, seed = cache_key(self.original, [], kind="written", device=self.device), self.options.training.seed
        writer = Writer(
            key, self._load_original, open_tokenizer(self.original), self.num_columns,
            self.options.reference_cache / f"written-{key}.safetensors",
        )  # fmt: skip
        windows = writer.windows(split.train, count, seed, self.progress)
        clean = without_repeats(windows, split.measured_on)
        notes = [f"{len(clean)} training windows were sampled from the original."]
        if missing := len(windows) - len(clean):
            notes.append(f"{missing} sampled windows repeat a passage of the held-out text and were left out.")
        return replace(split, train=torch.cat([split.train, clean]), notes=[*split.notes, *notes])

    def _load_original(self) -> torch.nn.Module:
        dtype = torch.float32 if torch.device(self.device).type == "cpu" else torch.bfloat16
        return load_model(self.original, dtype).to(self.device).eval()

    def teacher_windows(self, split: _Split) -> tuple[TeacherWindows, TeacherWindows]:
        """Return training and held-out windows with the original's distributions, from the cache where it has them."""
        open_original = partial(open_runner, self.original, device=self.device, runner=TRANSFORMERS)
        shared = {"num_columns": self.num_columns, "progress": self.progress}
        build = partial(build_teacher_windows, self.original, open_original, directory=self.options.reference_cache)
        train = build(windows=split.train, stage="original, training text", **shared)
        return train, build(windows=split.held, num_tail=NUM_TAIL, stage="original, held-out text", **shared)

    def train(self, train: TeacherWindows, held: TeacherWindows, run: RunDirectory, best: Path) -> dict[str, Any]:
        """Train an adapter, save to `best` what lies `share` of the way from its start to the best step, free the base.

        Returns:
            Fields of the report, as `trainer.train`.
        """
        # transformers takes seconds to import, which nobody who mistyped a path should wait for
        from transformers import TrainingArguments

        from dynquant.lora import AdapterStart, save_adapter, start_from_residual
        from dynquant.training import trainer as trainers

        options = self.options.training
        adapted = open_with_adapter(self.base, options, device=self.device, original=self.original)
        if self.options.start == RESIDUAL:
            start_from_residual(adapted, open_model(self.original), progress=self.progress)
        start = AdapterStart(adapted)
        settings = trainers.trainer_settings(
            adapted, options, run.checkpoints, num_examples=len(train), device=self.device
        )
        trainer = trainers.DistillationTrainer(
            adapted, TrainingArguments(**settings), num_columns=self.num_columns, train_dataset=train,
            eval_dataset=held, callbacks=trainers.callbacks(options, self.progress),
        )  # fmt: skip
        trained = trainers.train(trainer, run)
        start.blend(adapted, self.options.share)
        save_adapter(adapted, best, options.stored_dtype)
        return trained

    def evaluate(self, texts: tuple[Path, ...], *, adapter: Path | None) -> EvalReport:
        """Return what `evaluate` measures on held-out text and questions, without or with an adapter."""
        name = "with the adapter" if adapter else "before"
        options = EvalOptions(
            candidate=str(self.base), reference=str(self.original), asked=self._asked(texts),
            window=self.options.data.window, reference_cache=self.options.reference_cache, runner=TRANSFORMERS,
            adapter=adapter,
        )  # fmt: skip

        @contextmanager
        def stage(_kept: str) -> Iterator[Progress]:
            yield lambda step, done, total, **where: self.progress(f"{name}: {step}", done, total, **where)

        return evaluate(options, Session(device=self.device, seed=self.options.training.seed, stage=stage))

    def _asked(self, texts: tuple[Path, ...]) -> TaskOptions:
        data = self.options.data
        return TaskOptions(
            tasks=("kl", "ppl", *(["mmlu"] if data.mmlu_data else [])), text=texts, max_tokens=data.max_tokens,
            mmlu_data=data.mmlu_data, shots=data.shots, num_shots=data.num_shots, limit=data.limit,
            **({"scoring": ("letter",)} if data.mmlu_data else {}),
        )  # fmt: skip


def _check_lengths(text: CalibrationText, train: torch.Tensor, held: torch.Tensor, window: int) -> None:
    if not len(train):
        raise DataError(
            f"Every window of {text.name} repeats a passage of the text that is measured on, so nothing is left to "
            "train on. Give another --text, or other --data."
        )
    if held.shape[1] != train.shape[1]:
        raise DataError(
            f"{text.name} is too short: one of its parts (training {train.shape[1]} tokens, held out {held.shape[1]}) "
            f"does not fill a window of {window}. Give more text, or a smaller --window."
        )


def _compare(before: EvalReport, after: EvalReport) -> tuple[list[Change], dict[str, Estimate], list[str]]:
    """Return what changed, the share of the KL that is gone on each text, and what the questions say."""
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
