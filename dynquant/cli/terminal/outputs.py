"""Outputs of a command: none is a file that it reads, and no other process writes one at the same time."""

import os
import re
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from inspect import Parameter
from pathlib import Path
from typing import Any, get_args

from safetensors import SafetensorError, safe_open
from typer.models import ArgumentInfo, OptionInfo

from dynquant.cli.terminal import console
from dynquant.errors import WriteError
from dynquant.options import Writes
from dynquant.storage.lock import locked

PATHS_IN_WORDS = frozenset({
    "calibration", "candidate", "data", "mmlu_data", "model", "packed", "path", "recipe", "reference", "shots", "text",
    "tokenizer",
})  # fmt: skip
"""Parameters of type str that may name files; hub ids and patterns are no files."""
_MODEL_FILE = re.compile(
    r".*\.(safetensors|bin|model)|.*config\.json|.*\.index\.json|.*token.*|vocab\..*|merges\.txt|chat_template.*|plan\.json"
)
_PART = re.compile(r"-\d{5}-of-\d{5}(?=\.gguf$)")


@contextmanager
def guarded(parameters: Iterable[Parameter], typed: Mapping[str, Any]) -> Iterator[None]:
    """Context manager: the outputs of a command with these values are its own.

    Raises:
        WriteError: an output is an input, too, or another process writes it.
    """
    inputs: dict[Path, str] = {}
    outputs: dict[Path, tuple[str, Writes]] = {}
    lines = console.json_target
    if lines is not None and os.path.isdir(lines.parent) and not _is_device(lines):
        outputs[lines] = "--json-progress", Writes()
    for parameter in parameters:
        value, notes = typed[parameter.name], get_args(parameter.annotation)
        writes = next((note for note in notes if isinstance(note, Writes)), None)
        info = next((note for note in notes if isinstance(note, ArgumentInfo | OptionInfo)), OptionInfo())
        words = [word for word in (info.default, *(info.param_decls or ())) if str(word).startswith("-")]
        flag = max(words, key=len, default=f"--{parameter.name.replace('_', '-')}")
        flag = parameter.name.upper() if isinstance(info, ArgumentInfo) else flag
        if writes is None:
            values = value if isinstance(value, list) else [value]
            texts = parameter.name in PATHS_IN_WORDS
            inputs |= {Path(v): flag for v in values if isinstance(v, Path) or (texts and isinstance(v, str))}
        elif value is not None and not typed.get(writes.unless):
            for other, (of_other, _) in outputs.items():
                if os.path.realpath(value) == os.path.realpath(other):
                    raise WriteError(f"{value} is given as {of_other} and as {flag}; give two names.")
            outputs[value] = flag, writes
    for output, (flag, writes) in outputs.items():
        _check(output, flag, writes, inputs)
    with ExitStack() as locks:
        for output in outputs:
            locks.enter_context(locked(output))
        console.open_json_lines()
        yield


def _check(output: Path, flag: str, writes: Writes, inputs: Mapping[Path, str]) -> None:
    """Refuse an output that would destroy an input, or that is no place for a file."""
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
    present = [path for path in (output, *_parts(output, whole=True)) if os.path.exists(path)]
    for given, of_input in inputs.items():
        if not os.path.exists(given):
            continue
        folder = given if given.is_dir() else None
        read = [] if folder and writes.kind == "folder" else [given, *_parts(given)]
        read += [file for file in folder.iterdir() if _is_read(file, flag)] if folder else []
        same = next((file for file in read if any(_is_same(path, file) for path in present)), None)
        if same is None and writes.kind == "new folder" and given.resolve().is_relative_to(output.resolve()):
            same = given
        if same is not None:
            verb = "is" if _is_same(output, same) else "would replace"
            raise WriteError(
                f"{output} ({flag}) {verb} {same}, which this command reads as {of_input}: it would be lost. Give "
                "another name for the output."
            )


def _parts(path: Path, *, whole: bool = False) -> list[Path]:
    """Return all parts of a split GGUF file of which this is one, or which this is the `whole` name of."""
    stem = _PART.sub("", path.name)
    if path.suffix != ".gguf" or (stem == path.name and not whole) or not os.path.isdir(path.parent):
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
