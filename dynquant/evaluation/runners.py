"""Logits of a causal language model, from a Hugging Face directory or a GGUF file, behind one protocol.

transformers runs in float32. llama.cpp runs through the low-level API of llama-cpp-python with an F32 key/value cache
and flash attention off: with its defaults a mixture of experts differs from float32 by a mean KL of 1e-4. Both runners
make the same calls in the same batch layout for every model, because llama.cpp's quantized kernels give slightly
different logits when the same tokens are batched differently. Sampling and chat templates are left out.
"""

import copy
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import torch

from dynquant.checkpoints.gguf_source import GGUFSource
from dynquant.errors import CheckpointError
from dynquant.evaluation.llama_cpp import LlamaCppRunner, llama_encode, llama_metadata, llama_vocabulary
from dynquant.families.from_gguf import config_from_gguf
from dynquant.families.open import is_gguf
from dynquant.packed.layers import choose_layout
from dynquant.packed.load_gguf import load as load_packed
from dynquant.packed.rounding import round_activations
from dynquant.running.load import REFUSALS, load_config, load_directory, load_tokenizer
from dynquant.storage.strict_json import parse_json

LLAMA_CPP, TRANSFORMERS = "llama.cpp", "transformers"
RUNNERS = (LLAMA_CPP, TRANSFORMERS)
"""Programs that can run a GGUF file."""


@dataclass(frozen=True)
class ModelInfo:
    """Facts about a model that need no reading of its weights."""

    path: Path
    kind: str
    vocab_size: int
    context_length: int
    num_named_tokens: int
    """Tokens before the trailing run of unnamed or `[PADn]` entries, which pad the embedding matrix."""


class LogitRunner(Protocol):
    """A loaded model that scores token ids. All logits are float32 CPU tensors with `vocab_size` columns."""

    vocab_size: int

    def reserve(self, num_tokens: int) -> None:
        """Make room for `num_tokens` tokens in memory at once; drops the held prefix."""
        ...

    def window_logits(self, tokens: Sequence[int]) -> torch.Tensor:
        """Logits after every token of an independent window, [tokens, vocab_size]; drops the held prefix."""
        ...

    def hold_prefix(self, tokens: Sequence[int]) -> None:
        """Run `tokens` once and keep their keys and values for later `branch_logits` calls."""
        ...

    def branch_logits(self, suffix: Sequence[int], branches: Sequence[Sequence[int]]) -> list[torch.Tensor]:
        """Logits that predict each token of each branch after held prefix + `suffix`, [len(branch), vocab_size]."""
        ...

    def close(self) -> None:
        """Free the model. The runner cannot be used afterwards."""
        ...


class TextEncoder(Protocol):
    """Token ids of a text; `add_special` adds what the tokenizer itself adds, a BOS for instance."""

    def __call__(self, text: str, *, add_special: bool = True) -> list[int]: ...


def describe_model(path: Path, *, runner: str = LLAMA_CPP) -> ModelInfo:
    """Vocabulary and context length of a resolved model, without loading its weights."""
    if not is_gguf(path):
        return _describe_hugging_face(path)
    return _describe_gguf(path) if runner == LLAMA_CPP else _describe_packed_gguf(path)


def open_runner(
    path: Path,
    *,
    threads: int | None = None,
    device: str | None = None,
    runner: str = LLAMA_CPP,
    rounded: bool = False,
    adapter: Path | None = None,
) -> LogitRunner:
    """Load a resolved model. `threads` defaults to all cores; `device` is for transformers (None: CUDA if present).

    `runner` runs GGUF files: llama.cpp, or transformers with the weights packed. Directories run in transformers. With
    `rounded`, packed models in transformers round activations to 8 bits as llama.cpp does (`activation_rounding`).
    `adapter` is a directory of PEFT, for models in transformers.
    """
    if is_gguf(path) and runner == LLAMA_CPP:
        return LlamaCppRunner(path, threads=threads)
    return HuggingFaceRunner(path, threads=threads, device=device, rounded=rounded, adapter=adapter)


@contextmanager
def open_encoder(path: Path) -> Iterator[TextEncoder]:
    """The tokenizer of a resolved model, without its weights."""
    if is_gguf(path):
        with llama_vocabulary(path) as (_, vocab):
            yield partial(llama_encode, vocab)
        return
    tokenizer = load_tokenizer(path)

    def encode(text: str, *, add_special: bool = True) -> list[int]:
        # verbose=False: it would warn that a whole text is longer than the context; windows are cut later.
        return tokenizer.encode(text, add_special_tokens=add_special, verbose=False)

    yield encode


def _describe_hugging_face(path: Path) -> ModelInfo:
    config = load_config(path).get_text_config()
    return ModelInfo(
        path=path,
        kind="transformers",
        vocab_size=config.vocab_size,
        context_length=getattr(config, "max_position_embeddings", None) or 2**31,
        num_named_tokens=_count_named_tokens(path, config.vocab_size),
    )


