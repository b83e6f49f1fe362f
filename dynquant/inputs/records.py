"""Records of the files that people give: JSON lines, a JSON array, or the rows of a csv or parquet file.

The end of a file's name says its form, in upper or lower case, and `.gz` may follow it; JSON that begins with `[` is an
array. Nothing else is guessed: a file with another ending is refused. All text is UTF-8, with or without a byte-order
mark.
"""

import csv
import gzip
import json
import sys
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TextIO

from dynquant.errors import DynquantError, unreadable
from dynquant.inputs.other_forms import START_BYTES, form_of_content, form_of_start
from dynquant.storage.file_kinds import JSON, content_of
from dynquant.storage.stand_ins import refuse_stand_in
from dynquant.storage.strict_json import parse_json

JSON_FORMS, TABLE_FORMS = (".jsonl", ".ndjson", ".json"), (".csv", ".parquet")
PLAIN_FORMS = (".txt", ".text", ".md", ".raw", ".tokens", "")
_FORMS = "Known are .jsonl, .ndjson, .json, .csv and .parquet (all but parquet also with .gz behind it)"

Record = tuple[int, str, Any]
"""Number, place ("NAME, line 3") and value."""


def form_of(path: Path) -> str:
    """Return the ending of a file's name that says its form, in lower case and without `.gz`."""
    stem, ending = path.stem, path.suffix.lower()
    return Path(stem).suffix.lower() if ending == ".gz" else ending


def read_records(path: Path, refusal: type[DynquantError], way_out: str = "") -> Iterator[Record]:
    """Yield the records of a file one by one; blank lines are none.

    Raises:
        `refusal`: the file cannot be read or has another form, or a record is not JSON; `way_out` ends the paragraph.
    """
    check_is_file(path, refusal)
    if not path.exists():
        raise refusal(f"There is no file {path}; check the path.")
    form = form_of(path)
    if form in JSON_FORMS:
        return _json_records(path, refusal, way_out)
    if form in TABLE_FORMS:
        return _csv_records(path, refusal) if form == ".csv" else _parquet_records(path, refusal)
    raise refusal(f"The form of {path} is not known from its ending `{path.suffix}`. {_FORMS}. {way_out}".rstrip())


def read_plain(path: Path, refusal: type[DynquantError]) -> str:
    """Return the text of a plain file.

    Raises:
        `refusal`: the file cannot be read, or it holds records, a table or a program's data.
    """
    with _opened(path, refusal) as file:
        content = file.read()
    if "\0" in content:
        raise refusal(f"{path} holds zero bytes, so it is not text in UTF-8. Convert it, or give another file.")
    if meaning := form_of_content(content):
        raise refusal(f"{path} has the ending of plain text but holds {meaning[0]}. {meaning[1]}.")
    return content


def check_is_file(path: Path, refusal: type[DynquantError]) -> None:
    """Raise `refusal` for what is there but no file: a directory, or a device or pipe, which is read but once."""
    if path.is_dir():
        raise refusal(f"{path} is a directory; give a file in it.")
    if path.exists() and not path.is_file():
        raise refusal(f"{path} is a device or pipe, and the text is read more than once. Save it as a file.")


@contextmanager
def _opened(path: Path, refusal: type[DynquantError]) -> Iterator[TextIO]:
    """Context manager: yields the file as text; what is wrong with it becomes one paragraph."""
    check_is_file(path, refusal)  # before anything opens it: a pipe would wait for its writer
    refuse_stand_in(path, is_text=True)
    try:
        check_start(path, refusal)
        with (gzip.open if _is_compressed(path) else open)(path, "rt", encoding="utf-8-sig") as file:
            yield file
    except FileNotFoundError as error:
        raise refusal(f"There is no file {path}; check the path.") from error
    except UnicodeDecodeError as error:
        raise refusal(f"{path} cannot be read as UTF-8 ({error}). Convert it to UTF-8.") from error
    except (OSError, EOFError, zlib.error) as error:
        raise refusal(unreadable(path, error) or f"{path} cannot be read: {error}. Fetch it again.") from error


def _is_compressed(path: Path) -> bool:
    return path.suffix.lower() == ".gz"


def check_start(path: Path, refusal: type[DynquantError]) -> None:
    """Raise `refusal` for a file that is no text in UTF-8, by its first bytes."""
    with (gzip.open if _is_compressed(path) else open)(path, "rb") as file:
        meaning = form_of_start(file.read(START_BYTES))
    if meaning is not None:
        raise refusal(f"{path} is {meaning[0]}. {meaning[1].format(path=path)}.")


def _json_records(path: Path, refusal: type[DynquantError], way_out: str) -> Iterator[Record]:
    def parsed(text: str, place: str) -> Any:
        try:
            return parse_json(text, unique_names=True)
        except ValueError as error:
            is_document = text.strip() == "{" and not _is_compressed(path)
            content = content_of(path) if is_document else JSON
            fault = f"{place} is not JSON: {error}" if content == JSON else f"{path} is {content}"
            form = "Records are objects, one a line, or one array of them."
            raise refusal(f"{fault}. {form} {way_out}".rstrip()) from error

    with _opened(path, refusal) as file:
        # Not splitlines(): it also splits at U+2028 and the like, which JSON strings may hold.
        lines = ((number, line) for number, line in enumerate(file, start=1) if line.strip())
        number, line = next(lines, (1, ""))
        if line.lstrip().startswith("["):
            entries = enumerate(parsed(line + file.read(), str(path)), start=1)
            yield from ((number, f"{path}, entry {number}", value) for number, value in entries)
            return
        while line:
            place = f"{path}, line {number}"
            yield number, place, parsed(line, place)
            number, line = next(lines, (1, ""))


