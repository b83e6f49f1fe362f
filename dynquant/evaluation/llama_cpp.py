"""llama.cpp through the low-level API of llama-cpp-python: loading, tokenizing, and logits of windows and branches.

The key/value cache is F32 and flash attention off: with its defaults a mixture of experts differs from float32 by a
mean KL of 1e-4. A question and all its answers are sequences of one batch, and so are short windows and questions.
llama.cpp's kernels for quantized weights give slightly different logits when the same tokens are batched differently,
so the layout depends on the token ids alone: compared models, which get the same ids, have the same one. Models with a
recurrent state run one window, one question and one set of answers at a time.
"""

import ctypes
import os
import re
from collections import deque
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from contextlib import closing, contextmanager
from copy import copy
from functools import cache, lru_cache, partial
from pathlib import Path

import numpy as np
import torch

from dynquant.checkpoints.gguf_source import GGUFSource, short_context
from dynquant.errors import CheckpointError, EvaluationError
from dynquant.families.complete_gguf import check_complete, check_loads
from dynquant.formats.quant_types import QUANT_TYPES
from dynquant.inputs.branches import Branches, neighbours_that, num_shared
from dynquant.inputs.model_inputs import Batch
from dynquant.inputs.questions import MAX_CHOICES
from dynquant.llama_library import llama_cpp
from dynquant.resources import count_mapped_files, free_memory, usable_cores
from dynquant.workers import side_by_side

BATCH_TOKENS = 512
"""Tokens per llama_decode call, and its physical batch; part of the layout that compared models must share."""
_PACKED_TOKENS = 128
"""Tokens up to which windows or questions share a batch. More was measured to be slower on a CPU by up to 20 %: every
token attends over the cells of all sequences, and products with weights gain little from more rows."""
_WRITTEN_TOKENS = 1024
"""Tokens of prompts that are gone on from together."""
_SEQUENCES = 64
"""Sequences of a context: 0 holds a shared prefix, the others windows, or questions with an answer each."""

_CONTEXTS_SHARE = 0.25
"""Contexts of windows that are scored side by side take this much of the free memory at most."""

_Window = tuple[Sequence[int], Collection[int]]
"""Token ids, and the places after which logits are wanted."""
IsDone = Callable[[Sequence[int]], bool]
"""Says of the tokens that a model wrote whether it should stop."""
Entry = tuple[int, int, Sequence[int], bool]
"""A token, its position, the sequences that it belongs to, and True where its logits are wanted."""


class _LlamaLog:
    """The tail of llama.cpp's warnings and errors, kept instead of printed."""

    def __init__(self) -> None:
        self._lines: deque[str] = deque(maxlen=8)
        # An attribute, because llama.cpp keeps only the raw pointer of the callback.
        self.callback = llama_cpp().llama_log_callback(self._keep)
        llama_cpp().llama_backend_init()
        self.clear()

    def _keep(self, level: int, text: bytes, _user_data: object) -> None:
        warning, error = 3, 4  # enum ggml_log_level of ggml.h
        if level in (warning, error):
            self._lines.append(text.decode("utf-8", errors="replace").strip())

    def clear(self) -> None:
        """Forget earlier lines, and listen again: the callback is the process's, others may have replaced it."""
        self._lines.clear()
        llama_cpp().llama_log_set(self.callback, ctypes.c_void_p(0))

    def last(self) -> str:
        """The latest line alone."""
        return self._lines[-1] if self._lines else "no reason given"

    def __str__(self) -> str:
        return "; ".join(line for line in self._lines if line) or "no reason given"


@cache
def llama_log() -> _LlamaLog:
    """The log of this process."""
    return _LlamaLog()


def load_llama_model(path: Path, *, vocab_only: bool) -> ctypes.c_void_p:
    try:
        api = llama_cpp()
    except ImportError as error:
        raise EvaluationError(f"{path.name} is a GGUF file, and running it needs llama.cpp. {error}") from error

    # llama.cpp aborts the process on some files, and takes others for whole.
    (check_loads if vocab_only else check_complete)(source_of(path, path.is_file() and path.stat().st_mtime_ns))
    log = llama_log()
    log.clear()
    params = api.llama_model_default_params()
    params.vocab_only = vocab_only
    model = api.llama_model_load_from_file(os.fsencode(path), params)
    if not model:
        raise CheckpointError(f"{path.name}: llama.cpp cannot load the file: {log}")
    if not vocab_only:
        count_mapped_files([path])
    return model


