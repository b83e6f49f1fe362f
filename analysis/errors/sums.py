"""Sums over the weights of some experts, which make up the error table, and the journal that keeps them.

They are added up in any order of parts, and are exact in JSON, so that a part that was measured before an interruption
counts as if it had been measured now.
"""

from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Self

import torch

from dynquant.errors import PlanError
from dynquant.storage.journal import Journal, Record

SumNumbers = list[list[list[float]] | None]
"""Squared, weighted and output sums as JSON holds them."""
_ROWS_AT_ONCE = 1 << 22
"""Weights of rows whose errors are computed at a time."""


@dataclass(frozen=True)
class ErrorSums:
    """Squared errors and energies of E experts in one type, float64 [E, 2] with the error first."""

    squared: torch.Tensor
    weighted: torch.Tensor
    outputs: torch.Tensor | None = None
    """Sums over the outputs on held-back inputs; None without any."""

    @classmethod
    def measured(
        cls, weights: torch.Tensor, decoded: torch.Tensor, scale: torch.Tensor, samples: torch.Tensor | None
    ) -> "ErrorSums":
        """Sum over weights and decoded [E, R, C], under scale [E, C], and over outputs of samples [E, S, C] or None."""
        count, _, columns = weights.shape
        step = max(1, _ROWS_AT_ONCE // (count * columns))
        squared, weighted, outputs = (torch.zeros(count, 2, dtype=torch.float64) for _ in range(3))
        for rows, decoded_rows in zip(weights.split(step, 1), decoded.split(step, 1), strict=True):
            lost = rows - decoded_rows
            squared += torch.stack([_energy(lost), _energy(rows)], -1)
            weighted += torch.stack([_energy(lost, scale), _energy(rows, scale)], -1)
            if samples is not None:
                outputs += torch.stack([_energy(samples @ part.transpose(1, 2)) for part in (lost, rows)], -1)
        return cls(squared, weighted, None if samples is None else outputs)

    @classmethod
    def joined(cls, parts: Iterable["ErrorSums"]) -> "ErrorSums":
        """Put the experts of several parts one after the other; all or none of them have outputs."""
        parts = list(parts)
        outputs = [part.outputs for part in parts if part.outputs is not None]
        return cls(
            torch.cat([part.squared for part in parts]),
            torch.cat([part.weighted for part in parts]),
            torch.cat(outputs) if outputs else None,
        )

    def numbers(self) -> SumNumbers:
        """Return the sums as JSON holds them."""
        return [None if sums is None else sums.tolist() for sums in (self.squared, self.weighted, self.outputs)]

    @classmethod
    def from_numbers(cls, numbers: SumNumbers, num_experts: int) -> "ErrorSums":
        """Read what `numbers` returned.

        Raises:
            ValueError, TypeError: they are not sums of so many experts.
        """
        tensors = [None if sums is None else torch.tensor(sums, dtype=torch.float64) for sums in numbers]
        if any(sums is not None and sums.shape != (num_experts, 2) for sums in tensors):
            raise ValueError(f"not the sums of {num_experts} experts")
        squared, weighted, outputs = tensors
        if squared is None or weighted is None:
            raise ValueError("sums of weights are missing")
        return cls(squared, weighted, outputs)


def _energy(matrices: torch.Tensor, column_scale: torch.Tensor | None = None) -> torch.Tensor:
    """Return the sum of squares of each matrix in [E, R, C], columns weighted by [E, C]; float64 [E]."""
    columns = matrices.square().sum(dim=1, dtype=torch.float64)  # [E, C]
    return (columns if column_scale is None else columns * column_scale.double()).sum(-1)


Sums = Mapping[str, ErrorSums]
"""Type -> sums of the same experts."""


class ErrorJournal:
    """The journal of an unfinished table, which is to be written to `table_path`.

        errors.json.journal
            {"identity": {...}}                                what decides the numbers; other ones start anew
            {"name": "blk.3.ffn_up_exps.weight", "experts": [4, 8], "sums": {"Q4_K": [[...], [...], [...]], ...}}

    A line is some experts of a tensor (or a matrix) in all its types, and is there before the next part is measured.
    A context manager: `with` closes the file.

    Args:
        identity: What decides the numbers, as strings. Parts of an interrupted run are kept only under an equal one.

    Raises:
        PlanError: the journal cannot be written.
    """

    def __init__(self, table_path: Path, identity: Mapping[str, str]) -> None:
        self._journal = Journal(table_path.with_name(f"{table_path.name}.journal"))
        self._parts: dict[tuple[str, int, int], Sums] = {}
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
    def num_parts(self) -> int:
        """Number of parts that an interrupted run left."""
        return len(self._parts)

    def get(self, name: str, experts: range, types: Collection[str]) -> Sums | None:
        """Return what an interrupted run has measured of these experts in these types."""
        sums = self._parts.get((name, experts.start, experts.stop))
        return sums if sums is not None and sums.keys() == set(types) else None

    def add(self, name: str, experts: range, sums: Sums) -> None:
        """Keep what was measured, on the disk.

        Raises:
            PlanError: it cannot be written.
        """
        numbers = {type_name: of_type.numbers() for type_name, of_type in sums.items()}
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
                sums = {str(key): ErrorSums.from_numbers(sums, stop - start) for key, sums in record["sums"].items()}
                self._parts[str(record["name"]), start, stop] = sums
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
