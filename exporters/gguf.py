"""Writes a plan as GGUF files that stock llama.cpp loads.

Headers and offsets are fixed first (`gguf_header`); tensors are then written to their places as they are encoded, one
part in memory at a time (`parts`). A killed export goes on where it stopped and gives the same bytes (`artifacts`).
"""

import hashlib
from collections.abc import Iterable, Mapping
from pathlib import Path

from dynquant import __version__
from dynquant.calibration.second_moments import SecondMoments
from dynquant.calibration.statistics import CalibrationStats
from dynquant.checkpoints.gguf_layout import FileLayout, Provenance, TensorSpec, layout, split_paths
from dynquant.checkpoints.model import Model
from dynquant.encoding.interface import Encoder, ProtectedWeight
from dynquant.encoding.parts import PartLimits, TensorPart
from dynquant.encoding.stream import (
    PartStream,
    QuantizedPart,
    check_importance,
    check_plan,
    guidance_of,
    parts_of_plan,
    quantize,
)
from dynquant.errors import ExportError
from dynquant.exporters.output import check_stats, export_identity, writing
from dynquant.recipes.plan import Plan
from dynquant.recipes.sizes import imatrix_info
from dynquant.session import Progress
from dynquant.storage.resumable_output import Region, ResumableOutput


def export_gguf(
    model: Model,
    plan: Plan,
    stats: CalibrationStats | None,
    output: Path,
    *,
    encoder: Encoder,
    moments: SecondMoments | None = None,
    protected: Mapping[str, tuple[ProtectedWeight, ...]] | None = None,
    threads: int | None = None,
    split_max_bytes: int | None = None,
    resume: bool = True,
    progress: Progress | None = None,
    limits: PartLimits | None = None,
    elsewhere: PartStream | None = None,
) -> list[Path]:
    """Write `plan` to `output`, or to NAME-00001-of-0000N.gguf beside it, and return the files.

    Until everything is written there are only NAME.partial and NAME.journal; an older `output` is replaced at the end.
    After a kill or a full disk the same call goes on. `stats` are those that the plan was made from, None if none;
    `moments` give encoders that use them hessians for error feedback, `protected` the super weights of each tensor.
    `limits` bound what is in memory at a time; `elsewhere` encodes on other machines.

    Raises:
        PlanError: the plan is not of this model.
        StatsError: the statistics are missing, superfluous, or of another checkpoint.
        EncodeError: NaN or Inf weights, or a type without the statistics it needs; partial files are removed.
        ExportError: another size than the plan predicts, no space, or an interrupted export of something else.
        ClusterError: `elsewhere` cannot go on; what is done is kept.
    """
    output = Path(output)
    check_plan(model, plan)
    check_stats(model, plan, stats)
    _check_output(model, output)
    guidance = guidance_of(stats, moments if encoder.uses_hessians else None, protected)
    check_importance(plan, guidance.importance)
    files = _layout(model, plan, stats, encoder, split_max_bytes)
    parts = parts_of_plan(plan, guidance, encoder, limits)
    target = ResumableOutput(
        split_paths(output, len(files)),
        [file.total_bytes for file in files],
        _regions(files, parts),
        export_identity(plan, encoder, _header_hash(files), moments if encoder.uses_hessians else None),
        resume=resume,
    )
    with writing(target):
        quantized = quantize(
            model, plan, guidance, encoder,
            parts=parts, threads=threads, progress=progress, skip=frozenset(target.finished), elsewhere=elsewhere,
        )  # fmt: skip
        _write(target, files, quantized)
        return target.commit()


def _write(target: ResumableOutput, files: Iterable[FileLayout], quantized: Iterable[QuantizedPart]) -> None:
    for number, file in enumerate(files):
        if _header_region(number) not in target.finished:
            target.write(_header_region(number), file.header)
    for one in quantized:
        target.write(one.part.key, memoryview(one.packed.contiguous().numpy().reshape(-1)))


def _layout(
    model: Model, plan: Plan, stats: CalibrationStats | None, encoder: Encoder, split_max_bytes: int | None
) -> list[FileLayout]:
    entries = {entry.name: entry for entry in plan.entries}
    tensors = [TensorSpec(name, entries[name].shape, entries[name].type) for name in model.source.names()]
    provenance = Provenance(plan.fingerprint, plan.recipe, encoder.name, plan.hash, plan.stats_hash or "")
    imatrix = imatrix_info(stats)
    files = layout(model, tensors, provenance, imatrix=imatrix)
    total = sum(file.total_bytes for file in files)
    if total != plan.predicted_bytes:
        raise ExportError(
            f"The plan predicts a file of {plan.predicted_bytes:,} bytes, but this model, plan and statistics give "
            f"{total:,}. The plan was edited or made by another version of dynquant ({plan.tool_version}, this is "
            f"{__version__}). Plan again."
        )
    if split_max_bytes is None:
        return files
    return layout(model, tensors, provenance, imatrix=imatrix, split_max_bytes=split_max_bytes)


def _regions(files: Iterable[FileLayout], parts: Mapping[str, list[TensorPart]]) -> dict[str, Region]:
    regions = {}
    for number, file in enumerate(files):
        regions[_header_region(number)] = Region(number, 0, len(file.header))
        for placement in file.placements:
            for part in parts[placement.tensor.name]:
                regions[part.key] = Region(number, placement.offset + part.offset, part.num_bytes)
    return regions


def _header_hash(files: Iterable[FileLayout]) -> str:
    return hashlib.sha256(b"".join(file.header for file in files)).hexdigest()


def _header_region(number: int) -> str:
    return f"header of file {number + 1}"


def _check_output(model: Model, output: Path) -> None:
    if output.is_dir():
        raise ExportError(f"{output} is a directory; give the name of the .gguf file to write.")
    if output.suffix != ".gguf":
        raise ExportError(f"The output {output} does not end in .gguf, which llama.cpp expects; name it {output}.gguf.")
    inputs = getattr(model.source, "files", ())
    if output.exists() and any(output.samefile(file) for file in inputs):
        raise ExportError(f"{output} is the model that is being read; export to another name.")
