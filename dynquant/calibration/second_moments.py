"""Full second moments of layer inputs and of gradients of outputs, and the hessians that error feedback works with.

Calibration sums v_t x_t x_tᵀ over tokens t for every input, in float32: per expert where that fits in memory, pooled
over the experts of a layer where it does not. v is 1, or 1 + the token's squared gradient over its mean, when
calibration ran backward: tokens on which the output depends count more. Two-sided moments also hold sums of g gᵀ for
the outputs of every weight but the output matrix, R² numbers for R rows; g is the gradient of the log-likelihood of
tokens drawn from the model, as in the Fisher information. Sums are mergeable. They are kept apart from
stats.safetensors, because C² numbers per input are many (7,168 channels: 206 MB for each expert).

`hessian` turns sums into what an encoder may invert. An expert that saw n tokens gets

    S = (n S_e + k S) / (n + k)         leaning on the layer's mean S like `importance`, k = 16
    H = (1 - r) S + r diag(S) + damping, r = C / (C + n + k)

so that off-diagonal terms count in the measure in which n tokens can know them: an expert without tokens is encoded on
the layer's diagonal, one with many on its own full matrix. Dead channels get the damping alone.
"""

import hashlib
import json
from dataclasses import dataclass, field
from pathlib import Path
from threading import Event

import torch
from safetensors import SafetensorError

from dynquant.calibration.importance import SHRINK_TOKENS, importance
from dynquant.calibration.statistics import CalibrationStats, StatsProvenance, check_finite
from dynquant.checkpoints.safetensors_format import merge_tensor_files
from dynquant.checkpoints.tensor_source import is_finite
from dynquant.errors import StatsError, unreadable
from dynquant.families.common.settings import differing_settings
from dynquant.storage.atomic import read_tensors, read_tensors_header
from dynquant.storage.file_kinds import MOMENTS, SAFETENSORS, refuse_other_kind
from dynquant.storage.file_names import path_beside

DAMPING = 0.01  # added to the diagonal, as a share of its mean
OUTPUT = ".output"  # ends the key of gradients of a weight's outputs
OUTPUT_SHARE = 0.75
"""Share of what lies off the diagonal of outputs' moments that counts at most. The two factors are no exact product:
with all of it their loss falls further, and the KL less far."""
_WAY_OUT = "Make it with `dynquant calibrate MODEL -o stats.safetensors`."