def _csv_records(path: Path, refusal: type[DynquantError]) -> Iterator[Record]:
    csv.field_size_limit(sys.maxsize)
    with _opened(path, refusal) as file:
        rows = csv.DictReader(file, strict=True)
        try:
            names = rows.fieldnames or ()
            if len(names) == 1 and (separator := next((mark for mark in ";\t|" if mark in names[0]), "")):
                raise refusal(f"{path} has {separator!r} between its columns. Save it with commas.")
            if len(set(names)) < len(names):
                raise refusal(f"The first line of {path} names a column twice: {', '.join(names)[:200]}. Rename one.")
            for number, row in enumerate(rows, start=1):
                place = f"{path}, row {number}"
                if None in row or None in row.values():
                    raise refusal(f"{place} has not the {len(names)} values that the first line names.")
                yield number, place, row
        except csv.Error as error:
            raise refusal(f"{path}, line {rows.line_num} is not csv with commas ({error}). Repair it.") from error


def _parquet_records(path: Path, refusal: type[DynquantError]) -> Iterator[Record]:
    try:
        from pyarrow import ArrowException
        from pyarrow.parquet import ParquetFile
    except ImportError as error:
        raise refusal(f"Reading {path} needs pyarrow: pip install 'dynquant-toolchain[models]'.") from error
    try:
        with ParquetFile(path) as file:
            rows = (row for batch in file.iter_batches(batch_size=256) for row in batch.to_pylist())
            yield from ((number, f"{path}, row {number}", row) for number, row in enumerate(rows, start=1))
    except (ArrowException, OSError, ValueError) as error:
        raise refusal(
            unreadable(path, error) or f"{path} is not a parquet file ({error}). Fetch or make it again."
        ) from error


class Chat(str):
    """A conversation as plain text, `role: content` a turn, with what a chat template renders it from."""

    messages: list[dict[str, Any]]
    tools: list[Any] | None

    @classmethod
    def of(cls, record: dict[str, Any], place: str, refusal: type[DynquantError]) -> "Chat":
        """Return the conversation of a record. Raises `refusal`: as `turns_of`."""
        messages, tools = turns_of(record["messages"], place, refusal, has_calls=True), record.get("tools") or None
        written = [] if tools is None else [f"tools: {json.dumps(tools, ensure_ascii=False)}"]
        for turn in messages:
            calls = turn.get("tool_calls")
            parts = [turn["content"], json.dumps(calls, ensure_ascii=False)] if calls else [turn["content"]]
            written.append(f"{turn['role']}: {' '.join(filter(None, parts))}")
        chat = cls("\n\n".join(written))
        chat.messages, chat.tools = messages, tools
        return chat


def text_of(record: Any, place: str, refusal: type[DynquantError]) -> str:
    """Return the text of a record: its `text`, or its `messages` as a `Chat`.

    Raises:
        `refusal`: the record has neither, or they are of another form.
    """
    if isinstance(record, dict) and isinstance(record.get("text"), str):
        return record["text"]
    if isinstance(record, dict) and record.get("text") is None and record.get("messages") is not None:
        return Chat.of(record, place, refusal)
    if isinstance(record, dict) and "text" in record and record.get("messages") is None:
        raise refusal(
            f'{place} has {shortened(record["text"])} as "text", which must be a string. Leave such records out.'
        )
    raise refusal(
        f'{place} has neither a field "text" (a string) nor "messages" (a list of chat turns): it has '
        f"{described(record)}. Rename the field, or give plain text in a .txt file."
    )


def turns_of(
    messages: Any, place: str, refusal: type[DynquantError], *, has_calls: bool = False
) -> list[dict[str, Any]]:
    """Return chat turns as role and text: parts of text are joined, and turns without any content are left out.

    With `has_calls` turns keep their other fields, and those that call tools are not left out.

    Raises:
        `refusal`: no list of turns with role and content, or a part that is not text.
    """
    turns = []
    for turn in messages if isinstance(messages, list) else [None]:
        if not isinstance(turn, dict) or not isinstance(turn.get("role"), str) or "content" not in turn:
            raise refusal(f"{place}: `messages` must be a list of turns, each with `role` and `content`.")
        content = turn["content"]
        if isinstance(content, list):
            content = "".join(part_text(part, place, refusal) for part in content)
        if content is not None and not isinstance(content, str):
            raise refusal(f"{place}: `content` must be a text or a list of parts, but it is {shortened(content)}.")
        if content is not None or (has_calls and turn.get("tool_calls")):
            turns.append({**(turn if has_calls else {}), "role": turn["role"], "content": content or ""})
    return turns


def part_text(part: Any, place: str, refusal: type[DynquantError]) -> str:
    """Return the text of a part of `content`, or raise `refusal` when it is of another kind."""
    text = part.get("text") if isinstance(part, dict) and part.get("type") == "text" else 0
    if text is not None and not isinstance(text, str):
        raise refusal(
            f"{place}: only parts of text can be read here, but `content` holds {shortened(part)}. Pictures are given "
            "with --data FILE to a vision-language model."
        )
    return text or ""


def described(record: Any) -> str:
    """Return what a record holds, for a paragraph that refuses it."""
    if not isinstance(record, dict):
        return shortened(record)
    return ", ".join(f"`{key}`" for key in record)[:200] or "nothing"


def shortened(value: Any) -> str:
    """Return the start of a value as JSON, for a paragraph that refuses it."""
    return json.dumps(value, default=str)[:60]
