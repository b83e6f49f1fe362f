"""Answers of a reference model, on disk: for the next candidate of an evaluation, and for training without the model.

An entry is one safetensors file, named by the model, the token ids that it saw, and what else decides its content. It
is written whole, by one process at a time, so a run that was stopped goes on at the first missing one. Training reads
its windows from mapped files of `SHARD_WINDOWS` windows each; only those of a batch are in memory.
"""

import glob
import hashlib
import json
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from safetensors import SafetensorError, safe_open
from torch import Tensor
from torch.utils.data import Dataset

from dynquant.checkpoints.safetensors_source import weight_files
from dynquant.errors import EvaluationError, unreadable
from dynquant.evaluation.distributions import Distributions
from dynquant.session import Progress
from dynquant.storage.atomic import read_tensors, save_tensors
from dynquant.storage.lock import locked

if TYPE_CHECKING:
    from dynquant.evaluation.runners import HuggingFaceRunner

SCHEMA_VERSION = 3  # part of every name: entries of an earlier version are made again
NUM_TRAINED_TOP = 128  # probabilities of a token that training goes by
SHARD_WINDOWS = 64
_HASHED_BYTES = 2**20
_LOGITS_AT_ONCE = 1 << 27


def model_fingerprint(path: Path) -> str:
    """SHA-256 over names, sizes, and the first and last MiB of a model's files."""
    digest = hashlib.sha256()
    for file in model_files(path):
        size = file.stat().st_size
        digest.update(f"{file.name} {size}".encode())
        with file.open("rb") as stream:
            digest.update(stream.read(_HASHED_BYTES))
            stream.seek(max(0, size - _HASHED_BYTES))
            digest.update(stream.read())
    return digest.hexdigest()


def model_files(path: Path) -> list[Path]:
    """Weights, configuration and tokenizer of a Hugging Face directory; all parts of a GGUF."""
    if path.is_dir():
        return sorted({*weight_files(path), *(file for file in path.iterdir() if file.suffix in {".json", ".model"})})
    stem, split, count = glob.escape(path.name).partition("-00001-of-")
    return sorted(path.parent.glob(f"{stem}-?????-of-{count}")) if split else [path]


def cache_key(model: Path, tokens: Iterable[int], **options: object) -> str:
    """Name of a cache entry: the model, the token ids that it saw, and the options that decide the content.

    Modification times are part of it: they catch an edit in the middle of a large file, which the fingerprint cannot
    see without reading all of it. A copy of the model only misses the cache.
    """
    times = [file.stat().st_mtime_ns for file in model_files(model)]
    content = [SCHEMA_VERSION, model_fingerprint(model), times, options]
    digest = hashlib.sha256(json.dumps(content, sort_keys=True).encode())
    digest.update(np.fromiter(tokens, dtype=np.int32).tobytes())
    return digest.hexdigest()[:32]


def load_cached(directory: Path, key: str) -> dict[str, Tensor] | None:
    """The tensors stored under `key`, or None. Raises EvaluationError when the file is damaged."""
    path = entry_path(directory, key)
    if not path.is_file():
        return None
    try:
        return read_tensors(path)[1]
    except KeyError:  # of an earlier version, without checksums: made anew
        return None
    except (SafetensorError, OSError, ValueError) as error:
        raise EvaluationError(
            unreadable(path, error) or f"The cached reference results {path} are damaged ({error}); delete the file."
        ) from error


def cached(directory: Path, key: str, make: Callable[[], dict[str, Tensor]]) -> dict[str, Tensor]:
    """Return the tensors stored under `key`, which are made and stored where there are none.

    Raises:
        EvaluationError: the file is damaged.
        WriteError: another process is making the same entry, or it cannot be written.
    """
    tensors = load_cached(directory, key)
    if tensors is None:
        with locked(entry_path(directory, key)):
            tensors = load_cached(directory, key)  # another process may have finished it since
            if tensors is None:
                tensors = make()
                save_cached(directory, key, tensors)
    return tensors


def save_cached(directory: Path, key: str, tensors: Mapping[str, Tensor]) -> None:
    """Store tensors under `key`; a reader never sees half a file."""
    path = entry_path(directory, key)
    size = sum(tensor.nbytes for tensor in tensors.values())
    way_out = f"It takes {size:,} bytes. Free some space, or name another cache directory."
    save_tensors(path, tensors, {}, way_out)


