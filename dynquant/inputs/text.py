"""Text: where it comes from, and how it becomes windows of token ids to calibrate or to be measured on.

Sources: a file of records with `text` or chat turns in `messages` (`inputs.records`), a plain text file (one document),
a `datasets` id or directory (`NAME` or `NAME:CONFIG`, split `train`), or the built-in text. Turns become `role:
content`: the chat template of a checkpoint is a program by whoever made it, and reading a checkpoint runs no program.
`data/calibration_default.txt` is public domain: excerpts of Austen, C. Brontë, Dickens, Eliot, O. Henry, London,
Melville, Stevenson, Thackeray and Trollope as found in Standard Ebooks, and of Python Enhancement Proposals 203, 574,
683 and 703, which their authors placed in the public domain.
"""

import hashlib
import os
import random
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from importlib import resources
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

import torch
from torch.nn import functional

from dynquant.errors import DynquantError, EvaluationError, StatsError
from dynquant.inputs.model_inputs import Batch, ModelInputs
from dynquant.inputs.records import (
    JSON_FORMS,
    PLAIN_FORMS,
    TABLE_FORMS,
    check_is_file,
    form_of,
    read_plain,
    read_records,
    text_of,
)

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

DEFAULT_NAME = "built-in text"
_PLAIN = "Plain text has the ending .txt, .md or .raw."
_DOCUMENT_BREAK = "\n\n\f\n"
_MAX_CHARACTERS_PER_TOKEN = 16
_TRICKY = (
    "a",
    " a",
    "  a",
    "a ",
    "\n",
    " \n\n ",
    "\t\tx\r\ny",
    "1234567890",
    "3.14159e-12 1,000,000",
    "I'd've WE'LL it's",
    "camelCaseWords HTTPServer x_1",
    "def f(x):\n    return {x!r:>10}",
    "https://a.b/c?d=e&f#g",
    "... --- !!! ?? ;;",
    "na\u00efve caf\u00e9 Gr\u00f6\u00dfe",
    "\u0440\u0443\u0441\u0441\u043a\u0438\u0439 \u0442\u0435\u043a\u0441\u0442",
    "\u65e5\u672c\u8a9e\u306e\u30c6\u30b9\u30c8",
    "\u4f60\u597d\uff0c\u4e16\u754c\u3002",
    "\ud55c\uad6d\uc5b4",
    "\u0627\u0644\u0639\u0631\u0628\u064a\u0629",
    "\U0001f642\U0001f680",
    "\u00a0nbsp\u3000wide",
    "\u00b2\u00b3 \u0663\u0664\u0665",
)


class TextEncoder(Protocol):
    """Token ids of a text; `add_special` adds what the tokenizer itself adds, a BOS for instance."""

    def __call__(self, text: str, *, add_special: bool = True) -> list[int]: ...


@dataclass(frozen=True)
class CalibrationText:
    """Documents in the order in which they are used. `sha256` covers their content and order."""

    name: str
    documents: tuple[str, ...]

    @property
    def sha256(self) -> str:
        digest = hashlib.sha256()
        for document in self.documents:
            data = document.encode("utf-8", "surrogatepass")
            digest.update(len(data).to_bytes(8, "little") + data)
        return digest.hexdigest()


def read_text(source: str | Path | None, *, seed: int = 0, max_tokens: int = 131_072) -> CalibrationText:
    """Read calibration documents and shuffle them with `seed`.

    A `datasets` source is read only as far as `max_tokens` can need.

    Raises:
        StatsError: no such file or data set, a record without `text` or `messages`, or no text at all.
    """
    name, contents = _documents(source, max_tokens)
    documents = [document for document in contents if document.strip()]
    if not documents:
        raise StatsError(f"The calibration text {name} is empty. Give a file with text, or none for the built-in text.")
    random.Random(seed).shuffle(documents)
    return CalibrationText(name, tuple(documents))


