"""Outputs of a command: none is a file that it reads, and no other process writes one at the same time."""

import os
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from inspect import Parameter
from pathlib import Path
from typing import Any, NamedTuple, get_args

from safetensors import SafetensorError, safe_open
from typer.models import ArgumentInfo, OptionInfo

from dynquant.cli.terminal import console
from dynquant.errors import WriteError
from dynquant.options import Writes, note_of
from dynquant.storage.lock import locked

PATHS_IN_WORDS = frozenset({
    "base", "calibration", "candidate", "data", "mmlu_data", "model", "packed", "path", "recipe", "reference", "shots",
    "text", "tokenizer",
})  # fmt: skip
"""Parameters of type str that may name files; hub ids and patterns are no files."""
_MODEL_FILE = re.compile(
    r".*\.(safetensors|bin|model)|.*config\.json|.*\.index\.json|.*token.*|vocab\..*|merges\.txt|chat_template.*|plan\.json"
)
_MARKS = {
    ".csv": b"name,role,layer,type",
    ".gguf": b"dynquant.version",
    ".html": b"dynquant",
    "plan.json": b'"tool_version"',
}
"""Bytes in files that dynquant wrote, by name or ending; those with other names are read before they are replaced."""
_MARKED_BYTES = 1 << 26
"""More than the metadata of a GGUF file takes; a damaged file of ours has its mark, too."""
_PART = re.compile(r"-\d{5}-of-\d{5}(?=\.gguf$)", re.IGNORECASE)


class _Output(NamedTuple):
    path: Path
    flag: str
    writes: Writes
    beside: list[Path]


@contextmanager
def guarded(parameters: Iterable[Parameter], typed: Mapping[str, Any]) -> Iterator[Callable[[], None]]:
    """Context manager: the outputs of a command with these values, and what is written beside them, are its own.

    Yields what locks them, once it is known that the values go together. Both raise WriteError: one of them is an
    input, too, or a file of another origin, or another process writes it.
    """
    inputs: dict[Path, tuple[str, str]] = {}  # to the parameter and its flag
    outputs: list[_Output] = []
    lines = console.json_target
    if lines is not None and os.path.isdir(lines.parent) and not _is_device(lines):
        outputs.append(_Output(lines, "--json-progress", Writes(), []))
    for parameter in parameters:
        value, writes = typed[parameter.name], note_of(parameter.annotation, Writes)
        flag = _flag_of(parameter)
        if writes is None:
            values = value if isinstance(value, list) else [value]
            texts = parameter.name in PATHS_IN_WORDS
            paths = [Path(v) for v in values if isinstance(v, Path) or (texts and isinstance(v, str))]
            inputs |= dict.fromkeys(paths, (parameter.name, flag))
        elif value is not None and not typed.get(writes.unless):
            has_beside = value.name or writes.kind == "folder"  # nothing is beside `/` or `.`, which are no files
            outputs.append(_Output(value, flag, writes, [*writes.beside(value, typed)] if has_beside else []))
    _check_apart(outputs)
    for output in outputs:
        _check(output, inputs)
    with ExitStack() as locks:

        def lock() -> None:
            for output in outputs:
                for path in (output.path, *output.beside):
                    locks.enter_context(locked(path))

        if console.json_target is not None and console.json_target in (output.path for output in outputs):
            locks.enter_context(locked(console.json_target))
        console.open_json_lines()  # a refusal is told there, too
        yield lock


def _flag_of(parameter: Parameter) -> str:
    notes = get_args(parameter.annotation)
    info = next((note for note in notes if isinstance(note, ArgumentInfo | OptionInfo)), OptionInfo())
    words = [word for word in (info.default, *(info.param_decls or ())) if str(word).startswith("-")]
    if isinstance(info, ArgumentInfo):
        return parameter.name.upper()
    return max(words, key=len, default=f"--{parameter.name.replace('_', '-')}")


