"""The error table: what every candidate type does to every tensor.

For a tensor W, its encoding Wq and its importance w_j = E[x_j^2] (per expert for stacked tensors), a row holds

    relative_rms      sqrt( sum (W - Wq)^2 / sum W^2 )
    weighted_error    sum_j w_j (W - Wq)_j^2 / sum_j w_j W_j^2          (what the encoders minimise)
    activation_error  ||X (W - Wq)^T||_F / ||X W^T||_F                  on held-back activations X

Errors are always of the bytes that ship: the encoder's output, decoded. Written as errors.json and errors.csv.
"""

import csv
import io
import json
from pathlib import Path

from pydantic import BaseModel, ConfigDict, ValidationError

from dynquant import __version__
from dynquant.architecture import Role
from dynquant.errors import PlanError
from dynquant.plan import write_atomically

SCHEMA_VERSION = 1


class ErrorRow(BaseModel):
    """One tensor in one type. `per_expert_*` have one number an expert, None where an expert has no samples."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: str
    role: Role
    layer: int | None
    type: str
    bytes: int
    relative_rms: float
    weighted_error: float
    weighted_energy: float
    """The denominator of `weighted_error` per token: sum_j w_j W_j^2, the mean squared norm of the output."""
    activation_error: float | None = None
    per_expert_weighted_error: tuple[float, ...] = ()
    per_expert_activation_error: tuple[float | None, ...] = ()


class ErrorTable(BaseModel):
    """All rows of one model, with the identity of what they were measured on."""

    model_config = ConfigDict(extra="forbid")

    schema_version: int = SCHEMA_VERSION
    tool_version: str = __version__
    model: str
    fingerprint: str
    stats_hash: str
    encoder: str
    types: tuple[str, ...]
    rows: list[ErrorRow]

    def row(self, name: str, type_name: str) -> ErrorRow | None:
        return self._by_key().get((name, type_name))

    def tensors(self) -> dict[str, dict[str, ErrorRow]]:
        """Tensor name -> type name -> row, in table order."""
        found: dict[str, dict[str, ErrorRow]] = {}
        for row in self.rows:
            found.setdefault(row.name, {})[row.type] = row
        return found

    def _by_key(self) -> dict[tuple[str, str], ErrorRow]:
        return {(row.name, row.type): row for row in self.rows}

    def save(self, path: Path) -> None:
        """Write errors.json and, beside it, the same rows as a tidy CSV."""
        write_atomically(path, self.model_dump_json(indent=1) + "\n")
        columns = [name for name in ErrorRow.model_fields if not name.startswith("per_expert")]
        text = io.StringIO()
        writer = csv.DictWriter(text, columns, lineterminator="\n")
        writer.writeheader()
        for row in self.rows:
            writer.writerow(row.model_dump(include=set(columns), mode="json"))
        write_atomically(path.with_suffix(".csv"), text.getvalue())

    @classmethod
    def load(cls, path: Path) -> "ErrorTable":
        """Read errors.json.

        Raises:
            PlanError: missing or not an error table.
        """
        try:
            return cls.model_validate(json.loads(path.read_text()))
        except (OSError, ValueError, ValidationError) as error:
            raise PlanError(f"{path} is not an error table of dynquant ({error}). Run `dynquant analyze`.") from error
