"""Measures what the weights of a model see: E[x^2] per input channel, extremes, sampled inputs, expert routing.

`collect_statistics` runs a transformers model over token windows with hooks on linear layers and inside fused experts.
The last part of the windows is held back: it gives only samples, on which activation errors are measured later, so
that no encoder is judged on inputs that it was fitted to. Extremes of down-projections come from all windows.
Second moments (E[x xᵀ], what error feedback needs) are summed beside, from the forward pass alone or weighted by the
gradients of a backward pass. `calibrate` adds what a user has: a model on disk and a text.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from dynquant.calibration.collector import Collector, SampleLimits
from dynquant.calibration.moment_recorder import DEFAULT_LIMIT, MomentRecorder
from dynquant.calibration.options import Hessians
from dynquant.calibration.second_moments import SecondMoments
from dynquant.calibration.statistics import CalibrationStats, StatsProvenance
from dynquant.checkpoints.model import Model
from dynquant.errors import StatsError
from dynquant.inputs.text import CalibrationText, pack_windows, read_text
from dynquant.running.gradients import activation_gradients, backward_from_sampled_labels
from dynquant.running.load import load_hf, load_tokenizer
from dynquant.session import Progress, ignore_progress

DEFAULT_TOKENS = 131_072
DEFAULT_WINDOW = 512
HELD_BACK = 0.1
"""Share of the windows that are sampled instead of summed."""


@dataclass(frozen=True)
class Calibration:
    """What one run measured. `left_out` lists inputs whose second moments did not fit in memory."""

    stats: CalibrationStats
    moments: SecondMoments | None = None
    pools_experts: bool = False
    left_out: tuple[str, ...] = ()


def calibrate(
    model: Model,
    text: str | Path | None = None,
    *,
    tokens: int = DEFAULT_TOKENS,
    window: int = DEFAULT_WINDOW,
    batch_size: int = 4,
    device: str = "cpu",
    dtype: torch.dtype | None = None,
    seed: int = 0,
    hessians: Hessians = "none",
    hessian_bytes: int = DEFAULT_LIMIT,
    progress: Progress | None = None,
) -> Calibration:
    """Calibrate a model on a text file, a `datasets` id, or (None) the built-in text.

    Args:
        tokens: at most this many tokens are used.
        dtype: of weights and activations; by default float32 on a CPU and the checkpoint's own on a GPU.
        seed: shuffles the documents of the text, and draws the labels of the backward pass.
        hessians: which second moments to take.
        hessian_bytes: how much memory they may take.

    Raises:
        CheckpointError: transformers cannot load the model.
        StatsError: the text is missing or empty, or the model has experts that cannot be observed.
    """
    windows, provenance = windows_of(model, text, tokens=tokens, window=window, seed=seed)
    return collect_statistics(
        load_hf(model, dtype=dtype, device=device),
        windows,
        arch=model.arch,
        n_layer=model.hyper.n_layer,
        provenance=provenance,
        batch_size=batch_size,
        hessians=hessians,
        hessian_bytes=hessian_bytes,
        progress=progress,
    )


def windows_of(
    model: Model, text: str | Path | None, *, tokens: int, window: int, seed: int
) -> tuple[torch.Tensor, StatsProvenance]:
    """Token ids [windows, window] of a text, and where they come from.

    Raises:
        StatsError: the text is missing or empty.
    """
    tokenizer = load_tokenizer(model)
    documents: CalibrationText = read_text(text, seed=seed, max_tokens=tokens)
    windows = pack_windows(documents, tokenizer, window=window, max_tokens=tokens)
    return windows, StatsProvenance(
        fingerprint=model.fingerprint,
        text_hash=documents.sha256,
        text_name=documents.name,
        window=windows.shape[1],
        max_tokens=tokens,
        seed=seed,
    )


def num_held_back(count: int, share: float) -> int:
    """How many of `count` windows or samples are held back: at least one, but not the only one unless all are."""
    return 0 if share <= 0 or (count == 1 and share < 1) else max(1, round(count * share))


def split_windows(
    tokens: torch.Tensor, provenance: StatsProvenance, held_back: float = HELD_BACK
) -> tuple[torch.Tensor, torch.Tensor, StatsProvenance]:
    """Windows that are summed, windows that are sampled, and the provenance with their numbers.

    Raises:
        StatsError: no window.
    """
    num_windows, window = tokens.shape if tokens.ndim == 2 else (0, 0)
    if num_windows == 0:
        raise StatsError("The calibration text gives no window of tokens; give a longer text.")
    num_held = num_held_back(num_windows, held_back)
    summed, held = tokens[: num_windows - num_held], tokens[num_windows - num_held :]
    counted = {
        "num_windows": num_windows,
        "num_tokens": summed.numel(),
        "num_held_back_tokens": held.numel(),
        "window": window,
    }
    return summed, held, provenance.model_copy(update=counted)


def collect_statistics(
    hf_model: nn.Module,
    tokens: torch.Tensor,
    *,
    arch: str,
    n_layer: int,
    provenance: StatsProvenance,
    held_back: float = HELD_BACK,
    limits: SampleLimits | None = None,
    batch_size: int = 4,
    hessians: Hessians = "none",
    hessian_bytes: int = DEFAULT_LIMIT,
    progress: Progress | None = None,
) -> Calibration:
    """Run `tokens` [windows, window] through a causal language model and return its statistics.

    The last `held_back` of the windows is sampled and not summed: at least one when there are two or more. Window
    and token counts are entered in `provenance`. The model's weights and configuration are left as they were.

    Raises:
        StatsError: no window, no linear layer with a GGUF name, or experts that cannot be observed.
    """
    summed, held, provenance = split_windows(tokens, provenance, held_back)
    moments = None if hessians == "none" else MomentRecorder.for_model(hf_model, hessian_bytes)
    collector = Collector(
        hf_model, arch, n_layer, provenance.window, limits or SampleLimits(), moments,
        with_gradients=hessians == "gradients",
    )  # fmt: skip
    run = _Run(hf_model, collector, batch_size, progress, tokens.numel())
    with collector.attached():
        if hessians == "gradients":
            run.backward("calibrate", summed, torch.Generator().manual_seed(provenance.seed))
        else:
            run.forward("calibrate", summed)
        collector.is_sampling = True
        run.forward("sample", held)
    stats = CalibrationStats(provenance, collector.take(), collector.aliases)
    check_seen(stats, hf_model)
    if moments is None:
        return Calibration(stats)
    found = moments.finish(provenance, summed, hessians, stats.aliases)
    return Calibration(stats, found, moments.pools_experts, tuple(moments.left_out))


def check_seen(stats: CalibrationStats, hf_model: nn.Module) -> None:
    """Refuse statistics of a model none of whose layers has a name.

    Raises:
        StatsError: with the model's class.
    """
    if not stats.inputs:
        raise StatsError(
            f"None of the linear layers of {type(hf_model).__name__} has a name in gguf-py's tensor map, so "
            "nothing was measured; check that the model's architecture is the one that was asked for."
        )


@dataclass
class _Run:
    """Batches of windows through the model."""

    hf_model: nn.Module
    collector: Collector
    batch_size: int
    progress: Progress | None
    total: int
    done: int = 0

    def forward(self, stage: str, windows: torch.Tensor) -> None:
        with torch.no_grad(), _last_logits(self.hf_model):
            self._each(stage, windows, lambda batch: self.hf_model(input_ids=batch, use_cache=False))

    def backward(self, stage: str, windows: torch.Tensor, generator: torch.Generator) -> None:
        with activation_gradients(self.hf_model), self.collector.seeing_gradients():
            self._each(stage, windows, lambda batch: backward_from_sampled_labels(self.hf_model, batch, generator))

    def _each(self, stage: str, windows: torch.Tensor, run: Callable[[torch.Tensor], Any]) -> None:
        device = next(self.hf_model.parameters()).device
        batches = windows.split(self.batch_size) if len(windows) else ()
        report = self.progress or ignore_progress
        report(stage, self.done, self.total, unit="tokens")
        for index, batch in enumerate(batches):
            self.collector.sample_fill = (index + 1) / len(batches)
            run(batch.to(device))
            self.done += batch.numel()
            report(stage, self.done, self.total, unit="tokens")


@contextmanager
def _last_logits(hf_model: nn.Module) -> Iterator[None]:
    """Compute the logits of the last token only: over a window they can be larger than the model."""
    head = hf_model.get_output_embeddings() if hasattr(hf_model, "get_output_embeddings") else None
    if head is None:
        yield
        return
    handle = head.register_forward_pre_hook(lambda _module, args: (args[0][:, -1:], *args[1:]))
    try:
        yield
    finally:
        handle.remove()
