"""Calibration of a model that is larger than the memory: all batches through one decoder layer, then through the next.

The statistics are those of `calibration`, bit for bit on a CPU: every input sees the same batches in the same order,
and the same collector listens. With second moments weighted by gradients, layers run a second time in reverse order.
After each stage its statistics and the hidden states that it left are on the disk, in a directory beside the output
(or `spill`); a run that was killed goes on after the last of them:

    progress.jsonl        {"identity": ...}, then one line a finished stage
    forward-00007.safetensors, forward-00007.moments.safetensors, backward-00007.moments.safetensors
    states-00008.bin, gradients-00007.bin
"""

from dataclasses import dataclass, replace
from functools import partial
from itertools import takewhile
from pathlib import Path
from typing import Any

import torch
from pydantic import BaseModel, ConfigDict, ValidationError

from dynquant import __version__
from dynquant.calibration.collector import Collector
from dynquant.calibration.options import Hessians
from dynquant.calibration.run import Calibration, Labels, Split, StatisticsOptions, check_seen, split_inputs
from dynquant.calibration.second_moments import named_tensors
from dynquant.calibration.statistics import CalibrationStats, StatsProvenance
from dynquant.checkpoints.model import Model
from dynquant.checkpoints.safetensors_format import merge_tensor_files
from dynquant.errors import StatsError
from dynquant.inputs.model_inputs import Batch, ModelInputs
from dynquant.running.linear_hooks import sampled_log_probability
from dynquant.running.streaming.layer_stream import LayerStream
from dynquant.running.streaming.staged_passes import StagedPasses
from dynquant.running.streaming.stream_memory import Workload, fit_within
from dynquant.running.weight_inputs import weight_inputs
from dynquant.session import Progress, ignore_progress
from dynquant.storage.atomic import save_tensors
from dynquant.storage.file_names import path_beside
from dynquant.storage.journal import Journal, Record
from dynquant.storage.work_files import STREAMING, check_folder, remove_folder, work_path


@dataclass(frozen=True)
class StreamingOptions:
    """Settings for running the model layer by layer."""

    limit_bytes: int | None = None  # memory of the whole process; None takes what the largest layers need
    spill: Path | None = None  # directory of hidden states, in place of the output's
    device: str = "cpu"
    dtype: torch.dtype = torch.float32


def calibrate_streamed(
    model: Model,
    inputs: ModelInputs,
    provenance: StatsProvenance,
    output: Path,
    options: StatisticsOptions | None = None,
    streaming: StreamingOptions | None = None,
    progress: Progress = ignore_progress,
) -> Calibration:
    """Calibrate on windows of text and write `output` and, beside it, second moments.

    Raises:
        CheckpointError: the model is no safetensors checkpoint of a known family.
        StatsError: the limit is too small, or there is no space for hidden states.
    """
    options, streaming = options or StatisticsOptions(), streaming or StreamingOptions()
    split = split_inputs(inputs, provenance, options.held_back)
    stream = LayerStream(model, dtype=streaming.dtype, device=streaming.device, with_layer_ahead=True)
    collector = options.collector(stream.hf_model, weight_inputs(model, stream.hf_model))
    if streaming.limit_bytes is not None:
        moments, batch_tokens = collector.moments, inputs.batch_size * split.provenance.window
        pools_experts = moments is None or moments.pools_experts
        has_outputs = moments is not None and moments.with_outputs
        work = Workload(batch_tokens, collector.with_gradients, moments is not None, pools_experts, has_outputs)
        fit_within(stream, streaming.limit_bytes, work)
    output.parent.mkdir(parents=True, exist_ok=True)
    identity = {
        "tool": __version__, "provenance": split.provenance.model_dump(), "batch": inputs.batch_size,
        "dtype": str(streaming.dtype), "device": streaming.device, "hessians": options.hessians,
        "hessian_bytes": options.hessian_bytes,
    }  # fmt: skip
    directory = work_path((streaming.spill or output.parent) / output.name, STREAMING)
    journal = _journal_in(directory, identity)
    run = _Run(stream, collector, split, journal)
    first_stage = len(journal.records)
    with stream.running():
        run.all_stages(progress)
    calibration = run.join(output, options.hessians, first_stage)
    journal.close()
    remove_folder(directory)
    return calibration


def _journal_in(directory: Path, identity: dict[str, object]) -> Journal:
    """Go on with the interrupted run in `directory` when it is of the same calibration, or start anew there."""
    try:
        if directory.is_symlink():
            directory.unlink()  # it would be emptied
        check_folder(directory)
        journal = Journal(directory / "progress.jsonl")
        if not journal.belongs_to(identity):
            remove_folder(directory)
            journal.records = []
        journal.start(identity, takewhile(_is_stage, journal.records))
    except OSError as error:
        raise StatsError(
            f"{directory} cannot be used for hidden states ({error}). Name another directory with --spill."
        ) from error
    return journal


class _StageRecord(BaseModel):
    """A line of the journal."""

    model_config = ConfigDict(strict=True)

    stage: int
    direction: str
    aliases: dict[str, str]
    moment_bytes: list[int]
    left_out: list[str]
    moments: list[str]


