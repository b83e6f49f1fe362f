"""Recognizes files that are not what their ending says: data under the name of a text, other encodings, documents.

Only what is sure is named: a text may begin with a bracket, hold commas in every line, or be about JSON.
"""

import ast
import csv
import json
import re
import sys
from io import StringIO
from itertools import islice

_STARTS = {
    rb"\xff\xfe\0\0": ("text in UTF-32", "Convert it: iconv -f UTF-32 -t UTF-8 {path} > NEW"),
    rb"\0\0\xfe\xff": ("text in UTF-32", "Convert it: iconv -f UTF-32 -t UTF-8 {path} > NEW"),
    rb"\xff\xfe": ("text in UTF-16", "Convert it: iconv -f UTF-16 -t UTF-8 {path} > NEW"),
    rb"\xfe\xff": ("text in UTF-16", "Convert it: iconv -f UTF-16 -t UTF-8 {path} > NEW"),
    rb"PAR1[\x0e-\x1f]": ("a parquet file", "Rename it to .parquet"),
    rb"\x1f\x8b": ("a gzip archive", "Add .gz to its name, behind the ending of what is in it"),
    rb"PK\x03\x04": ("a zip archive or office document", "Unpack it, or save its text as UTF-8"),
    rb"BZh[1-9]1AY&SY": ("a bzip2 archive", "Unpack it"),
    rb"\xfd7zXZ": ("an xz archive", "Unpack it"),
    rb"\x28\xb5\x2f\xfd": ("a zstd archive", "Unpack it"),
    rb"%PDF-\d\.\d\s*?[\r\n]": ("a PDF document", "Save its text as UTF-8"),
    rb"\{\\rtf\d*\\": ("a rich text document (RTF)", "Save it as plain text in UTF-8"),
    rb"GGUF[\x01-\x09]\0": ("a GGUF model", "Give a text"),
}
"""Patterns of first bytes; those of letters go on as no prose about such files does."""
START_BYTES = 16
_BEFORE_RECORD = re.compile(r"\s*(\[\s*)?(?=\{)")
_SPACE = re.compile(r"\s*")
_PYTHON_RECORD = re.compile(r"\s*\[?\s*\{'(text|messages|prompt|completion|content|question|instruction)': ?['\"\[{]")
_COLUMNS = frozenset(
    {
        "text",
        "texts",
        "content",
        "contents",
        "body",
        "document",
        "article",
        "sentence",
        "message",
        "messages",
        "prompt",
        "completion",
        "instruction",
        "input",
        "output",
        "response",
        "question",
        "answer",
        "label",
        "id",
        "title",
    }
)
_ROWS_LOOKED_AT = 20


def form_of_start(start: bytes) -> tuple[str, str] | None:
    """Return what a file with these first bytes is, and the way out, in which {path} stands for it; or None."""
    return next((meaning for pattern, meaning in _STARTS.items() if re.match(pattern, start)), None)


def form_of_content(content: str) -> tuple[str, str] | None:
    """Return which data a text is, and the way out; None for prose and code."""
    fields = _fields_of_json(content)
    if fields is not None:
        way_out = "Rename it to .jsonl or .json"
        if not fields:
            way_out = 'Write each text as {"text": ...} into a line of a .jsonl file'
        elif fields.isdisjoint({"text", "messages"}):
            named = ", ".join(f"`{name:.40}`" for name in sorted(fields)[:8])
            way_out += f', and name the field that holds the text "text" (it has {named})'
        return "JSON", way_out
    if _is_python_record(content):
        return "records as Python prints them", "Write them with json.dumps, one a line, into a .jsonl file"
    if columns := _columns_of_table(content):
        way_out = "Save it with commas as .csv"
        if "text" not in columns:
            way_out += f', and name the column that holds the text "text" (it has {", ".join(columns)[:200]})'
        return "a table", way_out
    return None


def _fields_of_json(content: str) -> set[str] | None:
    """Return the names in the first record of JSON lines or of an array (none of other arrays), or None for no JSON."""
    begin = _BEFORE_RECORD.match(content)
    if begin is None:
        # `[see here](url)` and `[1] A note.` go on behind the bracket; an array is the whole content.
        return set() if content.lstrip().startswith("[") and _is_array(content) else None
    try:
        record, end = json.JSONDecoder().raw_decode(content, begin.end())
    except (ValueError, RecursionError):
        return None
    is_array = content.lstrip().startswith("[")
    return set(record) if record and _are_records(content, end, is_array) else None


def _are_records(content: str, end: int, is_array: bool) -> bool:
    """Return whether a record that ends at `end` is the last of all content, or another one follows."""
    place = _SPACE.match(content, end).end()
    if content[place : place + 1] == "]":
        return is_array and _SPACE.match(content, place + 1).end() == len(content)
    if content[place : place + 1] == ",":
        place = _SPACE.match(content, place + 1).end()
    if place == len(content):
        return True
    try:
        return isinstance(json.JSONDecoder().raw_decode(content, place)[0], dict)
    except (ValueError, RecursionError):
        return False


def _is_python_record(content: str) -> bool:
    if not _PYTHON_RECORD.match(content):
        return False
    first = content.lstrip().partition("\n")[0].strip().rstrip(",")
    try:
        ast.literal_eval(first)
    except (ValueError, SyntaxError, RecursionError, MemoryError):
        return first.startswith("[")  # a list may have many lines
    return True


def _is_array(content: str) -> bool:
    try:
        return isinstance(json.loads(content), list)
    except (ValueError, RecursionError):
        return False


def _columns_of_table(content: str) -> list[str]:
    """Return the names of the columns when every row has as many values as the first, which names known ones."""
    csv.field_size_limit(sys.maxsize)
    first = content.lstrip().partition("\n")[0]
    for separator in filter(first.count, ",\t;|"):
        try:
            (header,) = csv.reader([first], delimiter=separator)
            names = [name.strip().lower() for name in header]
            # A sentence has a space behind its comma; a header has one only where each of its names is known.
            is_header = all(re.fullmatch(r"\w[\w .-]{0,39}", name) for name in header) or _COLUMNS.issuperset(names)
            if not is_header or len({*names}) < len(names) or _COLUMNS.isdisjoint(names):
                continue
            rows = filter(None, csv.reader(StringIO(content, newline=""), delimiter=separator))
            lengths = [len(row) for row in islice(rows, _ROWS_LOOKED_AT)]
        except csv.Error:
            continue
        fewest = 1 if " " not in first else 3  # "Garbage in, garbage out" below "Input, output" is no table
        if len(lengths) > fewest and {*lengths} == {len(names)}:
            return names
    return []