@lru_cache(maxsize=2)
def source_of(path: Path, _changed: int) -> GGUFSource:
    """The header of a file, read once although a model is loaded for its vocabulary first."""
    return GGUFSource(path)


@contextmanager
def llama_vocabulary(path: Path) -> Iterator[tuple[ctypes.c_void_p, ctypes.c_void_p]]:
    """A model loaded without weights, and its vocabulary."""
    model = load_llama_model(path, vocab_only=True)
    try:
        yield model, llama_cpp().llama_model_get_vocab(model)
    finally:
        llama_cpp().llama_model_free(model)


def llama_encode(
    vocab: ctypes.c_void_p, text: str, *, add_special: bool = True, parse_special: bool = False
) -> list[int]:
    data = text.encode("utf-8")
    capacity = len(data) + 8  # a byte a token at most, and special ones
    tokens = (llama_cpp().llama_token * capacity)()
    count = llama_cpp().llama_tokenize(vocab, data, len(data), tokens, capacity, add_special, parse_special)
    if count < 0:
        raise EvaluationError(f"llama.cpp's tokenizer failed on a text of {len(data)} bytes.")
    return list(tokens[:count])


def llama_decode_text(vocab: ctypes.c_void_p, tokens: Sequence[int]) -> str:
    """Return the text of tokens, without special ones."""
    ids, capacity = (llama_cpp().llama_token * len(tokens))(*tokens), 16 * len(tokens) + 16
    while True:
        buffer = ctypes.create_string_buffer(capacity)
        size = llama_cpp().llama_detokenize(vocab, ids, len(tokens), buffer, capacity, False, False)
        if size >= 0:
            return buffer.raw[:size].decode("utf-8", "replace")
        capacity = -size


def llama_tokens(vocab: ctypes.c_void_p) -> tuple[dict[str, int | None], dict[int, str]]:
    """Return the ids of EOS and BOS, None where there is none, and all tokens by id."""
    special = {"EOS": llama_cpp().llama_vocab_eos(vocab), "BOS": llama_cpp().llama_vocab_bos(vocab)}
    texts = (llama_cpp().llama_vocab_get_text(vocab, i) for i in range(llama_cpp().llama_vocab_n_tokens(vocab)))
    tokens = {i: (text or b"").decode("utf-8", "replace") for i, text in enumerate(texts)}
    return {name: None if token_id < 0 else token_id for name, token_id in special.items()}, tokens


def llama_facts(path: Path) -> tuple[int, int, int]:
    """Return the vocabulary's size, the context length, and the number of tokens before the padding."""
    with llama_vocabulary(path) as (model, vocab):

        def text_of(token: int) -> str:
            return (llama_cpp().llama_vocab_get_text(vocab, token) or b"").decode(errors="replace")

        vocab_size = llama_cpp().llama_vocab_n_tokens(vocab)
        architecture = llama_metadata(model, "general.architecture")
        context_length = int(llama_metadata(model, f"{architecture}.context_length") or 2**31)
        return vocab_size, context_length, without_padding(vocab_size, text_of)


def without_padding(num_tokens: int, text_of: Callable[[int], str]) -> int:
    """Count the tokens before the trailing `[PADn]`, which fill the embedding matrix."""
    while num_tokens and re.fullmatch(r"\[PAD\d+\]", text_of(num_tokens - 1)):
        num_tokens -= 1
    return num_tokens


def llama_metadata(model: ctypes.c_void_p, key: str) -> str:
    buffer = ctypes.create_string_buffer(256)
    length = llama_cpp().llama_model_meta_val_str(model, key.encode(), buffer, len(buffer))
    return buffer.value.decode() if length >= 0 else ""


