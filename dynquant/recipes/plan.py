"""The plan: which quant type every tensor gets, and why.

plan.json is total by construction (every tensor of the model exactly once), readable, and reproducible: the same
inputs give the same bytes. `predicted_bytes` is the exact size of the GGUF file that `export` writes from it.
"""

import hashlib
import json
from math import prod
from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict, ValidationError

from dynquant import __version__
from dynquant.checkpoints.tensor_roles import Role
from dynquant.errors import PlanError
from dynquant.formats.quant_types import QUANT_TYPES, QuantType
from dynquant.storage.atomic import write_atomically

SCHEMA_VERSION = 1
_MAX_DIMENSION, _MAX_BYTES = 1 << 48, 1 << 63


class PlanEntry(BaseModel):
    """One GGUF tensor. `shape` has the row length last; `sources` are the checkpoint's own tensor names."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: str
    shape: tuple[int, ...]
    role: Role
    type: str
    reason: str
    bytes: int
    wanted_type: str | None = None
    """The type that was asked for when the row length forced another one."""
    sources: tuple[str, ...] = ()
    weighted_error: float | None = None
    """Importance-weighted relative squared error of the chosen type, from errors.json."""

    @property
    def quant_type(self) -> QuantType:
        return QUANT_TYPES[self.type]


class Plan(BaseModel):
    """Every tensor of one model with its type."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    schema_version: Literal[1] = SCHEMA_VERSION
    tool_version: str = __version__
    model: str
    arch: str
    fingerprint: str
    stats_hash: str | None = None
    """SHA-256 of stats.safetensors; None for presets that read no statistics."""
    errors_hash: str | None = None
    recipe: str
    """What was asked for: `preset r1-iq1_s`, `bpw 2.0`, `size 31002144`."""
    objective: str = "fixed recipe"
    """What the types were chosen to minimise (`ErrorTable.cost_name`)."""
    types: tuple[str, ...] = ()
    predicted_kl: float | None = None
    """KL to the original in nats per token as the prices add up; None for a fixed recipe."""
    predicted_kl_se: float | None = None
    selected_kl: float | None = None
    """KL on the selection text, rendered; None when nothing was selected."""
    predicted_bytes: int
    entries: tuple[PlanEntry, ...]

    @property
    def num_weights(self) -> int:
        return sum(prod(entry.shape) for entry in self.entries)

    @property
    def tensor_bytes(self) -> int:
        return sum(entry.bytes for entry in self.entries)

    @property
    def bits_per_weight(self) -> float:
        """File bytes, metadata included, per weight."""
        return 8 * self.predicted_bytes / self.num_weights

    @property
    def hash(self) -> str:
        """SHA-256 of what decides the output's weights: fingerprint, statistics, and each tensor's type."""
        payload = [self.fingerprint, self.stats_hash, [(entry.name, entry.type) for entry in self.entries]]
        return hashlib.sha256(json.dumps(payload).encode()).hexdigest()

    def histogram(self) -> dict[str, int]:
        """Number of tensors of each type, most precise type first."""
        counts = {name: sum(entry.type == name for entry in self.entries) for name in QUANT_TYPES}
        return {name: count for name, count in counts.items() if count}

    def check_covers(self, names: list[str], fingerprint: str, model_name: str) -> None:
        """Refuse a plan of another checkpoint, or one whose tensors are not exactly the model's.

        Raises:
            PlanError: naming the tensor or the two fingerprints.
        """
        if self.fingerprint != fingerprint:
            raise PlanError(
                f"The plan was made for checkpoint {self.fingerprint[:12]} ({self.model}), but {model_name} has "
                f"fingerprint {fingerprint[:12]}. Run `dynquant plan` on {model_name}."
            )
        planned = {entry.name for entry in self.entries}
        for name in sorted(planned - set(names)):
            raise PlanError(f"The plan names the tensor `{name}`, which {model_name} does not have. Plan again.")
        for name in sorted(set(names) - planned):
            raise PlanError(f"{model_name} has the tensor `{name}`, which the plan does not name. Plan again.")

    def save(self, path: Path) -> None:
        """Write plan.json, whole or not at all."""
        write_atomically(path, self.model_dump_json(indent=1) + "\n")

    @classmethod
    def load(cls, path: Path) -> "Plan":
        """Read plan.json.

        Raises:
            PlanError: missing, not JSON, unknown fields or types, or a tensor named twice.
        """
        try:
            text = path.read_text()
            if '"serves"' in text[:200]:
                raise PlanError(
                    f"{path} is a plan for vLLM (`plan --for vllm`); export it with -f compressed-tensors, or make one "
                    "of GGUF types with `dynquant plan`."
                )
            plan = cls.model_validate_json(text)
        except OSError as error:
            raise PlanError(f"The plan {path} cannot be read: {error.strerror}.") from error
        except (ValidationError, UnicodeDecodeError) as error:
            first = error.errors()[0] if isinstance(error, ValidationError) else {"loc": (), "msg": str(error)}
            where = ".".join(str(part) for part in first["loc"]) or "the file"
            raise PlanError(f"{path} is not a plan of dynquant: {where}: {first['msg']}.") from error
        _check_entries(plan, path)
        return plan


def _check_entries(plan: Plan, path: Path) -> None:
    if not plan.entries or not 0 <= plan.predicted_bytes < _MAX_BYTES:
        raise PlanError(f"{path} has {len(plan.entries)} tensors in {plan.predicted_bytes!r:.40} bytes. Plan again.")
    seen: set[str] = set()
    for entry in plan.entries:
        if entry.type not in QUANT_TYPES:
            raise PlanError(f"{path} gives `{entry.name}` the unknown type {entry.type!r}.")
        if entry.name in seen:
            raise PlanError(f"{path} names the tensor `{entry.name}` twice.")
        seen.add(entry.name)
        if not entry.shape or min(entry.shape) < 1 or len(entry.shape) > 4 or max(entry.shape) >= _MAX_DIMENSION:
            raise PlanError(f"{path} gives `{entry.name}` the impossible shape {list(entry.shape)}.")
        if entry.shape[-1] % entry.quant_type.block_size:
            raise PlanError(
                f"{path} gives `{entry.name}` the type {entry.type}, whose blocks of {entry.quant_type.block_size} do "
                f"not divide its rows of {entry.shape[-1]}."
            )
        if entry.bytes != entry.quant_type.tensor_bytes(entry.shape):
            raise PlanError(f"{path} states {entry.bytes} bytes for `{entry.name}`; {entry.type} takes another size.")
