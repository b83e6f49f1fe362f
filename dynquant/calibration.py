"""Measures what the weights of a model see: E[x^2] per input channel, extremes, sampled inputs, expert routing.

`collect_statistics` runs a transformers model over token windows with hooks on linear layers and inside fused experts.
The last part of the windows is held back: it gives only samples, on which activation errors are measured later, so
that no encoder is judged on inputs that it was fitted to. Extremes of down-projections come from all windows.
Second moments (E[x xᵀ], what error feedback needs) are summed beside, from the forward pass alone or weighted by the
gradients of a backward pass. `calibrate` adds what a user has: a model on disk and a text.
"""

from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn

from dynquant.architecture import gguf_name_of
from dynquant.calibration_text import CalibrationText, pack_windows, read_text
from dynquant.errors import StatsError
from dynquant.expert_hooks import ExpertCall, expert_modules, record_experts
from dynquant.fisher import activation_gradients, backward_from_sampled_labels
from dynquant.hf_loading import load_hf, load_tokenizer
from dynquant.input_recorder import InputRecorder
from dynquant.linear_hooks import LinearHooks, linear_names
from dynquant.model import Model
from dynquant.moment_recorder import DEFAULT_LIMIT, MomentRecorder
from dynquant.progress import Progress, ignore_progress
from dynquant.second_moments import SecondMoments
from dynquant.statistics import CalibrationStats, StatsProvenance

DEFAULT_TOKENS = 131_072
DEFAULT_WINDOW = 512

Hessians = Literal["none", "activations", "gradients"]
"""Which second moments to take; with gradients, a token counts by its squared gradient of the KL divergence too."""


