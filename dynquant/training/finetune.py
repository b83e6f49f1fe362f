"""Supervised fine-tuning of a LoRA adapter on a packed model, by TRL's SFTTrainer.

A part of the data is held out. Its loss decides when to stop and which adapter is kept; loss, perplexity and the KL
from the base are then measured on it, without and with the adapter.
"""

import time
from contextlib import nullcontext
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dynquant.errors import DataError
from dynquant.evaluation.distributions import Distributions
from dynquant.evaluation.reference_cache import model_fingerprint
from dynquant.evaluation.statistics import Estimate, bootstrap_mean
from dynquant.families.open import locate_model
from dynquant.inputs.chats import TrainingData, read_training_data
from dynquant.resources import chosen_device
from dynquant.session import SILENT, Progress, Session
from dynquant.training.base import (
    check_context,
    check_packed,
    open_tokenizer,
    open_with_adapter,
    require_training_packages,
)
from dynquant.training.options import KEPT, FinetuneOptions
from dynquant.training.run import Change, RunDirectory, TrainingReport

PLAIN_CHAT = (
    "{% for message in messages %}{{ message['role'] }}: {{ message['content'] }}\n\n{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}"
)
"""For tokenizers without a chat template; saved with the adapter's tokenizer."""


def finetune(options: FinetuneOptions, session: Session = SILENT) -> TrainingReport:
    """Train the adapter and write it to the output with its tokenizer.

    Raises:
        TrainingError: no packed weights, a package of the extra `train` is missing, or an unfinished run that differs.
        DataError: data are missing, empty or malformed; lines are named.
        CheckpointError: the model or its tokenizer cannot be loaded.
        WriteError: the output cannot be written.
    """
    require_training_packages()
    began = time.perf_counter()
    options = replace(options, training=replace(options.training, seed=session.seed))
    with session.stage(KEPT) as progress:
        device = chosen_device(session.device)
        data = read_training_data(options.data)
        parts = data.split(options.held_out, seed=session.seed)
        base, original = locate_model(options.packed), options.base and locate_model(options.base)
        check_packed(base)
        check_context(base, options.max_length, "--max-length", original)
        run = RunDirectory(options.output, _identity(options, base, data, device), resume=options.resume)
        tokenizer = open_tokenizer(locate_model(options.tokenizer) if options.tokenizer else original or base)
        notes = _add_chat_template(tokenizer, data)

        # transformers takes seconds to import, which nobody who mistyped a path should wait for
        from dynquant.lora import round_adapter, save_adapter
        from dynquant.training.trainer import train

        where = {"device": device, "original": original}
        trainer = _trainer(options, base, tokenizer, parts, run, progress=progress, **where)
        notes += _left_out(trainer, data, [len(part.rows) for part in parts], options.max_length)
        trained = train(trainer, run)
        round_adapter(trainer.model, options.training.stored_dtype)
        described = {"data": data.name, "held_out_share": options.held_out, "max_length": options.max_length}
        changes = measure_adapter(trainer.model, trainer.get_eval_dataloader(), progress)

        def save(directory: Path) -> None:
            save_adapter(trainer.model, directory, options.training.stored_dtype)
            tokenizer.save_pretrained(str(directory))

        return run.finish(
            save,
            measure="loss (nats per token)",
            task="finetune",
            base=base.name,
            options=asdict(options.training) | described,
            **trained,
            changes=changes,
            notes=notes,
            seconds=round(time.perf_counter() - began, 1),
        )


def _identity(options: FinetuneOptions, base: Path, data: TrainingData, device: str) -> dict[str, object]:
    return {
        "task": "finetune", "base": model_fingerprint(base), "data": data.sha256, "held_out_share": options.held_out,
        "max_length": options.max_length, "tokenizer": options.tokenizer or options.base or "the base's",
        "device": device, **asdict(options.training),
    }  # fmt: skip