def _check_apart(outputs: Iterable[_Output]) -> None:
    """Raise WriteError for two files that are one."""
    names: dict[str, str] = {}
    for output in outputs:
        beside = f"beside or in {output.path} ({output.flag})"
        for path, words in [
            (output.path, f"as {output.flag}"),
            *((path, beside) for path in output.beside if path != output.path),
        ]:
            if (other := names.setdefault(os.path.realpath(path), words)) != words:
                raise WriteError(f"{path} would be written {other} and {words}; give two names.")


def _check(output_of: _Output, inputs: Mapping[Path, tuple[str, str]]) -> None:
    """Refuse an output that would destroy an input or a file of another origin, or that is no place for a file."""
    output, flag, writes, beside = output_of
    if _is_device(output):
        raise WriteError(f"{output} ({flag}) is a device or pipe, which cannot be replaced; name a file.")
    is_file, is_folder = writes.kind == "file", writes.kind.endswith("folder")
    if (is_file and os.path.isdir(output)) or (is_folder and os.path.isfile(output)):
        raise WriteError(f"{output} ({flag}) is a {'directory' if is_file else 'file'}; give another name.")
    if os.path.isdir(output) and not os.access(output, os.W_OK, effective_ids=os.access in os.supports_effective_ids):
        raise WriteError(f"{output} ({flag}) cannot be written: Permission denied. Choose another place.")
    if is_file and os.path.isfile(output) and _is_read(output, "--output"):
        raise WriteError(
            f"{output} ({flag}) is there already and is no earlier result of this command: it would be lost. Give "
            "another name."
        )
    present = [path for path in (output, *_parts(output, whole=True), *beside) if os.path.exists(path)]
    reused = [source for source, (parameter, _) in inputs.items() if parameter in writes.reuses]
    for source, (_, of_input) in inputs.items():
        if not os.path.exists(source) or source in reused:
            continue
        folder = source if source.is_dir() else None
        read = [] if folder and writes.kind == "folder" else [source, *_parts(source)]
        read += (
            [file for file in folder.iterdir() if _is_read(file, flag)] if folder and writes.kind != "folder" else []
        )
        same = next((file for file in read if any(_is_same(path, file) for path in present)), None)
        if same is None and writes.kind == "new folder" and source.resolve().is_relative_to(output.resolve()):
            same = source
        if same is not None:
            verb = "is" if _is_same(output, same) else "would replace"
            raise WriteError(
                f"{output} ({flag}) {verb} {same}, which this command reads as {of_input}: it would be lost. Give "
                "another name for the output."
            )
    for path in beside:
        if os.path.exists(path) and not _is_ours(path):
            raise WriteError(
                f"{path} is no earlier result of this command, and may be replaced by what is written beside or into "
                f"{output} ({flag}): it would be lost. Give another name for the output, or move that file."
            )


def _is_ours(path: Path) -> bool:
    """Return whether dynquant wrote a file, as far as it can be told from files of its kind."""
    if path.suffix == ".safetensors":
        return not _is_read(path, "--output")
    mark = _MARKS.get(path.name, _MARKS.get(path.suffix, b""))
    try:
        with path.open("rb") as file:
            return mark in file.read(_MARKED_BYTES)
    except OSError:
        return False


def _parts(path: Path, *, whole: bool = False) -> list[Path]:
    """Return all parts of a split GGUF file of which this is one, or which this is the `whole` name of."""
    stem = _PART.sub("", path.name)
    if path.suffix.lower() != ".gguf" or (stem == path.name and not whole) or not os.path.isdir(path.parent):
        return []
    return [file for file in path.parent.iterdir() if _PART.search(file.name) and _PART.sub("", file.name) == stem]


def _is_device(path: Path) -> bool:
    return os.path.exists(path) and not os.path.isfile(path) and not os.path.isdir(path)


def _is_same(path: Path, other: Path) -> bool:
    return os.path.exists(path) and os.path.exists(other) and os.path.samefile(path, other)


def _is_read(file: Path, flag: str) -> bool:
    """Return whether a file belongs to the model or plan in its directory; statistics may be measured anew."""
    if not _MODEL_FILE.fullmatch(file.name) or not file.is_file():
        return False
    try:
        with safe_open(file, framework="np") as opened:
            return flag != "--output" or "dynquant" not in (opened.metadata() or {})
    except (SafetensorError, OSError):
        return True
