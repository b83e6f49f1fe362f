"""Chat templates as they are rendered, not as they are written: text around messages, and what is wrong with it.

A template is any Jinja program, so that nothing can be told from its text. It is rendered in Jinja's sandbox, with the
settings of transformers and llama.cpp, on conversations whose messages are marks; the text between the marks is what
the template puts around a question, an answer and a system message.
"""

import json
import re
import sys
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime
from functools import lru_cache
from pathlib import Path
from types import FrameType
from typing import Any

from gguf import Keys, TokenType

from dynquant.checkpoints.gguf_source import GGUFSource, MetadataField
from dynquant.errors import CheckpointError
from dynquant.families.tokenizers.files import read_tokenizer_files

Message = Mapping[str, object]

SYSTEM, QUESTION, ANSWER, QUESTION_2, ANSWER_2, QUESTION_3 = (f"\u2983{mark}\u2984" for mark in "sqarbt")
"""Marks in the place of messages, of letters that no template writes."""
_CALL, _RESULT = "look_up_mark", "\u2983result\u2984"
_ID = "abcdefghi"  # Mistral's templates take nine letters and digits alone
_TOOL = {
    "type": "function",
    "function": {
        "name": _CALL,
        "description": "Looks a word up.",
        "parameters": {"type": "object", "properties": {"word": {"type": "string"}}, "required": ["word"]},
    },
}
_MARKUP = re.compile(r"<\|[^\s<>|]{1,40}\|>|<\uff5c[^<>\uff5c]{1,40}\uff5c>|</?s>|<(?:start|end)_of_[a-z]+>")
"""Texts that are written as one special token, whatever the tokenizer has."""
_ENDS = (
    "<|eot_id|>", "<|im_end|>", "<|end|>", "<|return|>", "<|call|>", "<end_of_turn>", "<|endoftext|>", "<|eom_id|>",
    "<|end_of_text|>", "<end_of_utterance>", "</s>", "<\uff5cend\u2581of\u2581sentence\uff5c>",
)  # fmt: skip
"""Tokens at which llama.cpp stops because it knows their names."""
_SECONDS = 5.0
"""Time of the processor, so that a busy machine makes no finding."""


class ChatTemplateError(CheckpointError):
    """A chat template cannot be rendered; `is_refusal` where the template itself says that it takes no such chat."""

    def __init__(self, message: str, *, is_refusal: bool = False) -> None:
        super().__init__(message)
        self.is_refusal = is_refusal


@dataclass(frozen=True)
class Surroundings:
    """Text that a template puts around messages: `start` question `answer` answer `next` question `answer` ..."""

    start: str
    """Before the first question, without a system message."""
    answer: str
    """Between a question and an answer that is part of the conversation."""
    next: str
    """Between an answer and the next question."""
    generation: str
    """Behind the last question, where the model goes on."""


@dataclass(frozen=True)
class ChatFormat:
    """A chat template and the special tokens of its tokenizer."""

    template: str | None
    tokens: frozenset[str]
    """Tokens that are matched before text is split."""
    bos: str
    ends: tuple[str, ...]
    """Tokens that end generation, EOS first."""
    adds_bos: bool | None
    """True where a BOS is put before every text; None where the files do not say."""

    def render(
        self,
        messages: Sequence[Message],
        *,
        tools: Sequence[object] | None = None,
        generation: bool = True,
        has_clock: bool = True,
    ) -> str:
        """Return the text of a conversation; templates without `has_clock` cannot ask for today's date.

        Raises:
            ChatTemplateError: the template is none, refuses or fails on the conversation, or takes seconds.
        """
        from jinja2 import TemplateSyntaxError

        clock = {"strftime_now": lambda form: datetime.now().strftime(form)} if has_clock else {}
        special = {"bos_token": self.bos, "eos_token": self.ends[0] if self.ends else ""}
        options = {"add_generation_prompt": generation, "tools": tools}
        try:
            with _deadline():
                compiled = _compiled(self.template or "")
                return compiled.render(messages=messages, raise_exception=_refuse, **options, **special, **clock)
        except ChatTemplateError:
            raise
        except TemplateSyntaxError as error:
            raise ChatTemplateError(f"is no valid Jinja template: line {error.lineno}, {error.message}") from error
        except Exception as error:  # a template is a program, which Jinja compiles to Python: anything may come of it
            what = "refuses it" if (is_refusal := isinstance(error, _RefusalError)) else "fails"
            raise ChatTemplateError(f"{what}: {str(error) or type(error).__name__}", is_refusal=is_refusal) from error

    def surroundings(self, *, has_clock: bool = True) -> Surroundings:
        """Return what surrounds questions and answers. Raises ChatTemplateError: as `render`, or a message is left out
        or written twice."""
        asked = self.render(chat(QUESTION), has_clock=has_clock)
        start, generation = between(asked, QUESTION)
        text = self.render(chat(QUESTION, ANSWER, QUESTION_2), has_clock=has_clock)
        _, answer, following, _ = between(text, QUESTION, ANSWER, QUESTION_2)
        return Surroundings(start, answer, following, generation)


