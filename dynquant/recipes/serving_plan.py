"""The plan of a compressed-tensors checkpoint: which of the schemes that vLLM serves every linear layer gets, and why.

Layers that vLLM fuses into one (q/k/v, gate/up, the two latent projections of MLA, all routed experts) are one unit and
share a scheme. Everything else (embedding, head, routers, norms, biases) is stored as in the checkpoint, matrices as
BF16. `predicted_bytes` is the exact size of the safetensors files that `export -f compressed-tensors` writes.
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
from dynquant.formats.vllm_schemes import SCHEMES, Scheme
from dynquant.storage.atomic import write_atomically
from dynquant.storage.strict_json import parse_json

SCHEMA_VERSION = 1
_MAX_DIMENSION = 1 << 48


class ServingEntry(BaseModel):
    """One matrix, or the routed experts' matrices of one kind in one layer. `shape` has the row length last."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: str
    """GGUF name: the name of its statistics."""
    unit: str
    """Entries of one unit have one scheme and group size."""
    role: Role
    shape: tuple[int, ...]
    modules: tuple[str, ...]
    """Names of the linear layers in the checkpoint that is written: one, or one for each expert."""
    scheme: str
    group_size: int
    """Weights of a row that share a scale; 0 for the whole row."""
    reason: str
    bytes: int
    wanted_scheme: str | None = None
    """The scheme that was asked for when the row length, or vLLM's kernels, forced another one."""
    weighted_error: float | None = None

    @property
    def stored_as(self) -> Scheme:
        return SCHEMES[self.scheme]

    @property
    def is_expert(self) -> bool:
        return len(self.shape) == 3


class ServingPlan(BaseModel):
    """Every linear layer of one model with its scheme."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    schema_version: Literal[1] = SCHEMA_VERSION
    tool_version: str = __version__
    serves: Literal["vllm"] = "vllm"
    model: str
    arch: str
    fingerprint: str
    stats_hash: str | None = None
    recipe: str
    objective: str = "fixed recipe"
    schemes: tuple[str, ...] = ()
    """The schemes that the planner could choose from."""
    mixed_experts: bool = False
    """Whether the experts of one layer may differ from those of another; vLLM loads that, transformers does not."""
    predicted_kl: float | None = None
    predicted_bytes: int
    num_weights: int
    other_bytes: int
    """Bytes of all tensors that no entry holds: embedding, head, routers, norms, biases."""
    entries: tuple[ServingEntry, ...]

    @property
    def bits_per_weight(self) -> float:
        """File bytes, headers included, per weight."""
        return 8 * self.predicted_bytes / self.num_weights

    @property
    def hash(self) -> str:
        """SHA-256 of what decides the weights: fingerprint, statistics, and each entry's scheme."""
        entries = [(entry.name, entry.scheme, entry.group_size) for entry in self.entries]
        return hashlib.sha256(json.dumps([self.fingerprint, self.stats_hash, entries]).encode()).hexdigest()

    def histogram(self) -> dict[str, tuple[int, int, int]]:
        """Linear layers, weights and bytes of each scheme, the most precise scheme first."""
        found = {}
        for name in SCHEMES:
            entries = [entry for entry in self.entries if entry.scheme == name]
            if entries:
                layers = sum(len(entry.modules) for entry in entries)
                found[name] = layers, sum(prod(e.shape) for e in entries), sum(e.bytes for e in entries)
        return found

    def save(self, path: Path) -> None:
        """Write the plan, whole or not at all."""
        write_atomically(path, self.model_dump_json(indent=1) + "\n")

    @classmethod
    def load(cls, path: Path) -> "ServingPlan":
        """Read a plan of `dynquant plan --for vllm`.

        Raises:
            PlanError: missing, of another kind, or with unknown schemes, odd sizes or units of two schemes.
        """
        try:
            text = path.read_text()
            document = parse_json(text)
        except OSError as error:
            raise PlanError(f"The plan {path} cannot be read: {error.strerror}.") from error
        except ValueError as error:
            raise PlanError(f"{path} is not a plan of dynquant: {error}.") from error
        if isinstance(document, dict) and "serves" not in document and "entries" in document:
            raise PlanError(
                f"{path} is a plan of GGUF types, which vLLM does not serve from compressed-tensors. Make one of its "
                "schemes with `dynquant plan MODEL --for vllm`, or export this one with -f gguf."
            )
        try:
            plan = cls.model_validate_json(text)
        except ValidationError as error:
            first = error.errors()[0]
            where = ".".join(str(part) for part in first["loc"]) or "the file"
            raise PlanError(f"{path} is not a plan of dynquant: {where}: {first['msg']}.") from error
        _check_entries(plan, path)
        return plan


def entry_bytes(scheme: Scheme, shape: tuple[int, ...], group: int) -> int:
    """Bytes of one matrix [R, C] or a stack [E, R, C] in a scheme."""
    return prod(shape[:-2]) * scheme.num_bytes(shape[-2], shape[-1], group)


def _check_entries(plan: ServingPlan, path: Path) -> None:
    units: dict[str, tuple[str, int]] = {}
    for entry in plan.entries:
        if len(entry.shape) not in (2, 3) or not all(0 < size < _MAX_DIMENSION for size in entry.shape):
            raise PlanError(f"{path} gives `{entry.name}` the impossible shape {list(entry.shape)!r:.100}.")
        if entry.scheme not in SCHEMES:
            raise PlanError(f"{path} gives `{entry.name}` the unknown scheme {entry.scheme!r}.")
        scheme, columns, group = entry.stored_as, entry.shape[-1], entry.group_size
        if group not in scheme.group_sizes or (group and columns % group):
            raise PlanError(
                f"{path} gives `{entry.name}` groups of {group}, which {entry.scheme} does not have or which do not "
                f"divide its rows of {columns}."
            )
        if entry.is_expert and not scheme.holds_experts:
            raise PlanError(f"{path} gives the experts `{entry.name}` the scheme {entry.scheme}, which has no kernel.")
        if entry.bytes != entry_bytes(scheme, entry.shape, group):
            raise PlanError(f"{path} states {entry.bytes} bytes for `{entry.name}`; {entry.scheme} takes another size.")
        first = units.setdefault(entry.unit, (entry.scheme, group))
        if first != (entry.scheme, group):
            raise PlanError(
                f"{path} gives `{entry.name}` the scheme {entry.scheme} in groups of {group}, but other layers of "
                f"`{entry.unit}`, which vLLM fuses with it, {first[0]} in groups of {first[1]}. Give them one scheme."
            )
