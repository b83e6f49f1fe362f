"""Sums over the weights of some experts, which make up the error table, and the journal that keeps them.

They are added up in any order of parts, and are exact in JSON, so that a part that was measured before an interruption
counts as if it had been measured now.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import NamedTuple

import torch

from dynquant.errors import PlanError
from dynquant.storage.journal import Journal, Record

_ROWS_AT_ONCE = 1 << 22  # weights of rows whose errors are computed at a time


@dataclass(frozen=True)
class ErrorPart:
    """Unit of measuring: experts of the tensor `name` of `shape`, in all their types."""

    name: str
    shape: tuple[int, ...]
    experts: range
    types: tuple[str, ...]

    @property
    def num_weights(self) -> int:
        return len(self.experts) * prod(self.shape[-2:])


class ErrorSums(NamedTuple):
    """Squared errors and energies of E experts in one type, [E, 2] with the error first.

    Lists, as JSON has them: tensors of a few bytes, kept until the table is whole, would lie between the large ones,
    and memory that is freed around them is not joined. A 14 GB checkpoint took 23 GB.
    """

    squared: list[list[float]]
    weighted: list[list[float]]
    outputs: list[list[float]] | None = None  # sums over the outputs on held-back inputs; None without any
    checksum: int | None = None  # `formats.checksum` of all weights of the part; None in journals of earlier versions

    @classmethod
    def measured(
        cls, weights: torch.Tensor, decoded: torch.Tensor, scale: torch.Tensor, samples: torch.Tensor | None
    ) -> "ErrorSums":
        """Sum over weights and decoded [E, R, C], under scale [E, C], and over outputs of samples [E, S, C] or None."""
        count, _, columns = weights.shape
        step = max(1, _ROWS_AT_ONCE // (count * columns))  # differences of a whole stack would double its memory
        squared, weighted, outputs = (torch.zeros(count, 2, dtype=torch.float64) for _ in range(3))
        for rows, decoded_rows in zip(weights.split(step, 1), decoded.split(step, 1), strict=True):
            lost = rows - decoded_rows
            squared += torch.stack([_energy(lost), _energy(rows)], -1)
            weighted += torch.stack([_energy(lost, scale), _energy(rows, scale)], -1)
            if samples is not None:
                outputs += torch.stack([_energy(samples @ part.transpose(1, 2)) for part in (lost, rows)], -1)
        return cls(squared.tolist(), weighted.tolist(), None if samples is None else outputs.tolist())

    @classmethod
    def joined(cls, parts: Sequence["ErrorSums"]) -> "ErrorSums":
        """Put the experts of several parts one after the other; all or none of them have outputs."""
        *fields, checksums = zip(*parts, strict=True)
        squared, weighted, outputs = ([pair for sums in field for pair in sums or ()] for field in fields)
        return cls(squared, weighted, outputs or None, None if None in checksums else sum(checksums) % (1 << 64))

    def check(self, num_experts: int) -> None:
        """Raise ValueError or TypeError unless these are sums of so many experts."""
        for sums in (self.squared, self.weighted, *([] if self.outputs is None else [self.outputs])):
            if torch.tensor(sums, dtype=torch.float64).shape != (num_experts, 2):
                raise ValueError(f"not the sums of {num_experts} experts")
        if not isinstance(self.checksum, int | None):
            raise ValueError("not a checksum")


def _energy(matrices: torch.Tensor, column_scale: torch.Tensor | None = None) -> torch.Tensor:
    """Return the sum of squares of each matrix in [E, R, C], columns weighted by [E, C]; float64 [E]."""
    columns = matrices.square().sum(dim=1, dtype=torch.float64)  # [E, C]
    return (columns if column_scale is None else columns * column_scale.double()).sum(-1)


Sums = Mapping[str, ErrorSums]  # type -> sums of the same experts


class ErrorJournal(Journal):
    """The journal of an unfinished table, which is to be written to `table_path`.

        errors.json.journal
            {"identity": {...}}                                what decides the numbers; other ones start anew
            {"name": "blk.3.ffn_up_exps.weight", "experts": [4, 8], "sums": {"Q4_K": [[...], [...], [...]], ...}}

    A line is some experts of a tensor (or a matrix) in all its types, and is there before the next part is measured.

    Args:
        identity: What decides the numbers, as strings. Parts of an interrupted run are kept only under an equal one.

    Raises:
        PlanError: the journal cannot be written.
    """

    def __init__(self, table_path: Path, identity: Mapping[str, str]) -> None:
        super().__init__(table_path.with_name(f"{table_path.name}.journal"))
        self._parts: dict[tuple[str, int, int], Sums] = {}
        records = self.records if self.belongs_to(identity) else []  # of the interrupted run
        with self._refusing():
            self.start(identity, records[: self._take_over(records)])

    @property
    def num_parts(self) -> int:
        """Number of parts that an interrupted run left."""
        return len(self._parts)

    def sums_of(self, part: ErrorPart) -> Sums | None:
        """Return what an interrupted run has measured of a part."""
        sums = self._parts.get((part.name, part.experts.start, part.experts.stop))
        return sums if sums is not None and sums.keys() == set(part.types) else None

    def keep(self, part: ErrorPart, sums: Sums) -> None:
        """Put what was measured of a part on the disk, or raise PlanError."""
        with self._refusing():
            self.add({"name": part.name, "experts": [part.experts.start, part.experts.stop], "sums": sums})

    def _take_over(self, records: Sequence[Record]) -> int:
        """Take over what records say and return how many of them could be read."""
        for number, record in enumerate(records):
            try:
                start, stop = map(int, record["experts"])
                sums = {str(type_name): ErrorSums(*numbers) for type_name, numbers in record["sums"].items()}
                for of_type in sums.values():
                    of_type.check(stop - start)
            except (ValueError, KeyError, TypeError, AttributeError, ArithmeticError, RuntimeError):
                return number
            self._parts[str(record["name"]), start, stop] = sums
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
