"""Calibration statistics: what `calibrate` measures and every later stage reads.

Everything is a mergeable sum or maximum keyed by GGUF weight name, so that shards, resumed runs and workers agree.
Weights that read the same input (q/k/v, gate/up) share one `InputStats` through `aliases`.
File layout of stats.safetensors: `KEY.in_sum2`, `KEY.counts`, `KEY.samples`, `KEY.sample_counts`, `KEY.max_in`, ... and
one JSON metadata entry `dynquant` (schema version, tool version, checkpoint fingerprint, text hash, options, aliases).
"""

import copy
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Literal

import torch
from pydantic import BaseModel, ConfigDict, Field
from safetensors import SafetensorError, safe_open

from dynquant import __version__
from dynquant.errors import StatsError
from dynquant.storage.atomic import save_tensors
from dynquant.storage.strict_json import parse_json

SCHEMA_VERSION = 1
_PART_TYPES = {
    "in_sum2": torch.float64, "counts": torch.int64, "samples": torch.bfloat16, "sample_counts": torch.int64,
    "max_in": torch.float32, "max_in_channel": torch.int64, "max_in_position": torch.int64,
    "max_out": torch.float32, "max_out_channel": torch.int64, "max_out_position": torch.int64,
}  # fmt: skip


@dataclass
class InputStats:
    """Sums over the tokens that one input saw. E = experts of a stacked weight, else 1; C = input channels.

    `in_sum2` float64 [E, C] sum of x^2, `counts` int64 [E] tokens. `samples` bfloat16 [E, S, C] holds inputs of
    held-back tokens (never part of the sums), `sample_counts` int64 [E] how many of the S rows are filled.
    Extremes, for down-projections only, float32/int64 [E]: `max_in` and `max_out` are the signed values of largest
    magnitude, with channel and token position inside their window.
    """

    in_sum2: torch.Tensor
    counts: torch.Tensor
    samples: torch.Tensor | None = None
    sample_counts: torch.Tensor | None = None
    max_in: torch.Tensor | None = None
    max_in_channel: torch.Tensor | None = None
    max_in_position: torch.Tensor | None = None
    max_out: torch.Tensor | None = None
    max_out_channel: torch.Tensor | None = None
    max_out_position: torch.Tensor | None = None

    def merge(self, other: "InputStats") -> None:
        """Add the sums of `other`, keep the larger extremes, and fill free sample rows from it."""
        self.in_sum2 += other.in_sum2
        self.counts += other.counts
        self._merge_extreme("max_in", other)
        self._merge_extreme("max_out", other)
        if self.samples is None:
            self._take(other, "samples", "sample_counts")
        elif other.samples is not None:
            self._merge_samples(other)

    def _merge_extreme(self, name: str, other: "InputStats") -> None:
        mine, theirs = getattr(self, name), getattr(other, name)
        if mine is None or theirs is None:
            if theirs is not None:
                self._take(other, name, f"{name}_channel", f"{name}_position")
            return
        larger = theirs.abs() > mine.abs()
        for part in (name, f"{name}_channel", f"{name}_position"):
            setattr(self, part, torch.where(larger, getattr(other, part), getattr(self, part)))

    def _take(self, other: "InputStats", *parts: str) -> None:
        for part in parts:
            value = getattr(other, part)
            setattr(self, part, None if value is None else value.clone())

    def _merge_samples(self, other: "InputStats") -> None:
        capacity = self.samples.shape[1]
        for expert in range(len(self.counts)):
            used = int(self.sample_counts[expert])
            take = min(capacity - used, int(other.sample_counts[expert]))
            self.samples[expert, used : used + take] = other.samples[expert, :take]
            self.sample_counts[expert] += take


class StatsProvenance(BaseModel):
    """Origin of statistics; later stages refuse a fingerprint that is not the model's."""

    model_config = ConfigDict(extra="forbid")

    schema_version: Literal[1] = SCHEMA_VERSION
    tool_version: str = __version__
    fingerprint: str
    text_hash: str = Field(pattern="^[0-9a-f]{1,64}$")
    text_name: str
    num_windows: int = Field(0, ge=0)
    num_tokens: int = Field(0, ge=0)
    num_held_back_tokens: int = Field(0, ge=0)
    window: int = Field(512, ge=0)
    max_tokens: int = Field(0, ge=0)
    """The limit that calibration ran under; 0 when unknown."""
    seed: int = 0
    imported_from: str | None = None

    def joined(self, other: "StatsProvenance") -> "StatsProvenance":
        """Return the provenance of both texts together."""
        sums = {
            name: getattr(self, name) + getattr(other, name)
            for name in ("num_windows", "num_tokens", "num_held_back_tokens")
        }
        return self.model_copy(update={"text_hash": _joined_hash(self.text_hash, other.text_hash), **sums})


