"""Text: where it comes from, and how it becomes windows of token ids to calibrate or to be measured on.

Sources: a file of records with `text` or chat turns in `messages` (`inputs.records`), a plain text file (one document),
a `datasets` id or directory (`NAME` or `NAME:CONFIG`, split `train`), or the mix that ships with dynquant
(data/README.md). Windows to calibrate on have conversations in the model's own chat template, which runs in a sandbox;
texts to measure on have them as lines of `role: content`, alike for all models.
"""

import hashlib
import os
import random
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from importlib import resources
from itertools import chain, islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

import torch
from torch.nn import functional

from dynquant.errors import DynquantError, EvaluationError, StatsError
from dynquant.families.tokenizers.chat_template import ChatFormat, ChatTemplateError
from dynquant.inputs.model_inputs import Batch, ModelInputs
from dynquant.inputs.records import (
    JSON_FORMS,
    PLAIN_FORMS,
    TABLE_FORMS,
    Chat,
    check_is_file,
    form_of,
    read_plain,
    read_records,
    text_of,
)

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

MIX = "dynquant-mix-2"
"""Name of the mix that is calibrated on where no text is given: its file in `dynquant/data`, without the ending."""
_FORMER_MIX = "dynquant-mix-1"
_PLAIN = "Plain text has the ending .txt, .md or .raw."
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
    domains: Mapping[str, str] = field(default_factory=dict, compare=False, repr=False)
    """Domains of documents, by their content; one that is not named here has none."""

    @property
    def sha256(self) -> str:
        digest = hashlib.sha256()
        for document in self.documents:
            data = document.encode("utf-8", "surrogatepass")
            digest.update(len(data).to_bytes(8, "little") + data)
        return digest.hexdigest()


def read_text(source: str | Path | None, *, seed: int = 0, max_tokens: int = 131_072) -> CalibrationText:
    """Read calibration documents and shuffle them with `seed`.

    A `datasets` source is read only as far as `max_tokens` can need. Records of a file may name a `domain`: any part of
    the text then has nearly as much of each domain as the whole.

    Raises:
        StatsError: no such file or data set, a record without `text` or `messages`, or no text at all.
    """
    name, contents = _documents(source, max_tokens)
    documents = [document for document in contents if document.text.strip()]
    if not documents:
        raise StatsError(f"The calibration text {name} is empty. Give a file with text, or none for {MIX}.")
    random.Random(seed).shuffle(documents)
    return CalibrationText(name, tuple(_interleaved(documents)), {each.text: each.domain for each in documents})


class _Document(NamedTuple):
    text: str
    domain: str

    @classmethod
    def of(cls, record: Any, place: str, refusal: type[DynquantError]) -> "_Document":
        return cls(text_of(record, place, refusal), str(record.get("domain")))

    @property
    def size(self) -> int:
        """Number of bytes, which is nearer to the number of tokens than that of characters where scripts differ."""
        return len(self.text.encode("utf-8", "surrogatepass"))


def _interleaved(documents: list[_Document]) -> list[str]:
    """Return texts such that every domain is through equally far at any place; those of one domain keep their order."""
    whole, before = Counter(), Counter()
    for document in documents:
        whole[document.domain] += document.size
    places = []
    for document in documents:
        places.append(before[document.domain] / whole[document.domain])
        before[document.domain] += document.size
    order = sorted(range(len(documents)), key=places.__getitem__)
    return [documents[i].text for i in order]


def _documents(
    source: str | Path | None, max_tokens: int, refusal: type[DynquantError] = StatsError
) -> tuple[str, Iterable[_Document]]:
    """Return the name and the documents of a source; a data set is read only as far as `max_tokens` can need."""
    if source is None or (str(source) == MIX and not Path(source).exists()):
        with resources.as_file(resources.files("dynquant") / "data" / f"{MIX}.jsonl") as path:
            return MIX, [_Document.of(record, place, refusal) for _, place, record in read_records(path, refusal)]
    path = Path(source)
    if str(source) == _FORMER_MIX and not path.exists():
        raise refusal(
            f"{_FORMER_MIX} ships no more: its Vietnamese and Hindi text was not in composed Unicode (NFC), as text is "
            f"elsewhere. {MIX} is the same text, composed; give that name, or none."
        )
    form = form_of(path)
    if path.is_file() and form in PLAIN_FORMS:
        return path.name, [_Document(read_plain(path, refusal), "")]
    if path.is_file():
        records = read_records(path, refusal, _PLAIN)
        return path.name, (_Document.of(record, place, refusal) for _, place, record in records)
    if not path.is_dir():
        check_is_file(path, refusal)
    if not path.exists() and (form in (*JSON_FORMS, *TABLE_FORMS, ".txt") or path.is_absolute()):
        raise refusal(f"There is no text {path}; check the path.")
    return str(source), _read_dataset(str(source), max_tokens * _MAX_CHARACTERS_PER_TOKEN, refusal)


