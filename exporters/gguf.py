"""Writes a plan as GGUF files that stock llama.cpp loads, and copies of such files with other bytes in some tensors.

Headers and offsets are fixed first (`gguf_layout`); tensors are then written to their places as they are encoded, one
part in memory at a time (`parts`). A killed export goes on where it stopped and gives the same bytes.

A vision-language model becomes two files: the language model as NAME.gguf, vision tower and projector as
mmproj-NAME.gguf beside it. The latter is small, so it comes first: a run that is killed goes on in the language model.
"""

import hashlib
import os
import shutil
from collections.abc import Iterable, Mapping
from contextlib import ExitStack, closing
from dataclasses import replace
from functools import partial
from pathlib import Path

import gguf
from torch import Tensor

from dynquant import __version__
from dynquant.calibration.statistics import CalibrationStats
from dynquant.checkpoints import gguf_layout
from dynquant.checkpoints.gguf_source import GGUFSource
from dynquant.checkpoints.model import Model, ModelPart
from dynquant.errors import ExportError
from dynquant.exporters.output import Encoding
from dynquant.recipes.build_plan import plan_of_part, with_projector_type
from dynquant.recipes.plan import Plan
from dynquant.recipes.sizes import imatrix_info
from dynquant.session import Session
from dynquant.storage.atomic import writing
from dynquant.storage.resumable_output import Region

_CAVEATS = {
    "mlp": "llama.cpp's graph of LLaVA puts the class embedding behind the patches; the model was trained with it in "
    "front. Patches get their neighbours' positions, and answers differ from those of transformers (reports/vision.md)."
}
"""By projector: what llama.cpp computes otherwise than transformers from the same weights."""

_NAME_BYTES = 4096
"""Other names of a model change the size of a header by less."""


def export_gguf(encoding: Encoding, output: Path, *, split_max_bytes: int | None = None) -> list[Path]:
    """Write a plan to `output`, or to NAME-00001-of-0000N.gguf beside it, and return the files.

    Until everything is written there are only NAME.partial and NAME.journal; an older `output` is replaced at the end.
    After a kill or a full disk the same call goes on.

    Raises:
        PlanError: the plan is not of this model.
        StatsError: the statistics are missing, superfluous, or of another checkpoint.
        EncodeError: NaN or Inf weights, or a type without the statistics it needs; partial files are removed.
        ExportError: another size than the plan predicts, no space, or an interrupted export of something else.
        ClusterError: `elsewhere` cannot go on; what is done is kept.
    """
    files: list[Path] = []
    for of_part, is_projector in _encodings(encoding):
        path = gguf_layout.mmproj_path(output) if is_projector else output
        # llama.cpp reads no split mmproj.
        files = _export_file(of_part, path, None if is_projector else split_max_bytes) + files
    return files


def _encodings(encoding: Encoding) -> list[tuple[Encoding, bool]]:
    """Return what every file is written from, and whether it is the projector; refuse another size than the plan's."""
    model, plan = encoding.model, encoding.plan
    if not model.parts:
        return [(encoding, False)]
    parts = []
    for part in model.parts:
        moments = encoding.moments
        if moments is not None:
            moments = replace(moments, aliases=_renamed(part, moments.aliases))
        own_plan, stats = plan_of_part(part, plan, encoding.stats), stats_of_part(part, encoding.stats)
        of_part = replace(encoding, model=part.model, plan=own_plan, stats=stats, moments=moments)
        parts.append((of_part, part.is_projector))
    total = sum(of_part.plan.predicted_bytes for of_part, _ in parts)
    if not model.unwritten and total != plan.predicted_bytes:
        raise ExportError(
            f"The plan predicts {plan.predicted_bytes:,} bytes, but language model and mmproj take {total:,}. The plan "
            "was edited or made by another version of dynquant. Plan again."
        )
    return parts


def _export_file(encoding: Encoding, output: Path, split_max_bytes: int | None) -> list[Path]:
    encoding.check()
    files = _layout(encoding, split_max_bytes)
    parts = encoding.parts()
    sizes = dict(zip(gguf_layout.split_paths(output, len(files)), (file.total_bytes for file in files), strict=True))
    headers = {f"header of file {number}": file.header for number, file in enumerate(files, start=1)}
    regions = {name: Region(number, 0, len(header)) for number, (name, header) in enumerate(headers.items())}
    for number, file in enumerate(files):
        for placement in file.placements:
            for part in parts[placement.tensor.name]:
                regions[part.key] = Region(number, placement.offset + part.offset, part.num_bytes)
    header_hash = hashlib.sha256(b"".join(headers.values())).hexdigest()
    with encoding.writing(sizes, regions, header_hash) as (target, progress):
        for name in (name for name in headers if name not in target.finished):
            target.write(name, headers[name])
        with closing(encoding.quantized(parts, frozenset(target.finished), progress)) as quantized:
            for part, packed in quantized:
                target.write(part.key, memoryview(packed.contiguous().numpy().reshape(-1)))
        return target.commit()