def _describe_packed_gguf(path: Path) -> ModelInfo:
    source = GGUFSource(path)
    config = config_from_gguf(source)
    tokens = next((field.value for field in source.metadata if field.key == "tokenizer.ggml.tokens"), None)
    named = len(tokens) if isinstance(tokens, list) else config.integer("vocab_size")
    while named and isinstance(tokens, list) and re.fullmatch(r"\[PAD\d+\]", tokens[named - 1]):
        named -= 1
    return ModelInfo(
        path=path,
        kind=TRANSFORMERS,
        vocab_size=config.integer("vocab_size"),
        context_length=config.integer("max_position_embeddings"),
        num_named_tokens=named,
    )


def _count_named_tokens(path: Path, vocab_size: int) -> int:
    """Highest token id of tokenizer.json plus one; a directory without that file counts as fully named."""
    file = path / "tokenizer.json"
    if not file.is_file():
        return vocab_size
    content = parse_json(file.read_bytes())
    vocab = content.get("model", {}).get("vocab", {})
    ids = [len(vocab) - 1] if isinstance(vocab, list) else list(vocab.values())
    ids += [token["id"] for token in content.get("added_tokens", [])]
    return min(vocab_size, max(ids) + 1)


def load_model(path: Path, dtype: torch.dtype = torch.float32) -> Any:
    """Load the transformers model of a resolved directory, or of a GGUF file with packed weights, on the CPU.

    Raises:
        CheckpointError: it cannot be loaded.
    """
    if not is_gguf(path):
        return load_directory(path, dtype)
    try:
        return load_packed(path, dtype=dtype)
    except REFUSALS as error:
        raise CheckpointError(f"{path.name}: transformers cannot load the model: {error}") from error


def _describe_gguf(path: Path) -> ModelInfo:
    with llama_vocabulary(path) as (model, vocab):
        import llama_cpp

        vocab_size = named = llama_cpp.llama_vocab_n_tokens(vocab)
        while named and re.fullmatch(rb"\[PAD\d+\]", llama_cpp.llama_vocab_get_text(vocab, named - 1) or b""):
            named -= 1
        architecture = llama_metadata(model, "general.architecture")
        return ModelInfo(
            path=path,
            kind="llama.cpp",
            vocab_size=vocab_size,
            context_length=int(llama_metadata(model, f"{architecture}.context_length") or 2**31),
            num_named_tokens=named,
        )


class HuggingFaceRunner:
    """A transformers causal model in float32, from a directory, or with packed weights from a GGUF file."""

    def __init__(
        self,
        path: Path,
        *,
        threads: int | None = None,
        device: str | None = None,
        rounded: bool = False,
        adapter: Path | None = None,
    ) -> None:
        if threads is not None:
            torch.set_num_threads(threads)
        model = load_model(path)
        self._device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        self._model = model.eval().to(self._device)
        choose_layout(self._model)
        if rounded:
            round_activations(self._model)
        if adapter is not None:
            from dynquant.lora import load_adapter

            self._model = load_adapter(self._model, adapter).eval()
        self._prefix_cache = None
        self.vocab_size: int = model.config.get_text_config().vocab_size

    def reserve(self, num_tokens: int) -> None:
        del num_tokens  # transformers' cache grows by itself
        self._prefix_cache = None

    @torch.inference_mode()
    def window_logits(self, tokens: Sequence[int]) -> torch.Tensor:
        self._prefix_cache = None
        return self._forward([list(tokens)], None).logits[0].float().cpu()

    @torch.inference_mode()
    def batch_logits(self, windows: torch.Tensor) -> torch.Tensor:
        """Logits float32 [n, T, vocab_size] of token ids [n, T], on the runner's device."""
        return self._model(input_ids=windows.to(self._device), use_cache=False).logits.float()

    @torch.inference_mode()
    def hold_prefix(self, tokens: Sequence[int]) -> None:
        self._prefix_cache = None
        if tokens:
            self._prefix_cache = self._forward([list(tokens)], None, use_cache=True).past_key_values

    @torch.inference_mode()
    def branch_logits(self, suffix: Sequence[int], branches: Sequence[Sequence[int]]) -> list[torch.Tensor]:
        # Copied rather than cropped afterwards: sliding-window and recurrent caches cannot be cropped.
        output = self._forward([list(suffix)], copy.deepcopy(self._prefix_cache), use_cache=True)
        first = output.logits[0, -1:].float().cpu()
        longest = max(len(branch) for branch in branches)
        if longest == 1:
            return [first] * len(branches)
        rows = [list(branch[:-1]) + [branch[0]] * (longest - len(branch)) for branch in branches]
        output.past_key_values.batch_repeat_interleave(len(branches))
        later = self._forward(rows, output.past_key_values, use_cache=True).logits.float().cpu()
        return [torch.cat([first, later[i, : len(branch) - 1]]) for i, branch in enumerate(branches)]

    def close(self) -> None:
        self._model = self._prefix_cache = None

    def _forward(self, rows: list[list[int]], past: object, *, use_cache: bool = False) -> object:
        ids = torch.tensor(rows, device=self._device)
        return self._model(input_ids=ids, past_key_values=past, use_cache=use_cache)
