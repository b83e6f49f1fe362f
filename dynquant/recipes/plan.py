"""The plan: how every tensor is stored, and why. llama.cpp and vLLM are two targets of one plan.

plan.json is total by construction, readable, and reproducible: the same inputs give the same bytes.

    gguf    one entry for every tensor of the GGUF file, in a quant type of ggml
    vllm    one entry for every linear layer, or for the routed experts' layers of one kind, in a compressed-tensors
            scheme; everything else (embedding, head, routers, norms, biases) is stored as in the checkpoint, matrices
            as BF16. Layers that vLLM fuses into one are one unit and share a scheme.

`predicted_bytes` is the exact size of the weight files that `export` writes from it.
"""

import hashlib
import json
import re
from collections import Counter
from math import prod
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, model_validator

from dynquant import __version__
from dynquant.checkpoints.model import Model, PrunedExperts
from dynquant.checkpoints.tensor_roles import Role
from dynquant.errors import PlanError
from dynquant.families.common.settings import Setting, differing_settings
from dynquant.formats.quant_types import QUANT_TYPES, QuantType
from dynquant.formats.storage_format import StorageFormat
from dynquant.formats.vllm_schemes import SCHEMES, Scheme
from dynquant.storage.documents import FrozenRecord, read_document
from dynquant.storage.file_names import PLAN_NAME

SCHEMA_VERSION = 2
PlanTarget = Literal["gguf", "vllm"]
_MAX_DIMENSION, _MAX_BYTES = 1 << 48, 1 << 63


def _is_empty(value: object) -> bool:
    return not value


class PlanEntry(FrozenRecord):
    """One tensor; of a plan for vLLM one linear layer or stack of experts. `shape` has the row length last."""

    name: str  # GGUF name: the name of its statistics
    shape: tuple[int, ...]
    role: Role
    type: str  # quant type or scheme
    reason: str
    bytes: int
    wanted_type: str | None = None  # the type that was asked for, where the row length or vLLM's kernels forced another
    sources: tuple[str, ...] = ()  # the checkpoint's own tensors that it holds
    weighted_error: float | None = None  # importance-weighted relative squared error of the type, as it was measured
    group_size: int | None = Field(None, exclude_if=lambda size: size is None)  # vLLM: weights a scale; 0: a row
    unit: str = Field("", exclude_if=_is_empty)  # vLLM: entries of one unit have one scheme and group size
    modules: tuple[str, ...] = Field((), exclude_if=_is_empty)  # vLLM: linear layers of the checkpoint that is written

    @property
    def format(self) -> StorageFormat:
        return self.quant_type if self.group_size is None else self.scheme

    @property
    def quant_type(self) -> QuantType:
        return QUANT_TYPES[self.type]

    @property
    def scheme(self) -> Scheme:
        return SCHEMES[self.type].grouped(self.group_size or 0)

    @property
    def is_expert_stack(self) -> bool:
        return len(self.shape) == 3


