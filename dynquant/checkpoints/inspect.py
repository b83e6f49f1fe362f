"""Contents of a checkpoint: types, sizes and bits per weight of any GGUF or safetensors file, from headers alone.

Returns plain data; printing is the command line's. A GGUF type outside our registry is listed by its ggml name. In
safetensors, packed integers of other tools count as stored elements: their true number of weights is not in the header.
"""

import re
from collections.abc import Iterable
from dataclasses import dataclass, replace
from functools import cache
from math import prod
from pathlib import Path

import gguf

from dynquant.checkpoints.gguf_source import is_gguf, read_split
from dynquant.checkpoints.published.packed_parts import CompressedMatrix, packed_tensors
from dynquant.checkpoints.safetensors_format import FileSpan, spans_of
from dynquant.checkpoints.safetensors_source import INDEX_NAME, checkpoint_spans, read_weight_map
from dynquant.checkpoints.tensor_roles import Role, role_ahead, role_of, roles_of
from dynquant.errors import CheckpointError
from dynquant.formats.quant_types import QUANT_TYPES
from dynquant.storage.file_kinds import SAFETENSORS, but_is, kind_of
from dynquant.storage.strict_json import parse_json

_GGUF_KEYS = (
    "general.name", "general.size_label", "general.file_type", "general.quantization_version", "tokenizer.ggml.model",
    "tokenizer.ggml.pre",
)  # fmt: skip
_GGUF_ARCH_KEYS = (
    "block_count", "context_length", "embedding_length", "attention.head_count", "attention.head_count_kv",
    "expert_count", "expert_used_count", "leading_dense_block_count",
)  # fmt: skip
_CONFIG_KEYS = (
    "model_type", "dtype", "torch_dtype", "num_hidden_layers", "hidden_size", "vocab_size", "max_position_embeddings",
    "n_routed_experts", "num_experts", "num_local_experts", "num_experts_per_tok",
)  # fmt: skip
_PROVENANCE_PREFIXES = ("dynquant.", "quantize.imatrix.")


@dataclass(frozen=True)
class TensorRecord:
    """One stored tensor. `shape` has the row length last."""

    name: str
    shape: tuple[int, ...]
    type: str
    num_bytes: int
    role: Role

    @property
    def num_weights(self) -> int:
        return prod(self.shape)


@dataclass(frozen=True)
class Share:
    """The tensors of one type, or of one role."""

    label: str
    num_tensors: int
    num_weights: int
    num_bytes: int

    @property
    def bits_per_weight(self) -> float:
        return 8 * self.num_bytes / self.num_weights if self.num_weights else 0.0


@dataclass(frozen=True)
class FileSummary:
    """One checkpoint. `total_bytes` counts whole files, so headers and padding are in `bits_per_weight`."""

    format: str
    files: tuple[Path, ...]
    arch: str
    total_bytes: int
    tensors: tuple[TensorRecord, ...]
    metadata: dict[str, object]
    provenance: dict[str, object]
    """`dynquant.*` and `quantize.imatrix.*` keys; empty for files of other tools."""
    fault: str = ""
    """Why the files are not a whole model."""

    @property
    def num_weights(self) -> int:
        return sum(tensor.num_weights for tensor in self.tensors)

    @property
    def bits_per_weight(self) -> float:
        return 8 * self.total_bytes / self.num_weights if self.num_weights else 0.0

    @property
    def types(self) -> tuple[Share, ...]:
        """Shares by type, largest first."""
        return _shares((tensor.type, tensor) for tensor in self.tensors)

    @property
    def roles(self) -> tuple[Share, ...]:
        """Shares by role, largest first."""
        return _shares((tensor.role.value, tensor) for tensor in self.tensors)


