"""Logits and answers of a model, from a Hugging Face directory or a GGUF file, behind one protocol.

transformers runs in float32. llama.cpp runs through the low-level API of llama-cpp-python with an F32 key/value cache
and flash attention off: with its defaults a mixture of experts differs from float32 by a mean KL of 1e-4. Both runners
make the same calls in the same batch layout for every model, because llama.cpp's quantized kernels give slightly
different logits when the same tokens are batched differently. Pictures go to transformers as the original's processor
made them, and to llama.cpp as they are, which resizes them its own way, to as many tokens as the processor allows.
Sampling and chat templates are left out.
"""

import copy
import inspect
import re
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any, Protocol

import torch

from dynquant.checkpoints.gguf_source import GGUFSource, is_gguf
from dynquant.errors import CheckpointError, EvaluationError
from dynquant.evaluation.llama_cpp import (
    IsDone,
    LlamaCppRunner,
    llama_encode,
    llama_facts,
    llama_tokens,
    llama_vocabulary,
    until_end,
    without_padding,
)
from dynquant.evaluation.llama_cpp_alone import check_runs
from dynquant.evaluation.options import LLAMA_CPP, TRANSFORMERS
from dynquant.evaluation.rendered_model import bytes_at_once, logits_at, scored_logits
from dynquant.families.from_gguf import NotUnderstoodError
from dynquant.families.open import open_model
from dynquant.families.tokenizers.tokenizer import num_named_tokens
from dynquant.inputs.branches import Branches, groups_within, neighbours_that, tree_batch
from dynquant.inputs.model_inputs import Batch
from dynquant.inputs.text import TextEncoder, varied_strings
from dynquant.inputs.written import cache_name
from dynquant.llama_library import is_installed
from dynquant.packed.float32_products import use_tensor_cores
from dynquant.packed.layers import choose_layout
from dynquant.packed.load_gguf import config_to_load
from dynquant.packed.load_gguf import load as load_packed
from dynquant.packed.rounding import round_activations
from dynquant.running.load import REFUSALS, load_config, load_directory, load_tokenizer

ROW_TOKENS = {"cpu": 1024, "cuda": 8192}
"""Tokens of questions in one forward pass, with their padding, by the type of the device."""
_PREFIX_BYTES = 16 << 30  # copies of a held prefix on a GPU
_GREEDY = {
    "do_sample": False,
    "num_beams": 1,
    "repetition_penalty": 1.0,
    "no_repeat_ngram_size": 0,
    "min_length": 0,
    "min_new_tokens": None,
    "suppress_tokens": None,
    "begin_suppress_tokens": None,
    "bad_words_ids": None,
    "forced_eos_token_id": None,
}
"""Neutral values of what a generation_config.json may ask for; llama.cpp does not read it."""


@dataclass(frozen=True)
class ModelInfo:
    """Facts about a model that need no reading of its weights."""

    path: Path
    kind: str
    vocab_size: int
    context_length: int
    num_named_tokens: int  # tokens before the trailing run of unnamed or `[PADn]` entries, which are padding


class LogitRunner(Protocol):
    """A loaded model that scores token ids. Logits are float32, on the CPU unless said otherwise."""

    vocab_size: int

    def reserve(self, num_tokens: int) -> None:
        """Make room for `num_tokens` tokens in memory at once; drops the held prefix."""

    def window_logits(self, tokens: Sequence[int]) -> torch.Tensor:
        """Return logits after every token of an independent window, [tokens, vocab_size]; drops the held prefix."""

    def scored_logits(self, batches: Iterable[Batch]) -> Iterator[torch.Tensor]:
        """Yield logits float32 [scored positions, vocab_size] of batches of one sequence, in order, on any device.

        Several are run together. Each is to be used before the next is asked for; drops the held prefix.
        """

    def hold_prefix(self, tokens: Sequence[int]) -> None:
        """Run `tokens` once and keep their keys and values for later `branch_logits` calls."""

    def branch_logits(self, trees: Sequence[Branches]) -> Iterator[tuple[Sequence[Branches], torch.Tensor]]:
        """Yield the next few trees and their rows of logits after the held prefix, [rows, vocab_size], on any device.

        Trees of similar length that follow each other are run together.
        """

    @property
    def stop_tokens(self) -> frozenset[int]:
        """Tokens that end a text."""

    def write(
        self, prompts: Sequence[Sequence[int]], num_tokens: int, stop: frozenset[int], is_done: IsDone | None = None
    ) -> Iterator[list[list[int]]]:
        """Yield what the model writes after each of the next few prompts, greedily, up to a token of `stop`,
        `num_tokens` of them, or where `is_done` is true of what it wrote.

        Prompts of similar length that follow each other are run together. Drops the held prefix.
        """

    def close(self) -> None:
        """Free the model. The runner cannot be used afterwards."""


