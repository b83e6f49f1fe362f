"""Training of the closing pass: how long, how far, and whether it is worth keeping.

How long (`_Tuning.train`): steps fall with the square root of their number, and the average over all of them, later
ones counting more, is about what a schedule that ends there would reach. It is measured on windows kept apart for that,
after 16 steps and then whenever the text has grown by 40 %, until `patience` looks in a row find it no better, or text
or time end. How far (`_Tuning.move_to_best_fraction`): the least of `_FRACTIONS` of the way that has `_ENOUGH_OF_GAIN`
of the best one's gain there; the rest of the way gains a tenth, and costs what the text does not ask for. Whether
(`_falls_clearly`): other windows, which decided nothing yet, must show that the KL clearly falls, and on no kind of
text clearly rises.

The loss is the square root of each token's KL, by `kl_lower_bound`, so that a share of a token's KL counts more where
there is little of it. The mean KL itself trades tokens that quantization hardly hurt, such as letters of answers, for
those that have most of it (reports/damage.md). What is compared is the unbiased KL. The original's distributions are
kept as a few probabilities of every token, so only one model is in memory, but for one without some experts: float32
weights, their gradients, and the decoded codes, 16 bytes a weight.
"""

import math
import time
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from dynquant.checkpoints.model import Model
from dynquant.errors import StatsError
from dynquant.evaluation.distributions import Distributions
from dynquant.evaluation.statistics import block_sums
from dynquant.exporters.options import TUNED_PARTS
from dynquant.exporters.tuning.interface import QuantizedFile
from dynquant.exporters.tuning.tensors import (
    Correction,
    Routes,
    Tunable,
    install,
    recorded_routes,
    share_changed,
    trained_kinds,
)
from dynquant.inputs.written import Writer
from dynquant.running.live_weights import LiveWeights
from dynquant.running.load import load_tokenizer, tf32_products
from dynquant.session import Progress, ignore_progress

GIVEN, WRITTEN = "given text", "text that the original wrote"
_TRAINED_TOP = 1024
_STOPPED_FALLING, _TEXT_ENDED, _TIME_ENDED = "the held-out KL stopped falling", "all text was used", "time was over"
_FULL_RATE_STEPS = 16
_STEPS = 128  # that all text makes, if each has as many tokens as follow
_LEAST_STEP, _MOST_STEP = 1024, 4096  # tokens of a step: four times as many take a GPU as long
_GROWTH = 1.4  # of the text between two looks at the held-out KL
_LATE = 8  # power by which later steps count more in the average
_LEAST_KL = 1e-3  # nats that are added to a token's KL, whose root has no slope at 0
_FRACTIONS = (0.25, 0.5, 0.75, 1.0)  # of the way from the first values to the trained ones
_ENOUGH_OF_GAIN = 0.85
"""Share of the best fraction's gain: half the way has 0.89 where three quarters are best, 0.75 where all is."""
_CLEARLY = 1.64  # standard errors by which the KL must fall: one chance in twenty that it did not
# Shares of the time for what the original says to text: that which chooses, which decides (the file is measured on it
# twice, as long), and which is trained on.
_CHOICE_SHARE, _DECISION_SHARE, _TRAINED_SHARE = 0.02, 0.1, 0.25
FEWEST_WINDOWS, _FEWEST_WRITTEN = 5, 5  # to hold some out for both choices


@dataclass(frozen=True)
class TuneOptions:
    """Settings of training. Rates, of the first 16 steps, are shares of the relative error that quantization made."""

    tokens: int = 131_072
    """At most of given text; fewer when the held-out KL stops falling."""
    minutes: float = 10.0
    """At most, for all of it but writing text; text that the time is too short for is left out."""
    sampled_tokens: int = 0
    """Tokens that the original writes itself, beside those of the text; a part of them is held out."""
    parts: tuple[str, ...] = TUNED_PARTS
    """Parts that are trained; the rest stays as it is."""
    patience: int = 3
    """Looks at the held-out KL without a gain before training ends."""
    step_tokens: int | None = None
    """None for so many that all text makes `_STEPS` steps, within limits."""
    scale_rate: float = 0.025
    norm_rate: float = 0.01
    router_rate: float = 0.01
    held_out_tokens: int = 16_384
    """Tokens that decide whether the result is kept, at most a fifth of the text; a quarter as many choose it."""
    seed: int = 0

    @property
    def rates(self) -> dict[str, float]:
        """Rates of the parts that are trained."""
        norms = self.norm_rate
        rates = {"scales": self.scale_rate, "norms": norms, "biases": norms, "routers": self.router_rate}
        return {part: rates[part] for part in self.parts}


