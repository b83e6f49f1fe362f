"""Logits of a causal language model, from a Hugging Face directory or a GGUF file, behind one protocol.

transformers runs in float32. llama.cpp runs through the low-level API of llama-cpp-python with an F32 key/value cache
and flash attention off: with its defaults a mixture of experts differs from float32 by a mean KL of 1e-4. Both runners
make the same calls in the same batch layout for every model, because llama.cpp's quantized kernels give slightly
different logits when the same tokens are batched differently. Sampling and chat templates are left out.
"""

import copy
import ctypes
import json
import os
import re
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from safetensors import SafetensorError

from dynquant.errors import CheckpointError, EvaluationError
from dynquant.hf_loading import unpack_compressed, without_progress_bars

BATCH_TOKENS = 512
"""Tokens per llama_decode call, and its physical batch; part of the layout that compared models must share."""

MAX_BRANCHES = 26


@dataclass(frozen=True)
class ModelInfo:
    """What can be known of a model without reading its weights."""

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


def is_gguf(path: Path) -> bool:
    return path.suffix.lower() == ".gguf"


def resolve_model(model: str | Path) -> Path:
    """The local path of a Hugging Face directory, a GGUF file or a hub id.

    Raises CheckpointError when there is no such model, or when `model` is a later part of a split GGUF.
    """
    path = Path(model)
    part = re.search(r"-(\d{5})-of-(\d{5})\.gguf$", path.name)
    if part and int(part.group(1)) != 1:
        first = path.name[: part.start()] + f"-00001-of-{part.group(2)}.gguf"
        raise CheckpointError(
            f"{path.name} is part {int(part.group(1))} of a split GGUF; give the first part, {first}."
        )
    if path.is_file() and is_gguf(path):
        return path
    if path.is_dir():
        if not (path / "config.json").is_file():
            raise CheckpointError(
                f"{path} holds no config.json, so it is not a Hugging Face model; give its directory."
            )
        return path
    if not path.exists() and re.fullmatch(r"[\w.-]+/[\w.-]+", str(model)) and not is_gguf(path):
        return _download(str(model))
    raise CheckpointError(f"{model} is neither a Hugging Face model directory nor a .gguf file; check the path.")


def _download(model_id: str) -> Path:
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(model_id))
    except Exception as error:
        raise CheckpointError(
            f"{model_id} is no local directory, and the hub could not provide it ({error}). "
            "Give the path of a model, or go online."
        ) from error


def describe_model(path: Path) -> ModelInfo:
    """Vocabulary and context length of a resolved model, without loading its weights."""
    return _describe_gguf(path) if is_gguf(path) else _describe_hugging_face(path)


def open_runner(path: Path, *, threads: int | None = None, device: str | None = None) -> LogitRunner:
    """Load a resolved model. `threads` defaults to all cores; `device` is for transformers (None: CUDA if present)."""
    if is_gguf(path):
        return LlamaCppRunner(path, threads=threads)
    return HuggingFaceRunner(path, threads=threads, device=device)


@contextmanager
def open_encoder(path: Path) -> Iterator[TextEncoder]:
    """The tokenizer of a resolved model, without its weights."""
    if is_gguf(path):
        with _llama_vocabulary(path) as (_, vocab):
            yield partial(_llama_encode, vocab)
        return
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(path, local_files_only=True)
    except (OSError, ValueError, KeyError) as error:
        raise CheckpointError(f"{path.name}: transformers cannot load the tokenizer: {error}") from error

    def encode(text: str, *, add_special: bool = True) -> list[int]:
        # verbose=False: it would warn that a whole text is longer than the context; windows are cut later.
        return tokenizer.encode(text, add_special_tokens=add_special, verbose=False)

    yield encode


def _describe_hugging_face(path: Path) -> ModelInfo:
    from transformers import AutoConfig

    try:
        config = AutoConfig.from_pretrained(path, local_files_only=True).get_text_config()
    except (OSError, ValueError, KeyError) as error:
        raise CheckpointError(f"{path.name}: transformers cannot read the model's configuration: {error}") from error
    return ModelInfo(
        path=path,
        kind="transformers",
        vocab_size=config.vocab_size,
        context_length=getattr(config, "max_position_embeddings", None) or 2**31,
        num_named_tokens=_count_named_tokens(path, config.vocab_size),
    )


def _count_named_tokens(path: Path, vocab_size: int) -> int:
    """Highest token id of tokenizer.json plus one; a directory without that file counts as fully named."""
    file = path / "tokenizer.json"
    if not file.is_file():
        return vocab_size
    content = json.loads(file.read_text(encoding="utf-8"))
    vocab = content.get("model", {}).get("vocab", {})
    ids = [len(vocab) - 1] if isinstance(vocab, list) else list(vocab.values())
    ids += [token["id"] for token in content.get("added_tokens", [])]
    return min(vocab_size, max(ids) + 1)