class PictureRunner(LogitRunner, Protocol):
    """A loaded model that sees pictures, and answers questions about them."""

    def answer(self, prompt: Batch, max_tokens: int) -> list[int]:
        """Return the greedy answer to a question, as token ids."""


def describe_model(path: Path, *, runner: str = LLAMA_CPP, base: Path | None = None) -> ModelInfo:
    """Vocabulary and context length of a resolved model, without loading its weights; `base` as `open_runner`."""
    if not is_gguf(path):
        config = load_config(path).get_text_config()
        context_length = getattr(config, "max_position_embeddings", None) or 2**31
        num_named = num_named_tokens(path)
        num_named = config.vocab_size if num_named is None else min(config.vocab_size, num_named)
        return ModelInfo(path, TRANSFORMERS, config.vocab_size, context_length, num_named)
    if runner == LLAMA_CPP:
        return ModelInfo(path, LLAMA_CPP, *llama_facts(path))
    source = GGUFSource(path)
    try:
        config = config_to_load(source)
    except NotUnderstoodError:
        if base is None or is_gguf(base):
            raise
        return replace(describe_model(base), path=path)
    vocab_size, context_length = config.integer("vocab_size"), config.integer("max_position_embeddings")
    tokens = next((field.value for field in source.metadata if field.key == "tokenizer.ggml.tokens"), None)
    num_named = without_padding(len(tokens), tokens.__getitem__) if isinstance(tokens, list) else vocab_size
    return ModelInfo(path, TRANSFORMERS, vocab_size, context_length, num_named)