@dataclass(frozen=True)
class SampleLimits:
    """How many held-back rows are kept: per dense input, per expert, and bytes per layer of experts."""

    dense_rows: int = 256
    expert_rows: int = 32
    expert_layer_bytes: int = 64 * 2**20

    def rows_per_expert(self, num_experts: int, channels: int) -> int:
        """Rows of bfloat16 for each expert when inputs of `channels` channels in all are kept."""
        return max(1, min(self.expert_rows, self.expert_layer_bytes // (2 * num_experts * channels)))


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
    tokenizer = load_tokenizer(model)
    documents: CalibrationText = read_text(text, seed=seed, max_tokens=tokens)
    windows = pack_windows(documents, tokenizer, window=window, max_tokens=tokens)
    provenance = StatsProvenance(
        fingerprint=model.fingerprint,
        text_hash=documents.sha256,
        text_name=documents.name,
        window=windows.shape[1],
        max_tokens=tokens,
        seed=seed,
    )
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


def collect_statistics(
    hf_model: nn.Module,
    tokens: torch.Tensor,
    *,
    arch: str,
    n_layer: int,
    provenance: StatsProvenance,
    held_back: float = 0.1,
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
    num_windows, window = tokens.shape if tokens.ndim == 2 else (0, 0)
    if num_windows == 0:
        raise StatsError("The calibration text gives no window of tokens; give a longer text.")
    num_held = 0 if num_windows == 1 or held_back <= 0 else max(1, round(num_windows * held_back))
    summed, held = tokens[: num_windows - num_held], tokens[num_windows - num_held :]
    moments = None if hessians == "none" else MomentRecorder.for_model(hf_model, hessian_bytes)
    collector = _Collector(hf_model, arch, n_layer, window, limits or SampleLimits(), moments)
    run = _Run(hf_model, collector, batch_size, progress, tokens.numel())
    with collector.attached():
        if hessians == "gradients":
            run.backward("calibrate", summed, torch.Generator().manual_seed(provenance.seed))
        else:
            run.forward("calibrate", summed)
        collector.is_sampling = True
        run.forward("sample", held)
    counted = {
        "num_windows": num_windows,
        "num_tokens": summed.numel(),
        "num_held_back_tokens": held.numel(),
        "window": window,
    }
    provenance = provenance.model_copy(update=counted)
    stats = collector.finish(provenance)
    if moments is None:
        return Calibration(stats)
    found = moments.finish(provenance, summed, hessians, stats.aliases)
    return Calibration(stats, found, moments.pools_experts, tuple(moments.left_out))


@dataclass
class _Run:
    """Batches of windows through the model."""

    hf_model: nn.Module
    collector: "_Collector"
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


class _Collector:
    """Names the inputs that the hooks show, and hands them to recorders."""

    def __init__(
        self,
        hf_model: nn.Module,
        arch: str,
        n_layer: int,
        window: int,
        limits: SampleLimits,
        moments: MomentRecorder | None,
    ) -> None:
        self.is_sampling = False
        """Whether windows are held back: sampled, and no part of the sums."""
        self.sample_fill = 0.0
        """The share of the sample capacity to fill by the end of this batch."""
        self._model = hf_model
        self._window = window
        self._limits = limits
        self._moments = moments
        self._with_gradients = False
        self._recorders: dict[str, InputRecorder] = {}
        self._linear_layers = linear_names(hf_model, arch, n_layer)
        self._linears = LinearHooks(hf_model, arch, n_layer, self._observe_linear)
        self._experts = {
            module: _ExpertNames.of(name, arch, n_layer) for name, module in expert_modules(hf_model).items()
        }

    @contextmanager
    def attached(self) -> Iterator[None]:
        with self._linears.attached(), record_experts(self._model, self._observe_expert):
            yield

    @contextmanager
    def seeing_gradients(self) -> Iterator[None]:
        """Second moments of linear layers wait for the gradient of their output."""
        hooks = [
            layer.register_forward_hook(partial(self._await_gradient, name), with_kwargs=True)
            for name, layer in self._linear_layers.items()
        ]
        self._with_gradients = True
        try:
            yield
        finally:
            self._with_gradients = False
            for hook in hooks:
                hook.remove()

    def finish(self, provenance: StatsProvenance) -> CalibrationStats:
        if not self._recorders:
            raise StatsError(
                f"None of the linear layers of {type(self._model).__name__} has a name in gguf-py's tensor map, so "
                "nothing was measured; check that the model's architecture is the one that was asked for."
            )
        aliases = self._linears.aliases | {
            alias: names.gate for names in self._experts.values() for alias in names.aliases
        }
        inputs = {key: recorder.finish() for key, recorder in self._recorders.items()}
        return CalibrationStats(provenance, inputs, aliases)

    def _observe_linear(self, key: str, x: torch.Tensor, out: torch.Tensor | None) -> None:
        recorder = self._recorders.get(key)
        if recorder is None:
            num_experts = x.shape[1] if x.ndim == 3 else 1
            recorder = self._add_recorder(key, num_experts, x, self._limits.dense_rows)
        self._record(recorder, x, 0)
        if self._moments is not None and not self.is_sampling and key not in self._awaiting():
            self._moments.add(key, x)
        if out is not None:
            positions = torch.arange(len(x), device=x.device) % self._window
            recorder.add_extremes(x.detach(), out.detach(), positions)

    def _awaiting(self) -> Collection[str]:
        """Weights whose inputs are summed when their gradients arrive."""
        return self._linear_layers if self._with_gradients else ()

    def _await_gradient(self, name: str, _module: nn.Module, args: tuple, kwargs: dict, out: torch.Tensor) -> None:
        key = self._linears.aliases.get(name, name)
        x = (args[0] if args else kwargs["input"]).detach().flatten(0, -2)
        if out.requires_grad:
            out.register_hook(lambda gradient: self._add_moments(key, x, gradient.flatten(0, -2)))

    def _observe_expert(self, call: ExpertCall) -> None:
        names, module = self._experts[call.module], call.module
        x, h = call.x.detach(), call.down_input.detach()
        if names.down not in self._recorders:
            rows = self._limits.rows_per_expert(module.num_experts, x.shape[1] + h.shape[1])
            self._add_recorder(names.gate, module.num_experts, x, rows)
            self._add_recorder(names.down, module.num_experts, h, rows)
        self._record(self._recorders[names.gate], x, call.expert)
        self._record(self._recorders[names.down], h, call.expert)
        positions = call.tokens % self._window
        self._recorders[names.down].add_extremes(h, call.down_output.detach(), positions, expert=call.expert)
        if self._moments is None or self.is_sampling:
            return
        where = {"num_experts": module.num_experts, "expert": call.expert}
        for key, inputs, output in ((names.gate, x, call.gate_up_output), (names.down, h, call.down_output)):
            if self._with_gradients:
                output.register_hook(partial(self._add_moments, key, inputs, **where))
            else:
                self._moments.add(key, inputs, **where)

    def _add_moments(self, key: str, x: torch.Tensor, gradient: torch.Tensor, **where: int) -> None:
        assert self._moments is not None
        self._moments.add(key, x, squared_gradients=gradient.square().sum(-1), **where)

    def _add_recorder(self, key: str, num_experts: int, x: torch.Tensor, rows: int) -> InputRecorder:
        self._recorders[key] = InputRecorder(num_experts, x.shape[-1], sample_rows=rows, device=x.device)
        return self._recorders[key]

    def _record(self, recorder: InputRecorder, x: torch.Tensor, expert: int) -> None:
        if self.is_sampling:
            recorder.add_samples(x, expert=expert, fill=self.sample_fill)
        else:
            recorder.add_sums(x.detach(), expert=expert)


@dataclass(frozen=True)
class _ExpertNames:
    """GGUF names of one layer's stacked experts. `gate` is the key of the common input; others are aliases of it."""

    gate: str
    down: str
    aliases: tuple[str, ...]

    @classmethod
    def of(cls, module_name: str, arch: str, n_layer: int) -> "_ExpertNames":
        parts = ("gate_proj", "up_proj", "gate_up_proj", "down_proj")
        gate, up, gate_up, down = (gguf_name_of(f"{module_name}.{part}", arch, n_layer) for part in parts)
        readers = [name for name in (gate, up, gate_up) if name is not None]
        if not readers or down is None:
            raise StatsError(
                f"gguf-py has no name for the experts {module_name} in architecture `{arch}`; calibrate with "
                "llama-imatrix and import the file instead."
            )
        return cls(readers[0], down, tuple(readers[1:]))


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
