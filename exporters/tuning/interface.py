"""A quantized model as the closing pass sees it, whatever files hold it: `gguf_file` and `compressed_file` are two."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from dynquant.checkpoints.tensor_roles import Role, role_of
from dynquant.running.live_weights import LiveWeights

SCALES = "scales"


class ScaledParts(NamedTuple):
    """A tensor whose weights are sums of a few parts, each times a number that is stored without codes."""

    scales: Tensor
    """The numbers, [blocks, count]: of a group its scale, of a super-block perhaps its minimum too."""
    parts: Tensor
    """Weights that the codes give under each of them alone, [blocks, count, block_size]."""


class QuantizedFile(Protocol):
    """A quantized model as tensors that have places in its running original."""

    pace: float
    """Share of the full rate at which scales move: finer groups each see less in the same text."""

    def check_original(self) -> None:
        """Raise ExportError when the files are of another model; the first tensor that differs is named."""

    def live(self, hf_model: Any) -> LiveWeights:
        """Return the places of the tensors in the running original."""

    def names(self) -> list[str]:
        """Names of all tensors, as `live` has them."""

    def is_quantized(self, name: str) -> bool:
        """Return whether a tensor differs from the original's in a measure that the rates go by."""

    def kind(self, name: str) -> str:
        """Return the part of the model that a tensor is trained as, `SCALES` or that of its values; empty for none."""

    def load(self, name: str) -> Tensor:
        """Return float32 values."""

    def scaled(self, name: str, device: torch.device) -> ScaledParts:
        """Return a tensor whose kind is `SCALES`, on a device."""

    def rounded(self, name: str, numbers: Tensor) -> Tensor:
        """Return numbers of a tensor (its scales, or its values) as they are read again once they are stored."""

    def stored(self, name: str, numbers: Tensor) -> dict[str, Tensor]:
        """Return what is written for new numbers of a tensor, by the names that the files have for it."""

    def write(self, output: Path, replacements: Mapping[str, Tensor], *, encoder: str, outcome: str) -> list[Path]:
        """Write the model to `output` with other tensors; `outcome` says what was trained. Raises WriteError."""


def kind_of_values(name: str) -> str:
    """Return the part of the model that a tensor of floats is trained as; empty for none."""
    return {Role.NORM: "norms", Role.ROUTER: "routers"}.get(role_of(name), "biases" * name.endswith(".bias"))