def inspect(path: str | Path) -> FileSummary:
    """Summarise a GGUF file (of a split, the first part), a safetensors file, or a checkpoint directory.

    What a file is, its content says; its name only where that is damaged.

    Raises:
        CheckpointError: nothing is there, or a file is truncated, corrupt or of another kind.
    """
    path = Path(path)
    if is_gguf(path):
        return _inspect_gguf(path)
    kind = kind_of(path)
    if kind == SAFETENSORS or (not kind and path.suffix.lower() == ".safetensors" and path.is_file()):
        summary = _inspect_safetensors(path.parent, spans_of(path))
        return replace(summary, fault=_of_several(path) or summary.fault)
    if path.is_dir():
        return _inspect_safetensors(path, checkpoint_spans(path))
    raise CheckpointError(
        f"{path} is neither a GGUF file, nor a safetensors file, nor a directory that holds a checkpoint"
        f"{but_is(path)}. Check the path."
    )


def _of_several(path: Path) -> str:
    """Return that a file is one of the shards of a checkpoint, or nothing."""
    index = path.parent / INDEX_NAME
    files = {file.name for file in read_weight_map(path.parent).values()} if index.is_file() else set()
    shard = re.search(r"-(\d{5})-of-(\d{5})\.safetensors$", path.name)
    if shard is None and (path.name not in files or len(files) < 2):
        return ""
    which = f"number {int(shard[1])} of {int(shard[2])}" if shard else f"one of {len(files)}"
    return f"{path} is {which} files of a checkpoint. Give the directory for all of them."


def _shares(labelled: Iterable[tuple[str, TensorRecord]]) -> tuple[Share, ...]:
    groups: dict[str, list[TensorRecord]] = {}
    for label, tensor in labelled:
        groups.setdefault(label, []).append(tensor)
    shares = [
        Share(label, len(group), sum(t.num_weights for t in group), sum(t.num_bytes for t in group))
        for label, group in groups.items()
    ]
    return tuple(sorted(shares, key=lambda share: -share.num_bytes))


def _inspect_gguf(path: Path) -> FileSummary:
    headers = read_split(path)
    files = [header.path for header in headers]
    values = {
        key: field.value
        for key, field in headers[0].fields.items()
        if key == "general.architecture" or key in _GGUF_KEYS or key.startswith(_PROVENANCE_PREFIXES)
    }
    arch = str(values.pop("general.architecture", "unknown"))
    arch_keys = [f"{arch}.{key}" for key in _GGUF_ARCH_KEYS]
    values |= {key: headers[0].fields[key].value for key in arch_keys if key in headers[0].fields}
    roles = roles_of(name for header in headers for name in header.tensors)
    return FileSummary(
        format="gguf",
        files=tuple(files),
        arch=arch,
        total_bytes=sum(file.stat().st_size for file in files),
        tensors=tuple(
            TensorRecord(tensor.name, tensor.shape, tensor.type, tensor.num_bytes, roles[tensor.name])
            for header in headers
            for tensor in header.tensors.values()
        ),
        metadata={key: value for key, value in values.items() if not key.startswith(_PROVENANCE_PREFIXES)},
        provenance={
            key: value.rstrip() if isinstance(value, str) else value
            for key, value in values.items()
            if key.startswith(_PROVENANCE_PREFIXES)
        },
    )


