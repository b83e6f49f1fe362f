"""llama.cpp importance matrices (GGUF files of llama-imatrix), read into and written from calibration statistics.

A file holds, per weight NAME of a model, `NAME.in_sum2` F32 [experts, row] and `NAME.counts` F32 [experts, 1] (numpy
order), and the keys `imatrix.datasets`, `imatrix.chunk_count`, `imatrix.chunk_size`. llama.cpp uses in_sum2 / counts,
and 1 for an expert with count 0. Stacked weights that are not experts (`attn_k_b`, `attn_v_b`) are stored flat with one
count. Only the GGUF form is supported; the older .dat form, which has no counts per expert, is refused.
"""

import hashlib
from collections.abc import Iterator
from pathlib import Path

import gguf
import numpy as np
import torch

from dynquant.calibration.importance import SHRINK_TOKENS, importance
from dynquant.calibration.statistics import CalibrationStats, InputStats, StatsProvenance
from dynquant.checkpoints.gguf_source import GGUFSource
from dynquant.checkpoints.model import Model
from dynquant.checkpoints.tensor_roles import role_of
from dynquant.errors import CheckpointError, StatsError, unreadable
from dynquant.storage.atomic import writing
from dynquant.storage.file_kinds import GGUF, refuse_other_kind

_SUMS, _COUNTS = ".in_sum2", ".counts"
_METADATA = ("imatrix.datasets", "imatrix.chunk_count", "imatrix.chunk_size")


def import_imatrix(path: str | Path, model: Model) -> CalibrationStats:
    """Read an imatrix file as statistics of `model`, without samples and extremes; raise StatsError for any other."""
    path = Path(path)
    source = _open(path)
    datasets, chunks, size = _provenance(path, source)
    names = set(source.names())
    shapes = {name: model.source.info(name).shape for name in model.source.names()}
    inputs = {}
    for name in source.names():
        weight = name.removesuffix(_SUMS)
        if weight != name and weight in shapes:
            if f"{weight}{_COUNTS}" not in names:
                raise StatsError(f"{path} has sums for {weight} and no counts; the file is damaged, make it again.")
            counts, sums = (source.load(key).numpy().astype(np.float64).reshape(-1) for key in (weight + _COUNTS, name))
            inputs[weight] = _input_stats(path, weight, shapes[weight], sums, counts)
    if not inputs:
        raise StatsError(f"No entry of {path} is named like a weight of {model.name}; it belongs to another model.")
    text = {"text_hash": hashlib.sha256(path.read_bytes()).hexdigest(), "text_name": ", ".join(datasets) or path.name}
    counts = {"num_windows": chunks, "num_tokens": chunks * size, "window": size}
    origin = {"fingerprint": model.fingerprint, "settings": model.settings, "imported_from": path.name}
    provenance = StatsProvenance(**origin, **text, **counts)
    return CalibrationStats(provenance, inputs)


def _open(path: Path) -> GGUFSource:
    try:
        refuse_other_kind(path, GGUF, "an importance matrix in a GGUF file", refusal=StatsError)
        with path.open("rb") as file:
            magic = file.read(4)
        if magic != b"GGUF":
            raise StatsError(
                f"{path} is not a GGUF file. If it is an imatrix in the old .dat form, convert it with "
                "`llama-imatrix --in-file OLD -o NEW.gguf`."
            )
        return GGUFSource(path)
    except (OSError, CheckpointError) as error:
        raise StatsError(unreadable(path, error) or f"The importance matrix cannot be read: {error}") from error


def _provenance(path: Path, source: GGUFSource) -> tuple[list[str], int, int]:
    """Names of the texts, number of chunks and tokens in each."""
    values = {field.key: field.value for field in source.metadata}
    missing = [key for key in _METADATA if key not in values]
    if missing:
        raise StatsError(f"{path} is a GGUF file but no importance matrix: it has no {', '.join(missing)}.")
    datasets, *numbers = (values[key] for key in _METADATA)
    if not isinstance(datasets, list) or not all(isinstance(name, str) for name in datasets):
        raise StatsError(f"{path} gives `{_METADATA[0]}` as {datasets!r:.80}; a list of names is needed.")
    for key, number in zip(_METADATA[1:], numbers, strict=True):
        if not isinstance(number, int) or number < 0:
            raise StatsError(f"{path} gives `{key}` as {number!r:.80}; a whole number is needed.")
    return datasets, *numbers


