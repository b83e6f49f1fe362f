"""Work files of an output: what is made on the way to it lies hidden beside it, under its whole name.

    .model.gguf.untuned-1f2e3d4c5b6a.gguf     of the export of these settings; its own parts, journal and partial files
    .model.tuned-1f2e3d4c5b6a.gguf.outcome    what came of tuning, of a directory that is written from that file
    .model.untuned-1f2e3d4c5b6a/              the same for a directory, whose parts are in ..model.untuned-….partial/
    .model.gguf.asymmetric-1f2e3d4c5b6a/      begin with this name
    model.gguf.journal, model.gguf.partial    an interrupted `ResumableOutput`; of a split, those of its parts
    .model.gguf.1a2b3c4d.partial              what a kill left of a file that was to appear whole, or of removed work

Whoever finishes an output removes those of interrupted runs that had other settings, which nobody will go on with.

Names with random digits, or digits of a hash, are nobody else's. What has one of the other names is ours by its
content: a folder by the journal in it, a file by its header or by the journal beside it. Something else stays; before
the work it is refused.
"""

import glob
import os
import re
import secrets
import shutil
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

from safetensors import SafetensorError

from dynquant.errors import WriteError
from dynquant.storage.atomic import read_tensors_header
from dynquant.storage.journal import Journal, holds_something, in_the_way
from dynquant.storage.lock import is_lock, locked
from dynquant.storage.resumable_output import unfinished

_OF_SPLIT = r"-\d{5}-of-\d{5}"
WRITTEN, STAGING, STREAMING = "written.safetensors", "partial", "streaming"
OUTCOME = ".outcome"
_KIND = (
    rf"(untuned|tuned)-[0-9a-f]{{12}}({_OF_SPLIT})?\.gguf(\.journal|\.partial|{re.escape(OUTCOME)})?|(untuned|asymmetric)-[0-9a-f]{{12}}|"
    rf"{re.escape(WRITTEN)}|{STAGING}|{STREAMING}"
)
_JOURNALS = ("*.journal", "progress.jsonl", "run.json")
"""Names of journals in folders of work."""
_CARD_BYTES = 1024  # of a model card, with its tags
_CUT_OFF = r"[0-9a-f]{8}\.partial"
"""The end of the name under which `atomic` writes a file."""


def work_path(output: Path, kind: str) -> Path:
    """Return the name of what is made on the way to an output; `kind` is one of those that `remove_work` knows."""
    assert re.fullmatch(_KIND, kind), kind
    return output.with_name(f".{output.name}.{kind}")


def check_work(output: Path) -> None:
    """Raise WriteError, before any work, for something else that has the name of a work file of a GGUF file."""
    unfinished([output])
    written = work_path(output, WRITTEN)
    if holds_something(written) and not _is_own(written, WRITTEN):
        raise in_the_way(written)


def check_folder(folder: Path) -> None:
    """Raise WriteError for what has the name of a folder of work, and is no such folder of ours."""
    if os.path.lexists(folder) and not _is_own_folder(folder):
        raise in_the_way(folder)


def remove_folder(folder: Path) -> None:
    """Remove a folder of work as far as possible, its journals last: what a kill leaves of it is still ours."""
    with suppress(OSError):
        journals = _journals(folder)
        for path in folder.iterdir():
            if path not in journals:
                _remove(path)
        shutil.rmtree(folder, ignore_errors=True)


def remove_work(output: Path) -> None:
    """Remove what interrupted runs left of an output that is finished, unless another process is writing it."""
    with suppress(WriteError, OSError), locked(output):
        for path in [*_hidden(output), *_interrupted(output)]:
            discard(path, output)


def discard(path: Path, output: Path) -> None:
    """Remove work of an output as far as possible. A folder has a name by then under which nobody takes what a kill
    leaves of it for whole, and which goes with other work."""
    if path.is_dir() and not path.is_symlink():
        gone = output.with_name(f".{output.name}.{secrets.token_hex(4)}.partial")
        with suppress(OSError):
            path = path.rename(gone)
    _remove(path)


def _remove(path: Path) -> None:
    """Remove a file or folder as far as possible."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        with suppress(OSError):
            path.unlink()


def _is_own(path: Path, kind: str) -> bool:
    """Return whether something with the hidden name of a work file, `.NAME.` before its kind, is ours."""
    if path.is_symlink():
        return True  # what it leads to stays
    if kind in (STAGING, STREAMING):
        return _is_own_folder(path)
    if kind.endswith(".lock"):
        return is_lock(path)
    if kind == WRITTEN:
        try:
            read_tensors_header(path)
        except (OSError, SafetensorError, KeyError, ValueError):
            return False
    return True


def _is_own_folder(folder: Path) -> bool:
    """Return whether a folder has a journal of ours, is a finished checkpoint of ours that a kill kept from its name,
    or holds nothing but files that a kill has cut off."""
    if not folder.is_dir():
        return False
    is_cut_off = re.compile(rf"\..*\.{_CUT_OFF}").fullmatch
    return bool(_journals(folder)) or _has_card(folder) or all(is_cut_off(path.name) for path in folder.iterdir())


def _has_card(folder: Path) -> bool:
    """Return whether a model card in a folder has the tag of dynquant."""
    try:
        with (folder / "README.md").open("rb") as card:
            return re.match(rb"---\n(?s:.*?)\btags:[^\n]*\bdynquant\b", card.read(_CARD_BYTES)) is not None
    except OSError:
        return False


def _journals(folder: Path) -> list[Path]:
    files = (path for name in _JOURNALS for path in folder.glob(name))
    return [path for path in files if Journal(path).identity is not None]


def _hidden(output: Path) -> Iterator[Path]:
    """Yield work files of this output with hidden names, and locks of such."""
    name = re.escape(output.name)
    forms = [
        rf"{name}\.({_KIND}|((errors\.)?journal\.)?{_CUT_OFF})",
        rf"\.{name}\.({_KIND})\.({_CUT_OFF}|lock|partial)",
    ]
    if output.suffix == ".gguf":
        forms.append(rf"{re.escape(output.stem)}{_OF_SPLIT}\.gguf\.((journal\.)?{_CUT_OFF}|lock)")
    form = re.compile(rf"\.({'|'.join(forms)})")
    for path in output.parent.iterdir():
        if form.fullmatch(path.name) and _is_own(path, path.name.removeprefix(f".{output.name}.")):
            yield path


def _interrupted(output: Path) -> Iterator[Path]:
    """Yield journals of ours beside the output, and the partial files that they are about."""
    names = [output.name, f"{output.name}.errors", f"mmproj-{output.name}"]
    for path in (output.with_name(f"{name}.journal") for name in names):
        if Journal(path).identity is not None:
            yield from (path, path.with_suffix(".partial"))
    first = re.compile(rf"({re.escape(output.stem)}-)00001(-of-\d{{5}}\.gguf)\.journal")
    for path in output.parent.iterdir() if output.suffix == ".gguf" else ():
        if (match := first.fullmatch(path.name)) and Journal(path).identity is not None:
            yield path
            yield from output.parent.glob(f"{glob.escape(match[1])}?????{match[2]}.partial")
