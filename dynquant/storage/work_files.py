"""Work files of an output: what is made on the way to it lies hidden beside it, under its whole name.

    .model.gguf.untuned-1f2e3d4c5b6a.gguf     of the export of these settings; its own parts, journal and partial files
    .model.gguf.asymmetric-1f2e3d4c5b6a/      begin with this name
    model.gguf.journal, model.gguf.partial    an interrupted `ResumableOutput`; of a split, those of its parts
    .model.gguf.1a2b3c4d.partial              what a kill left of a file that was to appear whole

Whoever finishes an output removes those of interrupted runs that had other settings, which nobody will go on with.
"""

import glob
import re
import shutil
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

from dynquant.errors import WriteError
from dynquant.storage.journal import Journal
from dynquant.storage.lock import locked

_OF_SPLIT = r"-\d{5}-of-\d{5}"
_KIND = (
    rf"(untuned|tuned)-[0-9a-f]{{12}}({_OF_SPLIT})?\.gguf(\.journal|\.partial)?|asymmetric-[0-9a-f]{{12}}|"
    r"written\.safetensors|partial|streaming"
)
_CUT_OFF = r"[0-9a-f]{8}\.partial"
"""The end of the name under which `atomic` writes a file."""


def work_path(output: Path, kind: str) -> Path:
    """Return the name of what is made on the way to an output; `kind` is one of those that `remove_work` knows."""
    assert re.fullmatch(_KIND, kind), kind
    return output.with_name(f".{output.name}.{kind}")


def remove_work(output: Path) -> None:
    """Remove what interrupted runs left of an output that is finished, unless another process is writing it."""
    with suppress(WriteError, OSError), locked(output):
        for path in [*_hidden(output), *_interrupted(output)]:
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path, ignore_errors=True)
            else:
                with suppress(OSError):
                    path.unlink()


def _hidden(output: Path) -> Iterator[Path]:
    """Yield what has the hidden name of a work file of this output, or is a lock of one."""
    name = re.escape(output.name)
    forms = [rf"{name}\.({_KIND}|((errors\.)?journal\.)?{_CUT_OFF})", rf"\.{name}\.({_KIND})\.({_CUT_OFF}|lock)"]
    if output.suffix == ".gguf":
        forms.append(rf"{re.escape(output.stem)}{_OF_SPLIT}\.gguf\.({_CUT_OFF}|lock)")
    form = re.compile(rf"\.({'|'.join(forms)})")
    yield from (path for path in output.parent.iterdir() if form.fullmatch(path.name))


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