def _layout(encoding: Encoding, split_max_bytes: int | None) -> list[gguf_layout.FileLayout]:
    model, plan = encoding.model, encoding.plan
    entries = {entry.name: entry for entry in plan.entries}
    tensors = [gguf_layout.TensorSpec(name, entries[name].shape, entries[name].type) for name in model.source.names()]
    provenance = gguf_layout.Provenance(
        plan.fingerprint, plan.recipe, encoding.encoder.name, plan.hash, plan.stats_hash or ""
    )
    lay_out = partial(gguf_layout.layout, model, tensors, provenance, imatrix=imatrix_info(encoding.stats))
    files = lay_out()
    total = sum(file.total_bytes for file in files)
    # The header holds the name of the model's directory, which may have been renamed or linked since.
    tolerance = 0 if model.name == plan.model else _NAME_BYTES
    if abs(total - plan.predicted_bytes) > tolerance:
        raise ExportError(
            f"The plan predicts a file of {plan.predicted_bytes:,} bytes, but this model, plan and statistics give "
            f"{total:,}. The plan was edited or made by another version of dynquant ({plan.tool_version}, this is "
            f"{__version__}). Plan again."
        )
    return files if split_max_bytes is None else lay_out(split_max_bytes=split_max_bytes)


def check_is_not_read(output: Path, read: Iterable[Path]) -> None:
    """Raise ExportError, before any work, for a file that is `read`."""
    if output.exists() and any(output.samefile(file) for file in read):
        raise ExportError(f"{output} is the model that is being read; export to another name.")


def check_parts(model: Model, session: Session) -> None:
    """Refuse a model whose language part llama.cpp cannot run; say what else is not written. Raises ExportError: with
    the reason."""
    if model.gguf_file is not None:
        raise ExportError(f"{model.name} is an mmproj file; give the checkpoint that it was made from.")
    reasons = " ".join(model.unwritten)
    if not any(not part.is_projector for part in model.parts):
        raise ExportError(
            f"{model.name} cannot be written as GGUF. {reasons} Nothing is written; `-f safetensors` keeps all parts."
        )
    for part in model.parts:
        kind = next((field.value for field in part.model.metadata if field.key == gguf.Keys.Clip.PROJECTOR_TYPE), None)
        if kind in _CAVEATS:
            session.note(_CAVEATS[str(kind)])
    if model.unwritten:
        session.note(f"only the language model is written, and it will not see pictures. {reasons}")


def with_mmproj_type(model: Model, plan: Plan, wanted: str, stats: CalibrationStats | None) -> Plan:
    """Return the plan with one type for the vision part, which changes its size. Raises ExportError: a model without a
    vision part that can be written."""
    if not any(part.is_projector for part in model.parts):
        raise ExportError(f"{model.name} has no vision part that is written as mmproj; leave --mmproj-type out.")
    return with_projector_type(model, plan, wanted.upper(), stats)


def _renamed(part: ModelPart, aliases: dict[str, str]) -> dict[str, str]:
    """Return where the inputs of the part's tensors are, under the names of the whole model's."""
    names = {name: part.plan_name(name) for name in part.model.source.names()}
    return aliases | {name: aliases.get(whole, whole) for name, whole in names.items() if name != whole}


def stats_of_part(part: ModelPart, stats: CalibrationStats | None) -> CalibrationStats | None:
    """Return the statistics under the names that tensors have in a part's file."""
    return None if stats is None else replace(stats, aliases=_renamed(part, stats.aliases))


def write_patched(source: GGUFSource, output: Path, replacements: Mapping[str, Tensor], *, encoder: str) -> list[Path]:
    """Write `source`, all of its files, under the name `output`; `encoder` is entered where dynquant keeps it. Raises
    WriteError: no space or no permission; nothing is left behind."""
    paths = gguf_layout.split_paths(output, len(source.files))
    with ExitStack() as stack:
        # The stack moves the first file last: loaders open it, and it must not appear before the others.
        partials = [stack.enter_context(writing(path)) for path in paths]
        for file, partial in zip(source.files, partials, strict=True):
            shutil.copyfile(file, partial)
        patches = [
            (*source.location(name), packed.contiguous().numpy().tobytes()) for name, packed in replacements.items()
        ]
        name_place = source.text_location(gguf_layout.ENCODER_KEY)
        if name_place is not None and name_place[1] == gguf_layout.PADDED_WIDTH:
            patches.append((0, name_place[0], encoder.ljust(gguf_layout.PADDED_WIDTH).encode()))  # no offset changes
        for index, partial in enumerate(partials):
            with partial.open("r+b") as target:
                for file_index, offset, data in patches:
                    if file_index == index:
                        target.seek(offset)
                        target.write(data)
                target.flush()
                os.fsync(target.fileno())
    return paths
