"""Adapters between two points: what training changes, kept as it began, blended with what came out, and saved.

Training on text gives up some of what that text seldom asks for. Between both ends most of what was won on the text is
kept, and most of what the start knew (WiSE-FT, Wortsman et al. 2022); reports/finetune.md has the figures.
"""

from pathlib import Path
from typing import Any

import torch
from torch import nn


class AdapterStart:
    """The trained parameters of a model as they are now."""

    def __init__(self, model: nn.Module) -> None:
        self._tensors = {name: tensor.detach().clone() for name, tensor in trained(model)}

    @torch.no_grad()
    def blend(self, model: nn.Module, share: float) -> None:
        """Move the same model's parameters to `share` of the way from the start to where they are."""
        for name, tensor in trained(model):
            tensor.copy_(self._tensors[name].lerp(tensor, share))


def trained(model: nn.Module) -> list[tuple[str, nn.Parameter]]:
    """Return names and parameters that training changes."""
    return [(name, tensor) for name, tensor in model.named_parameters() if tensor.requires_grad]


@torch.no_grad()
def round_adapter(adapted: nn.Module, dtype: torch.dtype) -> None:
    """Bring what is trained to the numbers that `dtype` can hold; tensors keep their own type."""
    for _, tensor in trained(adapted):
        tensor.copy_(tensor.to(dtype))


def save_adapter(adapted: Any, directory: Path, dtype: torch.dtype) -> None:
    """Write a PEFT model's adapter with its tensors in `dtype`. PEFT computes with it in float32 again."""
    tensors = {name: tensor.detach().to(dtype) for name, tensor in trained(adapted)}
    adapted.save_pretrained(str(directory), state_dict=tensors)
