"""Text that the original writes itself, to distill on when there is little text of the kind it was trained on.

Samples at temperature 1 follow the original's own distribution, which is what the packed model is brought back to
(data-free distillation: LLM-QAT, Liu et al. 2023). Each window goes on from a short beginning taken from given text, so
that subjects and formats of that text come up. Batches are written to the cache as they are finished.
"""

from pathlib import Path

import torch
from torch import Tensor, nn

from dynquant.evaluation.reference_cache import cache_key, entry_path, load_cached, save_cached
from dynquant.evaluation.runners import load_model
from dynquant.inputs.continuation import START_TOKENS, continued, random_starts
from dynquant.session import Progress
from dynquant.training.options import LARGE

_BATCH, _BATCH_OF_LARGE = 2048, 64
"""Windows that are written side by side; keys and values of all their tokens are in memory."""


def sampled_windows(
    original: Path, text: Tensor, count: int, directory: Path, columns: int, device: str, seed: int, progress: Progress
) -> Tensor:
    """Return windows sampled from a model, token ids int64 [count, T].

    Args:
        original: resolved directory or GGUF file; loaded only when `directory` lacks some windows.
        text: windows [n, T] that beginnings are taken from, at random places.
        columns: leading logits that may be drawn.

    Raises:
        CheckpointError: the model cannot be loaded.
        EvaluationError: the cache cannot be written, or is damaged.
    """
    generator = torch.Generator().manual_seed(seed)
    length = text.shape[1]
    starts = random_starts(text, count, min(START_TOKENS, length // 2), generator)
    options = {"kind": "sampled", "columns": columns, "window": length, "seed": seed, "device": device}
    dtype = torch.float32 if torch.device(device).type == "cpu" else torch.bfloat16
    model: nn.Module | None = None
    batches = []
    progress("original, writing", 0, count, unit="windows")
    for number, batch in enumerate(starts.split(_BATCH)):
        key = cache_key(original, batch.flatten().tolist(), number=number, **options)
        if not (is_there := entry_path(directory, key).is_file()):
            model = model or load_model(original, dtype).to(device).eval()
            parts = batch.split(_BATCH if model.num_parameters() < LARGE else _BATCH_OF_LARGE)
            draws = torch.Generator(device).manual_seed(seed + number)  # a restart draws the same
            windows = torch.cat([continued(model, part.to(device), length, draws, columns) for part in parts])
            save_cached(directory, key, {"windows": windows.int().cpu()})
        batches.append(load_cached(directory, key)["windows"].long())
        done = sum(map(len, batches))
        progress("original, writing", done, count, unit="windows", resumed=is_there)
    return torch.cat(batches) if batches else text.new_empty(0, length)
