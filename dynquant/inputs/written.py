"""Text that the original writes itself, to calibrate, tune or distill on beside given text or instead of it.

It is drawn at temperature 1, so that it follows the model's own distribution, which is what a quantized model is to
keep (data-free distillation: LLM-QAT, Liu et al. 2023). A window begins in one of up to three ways, in turn: from
nothing, with a few tokens of given text, or, where there is a chat template, with a short prompt of the mix that ships.
After an end of text the next beginning follows, as documents follow each other in given text.

Every window has random numbers of its own: what is written depends neither on how many windows are written side by
side nor on where an interrupted run goes on.
"""

import hashlib
import inspect
import json
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from safetensors import SafetensorError
from torch import Tensor, nn

from dynquant.inputs.held_out import runs_of
from dynquant.inputs.text import read_text, short_prompts
from dynquant.resources import free_memory
from dynquant.session import Progress
from dynquant.storage.atomic import read_tensors, save_tensors

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_VERSION = 1
_START_TOKENS = 16  # of given text
_PROMPT_SHARE = 1 / 3  # of a window, at most
_SPARE = 2.0  # windows that are written at most for each that is kept
_MOST_TOGETHER, _MOST_TOGETHER_ON_CPU = 1024, 64
_MEMORY_SHARE = 0.2  # of what is free, which others may want, too
_STRIDE = 7919  # between the beginnings that follow each other in a window: a prime
_TELLS_EVERY = 32  # tokens of each window
_FEWEST_REPEATS, _FEWEST_REPEATED = 3, 24


