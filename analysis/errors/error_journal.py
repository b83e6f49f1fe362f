"""What an interrupted error table has measured: a journal beside the table's file, until that is written.

    errors.json.journal
        {"identity": {...}}                                  what decides the numbers; other ones start anew
        {"name": "blk.3.ffn_up_exps.weight", "experts": [4, 8], "sums": {"Q4_K": [[...], [...], [...]], ...}}

A line is some experts of a tensor (or a matrix) in all its types, and is there before the next part is measured. A line
that a kill cut short does not count.
"""

import json
import os
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import IO, Self

from dynquant.analysis.errors.sums import ErrorSums
from dynquant.errors import PlanError

Sums = Mapping[str, ErrorSums]
"""Type -> sums of the same experts."""


class ErrorJournal:
    """The journal of one table, which is to be written to `table_path`. A context manager: `with` closes the file.

    Args:
        identity: What decides the numbers, as strings. Parts of an interrupted run are kept only under an equal one.

    Raises:
        PlanError: the journal cannot be written.
    """

    def __init__(self, table_path: Path, identity: Mapping[str, str]) -> None:
        self.path = table_path.with_name(f"{table_path.name}.journal")
        self._found: dict[tuple[str, int, int], Sums] = {}
        first = json.dumps({"identity": dict(identity)}, sort_keys=True)
        kept = self._read(first)
        temporary = self.path.with_name(f".{self.path.name}.partial")
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            temporary.write_text("".join(f"{line}\n" for line in (first, *kept)))
            os.replace(temporary, self.path)
            self._file: IO[bytes] = self.path.open("ab", buffering=0)
        except OSError as error:
            raise self._failure(error) from error

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    @property
    def num_found(self) -> int:
        """Parts that an interrupted run left."""
        return len(self._found)

    def get(self, name: str, experts: range, types: Collection[str]) -> Sums | None:
        """What an interrupted run has measured of these experts in these types."""
        found = self._found.get((name, experts.start, experts.stop))
        return found if found is not None and found.keys() == set(types) else None

    def add(self, name: str, experts: range, sums: Sums) -> None:
        """Keep what was measured, on the disk.

        Raises:
            PlanError: it cannot be written.
        """
        numbers = {type_name: one.numbers() for type_name, one in sums.items()}
        line = json.dumps({"name": name, "experts": [experts.start, experts.stop], "sums": numbers})
        try:
            self._file.write(f"{line}\n".encode())
            os.fsync(self._file.fileno())
        except OSError as error:
            raise self._failure(error) from error

    def remove(self) -> None:
        """The table is written."""
        self._file.close()
        self.path.unlink(missing_ok=True)

    def _read(self, first: str) -> list[str]:
        """Lines that hold under the same identity, after the first."""
        lines = self.path.read_text(errors="replace").splitlines() if self.path.is_file() else []
        if not lines or lines[0] != first:
            return []
        for number, line in enumerate(lines[1:]):
            try:
                entry = json.loads(line)
                start, stop = map(int, entry["experts"])
                sums = {str(key): ErrorSums.from_numbers(one, stop - start) for key, one in entry["sums"].items()}
                self._found[str(entry["name"]), start, stop] = sums
            except (ValueError, KeyError, TypeError, AttributeError):
                return lines[1 : number + 1]
        return lines[1:]

    def _failure(self, error: OSError) -> PlanError:
        return PlanError(
            f"{self.path}, which keeps the errors measured so far, cannot be written ({error.strerror}). Free some "
            "space and run the same command again to go on, or choose another output directory."
        )
