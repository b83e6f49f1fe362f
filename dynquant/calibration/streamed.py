"""Calibration of a model that is larger than the memory: all batches through one decoder layer, then through the next.

The statistics are those of `calibration`, bit for bit on a CPU: every input sees the same batches in the same order,
and the same collector listens. With second moments weighted by gradients, layers run a second time in reverse order.
After each stage its statistics and the hidden states that it left are on the disk, in a directory beside the output
(or `spill`); a run that was killed goes on after the last of them:

    progress.jsonl        {"identity": ...}, then one line a finished stage
    forward-00007.safetensors, forward-00007.moments.safetensors, backward-00007.moments.safetensors
    states-00008.bin, gradients-00007.bin
"""

import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from dynquant import __version__
from dynquant.calibration.collector import Collector, SampleLimits
from dynquant.calibration.moment_recorder import DEFAULT_LIMIT, MomentRecorder
from dynquant.calibration.run import Hessians, check_seen, split_windows
from dynquant.calibration.second_moments import path_beside
from dynquant.calibration.statistics import CalibrationStats, StatsProvenance
from dynquant.checkpoints.model import Model
from dynquant.checkpoints.safetensors_format import merge_tensor_files
from dynquant.errors import StatsError
from dynquant.running.gradients import sampled_log_probability
from dynquant.running.layer_stream import LayerStream
from dynquant.running.staged_passes import StagedPasses
from dynquant.running.stream_memory import Workload, fit_within
from dynquant.session import Progress
from dynquant.storage.atomic import save_tensors
from dynquant.storage.journal import Journal


@dataclass(frozen=True)
class StreamedCalibration:
    """What one run wrote: the statistics, second moments in `moments_path`, and how the model was run."""

    stats: CalibrationStats
    moments_path: Path | None
    pools_experts: bool
    left_out: tuple[str, ...]
    num_moments: int
    first_stage: int
    """Stages below this one were taken over from an interrupted run."""


def calibrate_streamed(
    model: Model,
    windows: torch.Tensor,
    provenance: StatsProvenance,
    output: Path,
    *,
    limit_bytes: int | None = None,
    spill: Path | None = None,
    batch_size: int = 4,
    device: str = "cpu",
    dtype: torch.dtype = torch.float32,
    hessians: Hessians = "none",
    hessian_bytes: int = DEFAULT_LIMIT,
    progress: Progress | None = None,
) -> StreamedCalibration:
    """Calibrate on `windows` [windows, window] and write `output` and, beside it, second moments.

    Args:
        limit_bytes: of the whole process; None takes what the largest layers need.
        spill: where hidden states go, instead of the directory of `output`.

    Raises:
        CheckpointError: the model is no safetensors checkpoint of a known family.
        StatsError: the limit is too small, or there is no space for hidden states.
    """
    summed, held, provenance = split_windows(windows, provenance)
    stream = LayerStream(model, dtype=dtype, device=device)
    moments = None if hessians == "none" else MomentRecorder.for_model(stream.hf_model, hessian_bytes)
    if limit_bytes is not None:
        work = Workload(
            batch_size * provenance.window,
            is_backward=hessians == "gradients",
            moments=moments is not None,
            pools_experts=moments is None or moments.pools_experts,
        )
        fit_within(stream, limit_bytes, work)
    output.parent.mkdir(parents=True, exist_ok=True)
    identity = {
        "tool": __version__, "provenance": provenance.model_dump(), "batch": batch_size, "dtype": str(dtype),
        "device": device, "hessians": hessians, "hessian_bytes": hessian_bytes,
    }  # fmt: skip
    directory = (spill or output.parent) / f".{output.name}.streaming"
    journal = _journal_in(directory, identity)
    run = _Run(stream, model, summed, held, provenance, batch_size, moments, hessians, journal, progress)
    first_stage = len(journal.records)
    with stream.running():
        run.all_stages()
    found = run.join(output)
    journal.close()
    shutil.rmtree(directory)
    return StreamedCalibration(*found, first_stage)


def _journal_in(directory: Path, identity: dict[str, object]) -> Journal:
    """Go on with the interrupted run in `directory` when it is of the same calibration, or start anew there."""
    try:
        directory.mkdir(parents=True, exist_ok=True)
        journal = Journal(directory / "progress.jsonl")
        if not journal.belongs_to(identity):
            for file in directory.iterdir():
                file.unlink()
            journal.remove()
        journal.start(identity, journal.records)
    except OSError as error:
        raise StatsError(
            f"{directory} cannot be used for hidden states ({error}). Name another directory with --spill."
        ) from error
    return journal