def _trainer(
    options: FinetuneOptions,
    base: Path,
    tokenizer: Any,
    parts: tuple[TrainingData, TrainingData],
    run: RunDirectory,
    *,
    device: str,
    original: Path | None,
    progress: Progress,
) -> Any:
    from datasets import Dataset, disable_progress_bars
    from trl import SFTConfig, SFTTrainer

    from dynquant.training.trainer import callbacks, trainer_settings
    from dynquant.training.trl_head import use_packed_head

    adapted = open_with_adapter(base, options.training, device=device, original=original)
    disable_progress_bars()
    train, held = (Dataset.from_list(list(part.rows)) for part in parts)
    settings = trainer_settings(adapted, options.training, run.checkpoints, num_examples=len(train), device=device)
    # Routers are frozen: a loss of their balance (`router_aux_loss_coef`) would only move what they read.
    config = SFTConfig(**settings, max_length=options.max_length, router_aux_loss_coef=0.0)
    trainer = SFTTrainer(
        adapted, config, train_dataset=train, eval_dataset=held, processing_class=tokenizer,
        callbacks=callbacks(options.training, progress),
    )  # fmt: skip
    use_packed_head(trainer)
    return trainer


def _add_chat_template(tokenizer: Any, data: TrainingData) -> list[str]:
    """Give a tokenizer without a chat template a plain one where the data are chats; return a note about it."""
    if data.form != "messages" or tokenizer.chat_template:
        return []
    tokenizer.chat_template = PLAIN_CHAT
    return [
        "The tokenizer has no chat template; turns are written as `role: content`, and the template is saved with the "
        "adapter."
    ]


def _left_out(trainer: Any, data: TrainingData, counts: list[int], max_length: int) -> list[str]:
    """Say how many examples TRL leaves out, their completion lying wholly beyond `max_length`; refuse none left."""
    parts = {"training": (trainer.train_dataset, counts[0]), "held-out": (trainer.eval_dataset, counts[1])}
    notes = []
    for name, (kept, count) in parts.items():
        if not len(kept):
            raise DataError(
                f"All {count} {name} examples of {data.name} have prompts of {max_length} tokens or more, so that "
                "nothing is left to learn. Shorten them, or raise --max-length."
            )
        if len(kept) < count:
            notes.append(
                f"{count - len(kept)} of {count} {name} examples have prompts of {max_length} tokens or more and were "
                "left out."
            )
    return notes


def measure_adapter(adapted: Any, batches: Any, progress: Progress) -> list[Change]:
    """Return loss, perplexity and KL from the base over the learned tokens of a TRL trainer's held-out batches."""
    adapted.eval()
    before, after, moved, lengths = [], [], [], []
    progress("measure", 0, len(batches), unit="batches")
    for done, batch in enumerate(batches, 1):
        labels = batch.pop("labels")[:, 1:]
        learned = labels != -100  # not the prompt, not the padding
        base, tuned = (_learned_logits(adapted, batch, learned, with_adapter) for with_adapter in (False, True))
        for losses, logits in ((before, base), (after, tuned)):
            losses.append(-logits.log_softmax(-1).gather(1, labels[learned].cpu()[:, None])[:, 0])
        moved.append(Distributions.of(base).kl(tuned))
        lengths += learned.sum(1).tolist()
        progress("measure", done, len(batches), unit="batches")
    lengths = [length for length in lengths if length]
    old, new, kl = (bootstrap_mean(torch.cat(values).numpy(), lengths) for values in (before, after, moved))
    none = Estimate(value=0.0, low=0.0, high=0.0)
    return [
        Change(name="held-out loss (nats)", before=old, after=new),
        Change(name="held-out perplexity", before=_exp(old), after=_exp(new)),
        Change(name="KL from the base (nats)", before=none, after=kl),
    ]


@torch.no_grad()
def _learned_logits(adapted: Any, batch: dict[str, Tensor], learned: Tensor, with_adapter: bool) -> Tensor:
    with nullcontext() if with_adapter else adapted.disable_adapter():
        return adapted(**batch, use_cache=False).logits[:, :-1][learned].float().cpu()


def _exp(mean: Estimate) -> Estimate:
    return Estimate(**{key: float(np.exp(value)) for key, value in mean.model_dump().items()})