class Plan(FrozenRecord):
    """Every tensor of one model with its type."""

    schema_version: Literal[2] = SCHEMA_VERSION
    tool_version: str = __version__
    target: PlanTarget = "gguf"
    model: str
    arch: str
    fingerprint: str
    settings: dict[str, Setting] = Field({}, exclude_if=_is_empty)  # what decides the computation beside the weights
    pruned: PrunedExperts | None = Field(None, exclude_if=_is_empty)  # experts that the planned model lacks
    stats_hash: str | None = None  # SHA-256 of stats.safetensors; None for presets that read no statistics
    hessians: str | None = Field(None, exclude_if=_is_empty)  # kind of second moments beside the statistics, if any
    errors_hash: str | None = None
    recipe: str  # the request: `preset r1-iq1_s`, `bpw 2.0`, `size 31002144`
    objective: str = "fixed recipe"  # sum that the types were chosen to minimise (`ErrorTable.cost_name`)
    types: tuple[str, ...] = ()  # the types or schemes that the planner could choose from
    predicted_kl: float | None = None  # KL to the original in nats per token as prices add up; None for a fixed recipe
    predicted_kl_se: float | None = None
    selected_kl: float | None = None  # KL on the selection text, rendered; None when nothing was selected
    predicted_bytes: int
    mixed_experts: bool = Field(False, exclude_if=_is_empty)  # vLLM: experts of two layers may differ, for vLLM alone
    other_bytes: int = Field(0, exclude_if=_is_empty)  # vLLM: bytes of all tensors that no entry holds
    other_weights: int = Field(0, exclude_if=_is_empty)  # vLLM: weights of the model that no entry holds
    notes: tuple[str, ...] = Field((), exclude_if=_is_empty)  # what has no statistics, and what no recipe quantizes
    checksums: dict[str, str] = Field({}, exclude_if=_is_empty)  # name -> checksum of its weights (`formats.checksum`)
    entries: tuple[PlanEntry, ...]

    @model_validator(mode="before")
    @classmethod
    def _read_older(cls, document: Any) -> Any:
        """Schema 1 had plans of GGUF types, and plans for vLLM with fields of their own and `serves` in them."""
        if not isinstance(document, dict) or document.get("schema_version") != 1:
            return document
        document = {**document, "schema_version": SCHEMA_VERSION}
        if document.pop("serves", None) != "vllm":
            return document
        try:
            names = {"scheme": "type", "wanted_scheme": "wanted_type"}
            entries = [{names.get(key, key): value for key, value in e.items()} for e in document["entries"]]
            weights = document.pop("num_weights") - sum(prod(entry["shape"]) for entry in entries)
        except (KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"not a plan for vLLM of schema 1 ({error!r})") from error
        types = document.pop("schemes", ())
        return document | {"target": "vllm", "types": types, "other_weights": weights, "entries": entries}

    @property
    def num_weights(self) -> int:
        return sum(prod(entry.shape) for entry in self.entries) + self.other_weights

    @property
    def tensor_bytes(self) -> int:
        return sum(entry.bytes for entry in self.entries)

    @property
    def bits_per_weight(self) -> float:
        """File bytes, metadata included, per weight."""
        return 8 * self.predicted_bytes / self.num_weights

    @property
    def hash(self) -> str:
        """SHA-256 of what decides the output's weights: fingerprint, statistics, and how each tensor is stored."""
        stored = [
            (entry.name, entry.type) if entry.group_size is None else (entry.name, entry.type, entry.group_size)
            for entry in self.entries
        ]
        return hashlib.sha256(json.dumps([self.fingerprint, self.stats_hash, stored]).encode()).hexdigest()

    def by_type(self) -> dict[str, list[PlanEntry]]:
        """Return the entries of each type, most precise type first."""
        formats = {"gguf": QUANT_TYPES, "vllm": SCHEMES}[self.target]
        entries = {name: [entry for entry in self.entries if entry.type == name] for name in formats}
        return {name: members for name, members in entries.items() if members}

    def histogram(self) -> dict[str, int]:
        """Return the number of tensors of each type, most precise type first."""
        return {name: len(entries) for name, entries in self.by_type().items()}

    def remarks(self) -> list[str]:
        """Return what is left out, the notes, and a line for each reason why tensors have no type asked for."""
        matches = (re.search(r"rows of [^;a-z]+ do not divide .*", entry.reason) for entry in self.entries)
        counts = Counter(match.group() for match in matches if match)
        fallbacks = [f"{count} tensor{'s' * (count > 1)}: {reason}" for reason, count in counts.most_common()]
        gone = [f"routed experts that are left out: {self.pruned}"] if self.pruned else []
        return [*gone, *self.notes, *fallbacks]

    def check_covers(self, names: list[str], model: Model) -> None:
        """Refuse a plan of another checkpoint or configuration, or one whose tensors are not exactly `names`. Raises
        PlanError: naming the tensor, the two fingerprints, or the settings that differ."""
        command = "dynquant plan --for vllm" if self.target == "vllm" else "dynquant plan"
        if self.fingerprint != model.fingerprint:
            raise PlanError(
                f"The plan was made for checkpoint {self.fingerprint[:12]} ({self.model}), but {model.name} has "
                f"fingerprint {model.fingerprint[:12]}. Run `{command}` on {model.name}."
            )
        if difference := differing_settings(self.settings, model.settings):
            raise PlanError(
                f"The plan was made for another configuration of {model.name}: {difference}. Restore it, or run "
                f"`{command}` on {model.name}, which calibrates anew."
            )
        planned = {entry.name for entry in self.entries}
        if unknown := planned - set(names):
            raise PlanError(
                f"The plan names the tensor `{min(unknown)}`, which {model.name} does not have. Plan again."
            )
        if left_out := set(names) - planned:
            raise PlanError(f"{model.name} has the tensor `{min(left_out)}`, which the plan does not name. Plan again.")

    @classmethod
    def load(cls, path: Path, target: PlanTarget = "gguf") -> "Plan":
        """Read plan.json, also by its folder, of this version or an older one. Raises PlanError: missing, not JSON, of
        another target, unknown fields or types, or a tensor named twice."""
        path = plan_file(path)
        plan = read_document(path, cls, "a plan", "Make one with `dynquant plan`.")
        if plan.target != target:
            raise PlanError(f"{path} {_OTHER_TARGET[plan.target]}")
        _check_entries(plan, path)
        return plan