class _Run:
    """The stages of one calibration, forward and, for gradients, back."""

    def __init__(
        self,
        stream: LayerStream,
        model: Model,
        summed: torch.Tensor,
        held: torch.Tensor,
        provenance: StatsProvenance,
        batch_size: int,
        moments: MomentRecorder | None,
        hessians: Hessians,
        journal: Journal,
        progress: Progress | None,
    ) -> None:
        self._stream, self._summed, self._provenance = stream, summed, provenance
        self._moments, self._hessians, self._journal, self._progress = moments, hessians, journal, progress
        self._directory = journal.path.parent
        sampled = held.split(batch_size) if len(held) else ()
        self._num_summed = len(summed.split(batch_size))
        self._num_sampled = len(sampled)
        self._passes = StagedPasses(stream, (*summed.split(batch_size), *sampled), self._directory)
        self._collector = Collector(
            stream.hf_model, model.arch, model.hyper.n_layer, provenance.window, SampleLimits(), moments,
            with_gradients=hessians == "gradients",
        )  # fmt: skip
        self._generator = torch.Generator().manual_seed(provenance.seed)

    def all_stages(self) -> None:
        """Run what the journal does not have yet."""
        forward = [("forward", stage) for stage in range(self._passes.head + 1)]
        backward = [("backward", stage) for stage in range(self._passes.head, 0, -1)]
        order = forward + (backward if self._with_gradients else [])
        done = self._journal.records
        if done and self._moments is not None:
            self._moments.used_bytes, self._moments.left_out = done[-1]["moment_bytes"], list(done[-1]["left_out"])
        if done:
            self._collector.know_aliases(done[-1]["aliases"])
        self._passes.states.check_space((len(forward) if self._with_gradients else 2) + 2 * self._with_gradients)
        for number, (direction, stage) in enumerate(order):
            if number >= len(done):
                self._forward(stage) if direction == "forward" else self._backward(stage)
                self._keep(direction, stage)
            if self._progress is not None:
                self._progress("calibrate", number + 1, len(order), unit="layers")

    def join(self, output: Path) -> tuple[CalibrationStats, Path | None, bool, tuple[str, ...], int]:
        """Write the statistics and second moments of all stages."""
        aliases = self._collector.aliases
        stats = CalibrationStats(self._provenance, {}, aliases)
        for part in self._parts("forward-?????.safetensors"):
            stats.inputs |= CalibrationStats.load(part).inputs
        check_seen(stats, self._stream.hf_model)
        moments_path, keys = None, set()
        if self._moments is not None:
            moments_path = path_beside(output)
            parts = self._parts("*.moments.safetensors")
            keys = {key for entry in self._journal.records for key in entry["moments"]}
            known = {alias: key for alias, key in aliases.items() if key in keys}
            header = {"provenance": self._provenance.model_dump(), "aliases": known, "kind": self._hessians}
            merge_tensor_files(moments_path, parts, {"tokens": self._summed.to(torch.int32)}, header)
        stats.save(output)
        pooled = self._moments is not None and self._moments.pools_experts
        left_out = () if self._moments is None else tuple(self._moments.left_out)
        return stats, moments_path, pooled, left_out, len(keys)

    @property
    def _with_gradients(self) -> bool:
        return self._hessians == "gradients"

    def _forward(self, stage: int) -> None:
        with self._collector.attached():
            self._passes.forward(stage, self._before_batch)
        if stage < self._passes.head:
            self._passes.states.settle(stage + 1)

    def _backward(self, stage: int) -> None:
        def loss(logits: torch.Tensor) -> torch.Tensor:
            return sampled_log_probability(logits, self._generator)

        with self._collector.seeing_gradients():
            self._passes.backward(stage, loss, self._before_batch, num_batches=self._num_summed)
        self._passes.gradients.settle(stage)

    def _before_batch(self, index: int) -> None:
        self._collector.is_sampling = index >= self._num_summed
        self._collector.sample_fill = (index - self._num_summed + 1) / max(1, self._num_sampled)

    def _keep(self, direction: str, stage: int) -> None:
        """Statistics and second moments of a stage go to the disk, then its line to the journal."""
        name = self._directory / f"{direction}-{stage:05d}.safetensors"
        if direction == "forward":
            CalibrationStats(self._provenance, self._collector.take()).save(name)
        entry: dict[str, Any] = {"stage": stage, "direction": direction, "aliases": self._collector.aliases}
        entry |= {"moment_bytes": 0, "left_out": [], "moments": []}
        if self._moments is not None:
            sums, weights = self._moments.take()
            tensors = {f"{key}.sum": one for key, one in sums.items()}
            tensors |= {f"{key}.weight": one for key, one in weights.items()}
            if tensors:
                save_tensors(name.with_suffix(".moments.safetensors"), tensors, {})
            entry["moment_bytes"], entry["left_out"] = self._moments.used_bytes, self._moments.left_out
            entry["moments"] = list(sums)
        self._journal.add(entry)
        if direction == "backward":
            self._passes.states.forget(stage)
            self._passes.gradients.forget(stage + 1)
        elif not self._with_gradients:
            self._passes.states.forget(stage)

    def _parts(self, pattern: str) -> list[Path]:
        return sorted(self._directory.glob(pattern))