def _is_stage(record: Record) -> bool:
    """Return whether a record is one of `_StageRecord`; what follows another is run again."""
    try:
        return bool(_StageRecord.model_validate(record))
    except ValidationError:
        return False


class _Run:
    """The stages of one calibration, forward and, for gradients, back."""

    def __init__(self, stream: LayerStream, collector: Collector, split: Split, journal: Journal) -> None:
        self._stream, self._collector, self._journal = stream, collector, journal
        self._summed, held, self._provenance = split
        self._moments = collector.moments
        self._with_gradients = collector.with_gradients
        self._directory = journal.path.parent
        self._batches = (*self._summed, *held)
        self._passes = StagedPasses(stream, [batch.ids for batch in self._batches], self._directory)
        self._labels = Labels.seeded(self._provenance.seed)

    def all_stages(self, progress: Progress) -> None:
        """Run what the journal does not have yet."""
        head, ahead = self._passes.head, self._passes.ahead
        ahead_of_head = () if ahead is None else (ahead,)  # takes what enters the head, which is given up after that
        forward = [("forward", stage) for stage in (*range(head), *ahead_of_head, head)]
        backward = [("backward", stage) for stage in (*ahead_of_head, *range(head, 0, -1))]
        order = forward + (backward if self._with_gradients else [])
        done = self._journal.records
        if done and self._moments is not None:
            self._moments.used_bytes, self._moments.left_out = (list(done[-1][k]) for k in ("moment_bytes", "left_out"))
        if done:
            self._collector.know_aliases(done[-1]["aliases"])
        self._passes.states.check_space((head + 1 if self._with_gradients else 2) + 2 * self._with_gradients)
        num_kept = len(done)
        progress("calibrate", num_kept, len(order), unit="layers")
        for number, (direction, stage) in enumerate(order):
            if number >= num_kept:
                before_batch = partial(self._before_batch, is_ahead=stage == ahead)
                if direction == "forward":
                    with self._collector.attached():
                        self._passes.forward(stage, before_batch)
                    if stage < head:
                        self._passes.states.settle(stage + 1)
                else:
                    labels = self._labels.after_next if stage == ahead else self._labels.next
                    loss = partial(sampled_log_probability, generator=labels)
                    with self._collector.seeing_gradients():
                        self._passes.backward(stage, loss, before_batch, num_batches=self._summed.num_batches)
                    if stage != ahead:
                        self._passes.gradients.settle(stage)
                self._keep(direction, stage)
                progress("calibrate", number + 1, len(order), unit="layers")

    def join(self, output: Path, hessians: Hessians, first_stage: int) -> Calibration:
        """Write the statistics and second moments of all stages."""
        aliases = self._collector.aliases
        stats = CalibrationStats(self._provenance, {}, aliases)
        for part in sorted(self._directory.glob("forward-?????.safetensors")):
            stats.inputs |= CalibrationStats.load(part).inputs
        check_seen(stats, self._stream.hf_model)
        result = Calibration(stats, first_stage=first_stage)
        if self._moments is not None:
            parts = sorted(self._directory.glob("*.moments.safetensors"))
            keys = {key for entry in self._journal.records for key in entry["moments"]}
            shared = {alias: key for alias, key in aliases.items() if key in keys}
            header = {"provenance": self._provenance.model_dump(), "aliases": shared, "kind": hessians}
            merge_tensor_files(path_beside(output), parts, {"tokens": self._summed.windows.to(torch.int32)}, header)
            pools_experts, left_out = self._moments.pools_experts, tuple(self._moments.left_out)
            result = replace(result, pools_experts=pools_experts, left_out=left_out, num_moments=len(keys))
        stats.save(output)
        return result

    def _before_batch(self, index: int, *, is_ahead: bool) -> None:
        num_summed = self._summed.num_batches
        fill = (index - num_summed + 1) / (len(self._batches) - num_summed) if index >= num_summed else None
        batch = self._batches[index]
        self._collector.start(Batch.of_tokens(batch.ids[:, 1:]) if is_ahead else batch, fill)

    def _keep(self, direction: str, stage: int) -> None:
        """Statistics and second moments of a stage go to the disk, then its line to the journal."""
        name = self._directory / f"{direction}-{stage:05d}.safetensors"
        if direction == "forward":
            CalibrationStats(self._provenance, self._collector.take()).save(name)
        entry: dict[str, Any] = {"stage": stage, "direction": direction, "aliases": self._collector.aliases}
        entry |= {"moment_bytes": [], "left_out": [], "moments": []}
        if self._moments is not None:
            sums, weights = self._moments.take()
            if sums:
                save_tensors(name.with_suffix(".moments.safetensors"), named_tensors(sums, weights), {})
            entry["moment_bytes"], entry["left_out"] = self._moments.used_bytes, self._moments.left_out
            entry["moments"] = list(sums)
        self._journal.add(entry)  # last, so that what it names is on the disk
        if direction == "backward":
            self._passes.gradients.forget(stage + 1)
        if direction == "backward" or not self._with_gradients:
            self._passes.states.forget(stage)