def _documents(
    source: str | Path | None, max_tokens: int, refusal: type[DynquantError] = StatsError
) -> tuple[str, Iterable[str]]:
    """Return the name and the documents of a source; a data set is read only as far as `max_tokens` can need."""
    if source is None:
        default = resources.files("dynquant").joinpath("data/calibration_default.txt").read_text("utf-8")
        return DEFAULT_NAME, default.split(_DOCUMENT_BREAK)
    path = Path(source)
    form = form_of(path)
    if path.is_file() and form in PLAIN_FORMS:
        return path.name, [read_plain(path, refusal)]
    if path.is_file():
        return path.name, (text_of(record, place, refusal) for _, place, record in read_records(path, refusal, _PLAIN))
    if not path.is_dir():
        check_is_file(path, refusal)
    if not path.exists() and (form in (*JSON_FORMS, *TABLE_FORMS, ".txt") or path.is_absolute()):
        raise refusal(f"There is no text {path}; check the path.")
    return str(source), _read_dataset(str(source), max_tokens * _MAX_CHARACTERS_PER_TOKEN, refusal)


def _read_dataset(spec: str, max_characters: int, refusal: type[DynquantError]) -> Iterator[str]:
    from datasets import load_dataset

    name, _, config = spec.partition(":")
    try:
        rows = load_dataset(name, config or None, split="train", streaming=True)
        total = 0
        for number, record in enumerate(rows):
            document = text_of(record, f"{spec}, row {number}", refusal)
            total += len(document)
            yield document
            if total >= max_characters:
                return
    except DynquantError:
        raise
    except Exception as error:  # load_dataset raises errors of many libraries
        if os.path.isdir(spec):
            raise refusal(
                f"{spec} is a directory, of which `datasets` makes no data set with a split `train` "
                f"({type(error).__name__}: {error}). Give a file in it."
            ) from error
        raise refusal(
            f"There is no file {spec}, and `datasets` cannot load a data set of that name with a split `train` "
            f"({type(error).__name__}: {error}). Give a .jsonl or .txt file, or a data set id as OWNER/NAME:CONFIG."
        ) from error


