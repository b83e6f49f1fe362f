"""The error table: what every candidate type does to every tensor.

For a tensor W, its encoding Wq and its importance w_j = E[x_j^2] (per expert for stacked tensors), a row holds

    relative_rms      sqrt( sum (W - Wq)^2 / sum W^2 )
    weighted_error    sum_j w_j (W - Wq)_j^2 / sum_j w_j W_j^2          (what the encoders minimise)
    activation_error  ||X (W - Wq)^T||_F / ||X W^T||_F                  on held-back activations X

With second moments H of the inputs, which the dynquant encoder works with, it minimises e H e^T over rows e of W - Wq,
and `weighted_error` is sum e H e^T / sum w H w^T: the relative squared error of the output, which an error that avoids
the directions of the inputs keeps small; the diagonal alone would count such an error as large.

Errors are those of stored bytes: the output of the table's encoder, decoded; `analyze`, `plan` and `export` have the
same one by default. Unless `--exact` is given they are estimated from rows drawn at random, with the standard error of
`weighted_error`; a row that has none is exact, every weight was measured. `export` enters exact errors of the types
that it writes into the table beside its plan (`written`). Written as errors.json and errors.csv.
"""

import csv
import io
from collections.abc import Collection, Iterable, Mapping
from functools import cached_property
from math import hypot, isfinite, sqrt
from pathlib import Path
from statistics import median
from typing import Literal, NamedTuple

from pydantic import ConfigDict, Field

from dynquant import __version__
from dynquant.checkpoints.tensor_roles import Role
from dynquant.errors import PlanError
from dynquant.formats.quant_types import QUANT_TYPES
from dynquant.storage.atomic import write_atomically
from dynquant.storage.documents import FrozenRecord, read_document
from dynquant.storage.file_names import table_beside

SCHEMA_VERSION = 1
CLOSED_FORM = "closed-form"


class ErrorRow(FrozenRecord):
    """One tensor in one type. `per_expert_*` have one number an expert, None if it was not drawn or has no samples."""

    model_config = ConfigDict(serialize_by_alias=True, validate_by_alias=True, validate_by_name=True)

    name: str
    role: Role
    layer: int | None
    type: str
    stands_for: tuple[str, ...] = Field((), alias="wanted")  # candidate types that rows of this length store as `type`
    bytes: int
    relative_rms: float
    weighted_error: float
    weighted_error_se: float | None = None  # standard error of `weighted_error`; None where every weight was measured
    weighted_energy: float  # denominator of `weighted_error` per token: sum_j w_j W_j^2, the output's mean squared norm
    activation_error: float | None = None
    per_expert_weighted_error: tuple[float | None, ...] = ()
    per_expert_activation_error: tuple[float | None, ...] = ()


class Price(FrozenRecord):
    """KL that a tensor in a type adds, in nats per token, with its standard error."""

    kl: float
    se: float