def open_runner(
    path: Path,
    *,
    threads: int | None = None,
    device: str | None = None,
    runner: str = LLAMA_CPP,
    rounded: bool = False,
    adapter: Path | None = None,
    base: Path | None = None,
    kv_types: tuple[str, ...] = (),
) -> LogitRunner:
    """Load a resolved model. `threads` defaults to all cores; `device` is for transformers (None: CUDA if present).

    `runner` runs GGUF files: llama.cpp, or transformers with the weights packed. Directories run in transformers. With
    `rounded`, packed models in transformers round activations to 8 bits as llama.cpp does (`packed.rounding`).
    `adapter` is a directory of PEFT, for models in transformers. `base` is the checkpoint that a GGUF file was made
    from, for files that transformers cannot load without it. `kv_types` are those of llama.cpp's key/value cache.
    """
    if is_gguf(path) and runner == LLAMA_CPP:
        check_runs(path, threads)
        return LlamaCppRunner(path, threads=threads, kv_types=kv_types)
    if threads is not None:
        torch.set_num_threads(threads)
    loaded = load_model(path, base=base).eval().to(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    choose_layout(loaded)
    use_tensor_cores(loaded)
    if rounded:
        round_activations(loaded)
    if adapter is not None:
        from dynquant.lora import load_adapter

        loaded = load_adapter(loaded, adapter).eval()
    return HuggingFaceRunner(loaded)


@contextmanager
def open_encoder(path: Path) -> Iterator[TextEncoder]:
    """Context manager: the tokenizer of a resolved model; of a GGUF file it is llama.cpp's, where that is there."""
    if is_read_by_llama_cpp(path):
        with llama_vocabulary(path) as (_, vocab):
            yield partial(llama_encode, vocab)
        return
    tokenizer = transformers_tokenizer(path)

    def encode(text: str, *, add_special: bool = True) -> list[int]:
        # verbose=False: it would warn that a whole text is longer than the context; windows are cut later.
        return tokenizer.encode(text, add_special_tokens=add_special, verbose=False)

    yield encode


def is_read_by_llama_cpp(path: Path) -> bool:
    return is_gguf(path) and is_installed()


def transformers_tokenizer(path: Path) -> Any:
    try:
        return load_tokenizer(open_model(str(path)) if is_gguf(path) else path)
    except CheckpointError as error:
        if not is_gguf(path):
            raise
        raise EvaluationError(f"There is no llama.cpp here to read its tokenizer, and {error}") from error


def tokenizer_notes(reference: Path, candidate: Path) -> list[str]:
    """Say how the tokenizer of a resolved candidate differs from the reference's, whose ids both models are fed.

    Compared are EOS and BOS, what is put around a text, the token of every id, and a few hundred strings.
    """
    try:
        theirs, ours = map(_tokenization, (reference, candidate))
    except (CheckpointError, EvaluationError) as error:
        return [f"The tokenizers of the two models were not compared: {error}"]
    differences = [
        f"the {name} token is {theirs.ids[name]} and {ours.ids[name]}"
        for name in theirs.ids
        if None not in (theirs.ids[name], ours.ids[name]) and theirs.ids[name] != ours.ids[name]
    ]
    if theirs.around != ours.around:
        differences.append(f"a text gets the ids {theirs.around} and {ours.around} around it")
    named = [i for i in theirs.tokens.keys() | ours.tokens.keys() if theirs.tokens.get(i) != ours.tokens.get(i)]
    if named:
        pair = " and ".join(repr(side.tokens.get(min(named))) for side in (theirs, ours))
        differences.append(f"{len(named)} ids stand for other tokens (id {min(named)}: {pair})")
    split = [text for text, ids in theirs.strings.items() if ids != ours.strings[text]]
    if split:
        differences.append(f"{len(split)} of {len(theirs.strings)} strings get other ids ({min(split, key=len)!r:.60})")
    if not differences:
        return []
    return [
        f"The tokenizers of {reference.name} and {candidate.name} differ: {'; '.join(differences)}. Both models were "
        "fed the ids of the former, so the figures are those of the weights; given text, the latter may do worse."
    ]


@dataclass(frozen=True)
class _Tokenization:
    """A tokenizer, in terms that both runtimes have."""

    ids: dict[str, int | None]  # ids of EOS and BOS
    around: tuple[list[int], list[int]]  # ids that are put before and behind a text
    tokens: dict[int, str]  # tokens by id; fillers without a meaning are left out
    strings: dict[str, list[int]]


def _tokenization(path: Path) -> _Tokenization:
    if is_read_by_llama_cpp(path):
        with llama_vocabulary(path) as (_, vocab):
            special, tokens = llama_tokens(vocab)
    else:
        tokenizer = transformers_tokenizer(path)
        special = {"EOS": tokenizer.eos_token_id, "BOS": tokenizer.bos_token_id}
        tokens = {token_id: text for text, token_id in tokenizer.get_vocab().items()}
    with open_encoder(path) as encode:
        strings = {text: encode(text, add_special=False) for text in varied_strings()}
        plain, whole = encode("a", add_special=False), encode("a")
    start = next(i for i in range(len(whole)) if whole[i : i + len(plain)] == plain or i == len(whole) - 1)
    # llama.cpp keeps spaces of added tokens plain.
    named = {i: text.replace("\u2581", " ") for i, text in tokens.items() if not re.fullmatch(r"\[PAD\d+\]", text)}
    return _Tokenization(special, (whole[:start], whole[start + len(plain) :]), named, strings)


def load_model(path: Path, dtype: torch.dtype = torch.float32, *, base: Path | None = None) -> Any:
    """Load a directory, or a GGUF file with packed weights, in transformers on the CPU; `base` as `open_runner`.

    Raises:
        CheckpointError: it cannot be loaded.
    """
    if not is_gguf(path):
        return load_directory(path, dtype)
    try:
        try:
            return load_packed(path, dtype=dtype)
        except NotUnderstoodError:
            if base is None:
                raise
            return load_packed(path, base=base, dtype=dtype)
    except REFUSALS as error:
        raise CheckpointError(f"{path.name}: transformers cannot load the model: {error}") from error


class HuggingFaceRunner:
    """A transformers model, from a directory, or with packed weights from a GGUF file; it may see pictures."""

    def __init__(self, hf_model: Any) -> None:
        self.hf_model = hf_model
        self._prefix_cache, self._prefix = None, []
        self.vocab_size: int = hf_model.config.get_text_config().vocab_size

    @property
    def device(self) -> torch.device:
        return self.hf_model.device

    @property
    def stop_tokens(self) -> frozenset[int]:
        """Tokens that end a text or an answer."""
        ids = self.hf_model.generation_config.eos_token_id
        return frozenset([] if ids is None else ids if isinstance(ids, list) else [ids])

    @torch.inference_mode()
    def write(
        self, prompts: Sequence[Sequence[int]], num_tokens: int, stop: frozenset[int], is_done: IsDone | None = None
    ) -> Iterator[list[list[int]]]:
        self._prefix_cache = None
        ends = sorted(stop) or None
        filler = ends[0] if ends else 0
        for group in neighbours_that(self._are_written_together, prompts):
            length = max(map(len, group))
            ids = torch.tensor([[filler] * (length - len(prompt)) + list(prompt) for prompt in group])
            places = torch.arange(length).expand(len(group), -1)
            starts = torch.tensor([[length - len(prompt)] for prompt in group])
            rows = self.hf_model.generate(
                ids.to(self.device),
                attention_mask=(places >= starts).long().to(self.device),
                max_new_tokens=num_tokens,
                eos_token_id=ends,
                pad_token_id=filler,
                stopping_criteria=[partial(_are_done, length, is_done)] if is_done else None,
                **_GREEDY,
            )
            yield [until_end(row, stop) for row in rows[:, length:].tolist()]

    def _are_written_together(self, prompts: Sequence[Sequence[int]]) -> bool:
        """Prompts of several lengths are padded before their start, which only some models look past."""
        longest = max(map(len, prompts))
        fits = longest * len(prompts) <= ROW_TOKENS.get(self.device.type, ROW_TOKENS["cpu"])
        return fits and (len({*map(len, prompts)}) == 1 or self._takes_trees)

    def reserve(self, num_tokens: int) -> None:
        del num_tokens  # transformers' cache grows by itself
        self._prefix_cache = None

    def scored_logits(self, batches: Iterable[Batch]) -> Iterator[torch.Tensor]:
        self._prefix_cache = None
        return scored_logits(self.hf_model, batches)

    @torch.inference_mode()
    def answer(self, prompt: Batch, max_tokens: int) -> list[int]:
        ids = self.hf_model.generate(**prompt.on(self.device), max_new_tokens=max_tokens, do_sample=False)
        return ids[0, prompt.num_tokens :].tolist()

    @torch.inference_mode()
    def window_logits(self, tokens: Sequence[int]) -> torch.Tensor:
        self._prefix_cache = None
        return self._forward([list(tokens)], None).logits[0].float().cpu()

    @torch.inference_mode()
    def batch_logits(self, windows: torch.Tensor) -> torch.Tensor:
        """Logits float32 [n, T, vocab_size] of token ids [n, T], on the runner's device."""
        return self.hf_model(input_ids=windows.to(self.device), use_cache=False).logits.float()

    @torch.inference_mode()
    def hold_prefix(self, tokens: Sequence[int]) -> None:
        self._prefix_cache, self._prefix = None, list(tokens)
        if tokens and self._goes_on_from_caches:
            self._prefix_cache = self._forward([self._prefix], None, use_cache=True)[self._cache_name]

    @torch.inference_mode()
    def branch_logits(self, trees: Sequence[Branches]) -> Iterator[tuple[Sequence[Branches], torch.Tensor]]:
        if not self._takes_trees:
            for tree in trees:
                yield [tree], self._branches_of_one(tree)
            return
        layers = [] if self._prefix_cache is None else self._prefix_cache.layers
        prefix_bytes = sum(layer.keys.nbytes + layer.values.nbytes for layer in layers)
        limits = {
            "tokens": ROW_TOKENS.get(self.device.type, ROW_TOKENS["cpu"]),
            "rows": max(1, bytes_at_once(self.device) // (4 * self.vocab_size)),
            # Every row of a batch gets a copy of the prefix, in each layer.
            "at_most": max(1, bytes_at_once(self.device, _PREFIX_BYTES) // max(1, prefix_bytes)),
        }
        for group in groups_within(trees, **limits):
            yield group, self._tree_logits(group)

    def _tree_logits(self, trees: Sequence[Branches]) -> torch.Tensor:
        start = 0 if self._prefix_cache is None else self._prefix_cache.get_seq_length()
        batch = tree_batch(trees, start)
        return logits_at(
            self.hf_model,
            batch.places,
            input_ids=batch.ids,
            position_ids=batch.positions,
            attention_mask=batch.mask(start, self.hf_model.dtype, self.device),
            use_cache=True,
            **{self._cache_name: self._prefix_of_rows(len(trees))},
        )

    def _prefix_of_rows(self, count: int) -> Any:
        """Return the held prefix for `count` rows, without a copy of its keys and values."""
        if self._prefix_cache is None:
            return None
        cache = copy.copy(self._prefix_cache)
        cache.layers = [copy.copy(layer) for layer in cache.layers]
        for layer in cache.layers:
            layer.keys, layer.values = (part.expand(count, -1, -1, -1) for part in (layer.keys, layer.values))
        return cache

    @cached_property
    def _takes_trees(self) -> bool:
        """True where every layer sees all of the prefix, and the model goes by the mask and positions that it is given.

        Windows of attention count places in the cache, in which the answers of a question lie behind each other, and
        recurrent layers have one state: such models answer one question at a time, as do those with pictures, which
        make positions of their own.
        """
        model = self.hf_model.get_base_model() if hasattr(self.hf_model, "get_base_model") else self.hf_model
        config = model.config
        has_own_positions = config.get_text_config() is not config or getattr(config, "alibi", False)
        if has_own_positions or "position_ids" not in inspect.signature(model.forward).parameters:
            return False
        if config._attn_implementation not in ("sdpa", "eager"):
            return False
        cache = self._forward([[0]], None, use_cache=True)[self._cache_name]
        return all(type(layer).__name__ == "DynamicLayer" for layer in cache.layers)

    @cached_property
    def _goes_on_from_caches(self) -> bool:
        """True where several tokens after a cache get the logits that they get after the tokens themselves.

        Some recurrent layers (Mamba's) take up one token at a time from their state, and ignore it when given more.
        """
        ids = list(range(12))
        cache = getattr(self._forward([ids[:6]], None, use_cache=True), self._cache_name, None)
        if cache is None or not _is_recurrent(cache):
            return cache is not None
        whole = self._forward([ids], None).logits[0, 6:].float()
        later = self._forward([ids[6:]], cache, use_cache=True).logits[0].float()
        return bool((later - whole).abs().max() < 1e-4 * whole.std())

    def _branches_of_one(self, tree: Branches) -> torch.Tensor:
        longer = [list(answer[:-1]) for answer in tree.answers if len(answer) > 1]
        if not self._goes_on_from_caches:
            start = [*self._prefix, *tree.suffix]
            parts = [self._forward([start + more], None).logits[0, len(start) - 1 :] for more in longer or [[]]]
            return torch.cat([parts[0][:1], *(part[1:] for part in parts)]).float()
        # Copied rather than cropped afterwards: sliding-window and recurrent caches cannot be cropped.
        output = self._forward([list(tree.suffix)], copy.deepcopy(self._prefix_cache), use_cache=True)
        first, cache = output.logits[0, -1:].float(), output[self._cache_name]
        if _is_recurrent(cache):  # its states cannot be repeated
            parts = [self._forward([row], copy.deepcopy(cache), use_cache=True).logits[0] for row in longer]
        elif longer:
            longest = max(map(len, longer))
            cache.batch_repeat_interleave(len(longer))
            rows = [row + row[:1] * (longest - len(row)) for row in longer]
            logits = self._forward(rows, cache, use_cache=True).logits
            parts = [logits[i, : len(row)] for i, row in enumerate(longer)]
        else:
            parts = []
        return torch.cat([first, *(part.float() for part in parts)])

    def close(self) -> None:
        self.hf_model = self._prefix_cache = None

    @cached_property
    def _cache_name(self) -> str:
        return cache_name(self.hf_model)

    def _forward(self, rows: list[list[int]], past: object, *, use_cache: bool = False) -> Any:
        ids = torch.tensor(rows, device=self.device)
        return self.hf_model(input_ids=ids, **{self._cache_name: past}, use_cache=use_cache)


def _are_done(length: int, is_done: IsDone, ids: torch.Tensor, _scores: object, **_options: object) -> torch.Tensor:
    """Say for every row of transformers' `generate` whether it is done; prompts have `length` tokens."""
    return torch.tensor([is_done(row) for row in ids[:, length:].tolist()], device=ids.device)


def _is_recurrent(cache: Any) -> bool:
    return any("LinearAttention" in type(layer).__name__ for layer in cache.layers)
