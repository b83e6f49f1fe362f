"""Copies of a checkpoint with another configuration or other tensors; what stays the same is linked."""

import json
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file


def edited_config(source: Path, target: Path, edit: Callable[[dict], object] = lambda config: None) -> Path:
    """Return `target`, a copy whose config.json went through `edit`."""
    target.mkdir()
    for file in source.iterdir():
        (target / file.name).symlink_to(file)
    config = json.loads((source / "config.json").read_text())
    edit(config)
    (target / "config.json").unlink()
    (target / "config.json").write_text(json.dumps(config))
    return target


def edited_weights(source: Path, target: Path, edit: Callable[[dict[str, torch.Tensor]], object]) -> Path:
    """Return `target`, a copy whose tensors went through `edit`."""
    tensors = load_file(source / "model.safetensors")
    edit(tensors)
    edited_config(source, target)
    (target / "model.safetensors").unlink()
    contiguous = {name: tensor.contiguous() for name, tensor in tensors.items()}
    save_file(contiguous, target / "model.safetensors", metadata={"format": "pt"})
    return target