class Score(NamedTuple):
    """The file against its original on windows that were held out."""

    kl: float
    agreement: float
    """Share of tokens after which both find the same token most likely."""
    rerouted: float
    """Share of tokens, over all layers, that go to other experts."""
    kls: dict[str, float]
    """By kind of text."""


class Tuned(NamedTuple):
    """New values of stored tensors, by their names in the file; empty when tuning did not clearly lower the KL on
    held-out windows."""

    replacements: dict[str, Tensor]
    before: Score
    after: Score
    tokens: int
    held_tokens: int
    fraction: float
    """Share of the way from the first values to the trained ones."""
    ended: str
    """Why training ended."""


class _Batch(NamedTuple):
    """Windows of one kind of text, and what the original makes of them."""

    kind: str
    ids: Tensor
    target: Distributions
    routes: Routes


class _Split(NamedTuple):
    """Batches of windows by their use."""

    train: list[tuple[str, Tensor]]
    choice: list[tuple[str, Tensor]]
    decision: list[tuple[str, Tensor]]


class _Blocks(NamedTuple):
    """Measurements on batches: mean KL of every block of tokens with its kind, agreement, and changed routes."""

    kls: Tensor
    kinds: list[str]
    agreement: float
    rerouted: float

    @property
    def mean(self) -> float:
        return float(self.kls.mean())

    def of(self, kind: str) -> Tensor:
        return self.kls[[index for index, name in enumerate(self.kinds) if name == kind]]

    def score(self) -> Score:
        by_kind = {kind: float(self.of(kind).mean()) for kind in dict.fromkeys(self.kinds)}
        return Score(self.mean, self.agreement, self.rerouted, by_kind)


@torch.no_grad()
def tune(
    model: Model,
    hf_model: Any,
    file: QuantizedFile,
    windows: Tensor,
    options: TuneOptions,
    *,
    original: Any = None,
    written_file: Path | None = None,
    progress: Progress = ignore_progress,
) -> Tuned:
    """Tune `file` towards `hf_model`, its original in float32, which ends up holding tuned weights.

    Args:
        original: The running model that it is tuned towards instead, which has experts that `hf_model` lacks.
        windows: token ids [n, window] to train on, apart from those that are held out.
        written_file: where text that the original writes is kept for a run that is started again.

    Raises:
        StatsError: too little text.
        CheckpointError: the original's weights cannot be followed into the running model.
    """
    with recorded_routes(hf_model) as routes:
        live = file.live(hf_model)
        tuning = _Tuning(hf_model, routes, options, progress, original)
        written = _written(model, original or hf_model, windows, options, written_file, progress)
        split = _split(windows.long(), written, options)
        start, limit = time.monotonic(), 60 * options.minutes
        choice = tuning.original(split.choice, until=start + _CHOICE_SHARE * limit)
        decision = tuning.original(split.decision, until=start + (_CHOICE_SHARE + _DECISION_SHARE) * limit)
        is_idle = not trained_kinds(live, file, options.rates)
        until = time.monotonic() + _TRAINED_SHARE * limit
        train = [] if is_idle else tuning.original(split.train, until=until, num_top=_TRAINED_TOP, num_tail=0)
        trained, deadline = install(live, file, options.rates, routes), start + limit
        tuning.trained, first = list(trained.values()), [tensor.parameter.clone() for tensor in trained.values()]
        start = time.monotonic()
        before = tuning.measured(decision)
        # Measured once more, and the start and fractions of the way on a quarter each.
        deadline -= (1 + (1 + len(_FRACTIONS)) / 4) * (time.monotonic() - start)
        held = sum(batch.ids.numel() for batch in decision)
        if not trained:
            return Tuned({}, before.score(), before.score(), 0, held, 0.0, "the file has none of the parts to train")
        best, tokens, ended = tuning.train(live, trained, train, choice, deadline)
        fraction = tuning.move_to_best_fraction(first, best, choice)
        after = tuning.measured(decision)
    is_kept = _falls_clearly(before, after)
    changed = {key: value for tensor in trained.values() for key, value in tensor.stored().items()} if is_kept else {}
    if len(train) < len(split.train) and ended == _TEXT_ENDED:
        ended = _TIME_ENDED
    return Tuned(changed, before.score(), after.score(), tokens, held, fraction, ended)


