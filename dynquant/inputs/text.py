"""Calibration text: where it comes from, and how it becomes fixed windows of token ids.

Sources: a `.jsonl` file (field `text`, or chat turns in `messages`), any other text file (one document), a `datasets`
id or directory (`NAME` or `NAME:CONFIG`, split `train`), or the built-in text. Turns become `role: content`: the chat
template of a checkpoint is a program by whoever made it, and reading a checkpoint runs no program.
`data/calibration_default.txt` is public domain: excerpts of Austen, C. Brontë, Dickens, Eliot, O. Henry, London,
Melville, Stevenson, Thackeray and Trollope as found in Standard Ebooks, and of Python Enhancement Proposals 203, 574,
683 and 703, which their authors placed in the public domain.
"""

import hashlib
import random
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from importlib import resources
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from dynquant.errors import StatsError
from dynquant.storage.strict_json import parse_json

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

DEFAULT_NAME = "built-in text"
_DOCUMENT_BREAK = "\n\n\f\n"
_MAX_CHARACTERS_PER_TOKEN = 16


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


def read_text(
    source: str | Path | None,
    *,
    seed: int = 0,
    max_tokens: int = 131_072,
) -> CalibrationText:
    """Read calibration documents and shuffle them with `seed`.

    A `datasets` source is read only as far as `max_tokens` can need.

    Raises:
        StatsError: no such file or data set, a line without `text` or `messages`, or no text at all.
    """
    name, found = _documents(source, max_tokens)
    documents = [document for document in found if document.strip()]
    if not documents:
        raise StatsError(f"The calibration text {name} is empty. Give a file with text, or none for the built-in text.")
    random.Random(seed).shuffle(documents)
    return CalibrationText(name, tuple(documents))


def _documents(source: str | Path | None, max_tokens: int) -> tuple[str, Iterable[str]]:
    if source is None:
        default = resources.files("dynquant").joinpath("data/calibration_default.txt").read_text("utf-8")
        return DEFAULT_NAME, default.split(_DOCUMENT_BREAK)
    path = Path(source)
    if path.is_file():
        return path.name, _read_jsonl(path) if path.suffix == ".jsonl" else [_read_file(path)]
    if path.suffix in (".jsonl", ".txt"):
        raise StatsError(f"There is no calibration text {path}. Check the path, or give none for the built-in text.")
    return str(source), _read_dataset(str(source), max_tokens * _MAX_CHARACTERS_PER_TOKEN)


def _read_file(path: Path) -> str:
    try:
        return path.read_text("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise StatsError(f"The calibration text {path} cannot be read as UTF-8: {error}.") from error


def _read_jsonl(path: Path) -> Iterator[str]:
    for number, line in enumerate(_read_file(path).split("\n"), start=1):
        if line.strip():
            try:
                record = parse_json(line)
            except ValueError as error:
                raise StatsError(f"{path}, line {number} is not JSON: {error}.") from error
            yield _text_of(record, f"{path}, line {number}")


def _text_of(record: Any, place: str) -> str:
    if isinstance(record, dict) and isinstance(record.get("text"), str):
        return record["text"]
    if isinstance(record, dict) and isinstance(record.get("messages"), list):
        return _render_chat(record["messages"], place)
    raise StatsError(
        f"{place} has neither a field `text` (a string) nor `messages` (a list of chat turns). Rename the field, or "
        "give plain text in a .txt file."
    )


def _render_chat(messages: list[Any], place: str) -> str:
    try:
        return "\n\n".join(f"{turn['role']}: {turn['content']}" for turn in messages)
    except (TypeError, KeyError) as error:
        raise StatsError(f"{place}: each entry of `messages` needs `role` and `content`.") from error


def _read_dataset(spec: str, max_characters: int) -> Iterator[str]:
    from datasets import load_dataset

    name, _, config = spec.partition(":")
    try:
        rows = load_dataset(name, config or None, split="train", streaming=True)
        total = 0
        for number, record in enumerate(rows):
            document = _text_of(record, f"{spec}, row {number}")
            total += len(document)
            yield document
            if total >= max_characters:
                return
    except StatsError:
        raise
    except Exception as error:  # load_dataset raises errors of many libraries
        raise StatsError(
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
        StatsError: the text gives no token.
    """
    bos = _leading_token(tokenizer)
    body = window - 1 if bos is not None else window
    limit = max(max_tokens // window, 1) * body
    ids = list(islice(_token_stream(text, tokenizer, skip_first=bos is not None), limit))
    if not ids:
        raise StatsError(f"The calibration text {text.name} gives no token. Give a longer text.")
    body = min(body, len(ids))
    packed = torch.tensor(ids[: len(ids) // body * body], dtype=torch.int64).reshape(-1, body)
    if bos is None:
        return packed
    return torch.cat([torch.full((len(packed), 1), bos, dtype=torch.int64), packed], dim=1)


def _leading_token(tokenizer: "PreTrainedTokenizerBase") -> int | None:
    ids = tokenizer("a")["input_ids"]
    return ids[0] if tokenizer.bos_token_id is not None and ids[:1] == [tokenizer.bos_token_id] else None


def _token_stream(text: CalibrationText, tokenizer: "PreTrainedTokenizerBase", *, skip_first: bool) -> Iterator[int]:
    for number, document in enumerate(text.documents):
        if number and tokenizer.eos_token_id is not None:
            yield tokenizer.eos_token_id
        # `verbose` off: the tokenizer would warn that a document is longer than the model's context.
        ids = tokenizer(document, verbose=False)["input_ids"]
        yield from ids[1:] if skip_first else ids