def _inspect_safetensors(directory: Path, spans: dict[str, FileSpan]) -> FileSummary:
    files = sorted({span.path for span in spans.values()})
    config = _read_config(directory)
    architectures = config.get("architectures")
    arch = architectures[0] if isinstance(architectures, list) and architectures else config.get("model_type")
    metadata = {key: config[key] for key in _CONFIG_KEYS if config.get(key) is not None}
    quantization = config.get("quantization_config")
    if isinstance(quantization, dict) and "quant_method" in quantization:
        metadata["quant_method"] = quantization["quant_method"]
    stored = {name: (span.shape, span.dtype, span.num_bytes) for name, span in spans.items()}
    if metadata.get("quant_method") == "compressed-tensors" and isinstance(quantization, dict):
        for name, matrix in packed_tensors(spans, quantization).items():
            assert isinstance(matrix, CompressedMatrix)
            size = sum(stored.pop(part)[2] for part in matrix.parts)
            stored[name] = (matrix.shape, matrix.scheme, size)
    roles = _roles_of_parameters(stored)
    tensors = [TensorRecord(name, *of_tensor, roles[name]) for name, of_tensor in stored.items()]
    provenance: dict[str, object] = {}
    fault = ""
    if metadata.get("quant_method") == "dynquant" and isinstance(quantization, dict):
        types, recorded = quantization.get("types"), quantization.get("provenance")
        if isinstance(types, dict):
            if lost := sorted(set(types) - spans.keys()):
                fault = f"{directory} lacks {len(lost)} tensors of its quantization_config, first `{lost[0]}`."
            tensors = [_unpacked_record(record, types) for record in tensors]
        if isinstance(recorded, dict):
            provenance = {f"dynquant.{key}": value for key, value in recorded.items()}
    return FileSummary(
        format="safetensors",
        files=tuple(files),
        arch=str(arch or "unknown"),
        total_bytes=sum(file.stat().st_size for file in files),
        tensors=tuple(tensors),
        metadata=metadata,
        provenance=provenance,
        fault=fault,
    )


def _unpacked_record(record: TensorRecord, types: dict[str, object]) -> TensorRecord:
    """A packed tensor under its quant type and the shape of its weights, not of its bytes."""
    stored = QUANT_TYPES.get(str(types.get(record.name)))
    if stored is None or record.type != "U8" or not record.shape:
        return record
    shape = (*record.shape[:-1], record.shape[-1] // stored.block_bytes * stored.block_size)
    return replace(record, shape=shape, type=stored.name)


def _read_config(directory: Path) -> dict[str, object]:
    path = directory / "config.json"
    if not path.is_file():
        return {}
    try:
        config = parse_json(path.read_bytes())
    except ValueError as error:
        raise CheckpointError(f"{path} is not JSON ({error}). Fetch it again.") from error
    return config if isinstance(config, dict) else {}


_FIRST_INDEX = re.compile(r"\.\d+\.")
_EXPERT_INDEX = re.compile(r"\.experts\.\d+\.")


def _roles_of_parameters(names: Iterable[str]) -> dict[str, Role]:
    """The roles of Hugging Face parameters, by the names of all architectures in gguf-py's map.

    Layers that predict tokens ahead stand behind the others, or under `mtp.` as layers of their own.
    """
    gguf_names = {name: _first_layer_name(name) for name in names}
    layers = {name: match[0] for name in gguf_names if (match := _FIRST_INDEX.search(name))}
    ahead = {layer for name, layer in layers.items() if ".nextn." in gguf_names[name]}
    roles = {}
    for name, gguf_name in gguf_names.items():
        roles[name] = role = role_of(gguf_name) if gguf_name else Role.OTHER
        if _MTP.match(name) and not gguf_name and name.endswith(".weight"):
            roles[name] = Role.NORM if "norm" in name else Role.MTP
        elif _MTP.match(name) or layers.get(name) in ahead:
            roles[name] = role_ahead(role)
    return roles


_MTP = re.compile(r"(model\.)?mtp\.")


def _first_layer_name(name: str) -> str:
    """The GGUF name of a Hugging Face parameter as if its layer were the first; empty where none is known."""
    template = _FIRST_INDEX.sub(".{bid}.", _EXPERT_INDEX.sub(".experts.", name), count=1)
    template = _MTP.sub("model.", template)
    if template.endswith(".bias") and not template.endswith("e_score_correction_bias"):
        return ""
    names = _names_of_parameters()
    return names.get(template) or names.get(template.rpartition(".")[0]) or ""


@cache
def _names_of_parameters() -> dict[str, str]:
    tables = (gguf.TensorNameMap.mappings_cfg, gguf.TensorNameMap.block_mappings_cfg)
    return {
        name: gguf.TENSOR_NAMES[tensor].replace("{bid}", "0") + ".weight"
        for table in tables
        for tensor, names in reversed(table.items())
        for name in names
    }