@dataclass
class CalibrationStats:
    """All inputs of one model."""

    provenance: StatsProvenance
    inputs: dict[str, InputStats] = field(default_factory=dict)
    aliases: dict[str, str] = field(default_factory=dict)
    """Weight name -> key in `inputs` for weights that share another weight's input."""

    def input_of(self, weight: str) -> InputStats | None:
        """Statistics of the input that a GGUF weight reads, or None when calibration did not see it."""
        return self.inputs.get(self.aliases.get(weight, weight))

    def merge(self, other: "CalibrationStats") -> None:
        """Add another run over other text of the same model.

        Raises:
            StatsError: the two runs belong to different checkpoints.
        """
        if other.provenance.fingerprint != self.provenance.fingerprint:
            raise StatsError(
                f"Statistics of checkpoint {other.provenance.fingerprint[:12]} cannot be merged into those of "
                f"{self.provenance.fingerprint[:12]}; calibrate both on the same model."
            )
        for key, stats in other.inputs.items():
            if key in self.inputs:
                self.inputs[key].merge(stats)
            else:
                self.inputs[key] = copy.deepcopy(stats)
        self.aliases |= other.aliases
        self.provenance = self.provenance.joined(other.provenance)

    def check_belongs_to(self, fingerprint: str, model_name: str) -> None:
        """Refuse statistics of another checkpoint.

        Raises:
            StatsError: naming both fingerprints.
        """
        if self.provenance.fingerprint != fingerprint:
            raise StatsError(
                f"The calibration statistics were measured on checkpoint {self.provenance.fingerprint[:12]}, but "
                f"{model_name} has fingerprint {fingerprint[:12]}. Run `dynquant calibrate` on {model_name}."
            )

    def save(self, path: Path) -> None:
        """Write stats.safetensors, whole or not at all."""
        tensors = {
            f"{key}.{part.name}": value
            for key, stats in self.inputs.items()
            for part in fields(InputStats)
            if (value := getattr(stats, part.name)) is not None
        }
        header = {"provenance": self.provenance.model_dump(), "aliases": self.aliases}
        save_tensors(path, tensors, header)

    @classmethod
    def load(cls, path: Path) -> "CalibrationStats":
        """Read stats.safetensors.

        Raises:
            StatsError: missing, truncated, or not written by `dynquant calibrate`.
        """
        try:
            with safe_open(path, framework="pt") as file:
                header = parse_json((file.metadata() or {})["dynquant"])
                stats = cls(StatsProvenance(**header["provenance"]), aliases=header["aliases"])
                parts: dict[str, dict[str, torch.Tensor]] = {}
                for name in file.keys():  # noqa: SIM118
                    key, _, part = name.rpartition(".")
                    parts.setdefault(key, {})[part] = file.get_tensor(name)
                stats.inputs = {key: _checked_input(key, found) for key, found in parts.items()}
                _check_aliases(stats.aliases, stats.inputs)
                return stats
        except (OSError, SafetensorError, KeyError, ValueError, TypeError) as error:
            raise StatsError(
                f"{path} is not a statistics file of dynquant ({type(error).__name__}: {error}). "
                "Make it with `dynquant calibrate MODEL -o FILE`."
            ) from error


def _checked_input(key: str, found: dict[str, torch.Tensor]) -> InputStats:
    """Raises ValueError for parts that are missing, of another type or shape, or not finite."""
    stats = InputStats(**found)
    sums, counts = stats.in_sum2, stats.counts
    if sums.ndim != 2 or not sums.numel():
        raise ValueError(f"`{key}.in_sum2` has the shape {list(sums.shape)}, not [experts, channels]")
    experts, channels = sums.shape
    for name, tensor in found.items():
        if name == "samples":
            fits = tensor.ndim == 3 and (tensor.shape[0], tensor.shape[2]) == (experts, channels)
        else:
            fits = tensor.shape == (sums.shape if name == "in_sum2" else (experts,))
        if not fits or tensor.dtype != _PART_TYPES[name]:
            raise ValueError(
                f"`{key}.{name}` is {list(tensor.shape)} of {tensor.dtype} for {experts} experts and {channels} "
                f"channels; {_PART_TYPES[name]} is needed"
            )
        if not torch.isfinite(tensor).all():
            raise ValueError(f"`{key}.{name}` holds NaN or infinite values")
    filled, samples = stats.sample_counts, stats.samples
    if (filled is None) != (samples is None):
        raise ValueError(f"`{key}` has only one of `samples` and `sample_counts`")
    if bool((counts < 0).any() or (sums < 0).any()):
        raise ValueError(f"`{key}` has negative sums or counts")
    if filled is not None and bool((filled < 0).any() or (filled > samples.shape[1]).any()):
        raise ValueError(f"`{key}.sample_counts` goes beyond the {samples.shape[1]} samples that are there")
    return stats


def _check_aliases(aliases: object, inputs: dict[str, InputStats]) -> None:
    if not isinstance(aliases, dict) or not all(isinstance(key, str) and key in inputs for key in aliases.values()):
        raise ValueError("`aliases` does not map weights to inputs of the file")


def _joined_hash(first: str, second: str) -> str:
    """One hash for two texts, the same in whatever order shards are merged: the sum of both, modulo 2^256."""
    return f"{(int(first, 16) + int(second, 16)) % (1 << 256):064x}"