class HuggingFaceRunner:
    """A transformers causal model in float32."""

    def __init__(self, path: Path, *, threads: int | None = None, device: str | None = None) -> None:
        from transformers import AutoModelForCausalLM

        if threads is not None:
            torch.set_num_threads(threads)
        try:
            with without_progress_bars():
                model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32, local_files_only=True)
                model = unpack_compressed(model, torch.float32)
        except (OSError, ValueError, KeyError, ImportError, RuntimeError, SafetensorError) as error:
            raise CheckpointError(f"{path.name}: transformers cannot load the model: {error}") from error
        self._device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        self._model = model.eval().to(self._device)
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


class _LlamaLog:
    """The tail of llama.cpp's warnings and errors, kept instead of printed."""

    def __init__(self) -> None:
        import llama_cpp

        self._lines: deque[str] = deque(maxlen=8)
        # An attribute, because llama.cpp keeps only the raw pointer of the callback.
        self._callback = llama_cpp.llama_log_callback(self._keep)
        llama_cpp.llama_backend_init()
        self.clear()

    def _keep(self, level: int, text: bytes, _user_data: object) -> None:
        warning, error = 3, 4  # enum ggml_log_level of ggml.h
        if level in (warning, error):
            self._lines.append(text.decode("utf-8", errors="replace").strip())

    def clear(self) -> None:
        """Forget earlier lines, and listen again: the callback is the process's, others may have replaced it."""
        import llama_cpp

        self._lines.clear()
        llama_cpp.llama_log_set(self._callback, ctypes.c_void_p(0))

    def __str__(self) -> str:
        return "; ".join(line for line in self._lines if line) or "no reason given"


@cache
def _start_llama() -> _LlamaLog:
    return _LlamaLog()


def _load_llama_model(path: Path, *, vocab_only: bool) -> ctypes.c_void_p:
    try:
        import llama_cpp
    except ImportError as error:
        raise EvaluationError(
            f"{path.name} is a GGUF file, and running it needs llama-cpp-python: install dynquant with the extra "
            f'"llama" ({error}).'
        ) from error

    log = _start_llama()
    log.clear()
    params = llama_cpp.llama_model_default_params()
    params.vocab_only = vocab_only
    model = llama_cpp.llama_model_load_from_file(os.fsencode(path), params)
    if not model:
        raise CheckpointError(f"{path.name}: llama.cpp cannot load the file: {log}")
    return model


@contextmanager
def _llama_vocabulary(path: Path) -> Iterator[tuple[ctypes.c_void_p, ctypes.c_void_p]]:
    """A model loaded without weights, and its vocabulary."""
    model = _load_llama_model(path, vocab_only=True)
    import llama_cpp

    try:
        yield model, llama_cpp.llama_model_get_vocab(model)
    finally:
        llama_cpp.llama_model_free(model)


def _llama_encode(vocab: ctypes.c_void_p, text: str, *, add_special: bool = True) -> list[int]:
    import llama_cpp

    data = text.encode("utf-8")
    capacity = len(data) + 8
    tokens = (llama_cpp.llama_token * capacity)()
    count = llama_cpp.llama_tokenize(vocab, data, len(data), tokens, capacity, add_special, False)
    if count < 0:
        raise EvaluationError(f"llama.cpp's tokenizer failed on a text of {len(data)} bytes.")
    return list(tokens[:count])


def _describe_gguf(path: Path) -> ModelInfo:
    with _llama_vocabulary(path) as (model, vocab):
        import llama_cpp

        vocab_size = named = llama_cpp.llama_vocab_n_tokens(vocab)
        while named and re.fullmatch(rb"\[PAD\d+\]", llama_cpp.llama_vocab_get_text(vocab, named - 1) or b""):
            named -= 1
        architecture = _llama_metadata(model, "general.architecture")
        return ModelInfo(
            path=path,
            kind="llama.cpp",
            vocab_size=vocab_size,
            context_length=int(_llama_metadata(model, f"{architecture}.context_length") or 2**31),
            num_named_tokens=named,
        )


def _llama_metadata(model: ctypes.c_void_p, key: str) -> str:
    import llama_cpp

    buffer = ctypes.create_string_buffer(256)
    length = llama_cpp.llama_model_meta_val_str(model, key.encode(), buffer, len(buffer))
    return buffer.value.decode() if length >= 0 else ""