class LlamaCppRunner:
    """A GGUF model in llama.cpp."""

    def __init__(self, path: Path, *, threads: int | None = None, kv_types: tuple[str, ...] = ()) -> None:
        """Load a file. `kv_types` are the types of keys and of values in the cache, by default float32."""
        self._api = llama_cpp()
        self._path = path
        self._threads = threads or usable_cores()
        self._kv_types = [QUANT_TYPES[name.upper()].ggml_id for name in kv_types or ("f32", "f32")]
        self._model = load_llama_model(path, vocab_only=False)
        self._has_state = llama_cpp().llama_model_is_recurrent(self._model) or llama_cpp().llama_model_is_hybrid(
            self._model
        )
        self._short_context = short_context(source_of(path, path.stat().st_mtime_ns))
        self._context = None
        self._prefix_length = 0
        self.vocab_size: int = llama_cpp().llama_vocab_n_tokens(llama_cpp().llama_model_get_vocab(self._model))

    def reserve(self, num_tokens: int) -> None:
        self._free_context()
        params = self._api.llama_context_default_params()
        params.n_ctx = max(num_tokens, BATCH_TOKENS)  # llama.cpp aborts when sequences outnumber its tokens
        if num_tokens <= self._short_context:
            params.n_ctx = min(params.n_ctx, self._short_context)
        params.n_batch = params.n_ubatch = BATCH_TOKENS
        params.n_seq_max = 2 + MAX_CHOICES if self._has_state else _SEQUENCES  # each has memory for its state
        params.kv_unified = True  # sequences share the prefix's cells instead of each getting n_ctx / n_seq_max
        params.n_threads = params.n_threads_batch = self._threads
        params.type_k, params.type_v = self._kv_types  # F16 by default, see above
        is_exact = set(self._kv_types) == {QUANT_TYPES["F32"].ggml_id}
        # Only flash attention takes quantized values.
        flash = self._api.LLAMA_FLASH_ATTN_TYPE_DISABLED if is_exact else self._api.LLAMA_FLASH_ATTN_TYPE_ENABLED
        params.flash_attn_type = flash
        self._context = self._api.llama_init_from_model(self._model, params)
        if not self._context:
            way_out = "Use a smaller window, or a machine with more memory."
            if not is_exact:
                way_out = (
                    "Where it refuses the --kv-type: quantized values need flash attention, quantized rows of a head "
                    "whole blocks of 32, and some models one type for both. Give another, as q8_0, q8_0,f16 or f16."
                )
            raise EvaluationError(
                f"{self._path.name}: llama.cpp cannot make a context of {num_tokens} tokens: {llama_log()}. {way_out}"
            )
        self._memory = self._api.llama_get_memory(self._context)

    def window_logits(self, tokens: Sequence[int]) -> torch.Tensor:
        self._clear(len(tokens))
        return self._decode([(token, i, (0,), True) for i, token in enumerate(tokens)])

    def scored_logits(self, batches: Iterable[Batch]) -> Iterator[torch.Tensor]:
        windows = [(batch.ids[0].tolist(), set(batch.scored.tolist())) for batch in batches]
        parts = list(neighbours_that(self._share_a_batch, windows))
        runners = self._for_parts(parts)
        idle = deque(runners)  # threads take from it and put back, one at a time

        def score(part: Sequence[_Window]) -> Sequence[torch.Tensor]:
            runner = idle.popleft()
            rows = runner._part_logits(part)
            idle.append(runner)
            return rows

        if len(runners) == 1:
            for part in parts:
                yield from score(part)
            return
        try:
            with closing(side_by_side(score, parts, len(runners))) as results:
                for rows in results:
                    yield from rows
        finally:
            for runner in runners:
                runner._free_context()

    def _share_a_batch(self, windows: Sequence[_Window]) -> bool:
        num_tokens = sum(len(tokens) for tokens, _ in windows)
        return not self._has_state and len(windows) <= _SEQUENCES and num_tokens <= _PACKED_TOKENS

    def _part_logits(self, windows: Sequence[_Window]) -> Sequence[torch.Tensor]:
        """Return the scored rows of windows that are the sequences of one batch."""
        self._clear(sum(len(tokens) for tokens, _ in windows))
        entries = [
            (token, i, (sequence,), i in scored)
            for sequence, (tokens, scored) in enumerate(windows)
            for i, token in enumerate(tokens)
        ]
        return self._decode(entries).split([len(scored) for _, scored in windows])

    def _for_parts(self, parts: Sequence[Sequence[_Window]]) -> list["LlamaCppRunner"]:
        """Return runners of the same loaded weights, as many as there are threads where their memory is there.

        Threads that share a context wait for each other after every operation; contexts of one thread each do not.
        """
        num_tokens = max((sum(len(tokens) for tokens, _ in part) for part in parts), default=0)
        model = self._model
        # Logits of two results, of the context and of its last operation; keys and values of all layers at most.
        needed = 16 * self.vocab_size + 8 * self._api.llama_model_n_layer(model) * self._api.llama_model_n_embd(model)
        room = int(_CONTEXTS_SHARE * free_memory() / (needed * max(num_tokens, BATCH_TOKENS)))
        count = max(1, min(self._threads, len(parts), room))
        if count == 1:
            return [self]
        self._free_context()
        runners = [copy(self) for _ in range(count)]
        for runner in runners:
            runner._threads = self._threads // count
        return runners

    @property
    def stop_tokens(self) -> frozenset[int]:
        """Tokens that end a text."""
        vocab = self._api.llama_model_get_vocab(self._model)
        return frozenset(i for i in range(self.vocab_size) if self._api.llama_vocab_is_eog(vocab, i))

    def write(
        self, prompts: Sequence[Sequence[int]], num_tokens: int, stop: frozenset[int], is_done: IsDone | None = None
    ) -> Iterator[list[list[int]]]:
        for group in neighbours_that(partial(self._are_written_together, num_tokens), prompts):
            yield self._written(group, num_tokens, stop, is_done)

    def _are_written_together(self, num_new: int, prompts: Sequence[Sequence[int]]) -> bool:
        num_tokens = sum(map(len, prompts)) - len(prompts) * num_shared(prompts)
        is_short = not self._short_context or num_tokens + len(prompts) * num_new <= self._short_context
        return not self._has_state and len(prompts) <= _SEQUENCES and num_tokens <= _WRITTEN_TOKENS and is_short

    def _written(
        self, prompts: Sequence[Sequence[int]], num_tokens: int, stop: frozenset[int], is_done: IsDone | None
    ) -> list[list[int]]:
        shared, everyone = num_shared(prompts), range(len(prompts))
        self._clear(sum(map(len, prompts)) + len(prompts) * (num_tokens - shared) + shared)
        entries: list[Entry] = [(token, place, everyone, False) for place, token in enumerate(prompts[0][:shared])]
        entries += [
            (prompt[place], place, (sequence,), place == len(prompt) - 1)
            for sequence, prompt in enumerate(prompts)
            for place in range(shared, len(prompt))
        ]
        written: list[list[int]] = [[] for _ in prompts]
        going_on = list(everyone)
        for count in range(num_tokens):
            for sequence, token in zip(going_on, self._decode(entries).argmax(1).tolist(), strict=True):
                written[sequence].append(token)
            going_on = [i for i in going_on if written[i][-1] not in stop and not (is_done and is_done(written[i]))]
            if not going_on:
                break
            entries = [(written[i][-1], len(prompts[i]) + count, (i,), True) for i in going_on]
        return written

    def hold_prefix(self, tokens: Sequence[int]) -> None:
        self._clear(len(tokens), is_whole=False)
        self._decode([(token, i, (0,), False) for i, token in enumerate(tokens)])
        self._prefix_length = len(tokens)

    def branch_logits(self, trees: Sequence[Branches]) -> Iterator[tuple[Sequence[Branches], torch.Tensor]]:
        for tree in trees:
            if len(tree.answers) > MAX_CHOICES:
                raise EvaluationError(
                    f"a question has {len(tree.answers)} choices; at most {MAX_CHOICES} can be scored."
                )
        if self._has_state:
            for tree in trees:
                yield [tree], self._branches_of_one(tree)
            return
        for group in neighbours_that(self._fits, trees):
            yield group, self._tree_logits(group)

    def _fits(self, trees: Sequence[Branches]) -> bool:
        num_tokens = sum(tree.num_tokens for tree in trees)
        free = self._api.llama_n_ctx(self._context) - self._prefix_length
        return num_tokens <= min(_PACKED_TOKENS, free) and sum(map(_num_sequences, trees)) < _SEQUENCES

    def _tree_logits(self, trees: Sequence[Branches]) -> torch.Tensor:
        """Return the rows of some trees, whose questions belong to the sequences of all their answers."""
        start, first = self._prefix_length, 1
        entries: list[Entry] = []
        for tree in trees:
            sequences = range(first, first + _num_sequences(tree))
            for sequence in sequences:
                self._copy_sequence(0, sequence)
            end = len(tree.suffix)
            entries += [(token, start + i, sequences, i == end - 1) for i, token in enumerate(tree.suffix)]
            longer = [answer for answer in tree.answers if len(answer) > 1]
            for sequence, answer in zip(sequences, longer, strict=False):
                entries += [(token, start + end + i, (sequence,), True) for i, token in enumerate(answer[:-1])]
            first = sequences.stop
        rows = self._decode(entries)
        self._remove_sequences(range(1, first))
        return rows

    def _branches_of_one(self, tree: Branches) -> torch.Tensor:
        question, start = 1, self._prefix_length
        self._copy_sequence(0, question)
        end, last = start + len(tree.suffix), len(tree.suffix) - 1
        first = self._decode([(token, start + i, (question,), i == last) for i, token in enumerate(tree.suffix)])
        entries = []
        for i, answer in enumerate(tree.answers):
            if len(answer) > 1:
                self._copy_sequence(question, 2 + i)
                entries += [(token, end + j, (2 + i,), True) for j, token in enumerate(answer[:-1])]
        later = self._decode(entries)
        self._remove_sequences(range(1, 2 + len(tree.answers)))
        return torch.cat([first, later])

    def close(self) -> None:
        self._free_context()
        if self._model:
            self._api.llama_model_free(self._model)
            self._model = None

    def _free_context(self) -> None:
        if self._context:
            self._api.llama_free(self._context)
        self._context = None

    def _clear(self, num_tokens: int, *, is_whole: bool = True) -> None:
        """Empty the context, which has room for so many tokens then; they are all that comes if `is_whole`."""
        size = self._api.llama_n_ctx(self._context) if self._context else 0
        if size < num_tokens or (is_whole and num_tokens <= self._short_context < size):
            self.reserve(num_tokens)
        self._api.llama_memory_clear(self._memory, True)
        self._prefix_length = 0

    def _copy_sequence(self, source: int, target: int) -> None:
        self._api.llama_memory_seq_cp(self._memory, source, target, -1, -1)

    def _remove_sequences(self, sequences: Iterable[int]) -> None:
        for sequence in sequences:
            self._api.llama_memory_seq_rm(self._memory, sequence, -1, -1)

    def _decode(self, entries: Sequence[Entry]) -> torch.Tensor:
        """Decode entries; returns the wanted rows in their order."""
        rows = [self._decode_batch(entries[i : i + BATCH_TOKENS]) for i in range(0, len(entries), BATCH_TOKENS)]
        if len(rows) == 1:
            return rows[0]
        return torch.cat(rows) if rows else torch.empty(0, self.vocab_size)

    def _decode_batch(self, entries: Sequence[Entry]) -> torch.Tensor:
        api, count = self._api, len(entries)
        tokens, positions, sequences, wants = zip(*entries, strict=True)
        alike = {ids: (api.llama_seq_id * len(ids))(*ids) for ids in map(tuple, sequences)}
        pointer = ctypes.POINTER(api.llama_seq_id)
        batch = api.llama_batch(
            n_tokens=count,
            token=(api.llama_token * count)(*tokens),
            pos=(api.llama_pos * count)(*positions),
            n_seq_id=(ctypes.c_int32 * count)(*map(len, sequences)),
            seq_id=(pointer * count)(*(ctypes.cast(alike[tuple(ids)], pointer) for ids in sequences)),
            logits=(ctypes.c_int8 * count)(*wants),
        )
        code = api.llama_decode(self._context, batch)
        if code != 0:
            raise EvaluationError(f"{self._path.name}: llama_decode returned {code} for {count} tokens: {llama_log()}")
        num_rows = sum(wants)
        if num_rows == 0:
            return torch.empty(0, self.vocab_size)
        logits = api.llama_get_logits(self._context)  # overwritten by the next batch, so it is copied
        return torch.from_numpy(np.ctypeslib.as_array(logits, shape=(num_rows, self.vocab_size)).copy())


def until_end(tokens: Sequence[int], stop: frozenset[int]) -> list[int]:
    """Return tokens up to the first that ends a text, with it."""
    end = next((place + 1 for place, token in enumerate(tokens) if token in stop), len(tokens))
    return list(tokens[:end])


def _num_sequences(tree: Branches) -> int:
    """Count the sequences of a question: one for every answer that goes on after its first token, and at least one."""
    return max(1, sum(len(answer) > 1 for answer in tree.answers))
