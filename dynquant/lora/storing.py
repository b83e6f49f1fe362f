"""Writes an adapter to a directory, its tensors in float32 or, in half the bytes, in bfloat16."""

from pathlib import Path

import torch
from peft import PeftModel

from dynquant.lora.start import trained


@torch.no_grad()
def round_adapter(adapted: PeftModel, dtype: torch.dtype) -> None:
    """Bring what is trained to the numbers that `dtype` can hold; tensors keep their own type."""
    for _, tensor in trained(adapted):
        tensor.copy_(tensor.to(dtype))


def save_adapter(adapted: PeftModel, directory: Path, dtype: torch.dtype) -> None:
    """`save_pretrained` of what is trained, in `dtype`. PEFT computes with it in float32 again."""
    tensors = {name: tensor.detach().to(dtype) for name, tensor in trained(adapted)}
    adapted.save_pretrained(str(directory), state_dict=tensors)
