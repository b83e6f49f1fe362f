"""Large outputs that are written piece by piece, survive a kill, and appear whole or not at all.

An output is a set of files and of named regions in them. Files are written as NAME.partial at their final size, in any
order of regions; a journal beside them names each region whose bytes have reached the disk, with their SHA-256:

    {"identity": {...}}                         what the output is made from; resuming needs an equal one
    {"file": 0, "offset": 4096, "num_bytes": 8192, "sha256": "..."}
    {"sealed": true}                            every region is there; files are being moved to their names

A restart checks the bytes of journaled spans against their hashes and writes only regions that they do not cover, so
that it may divide the files into other regions. The journal goes last: a kill between two renames is finished by the
next run.
"""

import errno
import hashlib
import json
import os
import shutil
from bisect import bisect_right
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO, Self

from dynquant.errors import ExportError

_COPY_BYTES = 1 << 24


@dataclass(frozen=True)
class Region:
    """A run of bytes in the file of index `file`."""

    file: int
    offset: int
    num_bytes: int

    @property
    def end(self) -> int:
        return self.offset + self.num_bytes


@dataclass
class _Journal:
    identity: dict[str, str] | None = None
    hashes: dict[Region, str] = field(default_factory=dict)
    sealed: bool = False


class ResumableOutput:
    """Files that are filled region by region and then moved to their names.

    Args:
        paths: Final names, all in one directory.
        sizes: Bytes of each file; what no region covers reads as zeros.
        regions: What will be written, by name.
        identity: What decides the bytes, as strings. Regions of an interrupted run are kept only under an equal one.
        resume: False discards an interrupted run instead.

    Raises:
        ExportError: an interrupted run with another identity, too little free space, or a directory that cannot be
            written to.
    """

    def __init__(
        self,
        paths: list[Path],
        sizes: list[int],
        regions: Mapping[str, Region],
        identity: Mapping[str, str],
        *,
        resume: bool = True,
    ) -> None:
        self.paths = paths
        self._sizes = sizes
        self._regions = dict(regions)
        self._partials = [path.with_name(f"{path.name}.partial") for path in paths]
        self.journal_path = paths[0].with_name(f"{paths[0].name}.journal")
        self.finished: set[str] = set()
        """Names of the regions that need not be written again."""
        self._files: dict[int, BinaryIO] = {}
        self._journal: BinaryIO | None = None
        if not resume:
            self.discard()
        self._open(dict(identity))

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def write(self, name: str, data: memoryview | bytes) -> None:
        """Write one region, wait until it is on the disk, and record it.

        Raises:
            ExportError: the disk is full or broken; what is finished is kept and the message says how to go on.
        """
        region = self._regions[name]
        if len(data) != region.num_bytes:
            raise ValueError(f"`data` of `{name}` has {len(data)} bytes; its region has {region.num_bytes}")
        try:
            file = self._files[region.file]
            file.seek(region.offset)
            _write_all(file, data)
            os.fsync(file.fileno())
            self._record(_journal_line(region, hashlib.sha256(data).hexdigest()))
        except OSError as error:
            raise self._failure(error, f"`{name}` could not be written") from error
        self.finished.add(name)

    def commit(self) -> list[Path]:
        """Move the complete files to their names, replacing older ones, and remove the journal.

        Raises:
            ExportError: a file cannot be moved.
        """
        missing = sorted(self._regions.keys() - self.finished)
        if missing:
            raise ValueError(f"{len(missing)} regions were never written, the first is `{missing[0]}`")
        try:
            self._record({"sealed": True})
            self.close()
            # The first file goes last: loaders open it, and it must not appear before the others.
            for partial, path in reversed(list(zip(self._partials, self.paths, strict=True))):
                if partial.exists():
                    os.replace(partial, path)
            self.journal_path.unlink()
        except OSError as error:
            raise self._failure(error, "the finished file could not be moved to its name") from error
        return self.paths

    def discard(self) -> None:
        """Remove partial files and journal; files that already have their final name stay."""
        self.close()
        for path in (*self._partials, self.journal_path):
            path.unlink(missing_ok=True)

    def close(self) -> None:
        """Close the files, keeping what is written."""
        for file in (*self._files.values(), *((self._journal,) if self._journal else ())):
            file.close()
        self._files, self._journal = {}, None

    def _open(self, identity: dict[str, str]) -> None:
        journal = _read_journal(self.journal_path)
        if journal.sealed and not any(path.exists() for path in self._partials) and journal.identity != identity:
            journal = _Journal()
        if journal.identity not in (None, identity):
            raise self._another_run(journal.identity or {}, identity)
        moved = {i for i in range(len(self.paths)) if journal.sealed and self._was_moved(i, journal)}
        intact: dict[Region, str] = {}
        for index in range(len(self.paths)):
            found = self.paths[index] if index in moved else self._partials[index]
            intact |= self._intact(index, found, journal)
        self.finished = self._covered(intact)
        journal.hashes = intact
        self._check_space()
        try:
            self._files = {i: self._open_partial(i) for i in range(len(self.paths)) if i not in moved}
            self._start_journal(journal, identity)
        except OSError as error:
            self.close()
            raise ExportError(
                f"{self.paths[0]} cannot be created: {error.strerror}. Choose a directory with space that can be "
                "written to."
            ) from error

    def _was_moved(self, index: int, journal: _Journal) -> bool:
        expected = {name for name, region in self._regions.items() if region.file == index}
        return (
            not self._partials[index].exists()
            and self._covered(self._intact(index, self.paths[index], journal)) == expected
        )

    def _intact(self, index: int, path: Path, journal: _Journal) -> dict[Region, str]:
        """Journaled spans of one file whose bytes still have their hash."""
        if not path.is_file() or path.stat().st_size != self._sizes[index]:
            return {}
        with path.open("rb") as file:
            return {
                span: digest
                for span, digest in journal.hashes.items()
                if span.file == index and _digest(file, span) == digest
            }

    def _covered(self, spans: Iterable[Region]) -> set[str]:
        """Names of the regions all of whose bytes are in `spans`."""
        runs: list[Region] = []
        for span in sorted(spans, key=lambda span: (span.file, span.offset)):
            if runs and runs[-1].file == span.file and runs[-1].end >= span.offset:
                last = runs.pop()
                span = Region(span.file, last.offset, max(last.end, span.end) - last.offset)
            runs.append(span)
        starts = [(run.file, run.offset) for run in runs]
        found = set()
        for name, region in self._regions.items():
            place = bisect_right(starts, (region.file, region.offset)) - 1
            if place >= 0 and runs[place].file == region.file and runs[place].end >= region.end:
                found.add(name)
        return found

    def _open_partial(self, index: int) -> BinaryIO:
        path = self._partials[index]
        file = open(path, "r+b" if path.exists() else "w+b", buffering=0)  # noqa: SIM115
        file.truncate(self._sizes[index])
        return file  # type: ignore[return-value]

    def _start_journal(self, journal: _Journal, identity: dict[str, str]) -> None:
        """Rewrite the journal with what was found intact, which also drops a line that a kill cut short."""
        lines: list[dict[str, object]] = [{"identity": identity}]
        lines += [_journal_line(span, digest) for span, digest in journal.hashes.items()]
        if journal.sealed:
            lines.append({"sealed": True})
        temporary = self.journal_path.with_name(f"{self.journal_path.name}.new")
        try:
            temporary.write_text("".join(json.dumps(line) + "\n" for line in lines))
            os.replace(temporary, self.journal_path)
        except OSError:
            temporary.unlink(missing_ok=True)
            raise
        self._journal = self.journal_path.open("ab", buffering=0)  # a full disk must not fail once more at closing

    def _record(self, line: dict[str, object]) -> None:
        assert self._journal is not None
        _write_all(self._journal, json.dumps(line).encode() + b"\n")

    @property
    def _missing_bytes(self) -> int:
        return sum(region.num_bytes for name, region in self._regions.items() if name not in self.finished)

    @property
    def _bytes_to_allocate(self) -> int:
        """What the files will take beyond what their partial forms have on the disk already."""
        unallocated = 0
        for partial, size in zip(self._partials, self._sizes, strict=True):
            if partial.exists():
                allocated = 512 * getattr(partial.stat(), "st_blocks", 0)  # not on Windows
                unallocated += max(0, size - allocated)
            else:
                unallocated += size
        return min(unallocated, self._missing_bytes)

    def _check_space(self) -> None:
        directory = self.paths[0].parent
        try:
            directory.mkdir(parents=True, exist_ok=True)
            free = shutil.disk_usage(directory).free
        except OSError as error:
            raise ExportError(f"The output directory {directory} cannot be used: {error.strerror}.") from error
        if self._bytes_to_allocate > free:
            raise ExportError(
                f"{self._bytes_to_allocate:,} bytes are still to be written to {directory}, but only {free:,} are free "
                "there. Free some space, or choose an output on another disk."
            )

    def _another_run(self, found: dict[str, str], wanted: dict[str, str]) -> ExportError:
        key = next(key for key in (*wanted, *found) if found.get(key) != wanted.get(key))
        return ExportError(
            f"{self.journal_path} belongs to an interrupted export with another {key.replace('_', ' ')} "
            f"({found.get(key, 'none')[:16]}, now {wanted.get(key, 'none')[:16]}); its tensors cannot be used for this "
            "one. Finish it with its own plan and options, start over with --no-resume, or export to another name."
        )

    def _failure(self, error: OSError, what: str) -> ExportError:
        directory = self.paths[0].parent
        cause = f"The disk that holds {directory} is full" if error.errno == errno.ENOSPC else f"{error.strerror}"
        return ExportError(
            f"{cause}: {what}. {len(self.finished)} of {len(self._regions)} parts are kept in "
            f"{self._partials[0].name} and {self.journal_path.name}; {self._missing_bytes:,} bytes are missing. Repair "
            "the cause and run the same command again to go on, or delete these files."
        )


