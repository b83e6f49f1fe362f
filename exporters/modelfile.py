"""A Modelfile, with which Ollama makes a model of a GGUF file: template, stop texts and sampling parameters.

Ollama renders chats with a template of Go's, and takes none of the file's own but some that it knows. The translation
goes by what the chat template renders (`families/tokenizers/chat_template`): text before the first question, between
question and answer, between answer and question, where the model goes on, and the place of a system message. It is
written only if it gives the very text of the chat template for longer conversations as well.

Left out: tools, and a date, which Go's template would have to compute.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from dynquant.checkpoints.gguf_source import GGUFSource
from dynquant.errors import ExportError
from dynquant.exporters.options import modelfile_path
from dynquant.families.tokenizers.chat_template import (
    ANSWER,
    ANSWER_2,
    QUESTION,
    QUESTION_2,
    QUESTION_3,
    SYSTEM,
    ChatFormat,
    ChatTemplateError,
    Surroundings,
    between,
    chat,
    format_of_metadata,
    markup,
)
from dynquant.session import Session
from dynquant.storage.atomic import write_atomically

_PARAMETERS = {
    "temperature": "temp", "top_k": "top_k", "top_p": "top_p", "min_p": "min_p", "repeat_penalty": "penalty_repeat",
    "repeat_last_n": "penalty_last_n",
}  # fmt: skip
"""Names of Ollama for `general.sampling.*` of GGUF, which come from generation_config.json."""


@dataclass(frozen=True)
class _GoTemplate:
    """The template of a chat format, without the BOS that Ollama puts before it."""

    parts: Surroundings
    """`start` stands there without a system message."""
    before_system: str
    behind_system: str
    is_system_last: bool
    """A system message is part of the last question, not of what stands before the first."""

    def render(self, questions: list[str], answers: list[str], system: str) -> str:
        """Return what Ollama makes of a conversation."""
        joined = self.before_system + system + self.behind_system if system else ""
        text = joined if joined and not self.is_system_last else self.parts.start
        for question, answer in zip(questions, answers, strict=False):
            text += question + self.parts.answer + answer + self.parts.next
        return text + (joined if self.is_system_last else "") + questions[-1] + self.parts.generation

    def __str__(self) -> str:
        parts = self.parts
        system = f"{_literal(self.before_system)}{{{{ $.System }}}}{_literal(self.behind_system)}"
        start = f"{{{{ if .System }}}}{system}{{{{ else }}}}{_literal(parts.start)}{{{{ end }}}}"
        if self.is_system_last:
            start = _literal(parts.start)
        inserted = f"{{{{ if and $last $.System }}}}{system}{{{{ end }}}}" if self.is_system_last else ""
        behind = f"{{{{ if $last }}}}{_literal(parts.generation)}{{{{ else }}}}{_literal(parts.answer)}{{{{ end }}}}"
        if parts.generation == parts.answer:
            behind = _literal(parts.answer)
        return (  # the last answer is not closed: the model goes on with it
            start
            + "{{ range $i, $_ := .Messages }}{{ $last := eq (len (slice $.Messages $i)) 1 }}"
            + f'{{{{ if eq .Role "user" }}}}{inserted}{{{{ .Content }}}}{behind}'
            + '{{ else if eq .Role "assistant" }}{{ .Content }}'
            + f"{{{{ if not $last }}}}{_literal(parts.next)}{{{{ end }}}}{{{{ end }}}}{{{{ end }}}}"
        )


def write_modelfile(files: Sequence[Path], session: Session) -> Path:
    """Write NAME.Modelfile beside NAME.gguf, the first file, which an mmproj file may follow; say what it lacks.

    Raises:
        ExportError: the model is split over several files, which Ollama does not read.
        WriteError: no space, or no permission.
    """
    source = GGUFSource(files[0])
    if len(source.files) > 1:
        raise ExportError(f"{files[0]} is one of {len(source.files)} files, and Ollama reads models of one file alone.")
    text, notes = modelfile(source, [file.name for file in files])
    for note in notes:
        session.note(note)
    path = modelfile_path(files[0])
    write_atomically(path, text)
    return path


def modelfile(source: GGUFSource, names: list[str]) -> tuple[str, list[str]]:
    """Return a Modelfile for GGUF files of these names beside it, and what it does not say, as sentences."""
    form = format_of_metadata(source.metadata)
    values = {field.key: field.value for field in source.metadata}
    lines = [f"FROM ./{name}" for name in names]
    notes: list[str] = []
    stops: list[str] = []
    if form.template is None:
        notes.append("the model has no chat template, so that the Modelfile has none: Ollama continues texts")
    else:
        try:
            template, stops, more = _translated(form)
            lines.append(f'TEMPLATE """{template}"""')
            notes += more
        except ChatTemplateError as error:
            notes.append(f"the Modelfile has no TEMPLATE, since the chat template {error}; Ollama looks for one itself")
    lines += [f'PARAMETER stop "{stop}"' for stop in dict.fromkeys((*stops, *form.ends[:1])) if _is_plain(stop, '"')]
    lines += _parameters(values)
    return "\n".join(lines) + "\n", notes


def _translated(form: ChatFormat) -> tuple[_GoTemplate, list[str], list[str]]:
    """Return the template, texts at which generation stops, and notes. Raises ChatTemplateError: it is none that can
    be translated."""
    parts = form.surroundings(has_clock=False)
    notes = ["the template of the Modelfile has no tools"] if "tools" in (form.template or "") else []
    try:
        before, behind, is_last = _place_of_system(form)
    except ChatTemplateError:
        notes.append("the chat template takes no system message; with the Modelfile one stands before the question")
        before, behind, is_last, has_system = parts.start, "\n\n", False, False
    else:
        has_system = True
    template = _GoTemplate(parts, before, behind, is_last)
    questions, answers = [QUESTION, QUESTION_2, QUESTION_3], [ANSWER, ANSWER_2]
    for system in ("", SYSTEM) if has_system else ("",):
        for count in (1, 2, 3):
            asked, answered = questions[:count], answers[: count - 1]
            turns = [text for pair in zip(asked, [*answered, ""], strict=True) for text in pair][:-1]
            expected = form.render(chat(*turns, system=system or None), has_clock=False)
            if template.render(asked, answered, system) != expected:
                raise ChatTemplateError("writes later turns otherwise than the first")
    if form.adds_bos is not False and form.bos:
        template = _without_bos(template, form.bos)
    if not _is_plain(str(template), '"""'):
        raise ChatTemplateError("writes letters that a Modelfile cannot hold")
    stops = [end for end in form.ends if end in parts.next]
    return template, stops or [*markup(parts.next), *parts.next.strip().splitlines()][:1], notes


