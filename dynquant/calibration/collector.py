"""Collects input statistics of every layer of a running model through forward hooks, over text and pictures.

A collector belongs to one model and one calibration. It sees batches in whatever order they are run: all layers of one
batch, or all batches of one layer, whose statistics can then be taken before the next is run.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial

import torch
from torch import nn

from dynquant.calibration.recorders import InputRecorder, MomentRecorder
from dynquant.calibration.second_moments import OUTPUT
from dynquant.calibration.statistics import InputStats
from dynquant.checkpoints.tensor_roles import Role, role_of
from dynquant.inputs.model_inputs import Batch
from dynquant.running.expert_hooks import ExpertCall, expert_layout, expert_stack, record_experts
from dynquant.running.linear_hooks import LinearHooks, observed_outputs
from dynquant.running.weight_inputs import WeightInputs
from dynquant.storage.file_names import IMAGE, KINDS, TEXT

_ALL = ""
_PICTURE_READERS = ("cross_attn_k.weight", "cross_attn_v.weight")


@dataclass(frozen=True)
class SampleLimits:
    """Numbers of held-back rows to keep: per dense input, per expert, and bytes per layer of experts."""

    dense_rows: int = 256
    expert_rows: int = 32
    expert_layer_bytes: int = 64 * 2**20

    def rows_per_expert(self, num_experts: int, channels: int) -> int:
        """Rows of bfloat16 for each expert when inputs of `channels` channels in all are kept."""
        return max(1, min(self.expert_rows, self.expert_layer_bytes // (2 * num_experts * channels)))


class Collector:
    """Names the inputs that the hooks show, and hands them to recorders; `start` says which batch runs next.

    With `with_gradients`, second moments of linear layers and experts wait for the gradients of `seeing_gradients`.
    With `by_kind`, image and text tokens are recorded apart too. Linear layers of the language model see both in one
    sequence; vision tower, projector and the keys and values of cross-attention see pictures only.
    """

    def __init__(
        self,
        hf_model: nn.Module,
        names: WeightInputs,
        moments: MomentRecorder | None,
        *,
        limits: SampleLimits | None = None,
        with_gradients: bool = False,
        by_kind: bool = False,
    ) -> None:
        self._model = hf_model
        self.moments, self._limits = moments, limits or SampleLimits()
        self.with_gradients, self._by_kind = with_gradients, by_kind
        self._sums, self._sees_gradients = False, False
        self._is_text, self._window, self._fill = torch.ones(0, dtype=torch.bool), 1, None
        self._recorders: dict[str, dict[str, InputRecorder]] = {kind: {} for kind in (_ALL, *KINDS)}
        self._linear_layers, self._experts, self._aliases = names.linears, names.experts, names.aliases
        self._linears = LinearHooks(hf_model, names.linears, self._observe_linear)

    @contextmanager
    def attached(self) -> Iterator[None]:
        """Context manager: records forward passes."""
        self._sums = True
        try:
            with self._linears.attached(), record_experts(self._model, self._observe_expert):
                yield
        finally:
            self._sums = False

    @contextmanager
    def seeing_gradients(self) -> Iterator[None]:
        """Context manager: backward passes add second moments, weighted by the gradients of outputs."""
        self._sees_gradients = True
        try:
            outputs = observed_outputs(self._linear_layers, self._await_gradient)
            with outputs, record_experts(self._model, self._observe_expert):
                yield
        finally:
            self._sees_gradients = False

    def start(self, batch: Batch, fill: float | None = None) -> None:
        """Name the batch that runs next; with `fill` it is held back, and samples may fill so much of their room."""
        self._is_text, self._window, self._fill = batch.is_text.flatten(), batch.is_text.shape[1], fill

    @property
    def aliases(self) -> dict[str, str]:
        """Weight -> key of the input that it shares, as far as layers have been run."""
        return (
            self._linears.aliases
            | self._aliases
            | {name: inputs.inner[0] for inputs in self._experts.values() for name in inputs.inner[1:]}
        )

    def take(self, kind: str = _ALL) -> dict[str, InputStats]:
        """Return the statistics of all inputs that were seen since the last call, of one of KINDS or of all tokens."""
        stats = {key: recorder.finish() for key, recorder in self._recorders[kind].items()}
        self._recorders[kind].clear()
        return stats

    def know_aliases(self, aliases: dict[str, str]) -> None:
        """Take over what an interrupted run has learnt."""
        self._linears.aliases.update(aliases)

    def _observe_linear(self, key: str, x: torch.Tensor, out: torch.Tensor | None) -> None:
        sees_pictures = role_of(key).is_vision or key.endswith(_PICTURE_READERS) or len(x) != len(self._is_text)
        is_text = torch.zeros(len(x), dtype=torch.bool) if sees_pictures else self._is_text
        num_experts = x.shape[1] if x.ndim == 3 else 1
        rows = _Rows(torch.arange(len(x), device=x.device), is_text, self._limits.dense_rows, num_experts)
        self._record(key, rows, x.detach(), None if out is None or role_of(key).is_vision else out.detach())
        waits = self.with_gradients and key in self._linear_layers
        if self.moments is not None and self._fill is None and not waits:
            self.moments.add(key, x)

    def _await_gradient(self, name: str, x: torch.Tensor, _y: torch.Tensor) -> Callable[[torch.Tensor], None]:
        key = self._linears.aliases.get(name, name)
        x = self._linear_layers[name].channels(x.flatten(0, -2))

        def add(gradient: torch.Tensor) -> None:
            self._add_moments(key, x, gradient.flatten(0, -2))
            if role_of(name) is not Role.OUTPUT:  # which has as many rows as the vocabulary
                self._add_output(name, gradient.flatten(0, -2))

        return add

    def _observe_expert(self, call: ExpertCall) -> None:
        names = self._experts[call.module]
        num_experts = len(expert_stack(call.module, expert_layout(call.module).down))
        gate, down = names.inner[0], names.down
        if self._sums:
            x, h = call.x.detach(), call.down_input.detach()
            capacity = self._limits.rows_per_expert(num_experts, x.shape[1] + h.shape[1])
            is_text = self._is_text[call.tokens.cpu()] if self._by_kind else None
            rows = _Rows(call.tokens, is_text, capacity, num_experts, call.expert)
            self._record(gate, rows, x, None)
            self._record(down, rows, h, call.down_output.detach())
        if self.moments is None or self._fill is not None:
            return
        layers = ((gate, call.x, call.gate_up_output), (down, call.down_input, call.down_output))
        for key, inputs, output in layers:
            add = partial(self._add_moments, key, inputs.detach(), num_experts=num_experts, expert=call.expert)
            if not self.with_gradients:
                add(None)
            elif self._sees_gradients:
                output.register_hook(add)  # called with the gradient
                for name, rows in names.rows.items():
                    if (name == down) == (key == down):
                        place = {"num_experts": num_experts, "expert": call.expert}
                        output.register_hook(partial(self._add_output, name, rows=rows, **place))

    def _add_moments(self, key: str, x: torch.Tensor, gradient: torch.Tensor | None, **place: int) -> None:
        assert self.moments is not None
        squares = None if gradient is None else gradient.square().sum(-1)
        self.moments.add(key, x, squares=squares, **place)

    def _add_output(self, name: str, gradient: torch.Tensor, rows: torch.Tensor | None = None, **place: int) -> None:
        """Add gradients of outputs, of which `rows` are those of a weight."""
        if self.moments is not None and self.moments.with_outputs:
            rows = None if rows is None else rows.to(gradient.device)
            self.moments.add(name + OUTPUT, gradient if rows is None else gradient[:, rows], **place)

    def _record(self, key: str, rows: "_Rows", x: torch.Tensor, out: torch.Tensor | None) -> None:
        """Add inputs of a layer to the recorders of their kinds; `out` is the output of a down-projection."""
        parts = {_ALL: x}
        if self._by_kind:
            is_text = rows.is_text.to(x.device)
            parts |= {IMAGE: x[~is_text], TEXT: x[is_text]}
        for kind, part in parts.items():
            recorder = self._recorders[kind].get(key)
            if recorder is None:
                recorder = InputRecorder(rows.num_experts, x.shape[-1], sample_rows=rows.capacity, device=x.device)
                self._recorders[kind][key] = recorder
            if self._fill is not None:
                recorder.add_samples(part, expert=rows.expert, fill=self._fill)
            elif len(part):
                recorder.add_sums(part, expert=rows.expert)
        if out is not None:
            self._recorders[_ALL][key].add_extremes(x, out, rows.tokens % self._window, expert=rows.expert)


@dataclass(frozen=True)
class _Rows:
    """Tokens of the batch that the rows of an input are, which of them hold text, and whose input it is."""

    tokens: torch.Tensor  # int64 [rows]
    is_text: torch.Tensor | None  # bool [rows]; None where kinds are not told apart
    capacity: int  # number of rows that may be sampled
    num_experts: int = 1
    expert: int = 0