def pack_windows(
    text: CalibrationText, tokenizer: "PreTrainedTokenizerBase", *, window: int = 512, max_tokens: int = 131_072
) -> torch.Tensor:
    """Token ids int64 [windows, window] of the documents in order; the ragged end is dropped.

    Documents are separated by the tokenizer's EOS. When the tokenizer starts texts with BOS, every window does: models
    trained that way behave differently without it. A text shorter than one window gives one shorter window.

    Raises:
        StatsError: the text gives no token, or windows of fewer than 2 tokens or no tokens are asked for.
    """
    if window < 2 or max_tokens < 1:
        raise StatsError(f"A window of {window} tokens out of {max_tokens} cannot be; give at least 2 and 1.")
    window = min(window, max(max_tokens, 2))
    starts_with_bos = tokenizer("a")["input_ids"][:1] == [tokenizer.bos_token_id]
    body = window - starts_with_bos
    limit = max(max_tokens // window, 1) * body
    ids = list(islice(_token_stream(text, tokenizer, limit, skip_first=starts_with_bos), limit))
    if not ids:
        raise StatsError(f"The calibration text {text.name} gives no token. Give a longer text.")
    body = min(body, len(ids))
    packed = torch.tensor(ids[: len(ids) // body * body], dtype=torch.int64).reshape(-1, body)
    return functional.pad(packed, (1, 0), value=tokenizer.bos_token_id) if starts_with_bos else packed


def _token_stream(
    text: CalibrationText, tokenizer: "PreTrainedTokenizerBase", limit: int, *, skip_first: bool
) -> Iterator[int]:
    for number, document in enumerate(text.documents):
        if number and tokenizer.eos_token_id is not None:
            yield tokenizer.eos_token_id
        # `verbose` off: the tokenizer would warn that a document is longer than the model's context.
        ids = first_tokens(lambda part: tokenizer(part, verbose=False)["input_ids"], document, limit)
        yield from ids[1:] if skip_first else ids


def first_tokens(encode: Callable[[str], list[int]], text: str, count: int) -> list[int]:
    """Return at least the first `count` + 1 tokens of a text, if it has them, encoding no more of it than they need.

    A tokenizer takes a hundred bytes of memory for a character.
    """
    spare = 64  # tokens beside the cut, which come out otherwise than in the whole text
    length = _MAX_CHARACTERS_PER_TOKEN * (count + spare)
    while True:
        ids = encode(text[:length])
        if length >= len(text):
            return ids
        if len(ids) > count + spare:
            return ids[: count + 1]
        length *= 4


def varied_strings() -> list[str]:
    """Return a few hundred short strings on which tokenizers are told apart: prose, code, numbers, spaces, scripts."""
    _, documents = _documents(None, 0)
    lines = [line for document in documents for line in document.splitlines() if line.strip()]
    return list(dict.fromkeys((*_TRICKY, *lines[:: max(1, len(lines) // 256)])))


def evaluation_windows(source: str | Path, encode: TextEncoder, *, window: int, max_tokens: int) -> ModelInputs:
    """Return windows of the first `max_tokens` tokens of a text, to measure on.

    Every window starts with the BOS token if the tokenizer adds one, and then has one text token less. Documents are
    joined by an empty line. The last window may be shorter; one of a single token is left out.

    Raises:
        EvaluationError: no such file or data set, a record without text, an empty text, or fewer than two tokens.
    """
    name, documents = _documents(source, max_tokens, EvaluationError)
    content = "\n\n".join(documents)
    if not content.strip():
        raise EvaluationError(f"The text {name} is empty. Give one that the models have not been tuned on.")
    bos = _bos(encode)
    tokens = first_tokens(partial(encode, add_special=False), content, max_tokens)[:max_tokens]
    step = window - len(bos)
    windows = [bos + tokens[start : start + step] for start in range(0, len(tokens), step)]
    batches = tuple(Batch.of_tokens(torch.tensor([ids])) for ids in windows if len(ids) > 1)
    if not batches:
        raise EvaluationError(f"{name} gives {len(tokens)} tokens; at least 2 are needed to score anything.")
    return ModelInputs(batches, name=name, sha256=hashlib.sha256(content.encode()).hexdigest())


def _bos(encode: TextEncoder) -> list[int]:
    """Return the token that a tokenizer puts before every text, or none."""
    plain, special = encode("a", add_special=False), encode("a")
    return special[:1] if special[:1] != plain[:1] else []


def context_windows(
    source: str | Path, encode: TextEncoder, contexts: Sequence[int], num_scored: int, *, max_tokens: int
) -> list[ModelInputs]:
    """Return windows for each length of context, of which the last `num_scored` tokens are scored: the same ones.

    There are as many windows as `max_tokens` has of the longest, and at least one. They begin as `evaluation_windows`.

    Raises:
        EvaluationError: as `evaluation_windows`, or a text is shorter than the longest context.
    """
    longest, bos = max(contexts), _bos(encode)
    text = evaluation_windows(source, encode, window=longest, max_tokens=max(max_tokens, longest))
    whole = [batch.ids for batch in text if batch.num_tokens == longest]
    if not whole:
        raise EvaluationError(
            f"{text.name} has {text.num_tokens:,} tokens, fewer than a context of {longest:,}. Give a longer text, or "
            "--contexts without that length."
        )
    inputs = []
    for context in contexts:
        is_text = torch.arange(context)[None] >= context - num_scored - 1  # what precedes the first scored one, too
        ends = [torch.cat([ids[:, : len(bos)], ids[:, longest - context + len(bos) :]], dim=1) for ids in whole]
        batches = tuple(Batch({"input_ids": ids}, is_text) for ids in ends)
        inputs.append(replace(text, samples=batches, name=f"{text.name}, last {num_scored} of {context:,} tokens"))
    return inputs
