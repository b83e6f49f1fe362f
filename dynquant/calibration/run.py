"""Measures what the weights of a model see: E[x^2] per input channel, extremes, sampled inputs, expert routing.

`collect_statistics` runs a transformers model over text or pictures with hooks on linear layers and inside fused
experts. The last part of the inputs is held back: it gives only samples, on which activation errors are measured later,
so that no encoder is judged on inputs that it was fitted to. Extremes of down-projections come from all inputs. With
pictures, image and text tokens are measured together and apart. Second moments (E[x xᵀ], what error feedback needs) are
summed beside, from the forward pass alone or weighted by the gradients of a backward pass. `streamed` and `sharded`
share the options, the split and the results, and `other_options` tells which of them an earlier run has.
"""

from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import NamedTuple

import torch
from torch import nn

from dynquant.calibration.collector import Collector, SampleLimits
from dynquant.calibration.options import CalibrationOptions, Hessians
from dynquant.calibration.recorders import DEFAULT_LIMIT, MomentRecorder
from dynquant.calibration.second_moments import SecondMoments, kind_beside
from dynquant.calibration.statistics import CalibrationStats, StatsProvenance
from dynquant.checkpoints.model import Model
from dynquant.errors import StatsError
from dynquant.families.common.settings import differing_settings
from dynquant.inputs.model_inputs import Batch, ModelInputs, check_context, num_held_back
from dynquant.inputs.pictures import read_samples
from dynquant.inputs.text import pack_windows, read_text, refused_chats
from dynquant.running.layer_ahead import layer_ahead_of
from dynquant.running.linear_hooks import activation_gradients, last_logits, sampled_log_probability
from dynquant.running.load import load_tokenizer
from dynquant.running.weight_inputs import WeightInputs
from dynquant.session import Progress, ignore_progress
from dynquant.storage.file_names import KINDS

HELD_BACK = 0.1  # share of the windows or samples that give samples and no sums


@dataclass(frozen=True)
class StatisticsOptions:
    """Choice of what is measured of every layer's inputs, and how many of the inputs are held back."""

    hessians: Hessians = "none"
    hessian_bytes: tuple[int, int] = (DEFAULT_LIMIT, DEFAULT_LIMIT)
    """Memory that second moments of inputs, and of outputs, may take."""
    held_back: float = HELD_BACK
    limits: SampleLimits = field(default_factory=SampleLimits)

    def collector(self, hf_model: nn.Module, names: WeightInputs, *, by_kind: bool = False) -> Collector:
        """Return what sees the model's inputs; its `moments` are None when no second moments are taken."""
        moments, both = None, self.hessians == "two-sided"
        if self.hessians != "none":
            moments = MomentRecorder.for_model(hf_model, self.hessian_bytes, with_outputs=both)
        gradients = both or self.hessians == "gradients"
        return Collector(hf_model, names, moments, limits=self.limits, with_gradients=gradients, by_kind=by_kind)


@dataclass(frozen=True)
class Calibration:
    """Results of one run. `left_out` lists inputs whose second moments did not fit in memory."""

    stats: CalibrationStats
    moments: SecondMoments | None = None  # None where nothing was asked for, or a streamed run has written them itself
    pools_experts: bool = False
    left_out: tuple[str, ...] = ()
    by_kind: Mapping[str, CalibrationStats] = field(default_factory=dict)  # of image and of text tokens, with pictures
    num_moments: int = 0
    first_stage: int = 0  # stages below it were taken over from an interrupted run that was streamed


def text_inputs(
    model: Model, text: str | Path | None, *, tokens: int, window: int, batch_size: int = 4, seed: int = 0
) -> ModelInputs:
    """Return windows of a text, or (None) of the mix that ships; raise StatsError when it cannot be used."""
    tokenizer = load_tokenizer(model)
    documents = read_text(text, seed=seed, max_tokens=tokens)
    windows = pack_windows(documents, tokenizer, window=window, max_tokens=tokens)
    check_context(model, windows.shape[1])
    plain = tuple(refused_chats(documents, tokenizer))
    return ModelInputs(windows, batch_size, documents.name, documents.sha256, plain)


