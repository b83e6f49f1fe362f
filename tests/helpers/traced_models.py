"""Packed models of architectures without a family, and the float models that their GGUF bytes stand for."""

from pathlib import Path
from typing import Any

import torch

from dynquant.checkpoints.gguf_source import GGUFSource
from dynquant.checkpoints.model import Model
from dynquant.encoding.stream import load_encoder
from dynquant.recipes.plan import Plan
from dynquant.running.live_weights import LiveWeights
from dynquant.running.load import load_directory, load_hf
from tests.helpers.exports import export_gguf, export_safetensors
from tests.helpers.packed_models import plan_of

TYPES = ("Q8_0", "Q4_0", "Q5_0", "Q4_1")


def mixed_plan(model: Model) -> Plan:
    """Return a plan with matrices in four types by turns."""
    names = [name for name in model.source.names() if len(model.source.info(name).shape) > 1]
    types = {name: TYPES[number % len(TYPES)] for number, name in enumerate(names)}
    return plan_of(model, types.__getitem__)


def packed_and_decoded(model: Model, folder: Path, tokens: torch.Tensor) -> tuple[Any, torch.Tensor, torch.Tensor]:
    """Export a model in a mixture of types as both, and return the packed model, its logits, and those of the float
    model with the values of the GGUF file."""
    plan, encoder = mixed_plan(model), load_encoder("ggml")
    export_gguf(model, plan, None, folder / "model.gguf", encoder=encoder)
    export_safetensors(model, plan, None, folder / "packed", encoder=encoder)
    decoded, file = load_hf(model, dtype=torch.float32), GGUFSource(folder / "model.gguf")
    live = LiveWeights(model, decoded)
    for name in live.names():
        live.write(name, file.load(name))
    packed = load_directory(folder / "packed", torch.float32)
    with torch.inference_mode():
        return packed, packed(input_ids=tokens).logits, decoded(input_ids=tokens).logits
