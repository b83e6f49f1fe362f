"""GGUF files of the small MoE for evaluation: exact in F32, and with every matrix rounded to a few bits."""

from dataclasses import replace
from pathlib import Path

import torch

from dynquant.checkpoints.tensor_source import TensorInfo, TensorSource
from dynquant.families.open import open_model
from tests.helpers.tiny_models import write_f32


def round_to_bits(weights: torch.Tensor, bits: int) -> torch.Tensor:
    """Round to the nearest of evenly spaced levels, one scale a row."""
    scale = weights.abs().amax(dim=-1, keepdim=True).clamp(min=1e-12) / (2 ** (bits - 1) - 0.5)
    return (weights / scale).round() * scale


class RoundedSource:
    """Another source whose matrices lose precision as they are loaded; the router stays exact."""

    def __init__(self, source: TensorSource, bits: int) -> None:
        self._source, self._bits = source, bits
        self.fingerprint = f"{source.fingerprint} rounded to {bits} bits"

    def names(self) -> list[str]:
        return self._source.names()

    def info(self, name: str) -> TensorInfo:
        return self._source.info(name)

    def load(self, name: str, index: int | None = None) -> torch.Tensor:
        weights = self._source.load(name, index)
        is_exact = weights.dim() < 2 or "gate_inp" in name
        return weights if is_exact else round_to_bits(weights, self._bits)


def write_gguf(directory: Path, output: Path, *, bits: int | None = None) -> Path:
    """Convert a Hugging Face directory to F32 GGUF, rounded to `bits` if given."""
    model = open_model(directory)
    if bits is not None:
        model = replace(model, source=RoundedSource(model.source, bits))
    return write_f32(model, output)
