"""Large outputs that are written piece by piece, survive a kill, and appear whole or not at all.

An output is a set of files and of named regions in them. Files are written as NAME.partial at their final size, in any
order of regions; a journal beside them names each region whose bytes have reached the disk, with their SHA-256:

    {"identity": {...}}                         what the output is made from; resuming needs an equal one
    {"file": 0, "offset": 4096, "num_bytes": 8192, "sha256": "..."}
    {"sealed": true}                            every region is there; files are being moved to their names

A restart checks the bytes of journaled spans against their hashes and writes only regions that they do not cover, so
that it may divide the files into other regions. The journal comes first, which makes NAME.partial ours, and goes last:
a kill between two renames is finished by the next run.
"""

import errno
import hashlib
import os
from bisect import bisect_right
from collections.abc import Iterable, Mapping, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, Self

from dynquant.errors import ExportError
from dynquant.storage.atomic import check_space
from dynquant.storage.journal import Journal, Record, differing_key, holds_something, in_the_way, write_all
from dynquant.storage.lock import locked


@dataclass(frozen=True, order=True)
class Region:
    """A run of bytes in the file of index `file`."""

    file: int
    offset: int
    num_bytes: int


class ResumableOutput:
    """Files that are filled region by region and then moved to their names.

    Args:
        files: Bytes of each file by its final name, all in one directory; what no region covers reads as zeros.
        regions: What will be written, by name.
        identity: What decides the bytes, as strings. Regions of an interrupted run are kept only under an equal one.
        resume: False discards an interrupted run instead.

    Raises:
        ExportError: an interrupted run with another identity, too little free space, or a directory that cannot be
            written to.
        WriteError: another process writes it, or something else has the name of a partial file or of the journal.
    """

    def __init__(
        self, files: Mapping[Path, int], regions: Mapping[str, Region], identity: Record, *, resume: bool = True
    ) -> None:
        self.paths, self._sizes = list(files), list(files.values())
        self._regions = dict(regions)
        self._partials = [_partial(path) for path in files]
        self.finished: set[str] = set()
        """Names of the regions that need not be written again."""
        self._files: dict[int, BinaryIO] = {}
        self._lock = ExitStack()
        self._lock.enter_context(locked(self.paths[0]))
        try:
            self._journal = unfinished(self.paths)
            if not resume:
                self.discard()
            self._open(dict(identity))
        except BaseException:
            self._lock.close()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
        self._lock.close()

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
            write_all(file, data)
            os.fsync(file.fileno())
            self._journal.add(_record(region, hashlib.sha256(data).hexdigest()))
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
            self._journal.add({"sealed": True})
            self.close()
            # The first file goes last: loaders open it, and it must not appear before the others.
            for partial, path in reversed(list(zip(self._partials, self.paths, strict=True))):
                if partial.exists():
                    os.replace(partial, path)
            self._journal.remove()
        except OSError as error:
            raise self._failure(error, "the finished file could not be moved to its name") from error
        return self.paths

    def discard(self) -> None:
        """Remove partial files and journal; files that already have their final name stay."""
        self.close()
        for path in self._partials:
            path.unlink(missing_ok=True)
        self._journal.remove()

    def close(self) -> None:
        """Close the files, keeping what is written."""
        for file in self._files.values():
            file.close()
        self._files = {}
        self._journal.close()

    def _open(self, identity: dict[str, str]) -> None:
        hashes, is_sealed = _finished_spans(self._journal.records)
        is_ours = self._journal.belongs_to(identity)
        if is_sealed and not is_ours and not any(path.exists() for path in self._partials):
            hashes, is_sealed = {}, False  # every file of that run has its name; only its journal is left
        elif self._journal.identity is not None and not is_ours:
            key = differing_key(self._journal.identity, identity) or ""
            stored, now = (str(run.get(key, "none"))[:16] for run in (self._journal.identity, identity))
            raise ExportError(
                f"{self._journal.path} belongs to an interrupted export with another {key.replace('_', ' ')} "
                f"({stored}, now {now}); its tensors cannot be used for this one. Finish it with its own plan and "
                "options, start over with --no-resume, or export to another name."
            )
        for partial in self._partials:
            if partial.is_symlink() or (partial.is_file() and partial.stat().st_nlink > 1):
                partial.unlink()  # another name of a file that is not ours to write
        intact: dict[Region, str] = {}
        moved = set()
        for index, (path, partial) in enumerate(zip(self.paths, self._partials, strict=True)):
            may_be_moved = is_sealed and not partial.exists()
            spans = self._intact(index, path if may_be_moved else partial, hashes)
            if may_be_moved:
                expected = {name for name, region in self._regions.items() if region.file == index}
                if self._covered(spans) != expected:
                    continue  # an older file, or a damaged one, which is written anew
                moved.add(index)
            intact |= spans
        self.finished = self._covered(intact)
        self._check_space()
        fresh = [path for path in self._partials if not path.exists()]
        is_new = self._journal.identity is None
        try:
            records = [_record(span, digest) for span, digest in intact.items()]
            self._journal.start(identity, records + [{"sealed": True}] * is_sealed)
            for index, partial in enumerate(self._partials):
                if index not in moved:
                    mode = "r+b" if partial.exists() else "x+b"
                    self._files[index] = open(partial, mode, buffering=0)  # type: ignore[assignment]  # noqa: SIM115
                    self._files[index].truncate(self._sizes[index])
        except OSError as error:
            self.close()
            for path in fresh:
                path.unlink(missing_ok=True)
            if is_new:
                self._journal.remove()
            raise ExportError(
                f"{self.paths[0]} cannot be created: {error.strerror}. Choose a directory with space that can be "
                "written to."
            ) from error

    def _intact(self, index: int, path: Path, hashes: Mapping[Region, str]) -> dict[Region, str]:
        """Return the journaled spans of one file whose bytes still have their hash."""
        if not path.is_file() or path.stat().st_size != self._sizes[index]:
            return {}
        spans, size = {}, self._sizes[index]
        with path.open("rb") as file:
            for span in (s for s in hashes if s.file == index and 0 <= s.offset <= s.offset + s.num_bytes <= size):
                file.seek(span.offset)
                if hashlib.sha256(file.read(span.num_bytes)).hexdigest() == hashes[span]:
                    spans[span] = hashes[span]
        return spans

    def _covered(self, spans: Iterable[Region]) -> set[str]:
        """Return the names of the regions all of whose bytes are in `spans`."""
        # Runs of adjoining spans as (file, offset); the first, before all files, covers nothing.
        starts, ends = [(-1, 0)], [(-1, 0)]
        for span in sorted(spans):
            start, end = _bounds(span)
            if start > ends[-1]:
                starts.append(start)
                ends.append(end)
            ends[-1] = max(ends[-1], end)
        bounds = {name: _bounds(region) for name, region in self._regions.items()}
        return {name for name, (start, end) in bounds.items() if ends[bisect_right(starts, start) - 1] >= end}

    @property
    def _missing_bytes(self) -> int:
        return sum(region.num_bytes for name, region in self._regions.items() if name not in self.finished)

    def _check_space(self) -> None:
        directory = self.paths[0].parent
        try:
            directory.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ExportError(f"The output directory {directory} cannot be used: {error.strerror}.") from error
        unallocated = 0
        for partial, size in zip(self._partials, self._sizes, strict=True):
            # Partial files are sparse: they have their final size before they have all their blocks (Windows: unknown).
            blocks = getattr(partial.stat(), "st_blocks", 0) if partial.exists() else 0
            unallocated += max(0, size - 512 * blocks)
        check_space(directory, min(unallocated, self._missing_bytes), ExportError)

    def _failure(self, error: OSError, what: str) -> ExportError:
        directory = self.paths[0].parent
        cause = f"The disk that holds {directory} is full" if error.errno == errno.ENOSPC else f"{error.strerror}"
        return ExportError(
            f"{cause}: {what}. {len(self.finished)} of {len(self._regions)} parts are kept in "
            f"{self._partials[0].name} and {self._journal.path.name}; {self._missing_bytes:,} bytes are missing. "
            "Repair the cause and run the same command again to go on, or delete these files."
        )


