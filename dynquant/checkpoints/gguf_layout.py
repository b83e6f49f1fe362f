"""The header of a GGUF file and the place of every byte after it, known before any weight is read.

    header: magic, counts, key/value pairs, tensor infos | padding to 32 | tensor | padding | tensor | padding ...

Header bytes are made by gguf-py's writer, so the size that `plan` predicts is the size that `export` writes; of arrays
it only counts the bytes, because a large vocabulary takes the writer a second. Strings that are only known at export
(tool version, encoder) are padded with spaces to a fixed width, and hashes have 64 digits: the size of a file depends
on the model, the types, the recipe and the statistics alone.

Left out: arrays without items, which gguf-py cannot write and which carry no value, and `general.alignment`, because
data is always aligned to ggml's default of 32.
"""

import io
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any, NamedTuple

import gguf
import numpy as np
from gguf import GGUFValueType
from gguf.gguf_writer import WriterState

from dynquant import __version__
from dynquant.checkpoints.gguf_source import GGUFSource, MetadataField
from dynquant.checkpoints.model import Model, PrunedExperts
from dynquant.errors import ExportError
from dynquant.formats.quant_types import QUANT_TYPES

ALIGNMENT = gguf.GGUF_DEFAULT_ALIGNMENT
MAX_NAME_LENGTH = 63
"""llama.cpp refuses longer tensor names (GGML_MAX_NAME is 64 with the terminator)."""
PADDED_WIDTH = 16
ENCODER_KEY = "dynquant.encoder"
TUNED = "+tune"
"""Ends the name of the encoder in a file that the closing pass has changed."""
UNKNOWN_HASH = "0" * 64
"""Stands for a hash that is not known yet; it has the size of any other."""
MAX_FILES = 65535
"""`split.no` and `split.count` are u16."""

_ITEM_BYTES = {
    GGUFValueType.BOOL: 1, GGUFValueType.UINT8: 1, GGUFValueType.INT8: 1, GGUFValueType.UINT16: 2,
    GGUFValueType.INT16: 2, GGUFValueType.UINT32: 4, GGUFValueType.INT32: 4, GGUFValueType.FLOAT32: 4,
    GGUFValueType.UINT64: 8, GGUFValueType.INT64: 8, GGUFValueType.FLOAT64: 8,
}  # fmt: skip
_FILE_TYPE_OF = {
    "F32": "ALL_F32", "Q3_K": "MOSTLY_Q3_K_M", "Q4_K": "MOSTLY_Q4_K_M", "Q5_K": "MOSTLY_Q5_K_M",
    "MXFP4": "MOSTLY_MXFP4_MOE",
}  # fmt: skip
_LATER_THAN_GGUF = {"Q2_0": 41}
"""File types that the `gguf` package (0.19) does not know yet."""


class TensorSpec(NamedTuple):
    """A tensor as the header describes it. `shape` has the row length last; `type` is a quant type name."""

    name: str
    shape: tuple[int, ...]
    type: str

    @property
    def num_bytes(self) -> int:
        return QUANT_TYPES[self.type].tensor_bytes(self.shape)


@dataclass(frozen=True)
class Provenance:
    """Origin of a file's weights, written as `dynquant.*`."""

    fingerprint: str
    recipe: str
    encoder: str = ""
    plan_hash: str = UNKNOWN_HASH
    stats_hash: str = ""


@dataclass(frozen=True)
class ImatrixInfo:
    """The keys that llama-quantize writes about an importance matrix. Names never hold a path."""

    file: str
    dataset: str
    num_entries: int
    num_chunks: int


@dataclass(frozen=True)
class Placement:
    """Place of one tensor's bytes, counted from the start of its file."""

    tensor: TensorSpec
    offset: int


@dataclass(frozen=True)
class FileLayout:
    """One file: its header, padded to the alignment, and what follows. Gaps between tensors are zero bytes."""

    header: bytes
    placements: tuple[Placement, ...]
    total_bytes: int


