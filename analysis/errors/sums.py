"""Sums over the weights of some experts, which make up the error table, and the journal that keeps them.

They are added up in any order of parts, and are exact in JSON, so that a part that was measured before an interruption
counts as if it had been measured now.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any, NamedTuple

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


class Sample(NamedTuple):
    """Experts that stand for a whole tensor; their sums are estimates, from some rows of each."""

    experts: list[int]
    chances: list[float]  # of each to be drawn
    weighted_error_se: float


class ErrorSums(NamedTuple):
    """Squared errors and energies of E experts in one type, [E, 2] with the error first.

    Lists, as JSON has them: tensors of a few bytes, kept until the table is whole, would lie between the large ones,
    and memory that is freed around them is not joined. A 14 GB checkpoint took 23 GB.
    """

    squared: list[list[float]]
    weighted: list[list[float]]
    outputs: list[list[float]] | None = None  # sums over the outputs on held-back inputs; None without any
    checksum: int | None = None  # `formats.checksum` of all weights of the part; None in journals of earlier versions
    sample: Sample | None = None  # None: every weight of the part was measured

    @classmethod
    def of(
        cls, lost: torch.Tensor, energies: torch.Tensor, checksum: int | None, sample: Sample | None = None
    ) -> "ErrorSums":
        """Return them from those of each expert [2 or 3, E], squared, weighted and perhaps of outputs."""
        pairs = torch.stack([lost, energies], -1).tolist()
        return cls(pairs[0], pairs[1], pairs[2] if len(pairs) > 2 else None, checksum, sample)

    @classmethod
    def joined(cls, parts: Sequence["ErrorSums"]) -> "ErrorSums":
        """Put the experts of several parts one after the other; all or none of them have outputs."""
        if len(parts) == 1:
            return parts[0]
        *fields, checksums, _ = zip(*parts, strict=True)
        squared, weighted, outputs = ([pair for sums in field for pair in sums or ()] for field in fields)
        return cls(squared, weighted, outputs or None, None if None in checksums else sum(checksums) % (1 << 64))

    @classmethod
    def added(cls, parts: Sequence[tuple[range, "ErrorSums"]], num_experts: int) -> "ErrorSums":
        """Add parts up, each with its experts; one expert may lie in several. All or none of them have outputs."""
        totals = torch.zeros(3, num_experts, 2, dtype=torch.float64)
        for experts, sums in parts:
            for total, pairs in zip(totals, sums[:3], strict=True):
                if pairs is not None:
                    total[experts.start : experts.stop] += torch.tensor(pairs, dtype=torch.float64)
        squared, weighted, outputs = totals.tolist()
        return cls(squared, weighted, outputs if all(sums.outputs for _, sums in parts) else None)

    @classmethod
    def read(cls, numbers: Sequence[Any], num_experts: int) -> "ErrorSums":
        """Read what JSON made of the sums of so many experts, or of a sample of them; raise ValueError or TypeError."""
        sums = cls(*numbers)
        if sums.sample is not None:
            sample = Sample(*sums.sample)
            if len({expert for expert in sample.experts if 0 <= expert < num_experts}) != len(sample.chances):
                raise ValueError(f"not a sample of {num_experts} experts")
            num_experts, sums = len(sample.experts), sums._replace(sample=sample)
        for pairs in (sums.squared, sums.weighted, *([] if sums.outputs is None else [sums.outputs])):
            if torch.tensor(pairs, dtype=torch.float64).shape != (num_experts, 2):
                raise ValueError(f"not the sums of {num_experts} experts")
        if not isinstance(sums.checksum, int | None):
            raise ValueError("not a checksum")
        return sums


def row_sums(matrices: torch.Tensor, metric: torch.Tensor, samples: torch.Tensor | None) -> torch.Tensor:
    """Return sums of each row of [E, R, C]: of squares, under the metric, and over outputs of samples [E, S, C].

    The metric is a scale of columns [E, C], or the second moments of the inputs, [E, C, C] or one [1, C, C] for all.
    The result is float64 [2 or 3, E, R].
    """
    step = max(1, _ROWS_AT_ONCE // (matrices.shape[0] * matrices.shape[2]))  # a whole stack would double its memory
    return torch.cat([_of_rows(rows, metric, samples) for rows in matrices.split(step, 1)], -1)


def _of_rows(rows: torch.Tensor, metric: torch.Tensor, samples: torch.Tensor | None) -> torch.Tensor:
    squares = rows.square()
    if metric.ndim == 2:
        weighted = (squares @ metric.to(squares.dtype).unsqueeze(-1)).squeeze(-1)
    else:
        weighted = ((rows @ metric) * rows).sum(-1, dtype=torch.float64)
    sums = [squares.sum(-1, dtype=torch.float64), weighted.double().clamp_min(0)]
    if samples is not None:
        sums.append((samples @ rows.transpose(1, 2)).square().sum(1, dtype=torch.float64))
    return torch.stack(sums)


Sums = Mapping[str, ErrorSums]  # type -> sums of the same experts


def journal_path(table: Path) -> Path:
    """Return the name of the journal of an unfinished table."""
    return table.with_name(f"{table.name}.journal")


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
        WriteError: something else has its name.
    """

    def __init__(self, table_path: Path, identity: Mapping[str, str]) -> None:
        super().__init__(journal_path(table_path))
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
                by_type = record["sums"].items()
                sums = {str(type_name): ErrorSums.read(numbers, stop - start) for type_name, numbers in by_type}
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
