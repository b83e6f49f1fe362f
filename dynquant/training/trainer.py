"""transformers' Trainer for adapters: settings, progress, distillation, and training from the last checkpoint."""

import math
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import EarlyStoppingCallback, PrinterCallback, Trainer, TrainerCallback

from dynquant.errors import TrainingError
from dynquant.evaluation.reference_cache import distributions_of
from dynquant.session import Progress
from dynquant.training.options import LARGE, TrainOptions
from dynquant.training.run import LossPoint, RunDirectory


class DistillationTrainer(Trainer):
    """Trains on batches of `TeacherWindows`; `eval_loss` is the mean KL of the held-out windows in nats per token.

    The held-out windows need draws from the tail, so that their KL is unbiased.

    Args:
        num_columns: leading logits that both models have.
    """

    def __init__(self, *args: Any, num_columns: int, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._num_columns = num_columns
        # The loss is a mean over the micro-batch, so the Trainer has to divide by their number.
        self.model_accepts_loss_kwargs = False

    def compute_loss(
        self, model: nn.Module, inputs: dict[str, Tensor], return_outputs: bool = False, **_: Any
    ) -> Tensor | tuple[Tensor, None]:
        loss = distributions_of(inputs).kl_lower_bound(self._logits(model, inputs)).mean()
        return (loss, None) if return_outputs else loss

    def prediction_step(
        self, model: nn.Module, inputs: dict[str, Tensor], prediction_loss_only: bool, ignore_keys: Any = None
    ) -> tuple[Tensor, None, None]:
        inputs = self._prepare_inputs(inputs)
        with torch.no_grad():
            return distributions_of(inputs).kl(self._logits(model, inputs)).mean().float(), None, None

    def _logits(self, model: nn.Module, inputs: dict[str, Tensor]) -> Tensor:
        logits = model(input_ids=inputs["input_ids"], use_cache=False).logits[..., : self._num_columns]
        return logits.float().flatten(0, 1)


class ProgressCallback(TrainerCallback):
    """Reports optimizer steps as `progress("train", done, total)`."""

    def __init__(self, progress: Progress) -> None:
        self._progress = progress

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self._progress("train", state.global_step, state.max_steps, unit="steps")

    on_train_begin = on_step_end  # with the steps of the checkpoint from which training goes on


def trainer_settings(
    adapted: nn.Module, options: TrainOptions, directory: Path, *, num_examples: int, device: str
) -> dict[str, Any]:
    """Return keyword arguments of `TrainingArguments` and its descendants, for a model with its adapter.

    Raises:
        TrainingError: `micro_batch` does not divide `batch_size`, or several GPUs are visible.
    """
    micro = options.micro_batch or options.batch_size
    if micro < 1 or options.batch_size % micro:
        raise TrainingError(
            f"A batch of {options.batch_size} does not divide into micro-batches of {micro}. Give a divisor."
        )
    steps = options.max_steps
    if steps is None:
        steps = max(1, math.ceil(math.ceil(num_examples / options.batch_size) * options.epochs))
    every = max(1, round(steps / options.evaluations))
    on_cpu = device == "cpu"
    if not on_cpu and torch.cuda.device_count() > 1:
        raise TrainingError(
            f"PyTorch sees {torch.cuda.device_count()} GPUs, over which transformers would copy the model. Adapters "
            "are trained on one: set CUDA_VISIBLE_DEVICES=0."
        )
    checkpointing = options.gradient_checkpointing
    if checkpointing is None:
        checkpointing = not on_cpu and sum(parameter.numel() for parameter in adapted.parameters()) >= LARGE
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
        "logging_steps": max(1, every // 4),  # four training losses for each held-out one, for the plot
        "eval_strategy": "steps",
        "eval_steps": every,
        "save_strategy": "steps",
        "save_steps": every,
        "save_total_limit": 2,  # the best and the last
        "load_best_model_at_end": True,
        "metric_for_best_model": "eval_loss",
        "greater_is_better": False,
        "restore_callback_states_from_checkpoint": True,  # early stopping goes on counting after a kill
        "remove_unused_columns": False,  # the losses read columns that the model's forward does not name
        "seed": options.seed,
        "data_seed": options.seed,
        "use_cpu": on_cpu,
        "bf16": not on_cpu,  # autocast; factors of the adapter stay float32
        "gradient_checkpointing": checkpointing,
        "dataloader_pin_memory": not on_cpu,
        "report_to": "none",
        "disable_tqdm": True,  # ProgressCallback reports instead
        "log_level": "error",
    }


def train(trainer: Trainer, run: RunDirectory) -> dict[str, Any]:
    """Train from the last checkpoint or from the start; the best adapter is in the model then.

    The held-out loss is measured before the first step too: that of the adapter as it starts, which is the base's own
    loss unless the adapter starts from the residual (`heal`).

    Returns:
        Fields of the report: numbers of examples, `steps`, `best_step` and `history`.
    """
    trainer.remove_callback(PrinterCallback)  # which prints every log entry as a dictionary
    checkpoint = run.last_checkpoint()
    trainer.args.eval_on_start = checkpoint is None
    trainer.train(resume_from_checkpoint=checkpoint)
    steps, best = trainer.state.global_step, trainer.state.best_model_checkpoint
    best_step = int(best.rpartition("-")[2]) if best else steps
    log = trainer.state.log_history
    points = [LossPoint(step=entry["step"], train=entry["loss"]) for entry in log if "loss" in entry]
    points += [LossPoint(step=entry["step"], held_out=entry["eval_loss"]) for entry in log if "eval_loss" in entry]
    history = sorted(points, key=lambda point: (point.step, point.train is None))
    counts = {"trained_examples": len(trainer.train_dataset), "held_out_examples": len(trainer.eval_dataset)}
    return {**counts, "steps": steps, "best_step": best_step, "history": history}


def callbacks(options: TrainOptions, progress: Progress) -> list[TrainerCallback]:
    """Return progress reports, and the end of a run whose held-out loss has stopped falling."""
    return [ProgressCallback(progress), EarlyStoppingCallback(early_stopping_patience=options.patience)]