def padded(num_bytes: int) -> int:
    """Bytes that a tensor occupies in a file, up to the next multiple of the alignment."""
    return -(-num_bytes // ALIGNMENT) * ALIGNMENT


def predicted_bytes(
    model: Model, tensors: Sequence[TensorSpec], provenance: Provenance, imatrix: ImatrixInfo | None = None
) -> int:
    """Return the exact size of the unsplit file; reads no weights.

    Raises:
        ExportError: a tensor name that llama.cpp cannot load.
    """
    _check_names(tensors)
    fields = _fields(model, tensors, provenance, imatrix)
    counted = [field for field in fields if _is_countable(field)]
    (header,) = _unpadded_headers(model.arch, [field for field in fields if not _is_countable(field)], [tensors])
    header_bytes = padded(len(header) + sum(map(_array_bytes, counted)))
    return header_bytes + sum(padded(tensor.num_bytes) for tensor in tensors)


def recorded_encoder(source: GGUFSource) -> str:
    """The encoder that a file of ours says it was written with; empty for other files."""
    return next((str(field.value).strip() for field in source.metadata if field.key == ENCODER_KEY), "")


def is_tuned(source: GGUFSource) -> bool:
    """Return whether a file of ours says that the closing pass has changed it."""
    return recorded_encoder(source).endswith(TUNED)


def layout(
    model: Model,
    tensors: Sequence[TensorSpec],
    provenance: Provenance,
    *,
    imatrix: ImatrixInfo | None = None,
    split_max_bytes: int | None = None,
) -> list[FileLayout]:
    """Header and offsets of every file; one file unless `split_max_bytes` asks for more.

    Metadata goes into the first file; the others hold the split keys only, as llama.cpp's gguf-split writes them.

    Raises:
        ExportError: a tensor name that llama.cpp cannot load, or a limit that some tensor alone exceeds.
    """
    _check_names(tensors)
    fields = _fields(model, tensors, provenance, imatrix)
    groups = [list(tensors)]
    if split_max_bytes is not None:
        groups = _grouped(model.arch, fields, tensors, split_max_bytes)
    return [_place(header, group) for header, group in zip(_headers(model.arch, fields, groups), groups, strict=True)]


def write_float32(model: Model, path: Path) -> Path:
    """Write all tensors as F32, one in memory at a time, and return `path`; for a file that does not last."""
    tensors = [TensorSpec(name, model.source.info(name).shape, "F32") for name in model.source.names()]
    (file,) = layout(model, tensors, Provenance(model.fingerprint, "all F32"))
    with path.open("wb") as target:
        target.write(file.header)
        for placement in file.placements:
            target.seek(placement.offset)
            target.write(model.source.load(placement.tensor.name).contiguous().numpy().tobytes())
        target.truncate(file.total_bytes)
    return path


def split_paths(output: Path, count: int) -> list[Path]:
    """The names of `count` files, as llama.cpp expects them: `NAME-00001-of-0000N.gguf`."""
    if count == 1:
        return [output]
    stem = output.name.removesuffix(".gguf")
    return [output.with_name(f"{stem}-{number:05d}-of-{count:05d}.gguf") for number in range(1, count + 1)]


def mmproj_path(output: Path) -> Path:
    """Return the name of the projector file beside the language model `output`."""
    return output.with_name(f"mmproj-{output.name}")


def file_type_of(recipe: str, tensors: Iterable[TensorSpec]) -> int:
    """`general.file_type`: that of the preset's mixture, else of the type that holds most weights. Display only."""
    preset = re.fullmatch(r"preset (?:llama-|uniform-|r1-)?(\w+)", recipe)
    if preset and (preset_type := _file_type(preset.group(1).upper())) is not None:
        return preset_type
    weights: Counter[str] = Counter()
    for tensor in tensors:
        weights[tensor.type] += prod(tensor.shape)
    return _file_type(max(weights, key=weights.__getitem__, default="F32")) or 0


def _file_type(name: str) -> int | None:
    member = _FILE_TYPE_OF.get(name, f"MOSTLY_{name}")
    members = gguf.LlamaFileType.__members__
    return int(members[member]) if member in members else _LATER_THAN_GGUF.get(name)


def _check_names(tensors: Iterable[TensorSpec]) -> None:
    for tensor in tensors:
        if len(tensor.name.encode()) > MAX_NAME_LENGTH:
            raise ExportError(
                f"The tensor name `{tensor.name}` is longer than the {MAX_NAME_LENGTH} bytes that llama.cpp can load, "
                "so this model cannot be written as GGUF."
            )


def _fields(
    model: Model, tensors: Sequence[TensorSpec], provenance: Provenance, imatrix: ImatrixInfo | None
) -> list[MetadataField]:
    """Return all metadata of a file, but for what gguf-py's writer adds itself."""
    left_out = (gguf.Keys.General.ARCHITECTURE, gguf.Keys.General.ALIGNMENT)
    fields = [
        field
        for field in model.metadata
        if field.key not in left_out and not (field.value_type == GGUFValueType.ARRAY and len(field.value) == 0)  # type: ignore[arg-type]
    ]
    return fields + _export_fields(tensors, provenance, imatrix, model.pruned)


def _is_countable(field: MetadataField) -> bool:
    """Return whether the bytes of an array can be counted without packing it."""
    return field.item_type is not None and (field.item_type == GGUFValueType.STRING or field.item_type in _ITEM_BYTES)


def _array_bytes(field: MetadataField) -> int:
    """Return what an array takes in a header: key, types, count and items."""
    items: Sequence = field.value  # type: ignore[assignment]
    if field.item_type == GGUFValueType.STRING:
        content = sum(8 + len(item.encode() if isinstance(item, str) else item) for item in items)
    else:
        content = _ITEM_BYTES[field.item_type] * len(items)  # type: ignore[index]
    return 8 + len(field.key.encode()) + 4 + 4 + 8 + content


def _export_fields(
    tensors: Sequence[TensorSpec], provenance: Provenance, imatrix: ImatrixInfo | None, pruned: PrunedExperts | None
) -> list[MetadataField]:
    """Return the fields that an export adds to the model's metadata; numbers are u32."""
    values: dict[str, int | str] = {
        gguf.Keys.General.QUANTIZATION_VERSION: gguf.GGML_QUANT_VERSION,
        gguf.Keys.General.FILE_TYPE: file_type_of(provenance.recipe, tensors),
    }
    if imatrix is not None:
        values |= {
            "quantize.imatrix.file": imatrix.file,
            "quantize.imatrix.dataset": imatrix.dataset,
            "quantize.imatrix.entries_count": imatrix.num_entries,
            "quantize.imatrix.chunks_count": imatrix.num_chunks,
        }
    values |= {
        "dynquant.version": _fixed_width(__version__),
        ENCODER_KEY: _fixed_width(provenance.encoder),
        "dynquant.recipe": provenance.recipe,
        "dynquant.fingerprint": provenance.fingerprint,
        "dynquant.plan_hash": provenance.plan_hash,
        "dynquant.stats_hash": provenance.stats_hash,
    }
    if pruned is not None:
        values |= {"dynquant.original_fingerprint": pruned.fingerprint, "dynquant.pruned_experts": str(pruned)}
    types = {int: GGUFValueType.UINT32, str: GGUFValueType.STRING}
    return [MetadataField(key, value, types[type(value)]) for key, value in values.items()]


def _fixed_width(text: str) -> str:
    if len(text) > PADDED_WIDTH:
        raise ValueError(f"`{text}` is longer than the {PADDED_WIDTH} characters kept for it")
    return text.ljust(PADDED_WIDTH)


def _headers(arch: str, fields: Sequence[MetadataField], groups: Sequence[Sequence[TensorSpec]]) -> list[bytes]:
    """Return the header of each file."""
    return [header.ljust(padded(len(header)), b"\0") for header in _unpadded_headers(arch, fields, groups)]


def _unpadded_headers(
    arch: str, fields: Sequence[MetadataField], groups: Sequence[Sequence[TensorSpec]]
) -> list[bytes]:
    """Return what gguf-py's writer, pointed at memory, makes of the headers."""
    writer = gguf.GGUFWriter(None, arch)
    for field in fields:
        writer.add_key_value(field.key, field.value, field.value_type, field.item_type)
    for number, group in enumerate(groups):
        if number > 0:
            writer.tensors.append({})
        for tensor in group:
            ggml_id: Any = QUANT_TYPES[tensor.type].ggml_id  # not a member of gguf-py's enum, which lacks new types
            writer.add_tensor_info(tensor.name, tensor.shape, np.dtype(np.float32), tensor.num_bytes, raw_dtype=ggml_id)
    buffers = [io.BytesIO() for _ in groups]
    writer.fout = buffers  # type: ignore[assignment]
    writer.state = WriterState.EMPTY
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    return [buffer.getvalue() for buffer in buffers]


def _place(header: bytes, tensors: Sequence[TensorSpec]) -> FileLayout:
    offset, placements = len(header), []
    for tensor in tensors:
        placements.append(Placement(tensor, offset))
        offset += padded(tensor.num_bytes)
    return FileLayout(header, tuple(placements), offset)


def _grouped(
    arch: str, fields: Sequence[MetadataField], tensors: Sequence[TensorSpec], limit: int
) -> list[list[TensorSpec]]:
    """Fill files in order so that each, header included, stays within `limit` bytes."""
    first, other = (len(header) for header in _headers(arch, fields, [[], []]))
    groups: list[list[TensorSpec]] = [[]]
    size = first
    for tensor in tensors:
        # An upper bound of what one more tensor adds to the padded header: name, dimensions, type, offset.
        info_bytes = padded(8 + len(tensor.name.encode()) + 4 + 8 * len(tensor.shape) + 4 + 8)
        needed = info_bytes + padded(tensor.num_bytes)
        if groups[-1] and size + needed > limit:
            groups.append([])
            size = other
        size += needed
        if size > limit:
            raise ExportError(
                f"Files of at most {limit:,} bytes were asked for, but `{tensor.name}` ({tensor.type}) with its header "
                f"takes {size:,} bytes and a tensor cannot be split. Give a limit of at least that."
            )
        groups[-1].append(tensor)
    if len(groups) > MAX_FILES:
        raise ExportError(
            f"Files of at most {limit:,} bytes would be {len(groups):,} files; GGUF counts to {MAX_FILES}."
        )
    return groups
