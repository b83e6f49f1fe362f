"""Hears from hooks what every layer of a running model is given, and keeps the statistics of it.

A collector belongs to one model and one calibration. It sees batches in whatever order they are run: all layers of one
batch, or all batches of one layer, whose statistics can then be taken before the next is run.
"""

from collections.abc import Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial

import torch
from torch import nn

from dynquant.calibration.input_recorder import InputRecorder
from dynquant.calibration.moment_recorder import MomentRecorder
from dynquant.calibration.statistics import InputStats
from dynquant.checkpoints.tensor_roles import gguf_name_of
from dynquant.errors import StatsError
from dynquant.running.expert_hooks import ExpertCall, expert_modules, record_experts
from dynquant.running.linear_hooks import LinearHooks, linear_names


@dataclass(frozen=True)
class SampleLimits:
    """How many held-back rows are kept: per dense input, per expert, and bytes per layer of experts."""

    dense_rows: int = 256
    expert_rows: int = 32
    expert_layer_bytes: int = 64 * 2**20

    def rows_per_expert(self, num_experts: int, channels: int) -> int:
        """Rows of bfloat16 for each expert when inputs of `channels` channels in all are kept."""
        return max(1, min(self.expert_rows, self.expert_layer_bytes // (2 * num_experts * channels)))


class Collector:
    """Names the inputs that the hooks show, and hands them to recorders.

    With `with_gradients`, second moments of linear layers and experts wait for the gradients of `seeing_gradients`.
    """

    def __init__(
        self,
        hf_model: nn.Module,
        arch: str,
        n_layer: int,
        window: int,
        limits: SampleLimits,
        moments: MomentRecorder | None,
        *,
        with_gradients: bool = False,
    ) -> None:
        self.is_sampling = False
        """Whether windows are held back: sampled, and no part of the sums."""
        self.sample_fill = 0.0
        """The share of the sample capacity to fill by the end of this batch."""
        self._model = hf_model
        self._window = window
        self._limits = limits
        self._moments = moments
        self._with_gradients = with_gradients
        self._sums, self._sees_gradients = False, False
        self._recorders: dict[str, InputRecorder] = {}
        self._linear_layers = linear_names(hf_model, arch, n_layer)
        self._linears = LinearHooks(hf_model, arch, n_layer, self._observe_linear)
        self._experts = {
            module: ExpertNames.of(name, arch, n_layer) for name, module in expert_modules(hf_model).items()
        }

    @contextmanager
    def attached(self) -> Iterator[None]:
        """Inside, forward passes are recorded."""
        self._sums = True
        try:
            with self._linears.attached(), record_experts(self._model, self._observe_expert):
                yield
        finally:
            self._sums = False

    @contextmanager
    def seeing_gradients(self) -> Iterator[None]:
        """Inside, backward passes add second moments, weighted by the gradients of outputs."""
        hooks = [
            layer.register_forward_hook(partial(self._await_gradient, name), with_kwargs=True)
            for name, layer in self._linear_layers.items()
        ]
        self._sees_gradients = True
        try:
            with record_experts(self._model, self._observe_expert):
                yield
        finally:
            self._sees_gradients = False
            for hook in hooks:
                hook.remove()

    @property
    def aliases(self) -> dict[str, str]:
        """Weight -> key of the input that it shares, as far as layers have been run."""
        return self._linears.aliases | {
            alias: names.gate for names in self._experts.values() for alias in names.aliases
        }

    def take(self) -> dict[str, InputStats]:
        """The statistics of all inputs that were seen since the last call."""
        found = {key: recorder.finish() for key, recorder in self._recorders.items()}
        self._recorders.clear()
        return found

    def know_aliases(self, aliases: dict[str, str]) -> None:
        """Take over what an interrupted run has learnt."""
        self._linears.aliases.update(aliases)

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
        if self._sums:
            self._sum_expert(call)
        if self._moments is None or self.is_sampling:
            return
        names, num_experts = self._experts[call.module], call.module.num_experts
        where = {"num_experts": num_experts, "expert": call.expert}
        for key, inputs, output in (
            (names.gate, call.x, call.gate_up_output),
            (names.down, call.down_input, call.down_output),
        ):
            if not self._with_gradients:
                self._moments.add(key, inputs.detach(), **where)
            elif self._sees_gradients:
                output.register_hook(partial(self._add_moments, key, inputs.detach(), **where))

    def _sum_expert(self, call: ExpertCall) -> None:
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
class ExpertNames:
    """GGUF names of one layer's stacked experts. `gate` is the key of the common input; others are aliases of it.

    `of` raises StatsError when gguf-py has no names for them.
    """

    gate: str
    down: str
    aliases: tuple[str, ...]

    @classmethod
    def of(cls, module_name: str, arch: str, n_layer: int) -> "ExpertNames":
        parts = ("gate_proj", "up_proj", "gate_up_proj", "down_proj")
        gate, up, gate_up, down = (gguf_name_of(f"{module_name}.{part}", arch, n_layer) for part in parts)
        readers = [name for name in (gate, up, gate_up) if name is not None]
        if not readers or down is None:
            raise StatsError(
                f"gguf-py has no name for the experts {module_name} in architecture `{arch}`; calibrate with "
                "llama-imatrix and import the file instead."
            )
        return cls(readers[0], down, tuple(readers[1:]))