def _read_dataset(spec: str, max_characters: int, refusal: type[DynquantError]) -> Iterator[_Document]:
    from datasets import load_dataset

    name, _, config = spec.partition(":")
    try:
        rows = load_dataset(name, config or None, split="train", streaming=True)
        total = 0
        for number, record in enumerate(rows):
            document = _Document.of(record, f"{spec}, row {number}", refusal)
            total += len(document.text)
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
    of_documents = _tokens_of_documents(text, tokenizer, limit, skip_first=starts_with_bos)
    ids = list(islice(chain.from_iterable(of_documents), limit))
    if not ids:
        raise StatsError(f"The calibration text {text.name} gives no token. Give a longer text.")
    body = min(body, len(ids))
    packed = torch.tensor(ids[: len(ids) // body * body], dtype=torch.int64).reshape(-1, body)
    return functional.pad(packed, (1, 0), value=tokenizer.bos_token_id) if starts_with_bos else packed


def window_domains(
    text: CalibrationText, tokenizer: "PreTrainedTokenizerBase", *, window: int, max_tokens: int, place: int
) -> list[str]:
    """Return the domain of the token at `place` of each window that `pack_windows` makes of these arguments; nothing
    for a text of one domain."""
    if len({*text.domains.values()}) < 2:
        return []
    starts_with_bos = tokenizer("a")["input_ids"][:1] == [tokenizer.bos_token_id]
    body, domains = window - starts_with_bos, list[str]()
    limit, before = max(max_tokens // window, 1) * body, 0
    of_documents = _tokens_of_documents(text, tokenizer, limit, skip_first=starts_with_bos)
    for document, ids in zip(text.documents, of_documents, strict=True):
        before += len(ids)
        while len(domains) * body + place < before:
            domains.append(text.domains.get(document, ""))
        if before >= limit:
            break
    return domains


def _tokens_of_documents(
    text: CalibrationText, tokenizer: "PreTrainedTokenizerBase", limit: int, *, skip_first: bool
) -> Iterator[list[int]]:
    encode = partial(tokenizer, verbose=False)  # it would warn that a document is longer than the model's context
    form, separator = _chat_format(tokenizer), [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    for number, document in enumerate(text.documents):
        is_chat = form is not None and isinstance(document, Chat)
        rendered = _rendered(document.messages, document.tools, form) if is_chat else None
        if isinstance(rendered, str):  # with what the tokenizer would add
            ids = first_tokens(lambda part: encode(part, add_special_tokens=False)["input_ids"], rendered, limit)
            ids = ids[skip_first and ids[:1] == [tokenizer.bos_token_id] :]
        else:
            ids = first_tokens(lambda part: encode(part)["input_ids"], document, limit)
            ids = ids[1:] if skip_first else ids
        yield (separator if number else []) + ids


def refused_chats(text: CalibrationText, tokenizer: "PreTrainedTokenizerBase") -> list[str]:
    """Return why the tokenizer's chat template does not render some conversations, whose windows have them as plain
    text: many templates refuse a system message or calls of tools."""
    form = _chat_format(tokenizer)
    chats = [document for document in text.documents if form is not None and isinstance(document, Chat)]
    reasons = [_rendered(chat.messages, chat.tools, form) for chat in chats]
    return [str(reason) for reason in reasons if isinstance(reason, ChatTemplateError)]


def short_prompts(text: CalibrationText, tokenizer: "PreTrainedTokenizerBase", most: int) -> list[list[int]]:
    """Return what stands before the first answers of conversations in the tokenizer's chat template, as token ids,
    where that is `most` tokens or fewer; none without a template."""
    if (form := _chat_format(tokenizer)) is None:
        return []
    prompts = []
    for chat in (document for document in text.documents if isinstance(document, Chat)):
        roles = [turn["role"] for turn in chat.messages]
        asked = chat.messages[: roles.index("assistant")] if "assistant" in roles else chat.messages
        rendered = _rendered(asked, chat.tools, form, generation=True)
        if isinstance(rendered, str):
            prompts.append(tokenizer(rendered, add_special_tokens=False)["input_ids"])
    return [ids for ids in prompts if 0 < len(ids) <= most]


def _chat_format(tokenizer: "PreTrainedTokenizerBase") -> ChatFormat | None:
    template = getattr(tokenizer, "chat_template", None)
    if isinstance(template, dict):
        template = template.get("default")
    bos, eos = (getattr(tokenizer, f"{kind}_token", None) or "" for kind in ("bos", "eos"))
    return ChatFormat(template, frozenset(), bos, (eos,), None) if template else None


def _rendered(
    messages: list[dict[str, Any]], tools: list[Any] | None, form: ChatFormat, *, generation: bool = False
) -> str | ChatTemplateError:
    try:
        return form.render(messages, tools=tools, generation=generation, has_clock=False)
    except ChatTemplateError as error:
        return error


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
    lines = [line for document in documents for line in document.text.splitlines() if line.strip()]
    return list(dict.fromkeys((*_TRICKY, *lines[:: max(1, len(lines) // 256)])))


def read_measured(source: str | Path, max_tokens: int) -> tuple[str, str]:
    """Return the name and the content of a text to measure on. Raises EvaluationError: as `evaluation_windows`."""
    name, documents = _documents(source, max_tokens, EvaluationError)
    content = "\n\n".join(document.text for document in documents)
    if not content.strip():
        raise EvaluationError(f"The text {name} is empty. Give one that the models have not been tuned on.")
    return name, content


def evaluation_windows(source: str | Path, encode: TextEncoder, *, window: int, max_tokens: int) -> ModelInputs:
    """Return windows of the first `max_tokens` tokens of a text, to measure on.

    Every window starts with the BOS token if the tokenizer adds one, and then has one text token less. Documents are
    joined by an empty line. The last window may be shorter; one of a single token is left out.

    Raises:
        EvaluationError: no such file or data set, a record without text, an empty text, or fewer than two tokens.
    """
    name, content = read_measured(source, max_tokens)
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