def chat(*messages: str, system: str | None = None) -> list[Message]:
    """Return a conversation of questions and answers in turn."""
    turns = [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(messages)]
    return turns if system is None else [{"role": "system", "content": system}, *turns]


def between(text: str, *marks: str) -> list[str]:
    """Return what is before, between and behind messages. Raises ChatTemplateError: one is not there exactly once."""
    parts = []
    for mark in marks:
        if text.count(mark) != 1:
            raise ChatTemplateError(f"writes a message {text.count(mark)} times, or out of its order")
        before, _, text = text.partition(mark)
        parts.append(before)
    return [*parts, text]


def markup(text: str) -> list[str]:
    """Return the texts within a text that are written as special tokens."""
    return _MARKUP.findall(text)


def format_of_metadata(fields: Iterable[MetadataField]) -> ChatFormat:
    """Return the chat format that a GGUF file has."""
    values: dict[str, Any] = {field.key: field.value for field in fields}
    tokens = values.get(Keys.Tokenizer.LIST) or []
    types = values.get(Keys.Tokenizer.TOKEN_TYPE) or []
    matched = frozenset(t for t, kind in zip(tokens, types, strict=False) if kind in _MATCHED)
    ids = {kind: values.get(f"tokenizer.ggml.{kind}_token_id") for kind in ("bos", "eos", "eot", "eom")}
    texts = {kind: tokens[i] for kind, i in ids.items() if isinstance(i, int) and 0 <= i < len(tokens)}
    bos = texts.pop("bos", "")
    ends = tuple(dict.fromkeys((*texts.values(), *(end for end in _ENDS if end in matched))))
    template = values.get(Keys.Tokenizer.CHAT_TEMPLATE)
    adds_bos = values.get(Keys.Tokenizer.ADD_BOS)
    return ChatFormat(template if isinstance(template, str) else None, matched, bos, ends, adds_bos)


_MATCHED = (TokenType.CONTROL, TokenType.USER_DEFINED, TokenType.UNKNOWN)


def format_of_directory(directory: Path) -> ChatFormat:
    """Return the chat format that the files of a Hugging Face directory state. Raises CheckpointError: they are
    damaged."""
    files = read_tokenizer_files(directory)
    vocabulary: dict[str, int] = {}
    if files.tokenizer is not None and isinstance(stored := files.tokenizer["model"].get("vocab"), dict):
        vocabulary = stored
    added = files.numbered(vocabulary)
    texts = {i: text for text, i in vocabulary.items()} | {i: token.content for i, token in added.items()}
    eos = [i for name in ("generation_config.json", "config.json") for i in files.stated.get(name, {}).get("eos", ())]
    named = [files.names["eos"]] if "eos" in files.names else []
    templates = files.chat_template
    if isinstance(templates, list):
        templates = next((t["template"] for t in templates if t["name"] == "default"), None)
    return ChatFormat(
        templates,
        frozenset(token.content for token in added.values()) | set(files.special),
        files.names.get("bos", ""),
        tuple(dict.fromkeys((*named, *(texts[i] for i in eos if i in texts)))),
        files.adds.get("bos"),
    )


def chat_format(path: Path) -> ChatFormat:
    """Return the chat format of a GGUF file or a directory. Raises CheckpointError: it has no tokenizer."""
    if path.is_dir():
        if not any((path / name).is_file() for name in ("config.json", "tokenizer_config.json", "tokenizer.json")):
            raise CheckpointError(f"{path} has no config.json and no tokenizer. Give a model's directory or GGUF file.")
        return format_of_directory(path)
    source = GGUFSource(path)
    if not any(field.key == "tokenizer.ggml.tokens" for field in source.metadata):
        raise CheckpointError(f"{path} has no tokenizer. Give the GGUF file of a language model.")
    return format_of_metadata(source.metadata)


@dataclass(frozen=True)
class Finding:
    """A sentence about a chat template; a fault is what a user would want repaired."""

    text: str
    is_fault: bool = True


def lint(form: ChatFormat) -> list[Finding]:
    """Render the standard conversations, and return what is wrong with them or worth knowing."""
    if form.template is None:
        return [Finding("there is no chat template: a model that continues texts", is_fault=False)]
    try:
        parts = form.surroundings()
    except ChatTemplateError as error:
        return [Finding(f"the chat template {error} (a question, its answer and another question)")]
    findings = _begin_of_text(form, parts.start)
    texts = [parts.start, parts.answer, parts.next, parts.generation]
    with _noted(findings, "three questions and two answers"):
        texts.append(form.render(chat(QUESTION, ANSWER, QUESTION_2, ANSWER_2, QUESTION_3)))
        findings += _turns(parts, texts[-1])
    with _noted(findings, "a question without a generation prompt"):
        findings += _prompt(form, parts)
    findings += _ends(form, parts)
    for what, messages, tools in _CONVERSATIONS:
        with _noted(findings, what):
            texts.append(form.render(messages, tools=tools))
            written = json.dumps([messages, tools], ensure_ascii=False)
            if any(mark in written and mark not in texts[-1] for mark in (SYSTEM, _CALL, _RESULT)):
                lack = f"the chat template leaves out part of {what}"
                findings.append(Finding(lack, is_fault=what == _SYSTEM_MESSAGE))
    unknown = dict.fromkeys(token for text in texts for token in markup(text) if token not in form.tokens)
    if unknown and form.tokens:
        findings.append(
            Finding(
                f"the chat template writes {', '.join(unknown)}, of which this tokenizer has no special token: the "
                "model gets it as several ordinary ones"
            )
        )
    return findings


