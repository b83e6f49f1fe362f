"""A small made-up GGUF model with a plan and statistics, exported in a blink."""

import time
from collections.abc import Callable
from pathlib import Path

import torch
from gguf import GGUFValueType

from dynquant.calibration.statistics import CalibrationStats, InputStats, StatsProvenance
from dynquant.checkpoints.gguf_source import MetadataField
from dynquant.checkpoints.model import Model
from dynquant.checkpoints.tensor_source import DictSource
from dynquant.encoding.stream import load_encoder
from dynquant.recipes.build_plan import plan_from_types

GGML = load_encoder("ggml")


NUM_LAYERS = 12


def tiny_model(**changes: torch.Tensor) -> Model:
    generator = torch.Generator().manual_seed(0)
    tensors = {"token_embd.weight": torch.randn(70, 256, generator=generator)}
    for layer in range(NUM_LAYERS):
        tensors[f"blk.{layer}.attn_norm.weight"] = torch.rand(250, generator=generator)
        tensors[f"blk.{layer}.ffn_up_exps.weight"] = torch.randn(3, 16, 256, generator=generator)
    fields = (
        MetadataField("general.architecture", "llama", GGUFValueType.STRING),
        MetadataField("general.alignment", 64, GGUFValueType.UINT32),
        MetadataField("llama.block_count", NUM_LAYERS, GGUFValueType.UINT32),
        MetadataField("llama.embedding_length", 256, GGUFValueType.UINT32),
        MetadataField("llama.rope.freq_base", 1e4, GGUFValueType.FLOAT32),
        MetadataField("llama.flag", False, GGUFValueType.BOOL),
        MetadataField("tokenizer.ggml.tokens", ["é", ""], GGUFValueType.ARRAY, GGUFValueType.STRING),
        MetadataField("tokenizer.ggml.token_type", [1, 3], GGUFValueType.ARRAY, GGUFValueType.INT32),
        MetadataField("tokenizer.ggml.empty", [], GGUFValueType.ARRAY, GGUFValueType.STRING),
    )
    return Model(Path("tiny"), DictSource(tensors | changes), fields, lambda name: (name,))


def tiny_plan(model: Model, type_name: str = "Q4_K", **options):
    types = {name: (type_name, "asked") for name in model.source.names() if "norm" not in name}
    return plan_from_types(model, types, recipe="preset test", **options)


def tiny_stats(model: Model) -> CalibrationStats:
    provenance = StatsProvenance(
        fingerprint=model.fingerprint, text_hash="7", text_name="/home/somebody/texts/prose.jsonl", num_windows=7
    )
    inputs = {
        f"blk.{layer}.ffn_up_exps.weight": InputStats(
            torch.rand(3, 256, dtype=torch.float64) * 50 + 1, torch.full((3,), 40)
        )
        for layer in range(NUM_LAYERS)
    }
    return CalibrationStats(provenance, inputs)


class WatchedEncoder:
    """ggml's bytes; `watch` hears the name and the weights of what is encoded next."""

    name, uses_hessians, device, prepare = GGML.name, GGML.uses_hessians, GGML.device, GGML.prepare

    def __init__(self, watch: Callable[[str, torch.Tensor], object]) -> None:
        self.watch = watch

    def encode(self, quant_type, weights, *args, name, **options):
        self.watch(name, weights)
        return GGML.encode(quant_type, weights, *args, name=name, **options)


def pause(*_) -> None:
    """Wait for a kill, in every tensor."""
    time.sleep(0.004)


def stop_after(parts: int) -> Callable[..., None]:
    """Let so many parts pass, and then interrupt."""
    left = iter(range(parts))

    def watch(*_) -> None:
        if next(left, None) is None:
            raise KeyboardInterrupt

    return watch


def left_in(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())