def plan_file(path: Path, way_out: str = "Check the path, or make one with `dynquant plan`.") -> Path:
    """Return the plan that a path names: that of a folder is the plan.json in it. Raises PlanError: it has none."""
    if not path.is_dir():
        return path
    if not (path / PLAN_NAME).is_file():
        raise PlanError(f"{path} is a directory without {PLAN_NAME}. {way_out}")
    return path / PLAN_NAME


_OTHER_TARGET = {
    "vllm": "is a plan for vLLM (`plan --for vllm`), whose schemes are no GGUF types; `export` takes it with -f "
    "compressed-tensors. For GGUF types, make one with `dynquant plan`.",
    "gguf": "is a plan of GGUF types, which vLLM does not serve from compressed-tensors. Make one of its schemes with "
    "`dynquant plan MODEL --for vllm`, or export this one with -f gguf.",
}
"""Words of a command that works with the other target."""


def _check_entries(plan: Plan, path: Path) -> None:
    if not plan.entries or not 0 <= plan.predicted_bytes < _MAX_BYTES:
        raise PlanError(f"{path} has {len(plan.entries)} tensors in {plan.predicted_bytes!r:.40} bytes. Plan again.")
    seen: set[str] = set()
    for entry in plan.entries:
        if entry.name in seen:
            raise PlanError(f"{path} names the tensor `{entry.name}` twice.")
        seen.add(entry.name)
        (_check_scheme if plan.target == "vllm" else _check_quant_type)(entry, path)
        if not entry.shape or min(entry.shape) < 1 or len(entry.shape) > 4 or max(entry.shape) >= _MAX_DIMENSION:
            raise PlanError(f"{path} gives `{entry.name}` the impossible shape {list(entry.shape)!r:.100}.")
        if entry.shape[-1] % entry.format.block_size:
            raise PlanError(
                f"{path} gives `{entry.name}` the type {entry.type}, whose blocks of {entry.format.block_size} do "
                f"not divide its rows of {entry.shape[-1]}."
            )
        if entry.bytes != entry.format.tensor_bytes(entry.shape):
            raise PlanError(f"{path} states {entry.bytes} bytes for `{entry.name}`; {entry.type} takes another size.")
    _check_units(plan, path)


def _check_quant_type(entry: PlanEntry, path: Path) -> None:
    if entry.type not in QUANT_TYPES:
        raise PlanError(f"{path} gives `{entry.name}` the unknown type {entry.type!r}.")
    if entry.group_size is not None:
        raise PlanError(f"{path} gives `{entry.name}` groups of {entry.group_size}; quant types have none.")


def _check_scheme(entry: PlanEntry, path: Path) -> None:
    if entry.type not in SCHEMES:
        raise PlanError(f"{path} gives `{entry.name}` the unknown scheme {entry.type!r}.")
    if entry.group_size not in entry.scheme.group_sizes:
        raise PlanError(f"{path} gives `{entry.name}` groups of {entry.group_size}, which {entry.type} does not have.")
    if len(entry.shape) not in (2, 3):
        raise PlanError(f"{path} gives `{entry.name}` the impossible shape {list(entry.shape)!r:.100}.")
    if entry.is_expert_stack and not entry.scheme.holds_experts:
        raise PlanError(f"{path} gives the experts `{entry.name}` the scheme {entry.type}, which has no kernel.")


def _check_units(plan: Plan, path: Path) -> None:
    """Raise PlanError for layers that vLLM fuses and that have two schemes."""
    schemes: dict[str, tuple[str, int | None]] = {}
    for entry in (entry for entry in plan.entries if entry.unit):
        first = schemes.setdefault(entry.unit, (entry.type, entry.group_size))
        if first != (entry.type, entry.group_size):
            raise PlanError(
                f"{path} gives `{entry.name}` the scheme {entry.type} in groups of {entry.group_size}, but other "
                f"layers of `{entry.unit}`, which vLLM fuses with it, {first[0]} in groups of {first[1]}. Give them "
                "one scheme."
            )
