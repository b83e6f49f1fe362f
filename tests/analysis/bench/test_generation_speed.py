"""Decoding steps after a prompt: the cache of a graph holds what the prompt filled."""

import torch
from transformers import AutoConfig

from dynquant.analysis.bench.generation_speed import generate_speed, read_prompt, static_copy
from dynquant.analysis.bench.random_models import random_packed

SHAPE = {
    "vocab_size": 512, "hidden_size": 256, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
    "head_dim": 64, "intermediate_size": 512, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 256,
}  # fmt: skip


@torch.inference_mode()
def test_a_static_copy_goes_on_where_the_prompt_ended() -> None:
    config = AutoConfig.for_model("qwen3_moe", **SHAPE, tie_word_embeddings=False)
    model = random_packed(config, "experts=IQ2_XXS,rest=Q4_K", device="cpu")
    (cache, speed, peak), (again, *_) = (read_prompt(model, 2, 9) for _ in range(2))
    assert speed > 0 and peak == 0
    for layer, other in zip(cache.layers, again.layers, strict=True):
        other.keys, other.values = layer.keys, layer.values
    static = static_copy(again, config, 16)
    assert again.layers[0].keys is None
    steps = {"input_ids": torch.tensor([[5], [7]]), "position_ids": torch.full((2, 1), 9)}
    logits = [model(**steps, past_key_values=filled, use_cache=True).logits for filled in (cache, static)]
    torch.testing.assert_close(*logits, rtol=0.05, atol=0.05)
    assert logits[0].std() > 0.1
    assert generate_speed(model, 1, 4, 8) > 0