def unfinished(files: Sequence[Path]) -> Journal:
    """Return the journal of an unfinished output of these files, which need not be there.

    Raises:
        WriteError: something else has its name, or that of a partial file.
    """
    # Bytes that lost their line are written again, so that a line need not wait for the disk.
    journal = Journal(files[0].with_name(f"{files[0].name}.journal"), sync=False)
    journal.check_own()
    for partial in map(_partial, files) if journal.identity is None else ():
        if holds_something(partial):
            raise in_the_way(partial)
    return journal


def _partial(file: Path) -> Path:
    return file.with_name(f"{file.name}.partial")


def _bounds(region: Region) -> tuple[tuple[int, int], tuple[int, int]]:
    return (region.file, region.offset), (region.file, region.offset + region.num_bytes)


def _record(region: Region, digest: str) -> Record:
    """Return the line of the journal that says: these bytes are on the disk and have this hash."""
    return {**vars(region), "sha256": digest}


def _finished_spans(records: list[Record]) -> tuple[dict[Region, str], bool]:
    """Return the SHA-256 of every span that was written, and whether all of them were."""
    hashes: dict[Region, str] = {}
    with suppress(ValueError, KeyError, TypeError):  # what follows a line that is not ours is written again
        for record in (record for record in records if "sealed" not in record):
            hashes[Region(*(int(record[key]) for key in ("file", "offset", "num_bytes")))] = str(record["sha256"])
    return hashes, any("sealed" in record for record in records)
