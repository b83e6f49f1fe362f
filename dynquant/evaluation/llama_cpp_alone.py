"""llama.cpp in a process of its own, for files at which it may end the process: their logits, or a refusal."""

import json
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import torch

from dynquant.errors import DynquantError, EvaluationError, OtherGraphError
from dynquant.evaluation.llama_cpp import LlamaCppRunner, source_of
from dynquant.families.from_gguf import Keys
from dynquant.resources import usable_cores
from dynquant.workers import run_module

_TOKENS, _LOGITS = "tokens.json", "logits.npy"
_OF_ANOTHER_GRAPH = re.compile(r"check_tensor_dims|done_getting_tensors|missing tensor|has wrong shape")
"""Words of llama.cpp on a file whose tensors are not those of its graph."""
_LAYERS_OF_LLAMA_4 = 4
"""Layers of which llama.cpp takes the last for one without rotation."""


def separate_window_logits(file: Path, tokens: Sequence[int], threads: int | None) -> torch.Tensor:
    """Return float32 logits [tokens, vocabulary] from a process of its own, which llama.cpp ends on some models.

    Raises:
        EvaluationError: llama.cpp cannot load or run the file; its last words are told.
        OtherGraphError: it cannot because of tensors that are not those of its graph.
    """
    with TemporaryDirectory() as name:
        folder = Path(name)
        (folder / _TOKENS).write_text(json.dumps(list(tokens)))
        arguments = [str(file.resolve()), name, str(threads or usable_cores())]
        done = run_module(__name__, arguments, GGML_NO_BACKTRACE="1")  # it would start a debugger
        if done.returncode:
            reason = _reason(done.stderr)
            kind = OtherGraphError if _OF_ANOTHER_GRAPH.search(reason) else EvaluationError
            raise kind(f"llama.cpp cannot run it: {reason}")
        return torch.from_numpy(np.load(folder / _LOGITS))


def check_runs(file: Path, threads: int | None) -> None:
    """Refuse a file that llama.cpp loads and then ends the process at: a Llama 4 without a layer for all positions.

    Its graph takes every fourth layer for one that attends to all tokens and does not rotate them, whatever config.json
    says; a file of fewer layers, or whose layers all attend globally, is tried in a process of its own.

    Raises:
        EvaluationError: that process ends.
    """
    keys = Keys(source_of(file, file.stat().st_mtime_ns))
    if keys.arch != "llama4":
        return
    num_layers, window = keys.integer("block_count"), keys.integer("attention.sliding_window", 1)
    if num_layers >= _LAYERS_OF_LLAMA_4 and window:
        return
    try:
        separate_window_logits(file, [0], threads)
    except EvaluationError as error:
        layers = "layers that all attend globally" if not window else f"only {num_layers} layers"
        raise EvaluationError(
            f"{file.name}: {error}. In llama.cpp every fourth layer of a Llama 4 is one without rotation, and this "
            f"file has {layers}. Judge packed safetensors of the checkpoint instead (export -f safetensors): they run "
            "in transformers. A newer llama-cpp-python may run the file."
        ) from error


def _reason(said: str) -> str:
    """Return why a process ended: our own refusal, or llama.cpp's last words with the place in its source."""
    lines = [line for line in said.splitlines() if line.strip()]
    last = [line for line in lines if line.startswith("error: ") or re.search(r"GGML_|fatal error", line)] or lines[-1:]
    return re.sub(r"\S*/", "", last[0]).removeprefix("error: ") if last else "no reason given"


def _main() -> None:
    """Run one file on tokens.json of a folder, and leave logits.npy there."""
    file, folder, threads = Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3])
    try:
        runner = LlamaCppRunner(file, threads=threads)
        logits = runner.window_logits(json.loads((folder / _TOKENS).read_text()))
    except (DynquantError, ImportError) as error:
        sys.exit(f"error: {error}")
    np.save(folder / _LOGITS, logits.numpy())
    runner.close()


if __name__ == "__main__":  # of `separate_window_logits`
    _main()
