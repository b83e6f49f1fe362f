"""Writes an adapter to a directory, its tensors in float32 or, in half the bytes, in bfloat16."""

from pathlib import Path

import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file

from dynquant.lora.saved import WEIGHTS_NAME


@torch.no_grad()
def round_adapter(adapted: PeftModel, dtype: torch.dtype) -> None:
    """Bring what is trained to the numbers that `dtype` can hold; tensors keep their own type."""
    for parameter in adapted.parameters():
        if parameter.requires_grad:
            parameter.copy_(parameter.to(dtype))


def save_adapter(adapted: PeftModel, directory: Path, dtype: torch.dtype) -> None:
    """`save_pretrained`, with all tensors in `dtype`. PEFT computes with them in float32 again."""
    adapted.save_pretrained(str(directory))
    file = directory / WEIGHTS_NAME
    tensors = load_file(file)
    if any(tensor.dtype != dtype for tensor in tensors.values()):
        save_file({name: tensor.to(dtype) for name, tensor in tensors.items()}, file, metadata={"format": "pt"})
