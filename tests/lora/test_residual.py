"""Adapters that start from what quantization took."""

import copy

import pytest
import torch

import dynquant
from dynquant.checkpoints.gguf_source import GGUFSource
from dynquant.errors import AdapterError
from dynquant.running.live_weights import LiveWeights
from dynquant.running.load import load_hf
from tests.helpers.adapters import logits
from tests.helpers.packed_models import export_both
from tests.helpers.tiny_models import mean_kl

pytest.importorskip("peft", reason="peft is not installed")
from dynquant.lora import add_adapter, start_from_residual
from dynquant.lora.layers import PackedLoraExperts


@pytest.mark.parametrize("family", ["deepseek-v3", "llama"])
def test_an_adapter_of_full_rank_starts_at_the_original(family, tiny_text, tmp_path):
    """MLA's joined projection, stacked experts, rows that llama.cpp interleaves; what has no adapter stays as it is."""
    made = export_both(tiny_text(family), tmp_path)
    original, source = load_hf(made.model), GGUFSource(made.gguf)
    live = LiveWeights(made.model, original)
    for name in ("token_embd.weight", "output.weight"):
        live.write(name, source.load(name))
    adapted = add_adapter(dynquant.load(made.gguf), rank=512)
    packed = mean_kl(logits(original), logits(adapted))
    start_from_residual(adapted, made.model)
    assert mean_kl(logits(original), logits(adapted)) < 1e-5 and packed > 1e-3


def test_the_residual_start_is_the_best_of_its_rank(packed_tiny, model):
    adapted = add_adapter(copy.deepcopy(model), rank=4)
    start_from_residual(adapted, packed_tiny.model)
    layer = next(layer for layer in adapted.modules() if isinstance(layer, PackedLoraExperts))
    name = "gate_proj" if layer.parameter_name == "gate_up_proj" else "down_proj"
    experts = layer.experts
    original = packed_tiny.model.source.load(f"blk.1.ffn_{name.removesuffix('_proj')}_exps.weight")
    a, b = layer.factors("default")
    delta = (layer.scaling["default"] * b @ a)[:, : original.shape[1]]
    residual = original - experts.dense(name, torch.float32)
    best = torch.linalg.svdvals(residual.double())[:, 4:].square().sum().sqrt()
    assert float((residual - delta).double().norm()) < 1.02 * float(best)


def test_another_model_is_no_original(packed_tiny, model, small_moe):
    from dynquant.families.open import open_model

    with pytest.raises(AdapterError, match="Give the model that was quantized"):
        start_from_residual(add_adapter(copy.deepcopy(model), rank=4), open_model(small_moe))