def file_hash(path: Path) -> str:
    """SHA-256 of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _write_all(file: BinaryIO, data: memoryview | bytes) -> None:
    rest = memoryview(data)
    while rest:
        rest = rest[file.write(rest[:_COPY_BYTES]) :]


def _digest(file: BinaryIO, region: Region) -> str:
    digest, rest = hashlib.sha256(), region.num_bytes
    file.seek(region.offset)
    while rest:
        part = file.read(min(rest, _COPY_BYTES))
        if not part:
            break
        digest.update(part)
        rest -= len(part)
    return digest.hexdigest()


def _journal_line(span: Region, digest: str) -> dict[str, object]:
    return {"file": span.file, "offset": span.offset, "num_bytes": span.num_bytes, "sha256": digest}


def _read_journal(path: Path) -> _Journal:
    """What the journal states up to the first line that is cut short."""
    journal = _Journal()
    if not path.is_file():
        return journal
    for text in path.read_text(errors="replace").splitlines():
        try:
            line = json.loads(text)
            if "identity" in line:
                journal.identity = {str(key): str(value) for key, value in line["identity"].items()}
            elif "sha256" in line:
                span = Region(int(line["file"]), int(line["offset"]), int(line["num_bytes"]))
                journal.hashes[span] = str(line["sha256"])
            elif "sealed" in line:
                journal.sealed = True
        except (ValueError, KeyError, TypeError, AttributeError):
            break
    return journal