def _place_of_system(form: ChatFormat) -> tuple[str, str, bool]:
    """Return what stands before and behind a system message, and whether it is part of the last question."""
    text = form.render(chat(QUESTION, ANSWER, QUESTION_2, system=SYSTEM), has_clock=False)
    if text.find(SYSTEM) > text.find(QUESTION):
        _, behind, _ = between(text, SYSTEM, QUESTION_2)
        return "", behind, True
    before, behind, _ = between(text, SYSTEM, QUESTION)
    return before, behind, False


def _without_bos(template: _GoTemplate, bos: str) -> _GoTemplate:
    parts = template.parts
    parts = Surroundings(parts.start.removeprefix(bos), parts.answer, parts.next, parts.generation)
    return _GoTemplate(parts, template.before_system.removeprefix(bos), template.behind_system, template.is_system_last)


def _parameters(values: Mapping[str, object]) -> list[str]:
    lines = []
    for name, key in _PARAMETERS.items():
        value = values.get(f"general.sampling.{key}")
        if isinstance(value, int | float):
            lines.append(f"PARAMETER {name} {value:.6g}")
    return lines


def _literal(text: str) -> str:
    """Return text as a Go template writes it; a brace before an action would be taken for a part of its own."""
    return re.sub(r"\{\{|\}\}|\{(?=\}\}|\Z)", lambda braces: f'{{{{ "{braces[0]}" }}}}', text)


def _is_plain(text: str, quotes: str) -> bool:
    """Tell whether Ollama's parser reads back a text between these quotes: it drops what cannot be printed."""
    return quotes not in text and not text.endswith('"') and text.replace("\n", "").replace("\t", "").isprintable()