def entry_path(directory: Path, key: str) -> Path:
    """The safetensors file of a cache entry."""
    return directory / f"reference-{key}.safetensors"


class TeacherWindows(Dataset):
    """Window i with the reference's distribution after each of its tokens.

    An item has `input_ids` int64 [T], and the fields of `Distributions`, each [T, ...], that are not empty.
    """

    def __init__(self, windows: Tensor, files: list[Path]) -> None:
        self.windows = windows
        self._files = files
        self._open: dict[Path, safe_open] = {}

    def __len__(self) -> int:
        return len(self.windows)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        file = self._files[index // SHARD_WINDOWS]
        row = index % SHARD_WINDOWS
        try:
            if file not in self._open:
                self._open[file] = safe_open(file, framework="pt")  # mapped; rows are read as they are asked for
            shard = self._open[file]
            stored = {name: shard.get_slice(name)[row] for name in shard.keys()}  # noqa: SIM118 (no mapping)
        except (SafetensorError, OSError) as error:
            raise EvaluationError(
                f"The cached distributions {file} are damaged ({error}); delete the file and run the command again."
            ) from error
        return {"input_ids": self.windows[index], **stored}


def distributions_of(batch: Mapping[str, Tensor]) -> Distributions:
    """Return the distributions of a batch of `TeacherWindows`, over all its tokens in order."""
    tops = [batch[name].flatten(0, 1) for name in ("top_ids", "top_log_probs")]
    if "tail_ids" not in batch:
        return Distributions(*tops, *(top[:, :0] for top in tops))
    return Distributions(*tops, *(batch[name].flatten(0, 1) for name in ("tail_ids", "tail_log_probs")))


def build_teacher_windows(
    reference: Path,
    open_reference: Callable[[], "HuggingFaceRunner"],
    windows: Tensor,
    directory: Path,
    *,
    num_columns: int,
    num_tail: int = 0,
    stage: str,
    progress: Progress,
) -> TeacherWindows:
    """Run the reference on what `directory` does not hold yet.

    Args:
        reference: path of the model, part of the files' names.
        open_reference: loads it; called only when something is missing.
        windows: token ids int64 [n, T].
        num_columns: leading logits that both models have.
        num_tail: draws from the tail, for an unbiased KL; training itself needs none.
        stage: name in progress reports.

    Raises:
        EvaluationError: NaN in the logits.
        WriteError: the cache cannot be written, or another process is writing the same entry.
    """
    shards = windows.split(SHARD_WINDOWS)
    options = {"kind": "distillation", "columns": num_columns, "window": windows.shape[1]}
    options |= {"num_top": NUM_TRAINED_TOP, "num_tail": num_tail}
    keys = [cache_key(reference, shard.flatten().tolist(), **options) for shard in shards]
    runner: HuggingFaceRunner | None = None
    done = 0
    progress(stage, 0, len(windows), unit="windows")
    for shard, key in zip(shards, keys, strict=True):
        path = entry_path(directory, key)
        if not (is_there := path.is_file()):
            with locked(path):
                runner = runner or open_reference()  # not loaded where all is there
                save_cached(directory, key, _shard_tensors(runner, shard, num_columns, num_tail))
        done += len(shard)
        progress(stage, done, len(windows), unit="windows", resumed=is_there)
    if runner is not None:
        runner.close()
    return TeacherWindows(windows, [entry_path(directory, key) for key in keys])


def _shard_tensors(runner: "HuggingFaceRunner", windows: Tensor, num_columns: int, num_tail: int) -> dict[str, Tensor]:
    count = max(1, _LOGITS_AT_ONCE // (windows.shape[1] * runner.vocab_size))  # windows at a time
    parts = []
    for batch in windows.split(count):
        logits = runner.batch_logits(batch)[..., :num_columns].flatten(0, 1)
        parts.append(Distributions.of(logits, num_top=NUM_TRAINED_TOP, num_tail=num_tail))
    tensors = Distributions.concatenate(parts).tensors()
    return {name: tensor.unflatten(0, windows.shape) for name, tensor in tensors.items() if tensor.numel()}
