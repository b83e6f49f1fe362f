"""The original's next-token distributions over training windows, on disk, for distillation without the original.

Of every distribution the `NUM_KEPT` largest probabilities are kept, and the mass of the rest as one: about 1 kB a
token. A file holds `SHARD_WINDOWS` windows, is named by what it was made from, and is written whole, so a run that was
stopped goes on at the first missing one. Reading maps the files; only the windows of a batch are in memory.
"""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor
from torch.utils.data import Dataset

from dynquant.errors import EvaluationError
from dynquant.evaluation.distributions import Distribution
from dynquant.evaluation.reference_cache import cache_key, entry_path, save_cached
from dynquant.evaluation.runners import HuggingFaceRunner
from dynquant.session import Progress

NUM_KEPT = 128
SHARD_WINDOWS = 64
_LOGITS_AT_ONCE = 1 << 27


class TeacherWindows(Dataset):
    """Window i with the original's distribution after each of its tokens.

    An item has `input_ids` int64 [T], and of the distributions `top_ids` int32 [T, k], `top_log_probs` float32 [T, k]
    and `log_rest` float32 [T].
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
                self._open[file] = safe_open(file, framework="pt")
            shard = self._open[file]
            found = {name: shard.get_slice(name)[row] for name in ("top_ids", "top_log_probs", "log_rest")}
        except (SafetensorError, OSError) as error:
            raise EvaluationError(
                f"The cached distributions {file} are damaged ({error}); delete the file and run the command again."
            ) from error
        return {"input_ids": self.windows[index], **found}


def distribution_of(batch: dict[str, Tensor]) -> Distribution:
    """The distributions of a batch of items, over all its tokens in order."""
    return Distribution(
        batch["top_ids"].flatten(0, 1), batch["top_log_probs"].flatten(0, 1), batch["log_rest"].flatten()
    )


def build_teacher_windows(
    reference: Path,
    open_reference: Callable[[], HuggingFaceRunner],
    windows: Tensor,
    directory: Path,
    *,
    num_columns: int,
    stage: str,
    progress: Progress,
) -> TeacherWindows:
    """Run the original on what `directory` does not hold yet.

    Args:
        reference: path of the original, part of the files' names.
        open_reference: loads it; called only when something is missing.
        windows: token ids int64 [n, T].
        num_columns: leading logits that both models have.
        stage: name in progress reports.

    Raises:
        EvaluationError: NaN in the logits, or a cache that cannot be written.
    """
    shards = windows.split(SHARD_WINDOWS)
    options = {"kind": "distillation", "kept": NUM_KEPT, "columns": num_columns, "window": windows.shape[1]}
    keys = [cache_key(reference, shard.flatten().tolist(), **options) for shard in shards]
    runner: HuggingFaceRunner | None = None
    done = 0
    for shard, key in zip(shards, keys, strict=True):
        if not entry_path(directory, key).is_file():
            runner = runner or open_reference()
            save_cached(directory, key, _distributions(runner, shard, num_columns))
        done += len(shard)
        progress(stage, done, len(windows), unit="windows")
    if runner is not None:
        runner.close()
    return TeacherWindows(windows, [entry_path(directory, key) for key in keys])


def _distributions(runner: HuggingFaceRunner, windows: Tensor, num_columns: int) -> dict[str, np.ndarray]:
    count = max(1, _LOGITS_AT_ONCE // (windows.shape[1] * runner.vocab_size))
    found = []
    for batch in windows.split(count):
        logits = runner.batch_logits(batch)[..., :num_columns]
        if not torch.isfinite(logits).all():
            raise EvaluationError("The original's logits contain NaN or infinity; check its files.")
        found.append(Distribution.of(logits.flatten(0, 1), NUM_KEPT))
    shape = windows.shape
    return {
        "top_ids": torch.cat([one.ids for one in found]).unflatten(0, shape).numpy(),
        "top_log_probs": torch.cat([one.log_probs for one in found]).unflatten(0, shape).numpy(),
        "log_rest": torch.cat([one.log_rest for one in found]).unflatten(0, shape).numpy(),
    }