def count_windows(model: Model, options: CalibrationOptions, seed: int, enough: int) -> int:
    """Return how many windows of text a calibration sums, on which later passes run; no more is read than tells whether
    there are `enough`."""
    tokens = min(options.tokens or options.sampled_tokens, 2 * enough * options.window)
    inputs = text_inputs(model, options.text, tokens=tokens, window=options.window, seed=seed)
    total = (len(inputs) if options.tokens else 0) + -(-options.sampled_tokens // inputs.longest)
    return total - num_held_back(total, HELD_BACK)


def provenance_of(model: Model, inputs: ModelInputs, *, tokens: int, seed: int) -> StatsProvenance:
    """Return where the statistics of a run on `inputs`, under a limit of `tokens`, will come from."""
    text = {"text_hash": inputs.sha256, "text_name": inputs.name, "window": inputs.longest}
    identity = {"fingerprint": model.fingerprint, "settings": model.settings}
    return StatsProvenance(**identity, max_tokens=tokens, seed=seed, **text)


class Split(NamedTuple):
    """Inputs that are summed, those that are held back and sampled, and the provenance with their numbers."""

    summed: ModelInputs
    held: ModelInputs
    provenance: StatsProvenance


def split_inputs(inputs: ModelInputs, provenance: StatsProvenance, held_back: float) -> Split:
    """Hold back the last of the inputs, or raise StatsError for no input."""
    if not len(inputs):
        raise StatsError("The calibration text gives no window of tokens; give a longer text.")
    summed, held = inputs.hold_back(held_back)
    counts = {"num_windows": len(inputs), "num_tokens": summed.num_tokens, "num_held_back_tokens": held.num_tokens}
    return Split(summed, held, provenance.model_copy(update=counts | {"window": inputs.longest}))


def collect_statistics(
    hf_model: nn.Module,
    inputs: ModelInputs,
    *,
    names: WeightInputs,
    provenance: StatsProvenance,
    options: StatisticsOptions | None = None,
    progress: Progress = ignore_progress,
) -> Calibration:
    """Run a language model on text, or a vision-language model on samples with pictures; return their statistics.

    The last of the inputs are sampled and not summed: at least one when there are two or more. Counts of windows and
    tokens are entered in `provenance`. The model's weights and configuration are left as they were.

    Raises:
        StatsError: no input, no linear layer with a GGUF name, or experts that cannot be observed.
    """
    options = options or StatisticsOptions()
    summed, held, provenance = split_inputs(inputs, provenance, options.held_back)
    kinds = KINDS if inputs.has_pictures else ()
    collector = options.collector(hf_model, names, by_kind=bool(kinds))
    device = next(hf_model.parameters()).device
    ahead = None if kinds else layer_ahead_of(hf_model)

    def run(stage: str, part: ModelInputs, labels: Labels | None = None, *, is_held: bool = False) -> None:
        """Run all batches; with labels, go back from those that are drawn."""
        done = 0
        progress(stage, done, part.num_tokens, unit="tokens")
        for number, batch in enumerate(part, start=1):
            fill = number / part.num_batches if is_held else None
            collector.start(batch, fill)
            logits = hf_model(**batch.on(device), use_cache=False).logits
            if labels is not None:
                sampled_log_probability(logits, labels.next).backward()
            if ahead is not None:
                collector.start(Batch.of_tokens(batch.ids[:, 1:]), fill)
                logits = ahead.logits(batch.ids.to(device))
                if labels is not None:
                    sampled_log_probability(logits, labels.after_next).backward()
            done += batch.num_tokens
            progress(stage, done, part.num_tokens, unit="tokens")

    with collector.attached(), nullcontext() if ahead is None else ahead.following():
        if collector.with_gradients:
            with activation_gradients(hf_model), collector.seeing_gradients():
                run("calibrate", summed, Labels.seeded(provenance.seed))
        else:
            with torch.no_grad(), last_logits(hf_model):
                run("calibrate", summed)
        with torch.no_grad(), last_logits(hf_model):
            run("sample", held, is_held=True)  # no gradients: samples are inputs
    stats = CalibrationStats(provenance, collector.take(), collector.aliases)
    check_seen(stats, hf_model)
    by_kind = {kind: CalibrationStats(provenance, collector.take(kind), stats.aliases) for kind in kinds}
    result = Calibration(stats, by_kind=by_kind)
    return result if collector.moments is None else _with_moments(result, collector.moments, summed, options.hessians)


def _with_moments(result: Calibration, moments: MomentRecorder, summed: ModelInputs, hessians: Hessians) -> Calibration:
    sums, weights = moments.take()
    shared = {alias: key for alias, key in result.stats.aliases.items() if key in sums}
    tokens = summed.windows.to(torch.int32).cpu()  # what later passes tune on
    second = SecondMoments(result.stats.provenance, tokens, hessians, shared, sums, weights)
    left_out = tuple(moments.left_out)
    return replace(
        result, moments=second, pools_experts=moments.pools_experts, left_out=left_out, num_moments=len(sums)
    )


class Labels(NamedTuple):
    """Generators that draw tokens from the model's distribution, and from that of the layer that predicts ahead."""

    next: torch.Generator
    after_next: torch.Generator

    @classmethod
    def seeded(cls, seed: int) -> "Labels":
        """Return both, apart, so that the layer ahead changes nothing of the others."""
        return cls(*(torch.Generator().manual_seed(seed) for _ in range(2)))


def check_seen(stats: CalibrationStats, hf_model: nn.Module) -> None:
    """Raise StatsError for statistics of a model none of whose layers has a name."""
    if not stats.inputs:
        raise StatsError(
            f"None of the linear layers of {type(hf_model).__name__} has a name in gguf-py's tensor map, so "
            "nothing was measured; check that the model's architecture is the one that was asked for."
        )


def other_options(
    provenance: StatsProvenance, kind: str, model: Model, options: CalibrationOptions, seed: int
) -> list[str]:
    """Return in what statistics, with second moments of this kind, differ from those that these options give."""
    same = {
        "weights": provenance.fingerprint == model.fingerprint,
        "configuration": not differing_settings(provenance.settings, model.settings),
        "--tokens": provenance.max_tokens == options.tokens,
        "--seed": provenance.seed == seed,
        "--sampled-tokens": provenance.sampled_tokens == options.sampled_tokens,
        "--hessians": options.hessians in ("none", kind),
    }
    if options.data is not None:
        same["--data"] = provenance.text_hash == read_samples(Path(options.data)).sha256
    elif all(same.values()):  # the text depends on both
        text = read_text(options.text, seed=seed, max_tokens=given_tokens(options))
        same |= {
            "--window": provenance.window == _window_of(provenance, model, options, seed),
            "text": provenance.text_hash == text.sha256,
        }
    newer = [name for name, value in (provenance.model_extra or {}).items() if value]  # of options that are not here
    return [name for name, is_same in same.items() if not is_same] + newer


def _window_of(provenance: StatsProvenance, model: Model, options: CalibrationOptions, seed: int) -> int:
    """Return the window that a calibration with these options has: that of one short window is the text's length."""
    window = min(options.window, max(options.tokens, 2))
    if provenance.num_windows != 1 or provenance.window >= window:
        return window
    return text_inputs(model, options.text, tokens=options.tokens, window=options.window, seed=seed).longest


def given_tokens(options: CalibrationOptions) -> int:
    """Return how many tokens of given text are read; what the model writes takes its beginnings from some."""
    return options.tokens or options.sampled_tokens


def with_kept_moments(path: Path, model: Model, options: CalibrationOptions, seed: int) -> CalibrationOptions:
    """Return options that take second moments with gradients as they are in a folder, where none were asked for by
    name: what `plan --select` measured in a multiple of the time serves a plan without it, too."""
    kind = kind_beside(path)
    if kind in ("none", options.hessians) or options.hessians != "activations" or options.changed("hessians"):
        return options
    kept, provenance = options.filled({"hessians": kind}), CalibrationStats.load(path).provenance
    return options if other_options(provenance, kind, model, kept, seed) else kept
