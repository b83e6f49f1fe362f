"""Exports that the closing pass tunes: written under the name of work, tuned from there, and removed.

A run that was stopped goes on with what is whole: with what is encoded, and where the output is written from a tuned
GGUF file also with that and with what was said of it. Training that ends by the clock does not give the same bytes
twice, and some may be in the output already.
"""

import glob
import hashlib
import json
from collections.abc import Callable
from dataclasses import astuple, dataclass
from pathlib import Path

from dynquant.checkpoints.gguf_source import GGUFSource
from dynquant.exporters.closing_pass import tune_file
from dynquant.exporters.output import Encoding
from dynquant.exporters.tuning.training import TuneOptions
from dynquant.storage.atomic import write_atomically
from dynquant.storage.work_files import OUTCOME, discard, work_path


@dataclass(frozen=True)
class TunedFormat:
    """Format of what is tuned on the way to an output: a GGUF file, perhaps in parts, or a checkpoint."""

    write: Callable[[Path], list[Path]]
    """Exports it under a name. The name, or that of its first part, is there when it is whole."""
    ending: str = ""
    """End of its name; a checkpoint is a folder."""
    convert: Callable[..., list[Path]] | None = None
    """Exports an output of another format under a name, with the tuned GGUF file as `stored` and the words on what
    `came_of_tuning`."""

    def whole(self, path: Path) -> list[Path]:
        """Return what lies there of a finished export with this name, what is opened first; nothing of another."""
        if path.is_symlink() or path.exists():
            return [path]
        parts = sorted(path.parent.glob(f"{glob.escape(path.stem)}-*-of-*{self.ending}")) if self.ending else []
        return parts if parts and "-00001-of-" in parts[0].name else []


def export_tuned(
    encoding: Encoding, kind: TunedFormat, output: Path, tuning: TuneOptions, split: int | None, shared: Path | None
) -> list[Path]:
    """Export under another name, tune, write the output, and return its files.

    `split` is the size of parts, `shared` a folder that keeps what the original writes.
    """
    assert encoding.moments is not None

    def beside(work: str, *identity: object) -> tuple[Path, list[Path]]:
        """Return a name of what is made on the way, and what of it a stopped run has left whole."""
        path = work_path(output, f"{work}-{_digest(encoding, split, *identity)}{kind.ending}")
        files = kind.whole(path)
        if encoding.resume and not path.is_symlink():  # what a link leads to is not ours to read
            return path, files
        for file in files:
            discard(file, output)
        return path, []

    name, untuned = beside("untuned")
    if not untuned:
        kind.write(name)
        untuned = kind.whole(name)
    target, files = (output, []) if kind.convert is None else beside("tuned", astuple(tuning))
    said = target.with_name(f"{target.name}{OUTCOME}")
    if not files or not said.is_file() or said.is_symlink():
        how = {"encoder": encoding.encoder.name, "shared": shared}
        tuned = tune_file(encoding.model, untuned[0], encoding.moments.tokens, tuning, target, encoding.session, **how)
        files = tuned.files
        if kind.convert is not None:
            write_atomically(said, tuned.outcome)
    if kind.convert is not None:
        untuned += [*files, said]
        files = kind.convert(output, stored=GGUFSource(files[0]), came_of_tuning=said.read_text("utf-8"))
    for path in untuned:
        discard(path, output)
    return files


def _digest(encoding: Encoding, split: int | None, *identity: object) -> str:
    """Return what tells work of these settings from that of others."""
    return hashlib.sha256(json.dumps([encoding.identity("any"), split, *identity]).encode()).hexdigest()[:12]