def _falls_clearly(before: _Blocks, after: _Blocks) -> bool:
    """Return whether the KL clearly falls over all blocks, and clearly rises on no kind of text."""
    by_kind = [after.of(kind) - before.of(kind) for kind in dict.fromkeys(before.kinds)]
    return _sureness(before.kls - after.kls) > _CLEARLY and all(_sureness(part) < _CLEARLY for part in by_kind)


def _sureness(changes: Tensor) -> float:
    """Return the mean over blocks in standard errors of itself; 0 for a single block."""
    return float(changes.mean() / changes.std().clamp_min(1e-12)) * math.sqrt(len(changes)) if len(changes) > 1 else 0.0


def _written(
    model: Model, hf_model: Any, windows: Tensor, options: TuneOptions, kept: Path | None, progress: Progress
) -> Tensor:
    """Return windows that the original writes, kept in a file where one is named."""
    count = -(-options.sampled_tokens // windows.shape[1])
    if not count:
        return windows[:0].long()
    writer = Writer(model.fingerprint, lambda: hf_model, load_tokenizer(model), file=kept)
    return writer.windows(windows.long(), max(count, _FEWEST_WRITTEN), options.seed, progress)


def _split(given: Tensor, written: Tensor, options: TuneOptions) -> _Split:
    if len(given) < FEWEST_WINDOWS:
        raise StatsError(
            f"The closing pass needs at least {FEWEST_WINDOWS} windows of {given.shape[1]} tokens, but the text has "
            f"{len(given)}. Calibrate on more text (--calibration, --tokens), or give --tune 0 to go without."
        )
    generator = torch.Generator().manual_seed(options.seed)
    trained = min(options.tokens, given.numel()) + written.numel()
    step_tokens = options.step_tokens or min(max(trained // _STEPS, _LEAST_STEP), _MOST_STEP)
    together = max(1, step_tokens // given.shape[1])
    split = _Split([], [], [])
    share = options.held_out_tokens / (len(given) + len(written)) / given.shape[1]
    for kind, windows in ((GIVEN, given), (WRITTEN, written)):
        windows = windows[torch.randperm(len(windows), generator=generator)]
        if not len(windows):
            continue
        decision = max(2, round(min(share, 0.2) * len(windows)))
        choice = max(1, decision // 4)
        most = max(1, options.tokens // windows.shape[1]) if kind == GIVEN else len(windows)
        sizes = (decision, choice, min(most, len(windows) - decision - choice))
        for batches, part in zip(split[::-1], windows[: sum(sizes)].split(sizes), strict=True):
            batches += [(kind, batch) for batch in part.split(together)]
    mixed = ([part[index] for index in torch.randperm(len(part), generator=generator)] for part in split)
    return _Split(*mixed)  # time may end within each


class _Tuning:
    """A running model whose tensors `trained` are moved."""

    def __init__(self, hf_model: Any, routes: Routes, options: TuneOptions, progress: Progress, towards: Any) -> None:
        self._model, self._towards, self._routes = hf_model, towards, routes
        self._options, self._progress = options, progress
        self._device = next(hf_model.parameters()).device
        self.trained: list[Tunable] = []

    def original(self, batches: list[tuple[str, Tensor]], until: float = math.inf, **reduction: int) -> list[_Batch]:
        """Return what the original makes of batches, or of those that it can see `until` a time; at least one."""
        seen: list[_Batch] = []
        total = sum(ids.numel() for _, ids in batches)
        self._progress("original", 0, total, unit="tokens")
        for kind, ids in batches:
            logits = self._logits(ids)  # also for the routes, which are those of the experts that are there
            if self._towards is not None:
                logits = _logits(self._towards, ids.to(self._device))
            target = Distributions.of(logits, **reduction)
            seen.append(_Batch(kind, ids, target, self._small_routes()))
            self._progress("original", sum(batch.ids.numel() for batch in seen), total, unit="tokens")
            if time.monotonic() > until:
                break
        return seen

    def measured(self, batches: Iterable[_Batch]) -> _Blocks:
        """Compare the model as it is with the original."""
        kls, kinds, agreements, changed = [], [], [], []
        for batch in batches:
            logits = self._logits(batch.ids)
            sums, sizes = block_sums(batch.target.kl(logits).cpu().numpy(), [len(row) for row in batch.ids])
            kls.append(torch.from_numpy(sums / sizes))
            kinds += [batch.kind] * len(sums)
            agreements.append(batch.target.agreements(logits))
            changed.append(share_changed(batch.routes, self._small_routes()))
        return _Blocks(torch.cat(kls), kinds, float(torch.cat(agreements).double().mean()), sum(changed) / len(changed))

    def train(
        self, live: LiveWeights, trained: dict[str, Tunable], train: list[_Batch], choice: list[_Batch], deadline: float
    ) -> tuple[list[Tensor], int, str]:
        """Return the best average of the steps, the tokens that were trained on, and why that was all."""
        self._model.requires_grad_(False)
        for name in trained.keys() - live.buffers:
            for parameter in live.parameters(name):
                parameter.requires_grad_(True)
        groups = [{"params": [tensor.parameter], "lr": tensor.rate} for tensor in self.trained]
        optimizer = torch.optim.Adam(groups, betas=(0.9, 0.99))
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, _step_size)
        average = [tensor.parameter.clone() for tensor in self.trained]
        best, lowest, look, idle = average, math.inf, _FULL_RATE_STEPS, 0
        tokens, total, ended = 0, sum(batch.ids.numel() for batch in train), _TEXT_ENDED
        self._progress("tune", 0, total, unit="tokens")
        for step, batch in enumerate(train, 1):
            self._step(batch, optimizer)
            schedule.step()
            for mean, tensor in zip(average, self.trained, strict=True):
                mean.lerp_(tensor.parameter, (_LATE + 1) / (_LATE + step))
            tokens += batch.ids.numel()
            self._progress("tune", tokens, total, unit="tokens")
            is_late = time.monotonic() > deadline
            if step < look and step < len(train) and not is_late:
                continue
            current = [tensor.parameter.clone() for tensor in self.trained]
            kl = self._placed(average, choice)
            idle = 0 if kl < lowest else idle + 1
            if kl < lowest:
                best, lowest = [mean.clone() for mean in average], kl
            if is_late or idle == self._options.patience:
                ended = _TIME_ENDED if is_late else _STOPPED_FALLING
                break
            self._place(current)
            look = math.ceil(_GROWTH * step)
        self._model.requires_grad_(False)
        return best, tokens, ended

    def move_to_best_fraction(self, first: list[Tensor], last: list[Tensor], choice: list[_Batch]) -> float:
        """Go the least fraction of the way from the first to the last values that has most of the best one's gain."""

        def on_the_way(fraction: float) -> list[Tensor]:
            return [start.lerp(end, fraction) for start, end in zip(first, last, strict=True)]

        before, *kls = (self._placed(on_the_way(fraction), choice) for fraction in (0.0, *_FRACTIONS))
        enough = max(min(kls), before - _ENOUGH_OF_GAIN * (before - min(kls)))
        enough_gained = (share for share, kl in zip(_FRACTIONS, kls, strict=True) if kl <= enough)
        fraction = next(enough_gained, _FRACTIONS[-1])  # none of a training that diverged, which is then not kept
        self._place(on_the_way(fraction), as_stored=True)  # what is measured next is what is written
        return fraction

    def _step(self, batch: _Batch, optimizer: torch.optim.Optimizer) -> None:
        with torch.enable_grad(), tf32_products(self._device):
            kl = batch.target.kl_lower_bound(self._logits(batch.ids)).clamp(min=0)
            (kl + _LEAST_KL).sqrt().mean().backward()
        for tensor in self.trained:
            if isinstance(tensor, Correction):
                tensor.expected = batch.routes
            tensor.pull_gradient()
        self._model.zero_grad(set_to_none=True)  # their memory is free before the next pass needs it
        optimizer.step()
        for tensor in self.trained:
            tensor.apply()

    def _placed(self, values: list[Tensor], batches: list[_Batch]) -> float:
        """Return the KL with other values of what is trained, rounded as they are stored; they stay in the model."""
        self._place(values, as_stored=True)
        return self.measured(batches).mean

    def _place(self, values: list[Tensor], *, as_stored: bool = False) -> None:
        for tensor, value in zip(self.trained, values, strict=True):
            tensor.parameter.copy_(value)
            tensor.apply(as_stored=as_stored)

    def _logits(self, ids: Tensor) -> Tensor:
        return _logits(self._model, ids.to(self._device))

    def _small_routes(self) -> Routes:
        return {layer: ids.short().cpu() for layer, ids in self._routes.items()}


def _logits(hf_model: Any, ids: Tensor) -> Tensor:
    with tf32_products(ids.device):
        return hf_model(input_ids=ids, use_cache=False).logits.float().flatten(0, 1)


def _step_size(step: int) -> float:
    """Return the share of the full rates: a few steps to warm up, later in the measure in which noise averages out."""
    return min(1.0, (step + 1) / 4) * min(1.0, math.sqrt(_FULL_RATE_STEPS / (step + 1)))
