"""What an interrupted error table has measured: a journal beside the table's file, until that is written.

    errors.json.journal
        {"identity": {...}}                                  what decides the numbers; other ones start anew
        {"name": "blk.3.ffn_up_exps.weight", "experts": [4, 8], "sums": {"Q4_K": [[...], [...], [...]], ...}}

A line is some experts of a tensor (or a matrix) in all its types, and is there before the next part is measured. A line
that a kill cut short does not count.
"""

from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Self

from dynquant.analysis.errors.sums import ErrorSums
from dynquant.errors import PlanError
from dynquant.storage.journal import Journal, Record

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
        self._journal = Journal(table_path.with_name(f"{table_path.name}.journal"))
        self._found: dict[tuple[str, int, int], Sums] = {}
        records = self._journal.records if self._journal.belongs_to(dict(identity)) else []
        with self._refusing():
            self._journal.start(dict(identity), records[: self._read(records)])

    @property
    def path(self) -> Path:
        """Name of the journal's file."""
        return self._journal.path

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._journal.close()

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
        with self._refusing():
            self._journal.add({"name": name, "experts": [experts.start, experts.stop], "sums": numbers})

    def remove(self) -> None:
        """Delete the journal: the table is written."""
        self._journal.remove()

    def _read(self, records: Sequence[Record]) -> int:
        """Take over what records say and return how many of them could be read."""
        for number, record in enumerate(records):
            try:
                start, stop = map(int, record["experts"])
                sums = {str(key): ErrorSums.from_numbers(one, stop - start) for key, one in record["sums"].items()}
                self._found[str(record["name"]), start, stop] = sums
            except (ValueError, KeyError, TypeError, AttributeError):
                return number
        return len(records)

    @contextmanager
    def _refusing(self) -> Iterator[None]:
        """Context manager: a journal that cannot be written is refused with the way out."""
        try:
            yield
        except OSError as error:
            raise PlanError(
                f"{self.path}, which keeps the errors measured so far, cannot be written ({error.strerror}). Free some "
                "space and run the same command again to go on, or choose another output directory."
            ) from error