@dataclass(frozen=True)
class Writer:
    """A model that writes."""

    identity: str
    """Hash of what decides its computation."""
    open: Callable[[], nn.Module]
    """Returns it, loaded; called only when something is left to write."""
    tokenizer: "PreTrainedTokenizerBase"
    columns: int | None = None
    """Leading logits that may be drawn; by default all."""
    file: Path | None = None
    """Keeps windows as they are written; a file of other windows is replaced."""

    def windows(self, given: Tensor, count: int, seed: int, progress: Progress) -> Tensor:
        """Return up to `count` windows as long as those of given text, token ids int64 [count, T].

        Windows that end in a loop or repeat a passage of an earlier one are left out and others written for them; a
        model that does little else gives fewer.

        Raises:
            CheckpointError: the model cannot be loaded.
            WriteError: the file cannot be written.
        """
        length, most = given.shape[1], round(_SPARE * count)
        beginnings = self._beginnings(given, most, seed)
        key = self._key(beginnings, length, seed)
        numbers = torch.rand(most, length, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
        texts = self._kept(key, length)
        is_good = good_windows(texts)
        model: nn.Module | None = None

        def tell(tokens: int = 0, *, resumed: bool = False) -> None:
            done = min(length * int(is_good.sum()) + tokens, length * count)
            progress("original, writing", done, length * count, unit="tokens", resumed=resumed)

        tell(resumed=len(texts) > 0)
        while (missing := count - int(is_good.sum())) > 0 and len(texts) < most:
            model = model or self.open()
            first = len(texts)
            chosen = slice(first, min(first + missing, first + windows_together(model, length), most))
            options = {"first": first, "ends": self._ends(model), "columns": self.columns, "tell": tell}
            texts = torch.cat([texts, continued(model, beginnings, numbers[chosen], **options)])
            if self.file is not None:
                save_tensors(self.file, {"windows": texts.int()}, {"key": key}, "Free some space there.")
            is_good = good_windows(texts)
            tell()
        if torch.cuda.is_initialized():
            torch.cuda.empty_cache()  # keys and values grew token by token: what that left is of use to others alone
        return texts[is_good][:count]

    def _beginnings(self, given: Tensor, count: int, seed: int) -> list[list[int]]:
        """Return beginnings of the three kinds in turn, each with the BOS that given windows begin with."""
        generator = torch.Generator().manual_seed(seed)
        bos, eos = self.tokenizer.bos_token_id, self.tokenizer.eos_token_id
        first = [bos] if bos is not None and bool((given[:, 0] == bos).all()) else []
        size = min(_START_TOKENS, given.shape[1] // 2)
        rows = torch.randint(len(given), (count,), generator=generator)
        places = torch.randint(given.shape[1] - size + 1, (count,), generator=generator)
        going_on = given[rows[:, None], places[:, None] + torch.arange(size)].tolist()
        begin = next(([token] for token in (bos, eos) if token is not None), None)
        prompts = short_prompts(read_text(None, seed=seed), self.tokenizer, round(_PROMPT_SHARE * given.shape[1]))
        kinds = [going_on, *([[begin]] if begin else []), *([prompts] if prompts else [])]
        chosen = (kinds[i % len(kinds)][i // len(kinds) % len(kinds[i % len(kinds)])] for i in range(count))
        return [first + ids[ids[:1] == first :] if first else ids for ids in chosen]

    def _ends(self, model: nn.Module) -> set[int]:
        stated = getattr(getattr(model, "generation_config", None), "eos_token_id", None)
        ends = {self.tokenizer.eos_token_id, *(stated if isinstance(stated, list) else [stated])}
        return {token for token in ends if token is not None}

    def _key(self, *parts: object) -> str:
        return hashlib.sha256(json.dumps([_VERSION, self.identity, self.columns, *parts]).encode()).hexdigest()

    def _kept(self, key: str, length: int) -> Tensor:
        """Return the windows that the file has of these; a damaged file has none."""
        try:
            header, tensors = read_tensors(self.file) if self.file is not None else ({}, {})
        except (SafetensorError, OSError, ValueError, KeyError):
            header, tensors = {}, {}
        return tensors["windows"].long() if header.get("key") == key else torch.empty(0, length, dtype=torch.int64)


@torch.no_grad()  # not in inference mode, whose tensors may stay in the model, and gradients are taken later
def continued(
    model: nn.Module,
    beginnings: Sequence[list[int]],
    numbers: Tensor,
    *,
    first: int = 0,
    ends: Collection[int] = (),
    columns: int | None = None,
    tell: Callable[[int], object] = lambda tokens: None,
) -> Tensor:
    """Return windows [n, T] that the model writes, the first of them after beginning number `first`.

    Args:
        numbers: float64 [n, T] in [0, 1) that choose the tokens.
        ends: tokens after which another beginning follows.
        columns: leading logits that may be drawn; by default all.
        tell: hears how many tokens there are.
    """
    device, name = next(model.parameters()).device, cache_name(model)
    queues = [list(beginnings[first + row]) for row in range(len(numbers))]
    nexts = [first + row for row in range(len(numbers))]
    numbers = numbers.to(device)
    column = [queue.pop(0) for queue in queues]
    ids, past = [column], None
    while len(ids) < numbers.shape[1]:
        new = torch.tensor(column, device=device)[:, None]
        output = model(input_ids=new, **{name: past}, use_cache=True, logits_to_keep=1)
        past = output[name]
        sums = output.logits[:, -1, :columns].double().softmax(-1).cumsum(-1)
        places = torch.searchsorted(sums, numbers[:, len(ids), None] * sums[:, -1:], right=True)
        drawn = places.clamp_max(sums.shape[1] - 1)[:, 0].tolist()
        column = [queue.pop(0) if queue else token for queue, token in zip(queues, drawn, strict=True)]
        ids.append(column)
        if len(ids) % _TELLS_EVERY == 0:
            tell(len(ids) * len(column))
        for row, token in enumerate(column):
            if token in ends and not queues[row]:
                nexts[row] = (nexts[row] + _STRIDE) % len(beginnings)
                following = beginnings[nexts[row]]
                queues[row] = following[following[0] == token :]
    return torch.tensor(ids).T.contiguous()


def good_windows(windows: Tensor) -> Tensor:
    """Return which windows [n, T] neither end in a loop nor repeat a passage of an earlier one, bool [n].

    Passages are looked for in second halves: two windows may begin with one prompt.
    """
    is_good = torch.tensor([not is_loop(row) for row in windows.tolist()], dtype=torch.bool)
    runs = runs_of(windows[:, windows.shape[1] // 2 :].numpy())
    if not runs.size:
        return is_good
    _, places, which = np.unique(runs, return_index=True, return_inverse=True)
    first_rows = (places // runs.shape[1])[which].reshape(runs.shape)
    return is_good & torch.from_numpy((first_rows == np.arange(len(runs))[:, None]).all(axis=1))


def is_loop(tokens: Sequence[int]) -> bool:
    """Return True if the text ends in a block of tokens that stands there three times or more, 24 tokens in all."""
    ids = np.asarray(tokens)
    for period in range(1, len(ids) // _FEWEST_REPEATS + 1):
        span = max(_FEWEST_REPEATS * period, _FEWEST_REPEATED)
        if span <= len(ids) and np.array_equal(ids[-span + period :], ids[-span:-period]):
            return True
    return False


def windows_together(model: nn.Module, length: int) -> int:
    """Return how many windows a loaded model can write side by side: keys, values and logits take memory."""
    parameter, config = next(model.parameters()), model.config.get_text_config()
    cached = 4 * config.num_hidden_layers * config.hidden_size * parameter.dtype.itemsize  # and a copy of each
    if parameter.device.type == "cpu":
        most, free = _MOST_TOGETHER_ON_CPU, free_memory()
    else:
        most, free = _MOST_TOGETHER, torch.cuda.mem_get_info(parameter.device)[0]
    return max(1, min(most, int(_MEMORY_SHARE * free / (length * cached + 32 * config.vocab_size))))


def cache_name(hf_model: nn.Module) -> str:
    """Return what a model calls the keys and values of earlier tokens; transformers 5.24 warns at the older name."""
    hf_model = hf_model.get_base_model() if hasattr(hf_model, "get_base_model") else hf_model
    return "cache" if "cache" in inspect.signature(hf_model.forward).parameters else "past_key_values"