class ErrorTable(FrozenRecord):
    """All rows of one model, with the identity of what they were measured on."""

    schema_version: Literal[1] = SCHEMA_VERSION
    tool_version: str = __version__
    model: str
    fingerprint: str
    stats_hash: str
    encoder: str
    types: tuple[str, ...]  # candidate types as they were asked for, before row-length fallbacks
    rows: tuple[ErrorRow, ...]
    moments: str = ""  # identity of the second moments that encoder and errors took into account
    seed: int | None = None  # of the rows that were drawn; None where every weight was measured
    checksums: dict[str, str] = Field(default_factory=dict)  # name -> `formats.checksum` of the weights, hexadecimal
    sensitivity: dict[str, float] = Field(default_factory=dict)  # name -> nats of KL per unit of `weighted_error`
    sensitivity_se: dict[str, float] = Field(default_factory=dict)  # standard errors of `sensitivity`, over windows
    prices: dict[str, dict[str, dict[str, Price]]] = Field(default_factory=dict)  # method -> tensor -> type
    priced_by: str = CLOSED_FORM  # which of the prices `cost` gives

    @property
    def cost_name(self) -> str:
        """Name of what `cost` estimates, for plans and plots."""
        if self.priced_by in self.prices:
            return f"predicted KL (nats per token) by {self.priced_by}"
        return "predicted KL (nats per token)" if self.sensitivity else "importance-weighted error, summed over tensors"

    def cost(self, row: ErrorRow) -> float:
        """Return what a planner should minimise the sum of: predicted KL where that was measured."""
        prices = self.prices.get(self.priced_by)
        return self.closed_form_cost(row) if prices is None else prices[row.name][row.type].kl

    def cost_se(self, row: ErrorRow) -> float:
        """Return the standard error of `cost`; 0 where there is none to give."""
        prices = self.prices.get(self.priced_by)
        if prices is not None:
            return prices[row.name][row.type].se
        return hypot(self.sensitivity_se.get(row.name, 0.0) * row.weighted_error, self.sampling_se(row))

    def sampling_se(self, row: ErrorRow) -> float:
        """Return the part of the closed form's standard error that comes from measuring drawn rows alone."""
        return self._closed_form_price(row) * (row.weighted_error_se or 0.0)

    def total(self, rows: Iterable[ErrorRow]) -> Price:
        """Add the costs of one row of each tensor together; their errors are taken to be independent."""
        rows = list(rows)
        return Price(kl=sum(self.cost(row) for row in rows), se=sqrt(sum(self.cost_se(row) ** 2 for row in rows)))

    def price_of(self, types: Mapping[str, str]) -> Price:
        """Return the `total` of a plan, tensor -> stored type; all of them are measured."""
        tensors = self.tensors()
        return self.total(tensors[name][type_name] for name, type_name in types.items())

    def median_output_error(self, type_name: str, names: Iterable[str]) -> float | None:
        """Return the median `activation_error` of tensors in a wanted type; None where none was measured."""
        rows = (self.row(name, type_name) for name in names)
        errors = [row.activation_error for row in rows if row is not None and row.activation_error is not None]
        return median(errors) if errors else None

    def closed_form_cost(self, row: ErrorRow) -> float:
        """Return sensitivity times relative error.

        Without any sensitivity, every tensor's relative error counts alike. A tensor that alone has none takes the
        median.
        """
        return self._closed_form_price(row) * row.weighted_error

    def _closed_form_price(self, row: ErrorRow) -> float:
        """Return the cost of one unit of `weighted_error`."""
        return self.sensitivity.get(row.name, self._median_sensitivity) if self.sensitivity else 1.0

    @cached_property
    def _median_sensitivity(self) -> float:
        return median(self.sensitivity.values())

    def row(self, name: str, type_name: str) -> ErrorRow | None:
        """Return the row of a tensor in a type, or in the type stored in its place when the row length does not fit."""
        return self._by_key.get((name, type_name))

    @cached_property
    def _by_key(self) -> dict[tuple[str, str], ErrorRow]:
        # Two types may stand for one that does not fit; llama.cpp stores the larger.
        by_size = sorted(self.rows, key=lambda row: row.bytes)
        by_wanted_type = {(row.name, name): row for row in by_size for name in row.stands_for}
        return by_wanted_type | {(row.name, row.type): row for row in self.rows}  # a type that is stored itself wins

    def tensors(self) -> dict[str, dict[str, ErrorRow]]:
        """Return the rows by tensor name and type name, in table order."""
        return self._by_tensor

    @cached_property
    def _by_tensor(self) -> dict[str, dict[str, ErrorRow]]:
        rows: dict[str, dict[str, ErrorRow]] = {}
        for row in self.rows:
            rows.setdefault(row.name, {})[row.type] = row
        return rows

    def restricted_to(self, types: Collection[str]) -> "ErrorTable":
        """Return the rows that these candidate types lead to; a tensor that would lose all of them keeps its own."""
        kept = {
            name: [row for row in rows.values() if set(types) & {row.type, *row.stands_for}] or list(rows.values())
            for name, rows in self.tensors().items()
        }
        return self.with_rows(row for rows in kept.values() for row in rows)

    def extended_by(self, other: "ErrorTable") -> "ErrorTable":
        """Return both tables' rows, tensor by tensor; a row that both hold stands for the wanted types of both.

        Prices that were measured for this table's types alone are dropped.

        Raises:
            PlanError: the weights of a tensor changed in between.
        """
        for name in self.checksums.keys() & other.checksums.keys():
            if self.checksums[name] != other.checksums[name]:
                raise PlanError(
                    f"The weights of `{name}` in {self.model} changed since the errors of other types were measured: "
                    f"their checksum was {self.checksums[name]}, now it is {other.checksums[name]}. Remove the error "
                    "table and the statistics, and plan again."
                )
        rows = {(row.name, row.type): row for row in self.rows}
        for row in other.rows:
            mine = rows.get((row.name, row.type))
            wanted_types = dict.fromkeys((*(mine.stands_for if mine else ()), *row.stands_for))
            better = mine if mine and mine.weighted_error_se is None else row  # exact ones stay
            rows[row.name, row.type] = better.model_copy(update={"stands_for": tuple(wanted_types)})
        order = {name: index for index, name in enumerate(self.tensors() | other.tensors())}
        types = tuple(dict.fromkeys((*self.types, *other.types)))
        merged = tuple(sorted(rows.values(), key=lambda row: order[row.name]))
        checksums = {**self.checksums, **other.checksums}
        origin = {"seed": self.seed if other.seed is None else other.seed, "checksums": checksums}
        return self._copy(types=types, rows=merged, **origin, prices={}, priced_by=CLOSED_FORM)

    def with_sensitivity(self, sensitivity: dict[str, float], errors: dict[str, float]) -> "ErrorTable":
        """Return the same rows, priced by these sensitivities, whose standard errors are `errors`."""
        return self._copy(sensitivity=sensitivity, sensitivity_se=errors)

    def with_prices(self, method: str, prices: dict[str, dict[str, Price]]) -> "ErrorTable":
        """Return the same rows, priced by `method`."""
        return self._copy(prices={**self.prices, method: prices}, priced_by=method)

    def with_measured(self, rows: Iterable[ErrorRow]) -> "ErrorTable":
        """Return the table with these rows in place of its own of the same tensors and types.

        Prices change as closed-form costs do, which all methods start from.
        """
        measured = {(row.name, row.type): row for row in rows}
        earlier = {(row.name, row.type): row.weighted_error for row in self.rows}
        ratios = {key: row.weighted_error / earlier[key] for key, row in measured.items() if earlier[key] > 0}
        prices = {
            method: {
                name: {
                    stored: Price(
                        kl=price.kl * ratios.get((name, stored), 1), se=price.se * ratios.get((name, stored), 1)
                    )
                    for stored, price in of_types.items()
                }
                for name, of_types in tensors.items()
            }
            for method, tensors in self.prices.items()
        }
        return self._copy(rows=tuple(measured.get((row.name, row.type), row) for row in self.rows), prices=prices)

    @property
    def origin(self) -> tuple[str, ...]:
        """Return statistics, weights, encoder and second moments that its errors rest on."""
        return self.stats_hash, self.fingerprint, self.encoder, self.moments

    @property
    def num_exact(self) -> int:
        """Number of rows whose errors are exact: every weight was measured."""
        return sum(row.weighted_error_se is None for row in self.rows)

    def is_priced_by(self, method: str) -> bool:
        """Return whether every row has a price by this method."""
        prices = self.prices.get(method, {})
        return method in self.prices and all(row.type in prices.get(row.name, {}) for row in self.rows)

    def remembering(self, other: "ErrorTable") -> "ErrorTable":
        """Return the same rows with the prices of a table that may have fewer; used where they cover all rows."""
        both = self._copy(prices={**self.prices, **other.prices}, priced_by=CLOSED_FORM)
        return both.priced(other.priced_by) if both.is_priced_by(other.priced_by) else both

    def priced(self, method: str) -> "ErrorTable":
        """Return the same rows, priced by a method whose prices it holds, or in closed form."""
        return self._copy(priced_by=method)

    def with_rows(self, rows: Iterable[ErrorRow]) -> "ErrorTable":
        """Return a table of other rows of the same tensors, priced the same way."""
        return self._copy(rows=tuple(rows))

    def _copy(self, **changes: object) -> "ErrorTable":
        """Make a new table, so that nothing that was derived from the old rows and cached comes along."""
        return ErrorTable.model_construct(**{name: getattr(self, name) for name in ErrorTable.model_fields} | changes)

    def save(self, path: Path) -> None:
        """Write errors.json and, beside it, the same rows as a tidy CSV."""
        super().save(path)
        columns = [name for name in ErrorRow.model_fields if not name.startswith(("per_expert", "stands_for"))]
        text = io.StringIO()
        writer = csv.DictWriter(text, columns, extrasaction="ignore", lineterminator="\n")
        writer.writeheader()
        writer.writerows(row.model_dump(mode="json") for row in self.rows)
        write_atomically(table_beside(path), text.getvalue())

    @classmethod
    def load(cls, path: Path, *, known_types: Collection[str] = QUANT_TYPES) -> "ErrorTable":
        """Read errors.json, or a table of other types that are known. Raises PlanError: missing or not an error
        table."""
        way_out = "Run `dynquant analyze`, or remove the file and plan again."
        return read_document(path, cls, "an error table", way_out, lambda table: _check_rows(table, known_types))


