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
from safetensors import SafetensorError

from dynquant import __version__
from dynquant.checkpoints.tensor_source import is_finite
from dynquant.errors import StatsError, unreadable
from dynquant.families.common.settings import Setting, Settings, differing_settings
from dynquant.storage.atomic import read_tensors, save_tensors
from dynquant.storage.file_kinds import MOMENTS, SAFETENSORS, STATISTICS, content_of, refuse_other_kind

SCHEMA_VERSION = 1
_WAY_OUT = "Make it with `dynquant calibrate MODEL -o FILE`."
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
        for name in ("max_in", "max_out"):
            mine, theirs = getattr(self, name), getattr(other, name)
            if theirs is not None:
                larger = torch.ones_like(theirs, dtype=torch.bool) if mine is None else theirs.abs() > mine.abs()
                for part in (name, f"{name}_channel", f"{name}_position"):
                    value = getattr(other, part)
                    setattr(self, part, torch.where(larger, value, value if mine is None else getattr(self, part)))
        if other.samples is None:
            return
        if self.samples is None:
            self.samples, self.sample_counts = other.samples.clone(), other.sample_counts.clone()
            return
        for expert, used in enumerate(self.sample_counts.tolist()):
            take = min(self.samples.shape[1] - used, int(other.sample_counts[expert]))
            self.samples[expert, used : used + take] = other.samples[expert, :take]
            self.sample_counts[expert] += take


class StatsProvenance(BaseModel):
    """Origin of statistics; later stages refuse a fingerprint that is not the model's.

    Fields that a newer dynquant added are kept in copies, and mean nothing here: where they would, it raises the
    version of the schema.
    """

    model_config = ConfigDict(extra="allow")

    schema_version: Literal[1] = SCHEMA_VERSION
    tool_version: str = __version__
    fingerprint: str
    settings: dict[str, Setting] = {}  # what decides the model's computation beside its weights
    text_hash: str = Field(pattern="^[0-9a-f]{1,64}$")
    text_name: str
    num_windows: int = Field(0, ge=0)
    num_tokens: int = Field(0, ge=0)
    num_held_back_tokens: int = Field(0, ge=0)
    window: int = Field(512, ge=0)
    max_tokens: int = Field(0, ge=0)  # the limit that calibration ran under; 0 when unknown
    seed: int = 0
    sampled_tokens: int = Field(0, ge=0)  # the limit of text that the model wrote itself
    sampled_hash: str = Field("", pattern="^[0-9a-f]{0,64}$")  # of that text's token ids
    imported_from: str | None = None

    def joined(self, other: "StatsProvenance") -> "StatsProvenance":
        """Return the provenance of both texts together, or raise StatsError when they ran on different checkpoints."""
        if other.fingerprint != self.fingerprint:
            raise StatsError(
                f"Statistics of checkpoint {other.fingerprint[:12]} cannot be merged into those of "
                f"{self.fingerprint[:12]}; calibrate both on the same model."
            )
        if difference := differing_settings(self.settings, other.settings):
            raise StatsError(
                f"The statistics to merge were measured under two configurations of one model: {difference}. Calibrate "
                "both under the same."
            )
        counts = ("num_windows", "num_tokens", "num_held_back_tokens")
        sums = {name: getattr(self, name) + getattr(other, name) for name in counts}
        # The sum of both hashes is the same in whatever order shards are merged.
        text_hash = f"{(int(self.text_hash, 16) + int(other.text_hash, 16)) % (1 << 256):064x}"
        return self.model_copy(update={"text_hash": text_hash, **sums})