class LlamaCppRunner:
    """A GGUF model in llama.cpp. Sequence 0 holds the shared prefix, 1 a question, 2 and up its answer branches."""

    def __init__(self, path: Path, *, threads: int | None = None) -> None:
        import llama_cpp

        self._api = llama_cpp
        self._path = path
        self._threads = threads or os.cpu_count() or 1
        self._model = _load_llama_model(path, vocab_only=False)
        self._batch = llama_cpp.llama_batch_init(BATCH_TOKENS, 0, 1)
        self._context = None
        self._prefix_length = 0
        self.vocab_size: int = llama_cpp.llama_vocab_n_tokens(llama_cpp.llama_model_get_vocab(self._model))

    def reserve(self, num_tokens: int) -> None:
        self._free_context()
        params = self._api.llama_context_default_params()
        params.n_ctx = num_tokens
        params.n_batch = params.n_ubatch = BATCH_TOKENS
        params.n_seq_max = 2 + MAX_BRANCHES
        params.kv_unified = True  # sequences share the prefix's cells instead of each getting n_ctx / n_seq_max
        params.n_threads = params.n_threads_batch = self._threads
        params.type_k = params.type_v = self._api.GGML_TYPE_F32
        params.flash_attn_type = self._api.LLAMA_FLASH_ATTN_TYPE_DISABLED
        self._context = self._api.llama_init_from_model(self._model, params)
        if not self._context:
            raise EvaluationError(
                f"{self._path.name}: llama.cpp cannot make a context of {num_tokens} tokens: {_start_llama()}. "
                "Use a smaller window, or a machine with more memory."
            )
        self._memory = self._api.llama_get_memory(self._context)

    def window_logits(self, tokens: Sequence[int]) -> torch.Tensor:
        self._clear(len(tokens))
        return self._decode([(token, i, 0, True) for i, token in enumerate(tokens)])

    def hold_prefix(self, tokens: Sequence[int]) -> None:
        self._clear(len(tokens))
        self._decode([(token, i, 0, False) for i, token in enumerate(tokens)])
        self._prefix_length = len(tokens)

    def branch_logits(self, suffix: Sequence[int], branches: Sequence[Sequence[int]]) -> list[torch.Tensor]:
        if len(branches) > MAX_BRANCHES:
            raise EvaluationError(f"a question has {len(branches)} choices; at most {MAX_BRANCHES} can be scored.")
        question, start = 1, self._prefix_length
        self._copy_sequence(0, question)
        end = start + len(suffix)
        last = len(suffix) - 1
        first = self._decode([(token, start + i, question, i == last) for i, token in enumerate(suffix)])
        entries = []
        for i, branch in enumerate(branches):
            if len(branch) > 1:
                self._copy_sequence(question, 2 + i)
                entries += [(token, end + j, 2 + i, True) for j, token in enumerate(branch[:-1])]
        later = self._decode(entries).split([len(branch) - 1 for branch in branches])
        for sequence in range(1, 2 + len(branches)):
            self._api.llama_memory_seq_rm(self._memory, sequence, -1, -1)
        return [torch.cat([first, rows]) for rows in later]

    def close(self) -> None:
        self._free_context()
        if self._model:
            self._api.llama_batch_free(self._batch)
            self._api.llama_model_free(self._model)
            self._model = None

    def _free_context(self) -> None:
        if self._context:
            self._api.llama_free(self._context)
        self._context = None

    def _clear(self, num_tokens: int) -> None:
        if not self._context or self._api.llama_n_ctx(self._context) < num_tokens:
            self.reserve(num_tokens)
        self._api.llama_memory_clear(self._memory, True)
        self._prefix_length = 0

    def _copy_sequence(self, source: int, target: int) -> None:
        self._api.llama_memory_seq_cp(self._memory, source, target, -1, -1)

    def _decode(self, entries: Sequence[tuple[int, int, int, bool]]) -> torch.Tensor:
        """Decode (token, position, sequence, wants logits) entries; returns the wanted rows in entry order."""
        rows = [self._decode_batch(entries[i : i + BATCH_TOKENS]) for i in range(0, len(entries), BATCH_TOKENS)]
        return torch.cat(rows) if rows else torch.empty(0, self.vocab_size)

    def _decode_batch(self, entries: Sequence[tuple[int, int, int, bool]]) -> torch.Tensor:
        batch = self._batch
        batch.n_tokens = len(entries)
        for i, (token, position, sequence, wants_logits) in enumerate(entries):
            batch.token[i] = token
            batch.pos[i] = position
            batch.n_seq_id[i] = 1
            batch.seq_id[i][0] = sequence
            batch.logits[i] = wants_logits
        code = self._api.llama_decode(self._context, batch)
        if code != 0:
            raise EvaluationError(
                f"{self._path.name}: llama_decode returned {code} for {len(entries)} tokens: {_start_llama()}"
            )
        num_rows = sum(wants for *_, wants in entries)
        if num_rows == 0:
            return torch.empty(0, self.vocab_size)
        pointer = self._api.llama_get_logits(self._context)
        return torch.from_numpy(np.ctypeslib.as_array(pointer, shape=(num_rows, self.vocab_size)).copy())