@dataclass
class SecondMoments:
    """Sums of one model. `sums` and `weights` are keyed as `CalibrationStats.inputs`, or by a weight and OUTPUT.

    `sums[key]` float32 [E, C, C], or [1, C, C] when pooled over experts; `weights[key]` float64 [E or 1], what the
    token weights v of its sum add up to. `tokens` int32 [windows, window] is the text that was summed.
    """

    provenance: StatsProvenance
    tokens: torch.Tensor
    kind: str = "activations"  # `activations` where token weights are 1, else they hold squared gradients
    aliases: dict[str, str] = field(default_factory=dict)
    sums: dict[str, torch.Tensor] = field(default_factory=dict)
    weights: dict[str, torch.Tensor] = field(default_factory=dict)
    _layer_mean: dict[str, torch.Tensor] = field(default_factory=dict, init=False, repr=False, compare=False)

    def key_of(self, weight: str) -> str | None:
        """The input that a GGUF weight reads, or None when there are no moments of it."""
        key = self.aliases.get(weight, weight)
        return key if key in self.sums else None

    def outputs(self) -> set[str]:
        """Weights whose outputs have moments."""
        return {key.removesuffix(OUTPUT) for key in self.sums if key.endswith(OUTPUT)}

    def layer_mean(self, key: str) -> torch.Tensor:
        """Weighted mean over all experts of an input, float32 [C, C]; of the last input that was asked for it is kept,
        because the experts of a layer are asked for in turns and a sum over all of them reads all of them."""
        mean = self._layer_mean.get(key)  # another thread may put another one in its place
        if mean is None:
            mean = self.sums[key].sum(0) / self.weights[key].sum().clamp_min(1)
            self._layer_mean = {key: mean}
        return mean

    @property
    def identity(self) -> str:
        """Tells these moments from others, without reading the sums."""
        totals = {key: weights.tolist() for key, weights in sorted(self.weights.items())}
        content = [self.provenance.model_dump(), self.kind, totals]
        return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()

    def merge(self, other: "SecondMoments") -> None:
        """Add another run over other text; raise StatsError for another model, or when only one run pooled experts."""
        self.provenance = self.provenance.joined(other.provenance)
        self._layer_mean = {}
        for key, sums in other.sums.items():
            if key not in self.sums:
                self.sums[key], self.weights[key] = sums.clone(), other.weights[key].clone()
                continue
            if self.sums[key].shape != sums.shape:
                raise StatsError(
                    f"The second moments of `{key}` are {tuple(self.sums[key].shape)} in one run and "
                    f"{tuple(sums.shape)} in the other; calibrate both with the same --hessian-memory."
                )
            self.sums[key] += sums
            self.weights[key] += other.weights[key]
        self.aliases |= other.aliases
        self.tokens = torch.cat((self.tokens, other.tokens))

    @property
    def num_bytes(self) -> int:
        return sum(tensor.nbytes for tensor in named_tensors(self.sums, self.weights).values())

    def save(self, path: Path) -> None:
        """Write hessians.safetensors, whole or not at all. Raises StatsError: NaN or infinite values, by name."""
        self.check_finite()
        self.write(path)

    def check_finite(self) -> None:
        """Raise StatsError for NaN or infinite values, by name."""
        check_finite(named_tensors(self.sums, self.weights))

    def write(self, path: Path, stop: Event | None = None) -> None:
        """Write hessians.safetensors like `save`, unchecked, unless `stop` is set before it is whole."""
        header = {"provenance": self.provenance.model_dump(), "aliases": self.aliases, "kind": self.kind}
        tensors = named_tensors(self.sums, self.weights) | {"tokens": self.tokens}
        merge_tensor_files(path, (), tensors, header, stop)  # unlike `save_tensors` it lets other threads run

    @classmethod
    def load(cls, path: Path) -> "SecondMoments":
        """Read hessians.safetensors by memory map, or raise StatsError when `calibrate` did not write it so."""
        refuse_other_kind(path, SAFETENSORS, MOMENTS, _WAY_OUT, StatsError)
        try:
            header, tensors = read_tensors(path)
            provenance = StatsProvenance(**header["provenance"])
            moments = cls(provenance, tensors.pop("tokens"), header["kind"], header["aliases"])
            _fill(moments, tensors)
            return moments
        except (OSError, SafetensorError, KeyError, ValueError, TypeError) as error:
            raise StatsError(
                unreadable(path, error)
                or f"{path} does not hold second moments of dynquant ({type(error).__name__}: {error}). {_WAY_OUT}"
            ) from error

    def check_belongs_to(self, stats: CalibrationStats, path: Path) -> None:
        """Raise StatsError, naming both texts or checkpoints, when the statistics are of another calibration."""
        for field_name in ("fingerprint", "text_hash", "num_tokens"):
            mine, theirs = getattr(self.provenance, field_name), getattr(stats.provenance, field_name)
            if mine != theirs:
                raise StatsError(
                    f"{path} is of another calibration than the statistics: its {field_name.replace('_', ' ')} is "
                    f"{str(mine)[:12]}, theirs {str(theirs)[:12]}. Calibrate again, or move it away to encode without "
                    "error feedback."
                )
        if difference := differing_settings(self.provenance.settings, stats.provenance.settings):
            raise StatsError(
                f"{path} was measured under another configuration of the model than the statistics: {difference}. "
                "Calibrate again, or move it away to encode without error feedback."
            )