_SYSTEM_MESSAGE = "a system message"
_CONVERSATIONS: list[tuple[str, list[Message], list[object] | None]] = [
    (_SYSTEM_MESSAGE, chat(QUESTION, system=SYSTEM), None),
    (
        "a call of a tool and its result",
        [
            *chat(QUESTION),
            {
                "role": "assistant",
                "content": "",
                "tool_calls": [
                    {"id": _ID, "type": "function", "function": {"name": _CALL, "arguments": {"word": "a"}}}
                ],
            },
            {"role": "tool", "name": _CALL, "tool_call_id": _ID, "content": _RESULT},
        ],
        [_TOOL],
    ),
    ("an empty question", chat(""), None),
]


@contextmanager
def _noted(findings: list[Finding], what: str) -> Iterator[None]:
    """Context manager: a template that cannot render a conversation is a finding, and the lint goes on."""
    try:
        yield
    except ChatTemplateError as error:
        findings.append(Finding(f"the chat template {error} ({what})", is_fault=not error.is_refusal))


def _turns(parts: Surroundings, text: str) -> list[Finding]:
    """Return what is wrong with the borders of questions and answers in a conversation of three questions."""
    inside = between(text, QUESTION, ANSWER, QUESTION_2, ANSWER_2, QUESTION_3)[1:-1]
    if inside != [parts.answer, parts.next] * 2:
        return [Finding("the chat template writes something else around later turns than around the first")]
    return []


def _prompt(form: ChatFormat, parts: Surroundings) -> list[Finding]:
    if form.render(chat(QUESTION), generation=False) == parts.start + QUESTION + parts.generation:
        rest = parts.answer.removeprefix(parts.generation)
        if len(rest) < len(parts.answer) and markup(rest):
            text = f"add_generation_prompt adds nothing, but {rest!r} stands before the answers of a conversation"
            return [Finding(text)]
    return []


def _ends(form: ChatFormat, parts: Surroundings) -> list[Finding]:
    if any(end in parts.next for end in form.ends):
        return []
    ends = ", ".join(form.ends) or "none"
    return [Finding(f"behind an answer stands {parts.next!r}, and none of the tokens that end generation ({ends})")]


def _begin_of_text(form: ChatFormat, text: str) -> list[Finding]:
    bos = form.bos
    if bos and text.startswith(bos * 2):
        return [Finding(f"the chat template writes BOS ({bos}) twice")]
    if bos and form.adds_bos and not text.startswith(bos):
        return [Finding(f"the tokenizer puts BOS ({bos}) before texts, but the chat template does not write it")]
    if bos and form.adds_bos:
        double = f"BOS ({bos}) is in the chat template, and the tokenizer adds it: tokenize rendered chats without"
        return [Finding(double, is_fault=False)]
    return []


class _RefusalError(ValueError):
    """Raised by `raise_exception` of a template."""


def _refuse(message: str) -> None:
    raise _RefusalError(message)


@lru_cache(maxsize=4)
def _compiled(template: str) -> Any:
    from jinja2 import nodes
    from jinja2.ext import Extension, loopcontrols
    from jinja2.parser import Parser
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    class Generation(Extension):
        """The block {% generation %} of transformers, which marks what is trained."""

        tags = frozenset({"generation"})

        def parse(self, parser: Parser) -> list[nodes.Node]:
            next(parser.stream)
            return parser.parse_statements(("name:endgeneration",), drop_needle=True)

    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[Generation, loopcontrols]
    )
    # Unlike Jinja's own filter, that of transformers escapes nothing for HTML, and has its options in this order.
    environment.filters["tojson"] = lambda value, ensure_ascii=False, indent=None, separators=None, sort_keys=False: (
        json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)
    )
    return environment.from_string(template)


@contextmanager
def _deadline() -> Iterator[None]:
    """Context manager: end a template that loops for seconds; Jinja's sandbox limits memory of a loop, not its time."""
    end, before = time.thread_time() + _SECONDS, sys.gettrace()

    def trace(frame: FrameType, event: str, argument: object) -> object:
        if frame.f_code.co_filename != "<template>":
            return None
        if time.thread_time() > end:
            raise ChatTemplateError(f"is not done after {_SECONDS:.0f} seconds")
        return trace

    sys.settrace(trace)
    try:
        yield
    finally:
        sys.settrace(before)
