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
import os
import shutil
from bisect import bisect_right
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, Self

from dynquant.errors import ExportError
from dynquant.storage.journal import Journal, Record, differing_key, write_all

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

    def record(self, digest: str) -> Record:
        """Return the line of the journal that says: these bytes are on the disk and have this hash."""
        return {"file": self.file, "offset": self.offset, "num_bytes": self.num_bytes, "sha256": digest}


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
        # Bytes that lost their line are written again, so that a line need not wait for the disk.
        self._journal = Journal(self.journal_path, sync=False)
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
            write_all(file, data)
            os.fsync(file.fileno())
            self._journal.add(region.record(hashlib.sha256(data).hexdigest()))
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
            raise self._another_run(self._journal.identity, identity)
        moved = {i for i in range(len(self.paths)) if is_sealed and self._was_moved(i, hashes)}
        intact: dict[Region, str] = {}
        for index, (path, partial) in enumerate(zip(self.paths, self._partials, strict=True)):
            intact |= self._intact(index, path if index in moved else partial, hashes)
        self.finished = self._covered(intact)
        self._check_space()
        records = [span.record(digest) for span, digest in intact.items()]
        try:
            self._files = {i: self._open_partial(i) for i in range(len(self.paths)) if i not in moved}
            self._journal.start(identity, records + [{"sealed": True}] * is_sealed)
        except OSError as error:
            self.close()
            raise ExportError(
                f"{self.paths[0]} cannot be created: {error.strerror}. Choose a directory with space that can be "
                "written to."
            ) from error

    def _was_moved(self, index: int, hashes: Mapping[Region, str]) -> bool:
        expected = {name for name, region in self._regions.items() if region.file == index}
        return (
            not self._partials[index].exists()
            and self._covered(self._intact(index, self.paths[index], hashes)) == expected
        )

    def _intact(self, index: int, path: Path, hashes: Mapping[Region, str]) -> dict[Region, str]:
        """Return the journaled spans of one file whose bytes still have their hash."""
        if not path.is_file() or path.stat().st_size != self._sizes[index]:
            return {}
        with path.open("rb") as file:
            return {
                span: digest for span, digest in hashes.items() if span.file == index and _digest(file, span) == digest
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
        names = set()
        for name, region in self._regions.items():
            place = bisect_right(starts, (region.file, region.offset)) - 1
            if place >= 0 and runs[place].file == region.file and runs[place].end >= region.end:
                names.add(name)
        return names

    def _open_partial(self, index: int) -> BinaryIO:
        path = self._partials[index]
        file = open(path, "r+b" if path.exists() else "w+b", buffering=0)  # noqa: SIM115
        file.truncate(self._sizes[index])
        return file  # type: ignore[return-value]

    @property
    def _missing_bytes(self) -> int:
        return sum(region.num_bytes for name, region in self._regions.items() if name not in self.finished)

    @property
    def _bytes_to_allocate(self) -> int:
        """Return the bytes that the files will take beyond what their partial forms have on the disk already."""
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

    def _another_run(self, stored: Record, identity: Record) -> ExportError:
        key = differing_key(stored, identity) or ""
        return ExportError(
            f"{self.journal_path} belongs to an interrupted export with another {key.replace('_', ' ')} "
            f"({stored.get(key, 'none')!s:.16}, now {identity.get(key, 'none')!s:.16}); its tensors cannot be used for "
            "this one. Finish it with its own plan and options, start over with --no-resume, or export to another name."
        )

    def _failure(self, error: OSError, what: str) -> ExportError:
        directory = self.paths[0].parent
        cause = f"The disk that holds {directory} is full" if error.errno == errno.ENOSPC else f"{error.strerror}"
        return ExportError(
            f"{cause}: {what}. {len(self.finished)} of {len(self._regions)} parts are kept in "
            f"{self._partials[0].name} and {self.journal_path.name}; {self._missing_bytes:,} bytes are missing. Repair "
            "the cause and run the same command again to go on, or delete these files."
        )


def _digest(file: BinaryIO, region: Region) -> str:
    digest, rest = hashlib.sha256(), region.num_bytes
    file.seek(region.offset)
    while rest and (part := file.read(min(rest, _COPY_BYTES))):
        digest.update(part)
        rest -= len(part)
    return digest.hexdigest()


def _finished_spans(records: Iterable[Record]) -> tuple[dict[Region, str], bool]:
    """Return the SHA-256 of every span that was written, and whether all of them were."""
    hashes: dict[Region, str] = {}
    is_sealed = False
    for record in records:
        try:
            if "sealed" in record:
                is_sealed = True
            else:
                span = Region(int(record["file"]), int(record["offset"]), int(record["num_bytes"]))
                hashes[span] = str(record["sha256"])
        except (ValueError, KeyError, TypeError):
            break
    return hashes, is_sealed