@dataclass
class CalibrationStats:
    """All inputs of one model."""

    provenance: StatsProvenance
    inputs: dict[str, InputStats] = field(default_factory=dict)
    aliases: dict[str, str] = field(default_factory=dict)  # weight -> key in `inputs` of the input that it shares

    def input_of(self, weight: str) -> InputStats | None:
        """Statistics of the input that a GGUF weight reads, or None when calibration did not see it."""
        return self.inputs.get(self.aliases.get(weight, weight))

    def merge(self, other: "CalibrationStats") -> None:
        """Add another run over other text of the same model, or raise StatsError when it was of another one."""
        self.provenance = self.provenance.joined(other.provenance)
        for key, stats in other.inputs.items():
            if key in self.inputs:
                self.inputs[key].merge(stats)
            else:
                self.inputs[key] = copy.deepcopy(stats)
        self.aliases |= other.aliases

    def check_belongs_to(self, fingerprint: str, model_name: str, settings: Settings) -> None:
        """Raise StatsError, naming both fingerprints or the settings that differ, for statistics of another model."""
        if self.provenance.fingerprint != fingerprint:
            raise StatsError(
                f"The calibration statistics were measured on checkpoint {self.provenance.fingerprint[:12]}, but "
                f"{model_name} has fingerprint {fingerprint[:12]}. Run `dynquant calibrate` on {model_name}."
            )
        if difference := differing_settings(self.provenance.settings, settings):
            raise StatsError(
                f"The calibration statistics were measured under another configuration of {model_name}: {difference}. "
                f"Restore it, or run `dynquant calibrate` on {model_name}."
            )

    def save(self, path: Path) -> None:
        """Write stats.safetensors, whole or not at all. Raises StatsError: values that are not finite."""
        tensors = {
            f"{key}.{part.name}": value
            for key, stats in self.inputs.items()
            for part in fields(InputStats)
            if (value := getattr(stats, part.name)) is not None
        }
        check_finite(tensors)
        save_tensors(path, tensors, {"provenance": self.provenance.model_dump(), "aliases": self.aliases})

    @classmethod
    def load(cls, path: Path) -> "CalibrationStats":
        """Read stats.safetensors by memory map, or raise StatsError when `calibrate` did not write it so."""
        refuse_other_kind(path, SAFETENSORS, STATISTICS, _WAY_OUT, StatsError)
        try:
            header, tensors = read_tensors(path)
            parts: dict[str, dict[str, torch.Tensor]] = {}
            for name, tensor in tensors.items():
                key, _, part = name.rpartition(".")
                parts.setdefault(key, {})[part] = tensor
            inputs = {key: _checked_input(key, tensors_of) for key, tensors_of in parts.items()}
            aliases = header["aliases"]
            if not isinstance(aliases, dict) or not all(
                isinstance(key, str) and key in inputs for key in aliases.values()
            ):
                raise ValueError("`aliases` does not map weights to inputs of the file")
            return cls(StatsProvenance(**header["provenance"]), inputs, aliases)
        except (OSError, SafetensorError, KeyError, ValueError, TypeError) as error:
            if content_of(path) == MOMENTS:
                raise StatsError(f"{path} is {MOMENTS}, not {STATISTICS}, which lies beside it. {_WAY_OUT}") from error
            raise StatsError(
                unreadable(path, error) or f"{path} is not {STATISTICS} ({type(error).__name__}: {error}). {_WAY_OUT}"
            ) from error


def check_finite(tensors: dict[str, torch.Tensor]) -> None:
    """Refuse statistics that no later step could use. Raises StatsError: NaN or infinite values, by name."""
    for name, tensor in tensors.items():
        if not is_finite(tensor):
            raise StatsError(
                f"Calibration gave NaN or infinite values in `{name}`: activations of the model overflow, and nothing "
                "was written. Check the model (its weights are finite), or leave out the text that does this."
            )


def _checked_input(key: str, tensors: dict[str, torch.Tensor]) -> InputStats:
    """Raises ValueError for parts that are missing, of another type or shape, or not finite."""
    stats = InputStats(**tensors)
    sums, counts = stats.in_sum2, stats.counts
    if sums.ndim != 2 or not sums.numel():
        raise ValueError(f"`{key}.in_sum2` has the shape {list(sums.shape)}, not [experts, channels]")
    experts, channels = sums.shape
    for name, tensor in tensors.items():
        if name == "samples":
            fits = tensor.ndim == 3 and (tensor.shape[0], tensor.shape[2]) == (experts, channels)
        else:
            fits = tensor.shape == (sums.shape if name == "in_sum2" else (experts,))
        if not fits or tensor.dtype != _PART_TYPES[name]:
            raise ValueError(
                f"`{key}.{name}` is {list(tensor.shape)} of {tensor.dtype} for {experts} experts and {channels} "
                f"channels; {_PART_TYPES[name]} is needed"
            )
        if not is_finite(tensor):
            raise ValueError(f"`{key}.{name}` holds NaN or infinite values")
    filled, samples = stats.sample_counts, stats.samples
    if (filled is None) != (samples is None):
        raise ValueError(f"`{key}` has only one of `samples` and `sample_counts`")
    if bool((counts < 0).any() or (sums < 0).any()):
        raise ValueError(f"`{key}` has negative sums or counts")
    if filled is not None and bool((filled < 0).any() or (filled > samples.shape[1]).any()):
        raise ValueError(f"`{key}.sample_counts` goes beyond the {samples.shape[1]} samples that are there")
    return stats
