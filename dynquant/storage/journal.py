"""An append-only record of what an unfinished run has done, from which the next run goes on.

    {"identity": {...}}        what decides the result; a run with another one cannot go on here
    {...}                      one record a line, written when what it speaks of is done

A kill can cut the last line short. It does not count, and `start` drops it.

The first line shows that a journal is ours, and so is what it speaks of. Something else of this name is left alone.
"""

import json
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, BinaryIO, Self, TextIO

from dynquant.errors import WriteError
from dynquant.storage.atomic import replacing
from dynquant.storage.strict_json import parse_json

Record = Mapping[str, Any]
_LONGEST_IDENTITY = 1 << 24
"""Bytes; of a file of something else, which may be large, no more are read."""


class Journal:
    """The journal at `path`: what an interrupted run left is read at once; `start` opens it for `add`.

    A context manager: `with` closes the file. OSErrors pass as they come; callers say what they mean for the run.

    Args:
        sync: Waits until every record is on the disk. False where nothing is lost with a record but time.
    """

    def __init__(self, path: Path, *, sync: bool = True) -> None:
        self.path = path
        self.identity: Record | None = None
        """Identity of the interrupted run; None without one."""
        self.records: list[Record] = []
        """Records of the interrupted run, up to the first line that is cut short."""
        self._sync = sync
        self._file: BinaryIO | None = None
        if path.is_file():
            with path.open(encoding="utf-8", errors="replace") as file:  # a kill may cut a character in two
                self._read(file)
        self._is_foreign = self.identity is None and holds_something(path)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def belongs_to(self, identity: Record) -> bool:
        """Return whether the interrupted run had this identity."""
        return self.identity == json.loads(json.dumps(identity))  # JSON knows no tuples

    def check_own(self) -> None:
        """Raise WriteError for something else, which has the name of the journal."""
        if self._is_foreign:
            raise in_the_way(self.path)

    def start(self, identity: Record, records: Iterable[Record]) -> None:
        """Rewrite the journal in one step with the records that still hold, and open it for more.

        Raises:
            WriteError: something else has its name.
        """
        self.check_own()
        self.records = list(records)
        with replacing(self.path) as temporary:
            temporary.write_bytes(b"".join(map(_line, ({"identity": identity}, *self.records))))
        # Unbuffered: a full disk must not fail once more at closing.
        self._file = self.path.open("ab", buffering=0)  # type: ignore[assignment]

    def add(self, record: Record) -> None:
        """Append a record."""
        assert self._file is not None, "the journal was not started"
        write_all(self._file, _line(record))
        if self._sync:
            os.fsync(self._file.fileno())
        self.records.append(record)

    def close(self) -> None:
        """Close the file, which stays for the next run."""
        if self._file is not None:
            self._file.close()
            self._file = None

    def remove(self) -> None:
        """Close and delete the file, and forget what it said: the run is finished, or not to be continued."""
        self.check_own()
        self.close()
        self.path.unlink(missing_ok=True)
        self.identity, self.records = None, []

    def _read(self, file: TextIO) -> None:
        try:
            self.identity = dict(_parsed(file.readline(_LONGEST_IDENTITY))["identity"])
            for line in file:
                self.records.append(dict(_parsed(line)))
        except (ValueError, KeyError, TypeError, IndexError):
            return


def differing_key(stored: Record, identity: Record) -> str | None:
    """Return the first key in which two identities differ, or None."""
    return next((key for key in (*identity, *stored) if stored.get(key) != identity.get(key)), None)


def holds_something(path: Path) -> bool:
    """Return whether something would be lost with `path`: all but an empty file, or none."""
    return os.path.lexists(path) and not (path.is_file() and path.stat().st_size == 0)


def in_the_way(path: Path) -> WriteError:
    """Return the refusal of something else that has the name of work in progress."""
    return WriteError(
        f"{path} is in the way: work in progress has this name, and it is none of dynquant's, so it would be lost. "
        "Move it, or give another name for the output."
    )


def write_all(file: BinaryIO, data: memoryview | bytes) -> None:
    """Write all of `data` to an unbuffered file, which may accept only a part of it at a time."""
    rest = memoryview(data)
    while rest:
        rest = rest[file.write(rest[: 1 << 24]) :]


def _parsed(line: str) -> Any:
    value = parse_json(line)
    json.dumps(value, allow_nan=False)  # 1e999 is read as infinite, of which nobody knows what to do
    return value


def _line(record: Record) -> bytes:
    return json.dumps(record).encode() + b"\n"
