"""Parts that every training of an adapter shares: options, a directory that survives a kill, progress, and the report.

Checkpoints lie in `.NAME.training` beside the output until the run is done; the output itself appears whole or not at
all. A restart goes on from the last complete checkpoint, and only under the same options, data and base.
"""

import math
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from pydantic import BaseModel, ConfigDict
from transformers import EarlyStoppingCallback, PrinterCallback, Trainer, TrainerCallback

from dynquant import __version__
from dynquant.analysis.plots.style import plot_settings, save_figure
from dynquant.analysis.plots.training import draw_training
from dynquant.errors import ExportError, TrainingError, WriteError
from dynquant.evaluation.statistics import Estimate
from dynquant.session import Progress
from dynquant.storage.atomic import write_atomically
from dynquant.storage.journal import Journal, Record, differing_key
from dynquant.training.options import TrainOptions

SCHEMA_VERSION = 1
REPORT_NAME = "training.json"
_STATE = "trainer_state.json"
_LARGE = 1_000_000_000
"""Weights from which activations are recomputed on a GPU: in smaller models they fit, and recomputing only costs."""


class _Record(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class LossPoint(_Record):
    """Losses logged after `step` optimizer steps, in nats per token; one of them is None."""

    step: int
    train: float | None = None
    held_out: float | None = None


class Change(_Record):
    """One measure on held-out data, without and with the adapter."""

    name: str
    before: Estimate
    after: Estimate


class TrainingReport(_Record):
    """training.json beside the adapter. `best_step` is the step whose adapter was kept."""

    schema_version: int = SCHEMA_VERSION
    tool_version: str = __version__
    task: str
    base: str
    identity: dict[str, str]
    options: dict[str, Any]
    trained_examples: int
    held_out_examples: int
    steps: int
    best_step: int
    history: list[LossPoint]
    changes: list[Change]
    gap_closed: dict[str, Estimate] = {}
    """Share of the KL to the original that the adapter took away, by text."""
    notes: list[str]
    seconds: float

    @property
    def has_helped(self) -> bool:
        """True when the held-out loss fell below that of the adapter as it started."""
        losses = [point.held_out for point in self.history if point.held_out is not None]
        return min(losses) < losses[0]


class RunDirectory:
    """The unfinished run beside `output`; `identity` is what decides its result.

    Raises:
        TrainingError: an unfinished run of another identity, or an output that is no adapter of an earlier run.
        WriteError: the directory cannot be made.
    """

    def __init__(self, output: Path, identity: Mapping[str, object], *, resume: bool) -> None:
        self.output = output
        self.checkpoints = output.with_name(f".{output.name}.training")
        self.identity = {key: str(value) for key, value in identity.items()}
        if output.exists() and not (output / REPORT_NAME).is_file() and (not output.is_dir() or any(output.iterdir())):
            raise TrainingError(
                f"{output} exists and is not the adapter of an earlier run (it has no {REPORT_NAME}); it is left "
                "alone. Choose another output directory."
            )
        with Journal(self.checkpoints / "run.json") as journal:
            if not resume or journal.identity is None or self.last_checkpoint() is None:
                shutil.rmtree(self.checkpoints, ignore_errors=True)
            else:
                self._check_identity(journal.identity)
            try:
                journal.start(self.identity, ())
            except OSError as error:
                raise WriteError(
                    f"{journal.path} could not be written: {error.strerror}. Free some space or choose another place."
                ) from error

    def last_checkpoint(self) -> str | None:
        """The last complete checkpoint; what was being written when the run was killed is removed."""
        found = {int(path.name.rpartition("-")[2]): path for path in self.checkpoints.glob("checkpoint-*")}
        for step in sorted(found, reverse=True):
            if (found[step] / _STATE).is_file():
                return str(found[step])
            shutil.rmtree(found[step])
        return None

    def finish(self, write: Callable[[Path], None]) -> None:
        """Let `write` fill a new directory, put it in the output's place, and remove the checkpoints."""
        partial = self.output.with_name(f".{self.output.name}.partial")
        try:
            shutil.rmtree(partial, ignore_errors=True)
            partial.mkdir(parents=True)
            write(partial)
            if self.output.exists():
                shutil.rmtree(self.output)
            partial.rename(self.output)
        except OSError as error:
            shutil.rmtree(partial, ignore_errors=True)
            raise ExportError(
                f"The adapter could not be written to {self.output}: {error.strerror or error}. Free some space and "
                "run the same command again: checkpoints are kept."
            ) from error
        shutil.rmtree(self.checkpoints, ignore_errors=True)

    def _check_identity(self, stored: Record) -> None:
        key = differing_key(stored, self.identity)
        if key is not None:
            old, new = stored.get(key, "nothing"), self.identity.get(key, "nothing")
            raise TrainingError(
                f"{self.checkpoints} holds an unfinished run with {key} = {old}; this one has {new}. Repeat the "
                "earlier command to finish it, or give --no-resume to start afresh."
            )


class ProgressCallback(TrainerCallback):
    """Reports optimizer steps as `progress("train", done, total)`."""

    def __init__(self, progress: Progress) -> None:
        self._progress = progress

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self._progress("train", state.global_step, state.max_steps, unit="steps")


def trainer_settings(
    options: TrainOptions, directory: Path, *, num_examples: int, num_weights: int, device: str
) -> dict[str, Any]:
    """Keyword arguments of `TrainingArguments` and its descendants.

    Raises:
        TrainingError: `micro_batch` does not divide `batch_size`, or several GPUs are visible.
    """
    micro = options.micro_batch or options.batch_size
    if micro < 1 or options.batch_size % micro:
        raise TrainingError(
            f"A batch of {options.batch_size} does not divide into micro-batches of {micro}. Give a divisor."
        )
    steps = total_steps(options, num_examples)
    every = max(1, round(steps / options.evaluations))
    on_cpu = device == "cpu"
    if not on_cpu and torch.cuda.device_count() > 1:
        raise TrainingError(
            f"PyTorch sees {torch.cuda.device_count()} GPUs, over which transformers would copy the model. Adapters "
            "are trained on one: set CUDA_VISIBLE_DEVICES=0."
        )
    checkpointing = options.gradient_checkpointing
    return {
        "output_dir": str(directory),
        "max_steps": steps,
        "per_device_train_batch_size": micro,
        "per_device_eval_batch_size": 2 * micro,  # nothing is kept for a backward pass
        "gradient_accumulation_steps": options.batch_size // micro,
        "learning_rate": options.learning_rate,
        "lr_scheduler_type": "cosine",
        "warmup_steps": min(steps, math.ceil(options.warmup * steps)),
        "weight_decay": 0.0,
        "max_grad_norm": 1.0,
        "logging_steps": max(1, every // 4),
        "eval_strategy": "steps",
        "eval_steps": every,
        "save_strategy": "steps",
        "save_steps": every,
        "save_total_limit": 2,
        "load_best_model_at_end": True,
        "metric_for_best_model": "eval_loss",
        "greater_is_better": False,
        "restore_callback_states_from_checkpoint": True,
        "remove_unused_columns": False,
        "seed": options.seed,
        "data_seed": options.seed,
        "use_cpu": on_cpu,
        "bf16": not on_cpu,
        "gradient_checkpointing": not on_cpu and num_weights >= _LARGE if checkpointing is None else checkpointing,
        "dataloader_pin_memory": not on_cpu,
        "report_to": "none",
        "disable_tqdm": True,
        "log_level": "error",
    }


def total_steps(options: TrainOptions, num_examples: int) -> int:
    """Optimizer steps of the whole run."""
    if options.max_steps is not None:
        return options.max_steps
    return max(1, math.ceil(math.ceil(num_examples / options.batch_size) * options.epochs))


def train(trainer: Trainer, run: RunDirectory) -> int:
    """Train from the last checkpoint or from the start; the best adapter is in the model then. Returns its step.

    The held-out loss is measured before the first step too: that of the adapter as it starts, which is the base's own
    loss unless the adapter starts from the residual (`heal`).
    """
    trainer.remove_callback(PrinterCallback)  # which prints every log entry as a dictionary
    checkpoint = run.last_checkpoint()
    trainer.args.eval_on_start = checkpoint is None
    trainer.train(resume_from_checkpoint=checkpoint)
    kept = trainer.state.best_model_checkpoint
    return int(kept.rpartition("-")[2]) if kept else trainer.state.global_step


def loss_history(log: list[dict[str, Any]]) -> list[LossPoint]:
    """The losses of a Trainer's log."""
    points = [LossPoint(step=entry["step"], train=entry["loss"]) for entry in log if "loss" in entry]
    points += [LossPoint(step=entry["step"], held_out=entry["eval_loss"]) for entry in log if "eval_loss" in entry]
    return sorted(points, key=lambda point: (point.step, point.train is None))


def callbacks(options: TrainOptions, progress: Progress) -> list[TrainerCallback]:
    """Progress reports, and the end of a run whose held-out loss has stopped falling."""
    return [ProgressCallback(progress), EarlyStoppingCallback(early_stopping_patience=options.patience)]


def write_report(directory: Path, report: TrainingReport, *, measure: str) -> None:
    """training.json and the plot of the losses."""
    write_atomically(directory / REPORT_NAME, report.model_dump_json(indent=2) + "\n")
    with plot_settings():
        figure, headline = draw_training(
            [(point.step, point.train) for point in report.history if point.train is not None],
            [(point.step, point.held_out) for point in report.history if point.held_out is not None],
            best_step=report.best_step,
            measure=measure,
            data=f"{report.base}, {report.trained_examples:,} examples",
        )
        save_figure(figure, directory, "loss", headline)
