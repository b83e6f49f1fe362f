"""Weights between those that an adapter started with and those that training made of it.

Training on text gives up some of what that text seldom asks for. Between both ends most of what was won on the text is
kept, and most of what the start knew (WiSE-FT, Wortsman et al. 2022); reports/finetune.md has the figures.
"""

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
    """Names and parameters that training changes."""
    return [(name, tensor) for name, tensor in model.named_parameters() if tensor.requires_grad]
