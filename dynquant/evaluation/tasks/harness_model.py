"""Running models as lm-evaluation-harness calls them.

The harness asks in texts. They become token ids by the original's tokenizer, whichever model runs, so that both are
asked the same; answers are written greedily and become texts by it. Questions with the same start are scored after one
run of it, and answers are written side by side, as far as the runner does both.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from lm_eval.api.model import TemplateLM
from lm_eval.models.utils import normalize_gen_kwargs, postprocess_generated_text
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

from dynquant.errors import EvaluationError
from dynquant.evaluation.llama_cpp import llama_decode_text, llama_encode, llama_tokens, llama_vocabulary
from dynquant.evaluation.runners import LogitRunner, is_read_by_llama_cpp, open_encoder, transformers_tokenizer
from dynquant.evaluation.tasks.multiple_choice import score_answers
from dynquant.families.tokenizers.chat_template import ChatFormat
from dynquant.inputs.branches import Branches, neighbours_that, num_shared
from dynquant.inputs.questions import MAX_CHOICES
from dynquant.inputs.text import TextEncoder

_TAIL_TOKENS = 8  # more than the letters of a stop string that are looked at for its end: tokens may have no letters
_Pair = tuple[tuple[str, str], list[int], list[int]]
"""Prompt and answer, and the ids of both."""


class Codec(NamedTuple):
    """A tokenizer for prompts: special tokens are matched where a text has them, and left out of what is decoded."""

    encode: TextEncoder
    decode: Callable[[Sequence[int]], str]
    prefix: int
    """Token before a text that has nothing before it: BOS, or EOS where there is none."""


@contextmanager
def open_codec(path: Path) -> Iterator[Codec]:
    """Context manager: yields the tokenizer of a resolved model, without its weights."""
    if is_read_by_llama_cpp(path):
        with llama_vocabulary(path) as (_, vocab):
            ids = llama_tokens(vocab)[0]
            encode, decode = partial(llama_encode, vocab, parse_special=True), partial(llama_decode_text, vocab)
            yield Codec(encode, decode, next((i for i in (ids["BOS"], ids["EOS"]) if i is not None), 0))
        return
    tokenizer = transformers_tokenizer(path)
    ids = (tokenizer.bos_token_id, tokenizer.eos_token_id)
    decode = partial(tokenizer.decode, skip_special_tokens=True)
    with open_encoder(path) as encode:
        yield Codec(encode, decode, next((i for i in ids if i is not None), 0))


class HarnessModel(TemplateLM):
    """A running model as the harness calls it. `cut` counts prompts that lost their beginning to fit the context."""

    def __init__(
        self,
        runner: Callable[[], LogitRunner],
        codec: Codec,
        chat: ChatFormat | None,
        *,
        context_length: int,
        num_columns: int,
        progress: Callable[[int, int], None],
    ) -> None:
        """Take a model that `runner` loads when it is first asked for; `num_columns` of its logits are compared."""
        super().__init__()
        self._runner, self._codec, self._chat = runner, codec, chat
        self._context_length, self._num_columns, self._progress = context_length, num_columns, progress
        self.cut = 0

    @property
    def eot_token_id(self) -> int:
        return self._codec.prefix

    @property
    def tokenizer_name(self) -> str:
        return "original"

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        assert self._chat is not None
        text = self._chat.render(chat_history, generation=add_generation_prompt)
        if add_generation_prompt:
            return text
        begun = chat_history[-1]["content"]  # an answer that the model goes on with, so that no end may follow it
        return text[: text.rindex(begun) + len(begun)]

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_options: object) -> list[int]:
        ids = self._codec.encode(string, add_special=add_special_tokens is not False)
        is_doubled = ids[:2] == [self._codec.prefix] * 2  # in the chat template, and added by the tokenizer
        return ids[1:] if is_doubled else ids

    def loglikelihood(self, requests: list[Any], disable_tqdm: bool = True) -> list[tuple[float, bool]]:
        return super().loglikelihood(requests, disable_tqdm=True)  # our own progress is shown

    def _loglikelihood_tokens(self, requests: list[_Pair], **_options: object) -> list[tuple[float, bool]]:
        """Return scores of answers to prompts; all answers to one prompt are a tree, and trees share their start."""
        by_prompt: dict[tuple[int, ...], list[int]] = {}
        for place, (texts, prompt, answer) in enumerate(requests):
            if not answer:
                raise EvaluationError(f"The answer {texts[1]!r} has no tokens after {texts[0][-60:]!r}.")
            by_prompt.setdefault(tuple(prompt), []).append(place)
        whole, places = [], []
        for prompt in sorted(by_prompt):
            for start in range(0, len(by_prompt[prompt]), MAX_CHOICES):
                part = by_prompt[prompt][start : start + MAX_CHOICES]
                answers = [requests[place][2] for place in part]
                whole.append(Branches(self._fitting(prompt, max(map(len, answers)) - 1), answers))
                places.append(part)
        groups = list(neighbours_that(lambda group: _share_most(whole, group), range(len(whole))))
        scores = score_answers(self._runner(), whole, groups, self._num_columns, self._progress)
        results: dict[int, tuple[float, bool]] = {}
        for part, score in zip(places, scores, strict=True):
            results.update(
                zip(part, zip(score.log_probs.tolist(), score.are_greedy.tolist(), strict=True), strict=True)
            )
        for place, (texts, *_) in enumerate(requests):
            self.cache_hook.add_partial("loglikelihood", texts, results[place])
        return [results[place] for place in range(len(requests))]

    def loglikelihood_rolling(self, requests: list[Any], disable_tqdm: bool = True) -> list[float]:
        windows, owners, sums = [], [], [0.0] * len(requests)
        for place, request in enumerate(requests):
            limits = {"max_seq_len": self._context_length, "context_len": 1}
            for pair in get_rolling_token_windows(self.tok_encode(request.args[0]), self._codec.prefix, **limits):
                before, scored = make_disjoint_window(pair)
                windows.append(Branches(before, [scored]))
                owners.append(place)
        if windows:
            scores = score_answers(self._runner(), windows, [range(len(windows))], self._num_columns, self._progress)
            for place, score in zip(owners, scores, strict=True):
                sums[place] += float(score.log_probs[0])
        return sums

    def generate_until(self, requests: list[Any], disable_tqdm: bool = True) -> list[str]:
        alike: dict[tuple[int, tuple[str, ...]], list[int]] = {}
        for place, request in enumerate(requests):
            asked = generation_of(request.args[1])
            alike.setdefault((asked["max_gen_toks"], tuple(asked["until"])), []).append(place)
        texts: dict[int, str] = {}
        self._progress(0, len(requests))
        for (num_tokens, until), places in alike.items():
            prompts = {i: self._fitting(self.tok_encode(requests[i].args[0]), num_tokens) for i in places}
            order = sorted(places, key=lambda i: len(prompts[i]))  # those that are run together need little padding
            unwritten = iter(order)
            runner = self._runner()
            is_done = partial(_has_ended, self._codec.decode, until) if until else None
            for group in runner.write([prompts[i] for i in order], num_tokens, runner.stop_tokens, is_done):
                for ids, i in zip(group, unwritten, strict=False):
                    texts[i] = postprocess_generated_text(self._codec.decode(ids), list(until), None)
                    self.cache_hook.add_partial("generate_until", requests[i].args, texts[i])
                self._progress(len(texts), len(requests))
        return [texts[i] for i in range(len(requests))]

    def _fitting(self, prompt: Sequence[int], num_tokens: int) -> Sequence[int]:
        """Return the end of a prompt, as the harness cuts it, that leaves room for tokens after it."""
        room = self._context_length - num_tokens
        if room < 1:
            raise EvaluationError(
                f"A task asks for {num_tokens:,} tokens after its prompts, which leave nothing of the context of "
                f"{self._context_length:,}. Give --new-tokens with a smaller number, or leave the task out."
            )
        self.cut += len(prompt) > room
        return prompt[-room:]


def _share_most(whole: Sequence[Branches], group: Sequence[int]) -> bool:
    """Say whether sorted prompts share half of each, so that running it once is worth a group of their own."""
    ends = [whole[group[0]].suffix, whole[group[-1]].suffix]  # what these two share, all between them do
    return 2 * num_shared(ends) >= max(len(whole[i].suffix) for i in group)


def _has_ended(decode: Callable[[Sequence[int]], str], until: Sequence[str], written: Sequence[int]) -> bool:
    end = decode(written[-max(map(len, until)) - _TAIL_TOKENS :])
    return any(stop in end for stop in until if stop)


def generation_of(options: Mapping[str, Any]) -> dict[str, Any]:
    """Return how a task wants answers written. Raises EvaluationError: drawn at random, which runners do not do."""
    asked = normalize_gen_kwargs(dict(options))
    if asked["do_sample"]:
        raise EvaluationError(
            "A task asks for answers that are drawn at random (do_sample), and both models write greedily here, so "
            "that their answers can be compared. Give a task that is greedy."
        )
    return asked
