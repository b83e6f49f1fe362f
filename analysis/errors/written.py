"""Errors of the blocks that an export writes: all weights are encoded there, so that they are exact at little cost.

They take the place of estimates in the table beside the plan, from which the next plan is made. What parts of tensors
lose is kept in a journal beside the output until the export is done, so that a run that goes on has it as well:

    {"identity": {...}}                                                   what decides the blocks
    {"name": "blk.3.ffn_up_exps.weight", "rows": [0, 4096], "sums": [...]}   rows of all experts, one after the other
"""

from collections.abc import Mapping
from contextlib import suppress
from math import prod
from pathlib import Path
from threading import Lock
from typing import Any, Self

from torch import Tensor

from dynquant.analysis.errors.measure import ErrorMeter, errors_of
from dynquant.analysis.errors.sampling import stacked
from dynquant.analysis.errors.sums import ErrorSums
from dynquant.analysis.errors.table import ErrorRow, ErrorTable
from dynquant.encoding.interface import Sides
from dynquant.encoding.parts import TensorPart
from dynquant.errors import ClusterError, DynquantError, PlanError, WriteError
from dynquant.evaluation.statistics import shown_kl
from dynquant.session import Session
from dynquant.storage.journal import Journal, Record

Span = tuple[int, int]  # rows of all experts, counted one expert after the other


class WrittenErrors:
    """Exact errors of the rows of a table that an export with `types`, tensor -> stored type, is about to write.

    A context manager: what an export that cannot go on has measured is removed.
    """

    def __init__(
        self, table_path: Path, origin: tuple[str, ...], meter: ErrorMeter, types: Mapping[str, str], journal_path: Path
    ) -> None:
        self.table_path, self.origin, self.meter, self.types = table_path, origin, meter, types
        self._journal = Journal(journal_path, sync=False)
        self._lock = Lock()  # parts are encoded side by side
        self._sums: dict[str, dict[Span, ErrorSums]] = {}

    def begin(self, identity: Record) -> Self:
        """Take over what an interrupted export of this identity has measured, or start anew."""
        for record in self._journal.records if self._journal.belongs_to(identity) else []:
            with suppress(ValueError, TypeError, LookupError):  # measured again, or the estimate stays
                name, span = str(record["name"]), (int(record["rows"][0]), int(record["rows"][1]))
                self._take(name, span, ErrorSums.read(record["sums"], len(self._experts(name, span))))
        records = [_record(name, *sums) for name, spans in self._sums.items() for sums in spans.items()]
        try:
            self._journal.start(identity, records)
        except OSError as error:
            raise WriteError(f"{self._journal.path} cannot be created: {error.strerror}.") from error
        return self

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self._journal.close()
        if kind is not None and issubclass(kind, DynquantError) and not issubclass(kind, WriteError | ClusterError):
            self._journal.remove()

    def add(self, part: TensorPart, arguments: Mapping[str, Any], packed: Tensor) -> None:
        """Measure blocks that were just encoded from these arguments of `Encoder.encode`."""
        if self.types.get(part.name) != part.quant_type.name:
            return
        sums = self.meter.sums_of_blocks(part, arguments["weights"], packed, Sides.of(arguments["hessian"]).inputs)
        first = part.experts.start * stacked(part.shape)[1] + part.rows.start
        span = first, first + len(part.experts) * len(part.rows)
        with self._lock:
            self._take(part.name, span, sums)
            with suppress(OSError):  # a full disk: whoever writes the output says so
                self._journal.add(_record(part.name, span, sums))

    def save(self, session: Session) -> None:
        """Enter the errors of all tensors that were measured whole into the table, and say what that changed."""
        with suppress(PlanError):  # removed meanwhile, or replaced by what is no such table
            before = ErrorTable.load(self.table_path)
            rows = [row for row in map(self._exact, before.rows) if row is not None]
            if before.origin == self.origin and rows:
                after = before.with_measured(rows)
                try:
                    after.save(self.table_path)
                except WriteError as error:
                    session.note(f"{self.table_path} keeps its estimates: {error}")
                else:
                    session.note(self._described(before, after, len(rows)))
        self._journal.remove()

    def _described(self, before: ErrorTable, after: ErrorTable, count: int) -> str:
        types = {name: stored for name, stored in self.types.items() if stored in before.tensors().get(name, {})}
        costs = (table.price_of(types) for table in (before, after))
        now = " -> ".join(f"{shown_kl(cost.kl)} ± {shown_kl(cost.se)}" for cost in costs)
        return (
            f"{self.table_path} has the exact errors of {count} tensors as they were written, in place of estimates; "
            f"{before.cost_name} of these: {now}"
        )

    def _exact(self, row: ErrorRow) -> ErrorRow | None:
        """Return the row of a tensor in the type that was written, measured whole; None for others."""
        spans = sorted(self._sums.get(row.name, {}).items())
        shape = stacked(self.meter.model.source.info(row.name).shape) if spans else (0, 0, 0)
        ends = [0, *(last for (_, last), _ in spans)]
        is_whole = ends[-1] == prod(shape[:2]) and all(
            span[0] == end for (span, _), end in zip(spans, ends, strict=False)
        )
        if not spans or not is_whole or self.types.get(row.name) != row.type:
            return None
        inputs = self.meter.stats.input_of(row.name)
        joined = ErrorSums.added([(self._experts(row.name, span), sums) for span, sums in spans], shape[0])
        return row.model_copy(update=errors_of(joined, inputs, shape[0]))

    def _experts(self, name: str, span: Span) -> range:
        num_rows = stacked(self.meter.model.source.info(name).shape)[1]
        return range(span[0] // num_rows, -(-span[1] // num_rows))

    def _take(self, name: str, span: Span, sums: ErrorSums) -> None:
        """Take down sums, in place of those of earlier parts that had some of these rows."""
        others = {(a, b): of for (a, b), of in self._sums.get(name, {}).items() if b <= span[0] or span[1] <= a}
        self._sums[name] = others | {span: sums}


def _record(name: str, span: Span, sums: ErrorSums) -> Record:
    return {"name": name, "rows": span, "sums": sums}