def named_tensors(sums: dict[str, torch.Tensor], weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Return sums and weights under their names in a file."""
    tensors = {f"{key}.sum": total for key, total in sums.items()}
    return tensors | {f"{key}.weight": weight for key, weight in weights.items()}


def _fill(moments: SecondMoments, tensors: dict[str, torch.Tensor]) -> None:
    """Put the tensors of a file in their places. Raises ValueError for what is not as `SecondMoments` describes it."""
    for name, tensor in tensors.items():
        key, _, part = name.rpartition(".")
        if part not in ("sum", "weight"):
            raise ValueError(f"`{name}` is neither a sum nor a weight")
        (moments.sums if part == "sum" else moments.weights)[key] = tensor
    if moments.sums.keys() != moments.weights.keys():
        raise ValueError("sums and weights are of different inputs")
    for key, sums in moments.sums.items():
        weights, shape = moments.weights[key], list(sums.shape)
        if sums.ndim != 3 or shape[1] != shape[2] or not sums.numel() or sums.dtype != torch.float32:
            raise ValueError(f"`{key}.sum` is {shape} of {sums.dtype}, not float32 [experts, channels, channels]")
        if list(weights.shape) != shape[:1] or weights.dtype != torch.float64:
            raise ValueError(f"`{key}.weight` is {list(weights.shape)} of {weights.dtype}")
        if not (is_finite(sums) and is_finite(weights)):
            raise ValueError(f"`{key}` holds NaN or infinite values")
    aliases, tokens = moments.aliases, moments.tokens
    if not isinstance(aliases, dict) or not all(isinstance(key, str) for key in aliases.values()):
        raise ValueError("`aliases` does not map weights to inputs")
    if moments.kind not in ("activations", "gradients", "two-sided") or tokens.ndim != 2 or tokens.is_floating_point():
        raise ValueError(f"the kind {moments.kind!r:.40} of {list(tokens.shape)} tokens")


def kind_beside(stats: Path) -> str:
    """Return what the second moments beside statistics are of, or "none"; a damaged file is none, too."""
    try:
        return read_tensors_header(path_beside(stats))["kind"]
    except (OSError, SafetensorError, KeyError, ValueError, TypeError):
        return "none"


def load_beside(stats_path: Path, stats: CalibrationStats) -> SecondMoments | None:
    """Return the second moments measured with these statistics, or None where there is no file of them."""
    path = path_beside(stats_path)
    if not path.is_file():
        return None
    moments = SecondMoments.load(path)
    moments.check_belongs_to(stats, path)
    return moments


def hessian(
    moments: SecondMoments,
    stats: CalibrationStats,
    weight: str,
    shape: tuple[int, ...],
    experts: slice | list[int] = slice(None),
) -> torch.Tensor | None:
    """E[x xᵀ] of a weight's input, positive definite, float32 [E, C, C]: one matrix, or one for each of `experts`.

    Pooled moments lend every expert their correlations, and the expert keeps its own diagonal. None when there are no
    moments of this input, or they are not of its width.
    """
    key, columns = moments.key_of(weight), shape[-1]
    if key is None or moments.sums[key].shape[-1] != columns:
        return None
    sums, totals = moments.sums[key], moments.weights[key]
    stacked = len(shape) == 3
    if stacked and len(sums) not in (1, shape[0]):
        return None
    counts = stats.inputs[key].counts.to(torch.float64)
    if len(sums) == 1:
        mean, tokens = sums / totals.clamp_min(1).to(torch.float32)[:, None, None], counts.sum().reshape(1)
        if stacked and len(counts) == shape[0]:
            squares = importance(stats, weight, shape)[experts]
            scale = squares.sqrt() * mean[0].diagonal().clamp_min(torch.finfo(torch.float32).tiny).rsqrt()
            mean = (mean[0] * scale.unsqueeze(1)).mul_(scale.unsqueeze(2))
            tokens = torch.full((len(mean),), float(counts.sum()))
    else:
        mean, tokens = _leaning(moments, key, counts, experts)
    return _invertible(mean, tokens)


def output_hessian(
    moments: SecondMoments, weight: str, shape: tuple[int, ...], experts: slice | list[int] = slice(None)
) -> torch.Tensor | None:
    """E[g gᵀ] of gradients g of a weight's outputs, positive definite, float32 [E or 1, R, R]; None without moments."""
    num_experts, rows = (shape[0] if len(shape) == 3 else 1), shape[-2]
    if (whole := weight.replace("attn_v_b", "attn_kv_b") + OUTPUT) in moments.sums and whole != weight + OUTPUT:
        heads = moments.sums[whole][0].unflatten(1, (num_experts, -1)).unflatten(0, (num_experts, -1))
        values = heads.diagonal(dim1=0, dim2=2).movedim(-1, 0)[experts, -rows:, -rows:]  # after the head's keys
        tokens = moments.weights[whole].expand(len(values))
        return _invertible(values / tokens.clamp_min(1).to(torch.float32)[:, None, None], tokens, OUTPUT_SHARE)
    key = weight + OUTPUT
    if key not in moments.sums or moments.sums[key].shape[-1] != rows:
        return None
    count = len(moments.sums[key])
    if count not in (1, num_experts):
        return None
    mean, tokens = _leaning(moments, key, moments.weights[key], experts if count > 1 else slice(None))
    return _invertible(mean, tokens, OUTPUT_SHARE)


def _leaning(
    moments: SecondMoments, key: str, counts: torch.Tensor, experts: slice | list[int]
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return means of experts that saw `counts` tokens, leaning on that of all, and the tokens that these stand for."""
    n, tokens = counts[experts], counts[experts] + SHRINK_TOKENS
    mean = moments.sums[key][experts] / moments.weights[key][experts].clamp_min(1e-12).to(torch.float32)[:, None, None]
    share = (n / (n + SHRINK_TOKENS)).to(torch.float32)[:, None, None]  # of the expert's own moments
    return mean.mul_(share).add_((1 - share) * moments.layer_mean(key)), tokens


def _invertible(mean: torch.Tensor, tokens: torch.Tensor, share: float = 1.0) -> torch.Tensor:
    """Return `mean` itself, changed in place: matrices of wide layers have hundreds of megabytes. At most `share` of
    what lies off the diagonal stays."""
    diagonal = mean.diagonal(dim1=-2, dim2=-1)
    trust = (share * tokens / (mean.shape[-1] + tokens)).to(torch.float32)[:, None, None]  # 1 - r
    average = diagonal.mean(-1, keepdim=True)
    added = (1 - trust.squeeze(2)) * diagonal + DAMPING * torch.where(average > 0, average, 1.0)
    mean.mul_(trust).diagonal(dim1=-2, dim2=-1).add_(added)  # the diagonal of S stays whole
    return mean
