"""Calibration on pictures and text: the statistics of `calibration`, and the same for image and text tokens apart.

Samples run through the model one at a time, whole. Every linear layer of the language model sees the tokens of pictures
and of text in one sequence; they are told apart by the placeholder's id. Vision tower and projector see pictures only,
and so do the keys and values of cross-attention. The last tenth of the samples is held back, as `calibration` does it.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import nn

from dynquant.calibration.collector import ExpertNames, SampleLimits
from dynquant.calibration.input_recorder import InputRecorder
from dynquant.calibration.moment_recorder import MomentRecorder
from dynquant.calibration.run import num_held_back
from dynquant.calibration.second_moments import SecondMoments
from dynquant.calibration.statistics import CalibrationStats, StatsProvenance
from dynquant.checkpoints.model import Model
from dynquant.checkpoints.tensor_roles import role_of
from dynquant.errors import StatsError
from dynquant.inputs.pictures import Encoded
from dynquant.running.expert_hooks import ExpertCall, expert_modules, record_experts
from dynquant.running.linear_hooks import LinearHooks
from dynquant.session import Progress

IMAGE, TEXT = "image", "text"
KINDS = (IMAGE, TEXT)
HELD_BACK = 0.1
_IMAGE_READERS = ("cross_attn_k.weight", "cross_attn_v.weight")


@dataclass(frozen=True)
class VisionCalibration:
    """What one run measured: all tokens together, and by kind of token."""

    stats: CalibrationStats
    by_kind: dict[str, CalibrationStats]
    moments: SecondMoments | None = None
    left_out: tuple[str, ...] = ()
    pools_experts: bool = False


def kind_path(stats: Path, kind: str) -> Path:
    """Where the statistics of one kind of token lie: `stats.safetensors` -> `stats-image.safetensors`."""
    return stats.with_name(f"{stats.stem}-{kind}{stats.suffix}")


def collect_vision_statistics(
    hf_model: nn.Module,
    samples: Sequence[Encoded],
    model: Model,
    provenance: StatsProvenance,
    *,
    hessian_bytes: int | None = None,
    progress: Progress | None = None,
) -> VisionCalibration:
    """Run samples through a vision-language model; second moments are taken when they may use `hessian_bytes`.

    Raises:
        StatsError: no sample, no image token in any, or no layer that was seen.
    """
    if not samples:
        raise StatsError("No sample is left to calibrate on; give some whose images can be decoded.")
    num_held = num_held_back(len(samples), HELD_BACK)
    num_summed = len(samples) - num_held
    moments = None if hessian_bytes is None else MomentRecorder.for_model(hf_model, hessian_bytes)
    collector = _Collector(hf_model, model, moments)
    total, done = sum(sample.num_tokens for sample in samples), 0
    device = next(hf_model.parameters()).device
    with torch.no_grad(), collector.attached():
        for index, sample in enumerate(samples):
            collector.start(sample, None if index < num_summed else (index + 1 - num_summed) / num_held)
            hf_model(**{name: value.to(device) for name, value in sample.inputs.items()}, use_cache=False)
            done += sample.num_tokens
            if progress:
                progress("calibrate", done, total, unit="tokens")
    counted = {
        "num_windows": len(samples),
        "num_tokens": sum(sample.num_tokens for sample in samples[:num_summed]),
        "num_held_back_tokens": sum(sample.num_tokens for sample in samples[num_summed:]),
        "window": max(sample.num_tokens for sample in samples),
    }
    provenance = provenance.model_copy(update=counted)
    stats, by_kind = collector.finish(provenance)
    if moments is None:
        return VisionCalibration(stats, by_kind)
    found = moments.finish(provenance, torch.empty(0, 0), "activations", stats.aliases)
    return VisionCalibration(stats, by_kind, found, tuple(moments.left_out), moments.pools_experts)


@dataclass
class _Recorders:
    """Of one input: all tokens, and those of each kind."""

    all: InputRecorder
    by_kind: dict[str, InputRecorder]


@dataclass
class _Collector:
    """Hands what the hooks see to the recorders of its kind of token."""

    hf_model: nn.Module
    model: Model
    moments: MomentRecorder | None
    limits: SampleLimits = field(default_factory=SampleLimits)

    def __post_init__(self) -> None:
        arch, n_layer = self.model.arch, self.model.hyper.n_layer
        self._hooks = LinearHooks(self.hf_model, arch, n_layer, self._observe_linear)
        self._experts = {
            module: ExpertNames.of(name, arch, n_layer) for name, module in expert_modules(self.hf_model).items()
        }
        self._recorders: dict[str, _Recorders] = {}
        self._is_image = torch.zeros(0, dtype=torch.bool)
        self._fill: float | None = None

    @contextmanager
    def attached(self) -> Iterator[None]:
        with self._hooks.attached(), record_experts(self.hf_model, self._observe_expert):
            yield

    def start(self, sample: Encoded, fill: float | None) -> None:
        """The sample that runs next; with `fill` it is held back, and so much of the capacity may be used after it."""
        self._is_image, self._fill = sample.is_image, fill

    def finish(self, provenance: StatsProvenance) -> tuple[CalibrationStats, dict[str, CalibrationStats]]:
        if not self._recorders:
            raise StatsError(f"None of the linear layers of {type(self.hf_model).__name__} was seen in calibration.")
        aliases = self._hooks.aliases | {
            alias: names.gate for names in self._experts.values() for alias in names.aliases
        }
        inputs = {key: recorders.all.finish() for key, recorders in self._recorders.items()}
        by_kind = {
            kind: CalibrationStats(
                provenance,
                {key: recorders.by_kind[kind].finish() for key, recorders in self._recorders.items()},
                aliases,
            )
            for kind in KINDS
        }
        return CalibrationStats(provenance, inputs, aliases), by_kind

    def _observe_linear(self, key: str, x: torch.Tensor, out: torch.Tensor | None) -> None:
        self._add(key, x, self._image_rows(key, len(x)), 1, 0, self.limits.dense_rows, out)

    def _image_rows(self, key: str, num_rows: int) -> torch.Tensor:
        """Which rows are image tokens; in the vision tower and for keys of cross-attention, all are."""
        sees_images = role_of(key).is_vision or key.endswith(_IMAGE_READERS) or num_rows != len(self._is_image)
        return torch.ones(num_rows, dtype=torch.bool) if sees_images else self._is_image

    def _observe_expert(self, call: ExpertCall) -> None:
        names, count = self._experts[call.module], call.module.num_experts
        is_image = self._is_image[call.tokens.cpu()]
        rows = self.limits.rows_per_expert(count, call.x.shape[1] + call.down_input.shape[1])
        self._add(names.gate, call.x, is_image, count, call.expert, rows, None)
        self._add(names.down, call.down_input, is_image, count, call.expert, rows, call.down_output)

    def _add(
        self,
        key: str,
        x: torch.Tensor,
        is_image: torch.Tensor,
        num_experts: int,
        expert: int,
        rows: int,
        out: torch.Tensor | None,
    ) -> None:
        recorders = self._recorders.get(key)
        if recorders is None:
            recorders = self._recorders[key] = _Recorders(
                _recorder(num_experts, x, rows), {kind: _recorder(num_experts, x, rows) for kind in KINDS}
            )
        is_image = is_image.to(x.device)
        for recorder, chosen in (
            (recorders.all, x), (recorders.by_kind[IMAGE], x[is_image]), (recorders.by_kind[TEXT], x[~is_image]),
        ):  # fmt: skip
            if not len(chosen):
                continue
            if self._fill is None:
                recorder.add_sums(chosen, expert=expert)
            else:
                recorder.add_samples(chosen, expert=expert, fill=self._fill)
        if out is not None and not role_of(key).is_vision:
            recorders.all.add_extremes(x, out, torch.arange(len(x), device=x.device), expert=expert)
        if self.moments is not None and self._fill is None:
            self.moments.add(key, x, num_experts=num_experts, expert=expert)


def _recorder(num_experts: int, x: torch.Tensor, rows: int) -> InputRecorder:
    return InputRecorder(num_experts, x.shape[-1], sample_rows=rows, device=x.device)