def _input_stats(path: Path, weight: str, shape: tuple[int, ...], sums: np.ndarray, counts: np.ndarray) -> InputStats:
    num_slices, channels = (shape[0] if len(shape) == 3 else 1), shape[-1]
    if sums.size != num_slices * channels or counts.size not in (1, num_slices):
        raise StatsError(
            f"{path} has {sums.size} sums and {counts.size} counts for {weight}, whose shape is "
            f"{'x'.join(map(str, shape))}; the file belongs to another model."
        )
    if not (np.isfinite(sums).all() and np.isfinite(counts).all() and (sums >= 0).all() and (counts >= 0).all()):
        raise StatsError(f"{path} has negative, NaN or Inf values for {weight}; make the importance matrix again.")
    tokens = np.broadcast_to(np.rint(counts), (num_slices,))  # one count may stand for all slices
    return InputStats(torch.from_numpy(sums.reshape(num_slices, channels)), torch.from_numpy(tokens.astype(np.int64)))


def export_imatrix(
    stats: CalibrationStats, path: str | Path, *, model: Model, shrink_tokens: float | None = SHRINK_TOKENS
) -> int:
    """Write an imatrix file for the weights of `model` and return the number of entries.

    With `shrink_tokens`, experts are shrunk to the layer mean as `importance` does it and experts without a token get
    the mean with count 1, so that llama-quantize weights errors as dynquant does. With None the raw sums are written,
    which llama-imatrix can merge with others; llama-quantize then treats unseen experts as all ones.

    Raises:
        StatsError: the statistics belong to another model, or cover no weight of it.
        WriteError: the file cannot be written.
    """
    stats.check_belongs_to(model.fingerprint, model.name, model.settings)
    provenance, written = stats.provenance, 0
    with writing(Path(path)) as temporary:
        writer = gguf.GGUFWriter(temporary, model.arch)
        writer.add_type("imatrix")
        writer.add_array(_METADATA[0], [provenance.text_name])
        writer.add_string("dynquant.calibration.sha256", provenance.text_hash)
        writer.add_uint32(_METADATA[1], provenance.num_tokens // max(provenance.window, 1))
        writer.add_uint32(_METADATA[2], provenance.window)
        for weight, sums, counts in _entries(stats, model, shrink_tokens):
            writer.add_tensor(f"{weight}{_SUMS}", sums)
            writer.add_tensor(f"{weight}{_COUNTS}", counts)
            written += 1
        if not written:
            raise StatsError(f"The statistics cover no weight of {model.name}, so there is no importance matrix.")
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
    return written


def _entries(
    stats: CalibrationStats, model: Model, shrink_tokens: float | None
) -> Iterator[tuple[str, np.ndarray, np.ndarray]]:
    """Weight, sums [n, row] and counts [n, 1] in float32; n is 1 for all but routed experts."""
    for weight in model.source.names():
        input_stats = stats.input_of(weight)
        if input_stats is None:
            continue
        shape = model.source.info(weight).shape
        num_slices = shape[0] if len(shape) == 3 else 1
        counts = input_stats.counts.to(torch.float64).expand(num_slices).unsqueeze(1)
        sums = input_stats.in_sum2.expand(num_slices, -1)
        if shrink_tokens is not None:
            counts = counts.clamp_min(1)  # llama.cpp ignores the sums of an expert with count 0
            sums = importance(stats, weight, shape, shrink_tokens=shrink_tokens).to(torch.float64) * counts
        if num_slices > 1 and not role_of(weight).is_routed_expert:  # attn_k_b and attn_v_b
            sums, counts = sums.reshape(1, -1), counts[:1]
        yield weight, sums.to(torch.float32).numpy(), counts.to(torch.float32).numpy()
