"""Tokens per second of llama.cpp on one GPU, for models of the shapes that `generation_speed` times in transformers.

    DYNQUANT_LLAMA_CPP=FOLDER python -m dynquant.analysis.bench.llama_speed 8b --types rest=Q4_K -o FOLDER

FOLDER of the variable has llama.cpp's libraries, built with its CUDA part. Files with random weights are written into
the output folder, read, and removed. A batch is as many sequences; keys and values are float16, everything else is
llama.cpp's default. Logits of every sequence are copied to the host after each step, as llama.cpp gives them.
"""

import ctypes
import itertools
import os
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from dynquant.analysis.bench.llama_speed.random_files import write_random_gguf
from dynquant.analysis.bench.random_models import MODEL_SHAPES, shape_config
from dynquant.errors import EvaluationError
from dynquant.evaluation.llama_cpp import llama_log
from dynquant.kernels.bench.harness import MarkdownTable, numbers, options
from dynquant.llama_library import library_path, llama_cpp

_BATCH_TOKENS = 2048
_UNSTEADY = 4  # first steps, in which graphs are recorded
_CELLS = 256  # llama.cpp rounds a sequence's room up to these


def main() -> None:
    """Parse, measure, print a Markdown table."""
    asked = options(
        __doc__, "shape", MODEL_SHAPES, output=Path, types=([], "Quant types of weights; may be repeated."),
        batches="1,8,32", prompts=("512,4096", "Tokens of prompt."), tokens=32,
        layers=(int, "Decoder layers, where fewer than the model's will do."),
    )  # fmt: skip
    config = shape_config(asked.shape)
    config.num_hidden_layers = asked.layers or config.num_hidden_layers
    print(f"{asked.shape}, llama.cpp of {library_path('llama').name}, {asked.tokens} new tokens, tokens/s\n")
    table = MarkdownTable("weights", "batch", "prompt", "prompt read", "decoding", "file, GiB")
    for types in asked.types:
        file = asked.output / f"{asked.shape}.gguf"
        write_random_gguf(config, types, file)
        model = LlamaModel(file)
        for prompt, batch in itertools.product(numbers(asked.prompts), numbers(asked.batches)):
            read, decoded = model.speeds(batch, prompt, asked.tokens)
            table.add(types, batch, prompt, f"{read:.0f}", f"{decoded:.1f}", f"{file.stat().st_size / 2**30:.2f}")
        model.close()
        file.unlink()


class LlamaModel:
    """A file in llama.cpp, with all layers on the GPU where the library has one."""

    def __init__(self, path: Path) -> None:
        self._api = llama_cpp()
        self._log = llama_log()
        params = self._api.llama_model_default_params()
        params.n_gpu_layers = 999
        self._model = self._api.llama_model_load_from_file(os.fsencode(path), params)
        if not self._model:
            raise EvaluationError(f"{path.name}: llama.cpp cannot load the file: {self._log}")
        self._vocab_size = self._api.llama_vocab_n_tokens(self._api.llama_model_get_vocab(self._model))

    def close(self) -> None:
        """Free the model."""
        self._api.llama_model_free(self._model)

    def speeds(self, batch: int, prompt: int, tokens: int) -> tuple[float, float]:
        """Return tokens per second of reading a prompt in each of `batch` sequences, and of writing after them."""
        params = self._api.llama_context_default_params()
        params.n_ctx = batch * -(-(prompt + tokens + _UNSTEADY) // _CELLS) * _CELLS
        params.n_batch, params.n_seq_max = _BATCH_TOKENS, batch
        context = self._api.llama_init_from_model(self._model, params)
        if not context:
            raise EvaluationError(f"no context for {batch} sequences of {prompt} tokens: {self._log}")
        ids = torch.randint(0, self._vocab_size, (batch, prompt + tokens + _UNSTEADY)).tolist()
        places = [(sequence, place) for sequence in range(batch) for place in range(prompt)]
        self._decode(context, ids, places[: min(prompt, _BATCH_TOKENS)], prompt)
        self._api.llama_memory_clear(self._api.llama_get_memory(context), True)
        started = time.perf_counter()
        for start in range(0, len(places), _BATCH_TOKENS):
            self._decode(context, ids, places[start : start + _BATCH_TOKENS], prompt)
        read = time.perf_counter() - started
        for place in range(prompt, prompt + tokens + _UNSTEADY):
            if place == prompt + _UNSTEADY:
                started = time.perf_counter()
            self._decode(context, ids, [(sequence, place) for sequence in range(batch)], prompt)
        decoded = time.perf_counter() - started
        self._api.llama_free(context)
        return batch * prompt / read, batch * tokens / decoded

    def _decode(
        self, context: Any, ids: Sequence[Sequence[int]], places: Sequence[tuple[int, int]], prompt: int
    ) -> None:
        """Decode tokens by sequence and place, and wait for the logits of all from the last of a prompt on."""
        api, count = self._api, len(places)
        pointer = ctypes.POINTER(api.llama_seq_id)
        sequences = [(api.llama_seq_id * 1)(sequence) for sequence, _ in places]
        batch = api.llama_batch(
            n_tokens=count,
            token=(api.llama_token * count)(*(ids[sequence][place] for sequence, place in places)),
            pos=(api.llama_pos * count)(*(place for _, place in places)),
            n_seq_id=(ctypes.c_int32 * count)(*[1] * count),
            seq_id=(pointer * count)(*(ctypes.cast(sequence, pointer) for sequence in sequences)),
            logits=(ctypes.c_int8 * count)(*(place >= prompt - 1 for _, place in places)),
        )
        if code := api.llama_decode(context, batch):
            raise EvaluationError(f"llama_decode returned {code} for {count} tokens: {self._log}")
        api.llama_get_logits(context)


if __name__ == "__main__":
    main()
