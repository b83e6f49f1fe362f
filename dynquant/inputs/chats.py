"""Examples for supervised fine-tuning: records of a file (`inputs.records`) in the forms that TRL's trainers take.

    {"text": "..."}                                      every token is learned
    {"prompt": "...", "completion": "..."}               the completion is learned
    {"messages": [{"role": ..., "content": ...}, ...]}   every assistant turn is learned

A conversation becomes one example for each assistant turn, with the turns before it as the prompt, so that any chat
template will do: no template has to mark which tokens are the assistant's. Loading from the hub is left out.
"""

import json
import random
from dataclasses import dataclass, replace
from itertools import compress
from pathlib import Path
from typing import Any, Literal

from dynquant.errors import DataError
from dynquant.inputs.records import described, read_records, shortened, turns_of
from dynquant.storage.atomic import file_hash

Form = Literal["text", "completion", "messages"]
_WAY_OUT = (
    'Each record needs "text", or "prompt" and "completion" (strings), or "messages" (a list of chat turns with role '
    "and content, one of them by the assistant)."
)


@dataclass(frozen=True)
class TrainingData:
    """Examples of one form. `sha256` is that of the file; `groups[i]` is the record that example i came from."""

    name: str
    sha256: str
    form: Form
    rows: tuple[dict[str, Any], ...]
    groups: tuple[int, ...]

    def split(self, share: float, *, seed: int) -> tuple["TrainingData", "TrainingData"]:
        """Training and held-out part. Examples of one line stay together, and equal examples do too.

        Raises:
            DataError: fewer than two different lines, so that nothing can be held out.
        """
        rows_of: dict[int, list[dict[str, Any]]] = {}
        for row, group in zip(self.rows, self.groups, strict=True):
            rows_of.setdefault(group, []).append(row)
        contents = {group: json.dumps(rows, sort_keys=True) for group, rows in rows_of.items()}
        keys = [contents[group] for group in self.groups]
        lines = sorted(set(keys))
        if len(lines) < 2:
            raise DataError(
                f"{self.name} holds one example only (or copies of one), so none can be held out to measure what "
                "training does. Give at least two different ones."
            )
        random.Random(seed).shuffle(lines)
        held = set(lines[: min(len(lines) - 1, max(1, round(share * len(lines))))])
        return self._where([key not in held for key in keys]), self._where([key in held for key in keys])

    def _where(self, mask: list[bool]) -> "TrainingData":
        return replace(self, rows=tuple(compress(self.rows, mask)), groups=tuple(compress(self.groups, mask)))


def read_training_data(path: Path) -> TrainingData:
    """Read a file; the first record decides the form.

    Raises:
        DataError: no such file, no example, a record that is not JSON or has no usable field; the record is named.
    """
    form: Form | None = None
    rows, groups = [], []
    for number, place, record in read_records(path, DataError, _WAY_OUT):
        line_form, examples = _examples(record, place)
        form = form or line_form
        if line_form != form:
            raise DataError(
                f"{place} has the field `{line_form}`, but the records before it have `{form}`. Use one form in a file."
            )
        rows += examples
        groups += [number] * len(examples)
    if form is None:
        raise DataError(f"The training data {path} holds no example. {_WAY_OUT}")
    return TrainingData(path.name, file_hash(path), form, tuple(rows), tuple(groups))


def _examples(record: Any, place: str) -> tuple[Form, list[dict[str, Any]]]:
    if not isinstance(record, dict):
        raise DataError(f"{place} is {type(record).__name__}, not an object. {_WAY_OUT}")
    record = {key: value for key, value in record.items() if value is not None}  # tables have all columns in all rows
    if "messages" in record:
        return "messages", _replies(record["messages"], place)
    if "prompt" in record or "completion" in record:
        return "completion", [{key: _text(record, key, place) for key in ("prompt", "completion")}]
    if "text" in record:
        return "text", [{"text": _text(record, "text", place)}]
    raise DataError(f"{place} has no usable field: it has {described(record)}. {_WAY_OUT}")


def _text(record: dict[str, Any], key: str, place: str) -> str:
    value = record.get(key)
    if not isinstance(value, str) or (key != "prompt" and not value.strip()):
        raise DataError(f"{place}: `{key}` must be a text, but it is {shortened(value)}. {_WAY_OUT}")
    return value


def _replies(messages: Any, place: str) -> list[dict[str, Any]]:
    turns = turns_of(messages, place, DataError)
    replies = [i for i, turn in enumerate(turns) if turn["role"] == "assistant" and i > 0]
    if not replies:
        raise DataError(f"{place}: no turn of `messages` is an answer of the assistant. {_WAY_OUT}")
    return [{"prompt": turns[:i], "completion": [turns[i]]} for i in replies]