class Option(NamedTuple):
    """One type of one tensor (or of a group of tensors).

    The order of the fields decides what `min`, `max` and `sorted` of options mean: by bytes, then by cost.
    """

    bytes: int  # as the file stores it, with padding
    cost: float
    type: str


def lower_hull(options: Iterable[Option]) -> list[Option]:
    """Return the options on the lower convex hull of cost over bytes, by rising bytes and falling cost."""
    hull: list[Option] = []
    for option in sorted(options):
        if hull and option.cost >= hull[-1].cost:
            continue
        while len(hull) >= 2 and hull_slope(hull[-2], hull[-1]) <= hull_slope(hull[-1], option):
            hull.pop()  # it lies on or above the line between its neighbours
        hull.append(option)
    return hull


def hull_slope(smaller: Option, larger: Option) -> float:
    """Return the cost that each further byte saves."""
    return (smaller.cost - larger.cost) / (larger.bytes - smaller.bytes)


def _check_rows(table: ErrorTable, known_types: Collection[str]) -> None:
    """Raise ValueError for types that are not known, numbers that cannot be, and prices that are missing."""
    for row in table.rows:
        if row.type not in known_types:
            raise ValueError(f"`{row.name}` in the unknown type {row.type!r:.40}")
        errors = (row.weighted_error, row.relative_rms, row.weighted_error_se or 0.0)
        if row.bytes < 0 or not all(isfinite(x) and x >= 0 for x in errors):
            raise ValueError(f"`{row.name}` in {row.type} has impossible bytes or errors")
    numbers = (*table.sensitivity.values(), *table.sensitivity_se.values())
    if not all(map(isfinite, numbers)):
        raise ValueError("a sensitivity is NaN or infinite")
    prices = table.prices.get(table.priced_by)
    missing = next((r for r in table.rows if prices is not None and r.type not in prices.get(r.name, ())), None)
    if missing:
        raise ValueError(f"`{missing.name}` has no price in {missing.type} by {table.priced_by}")
