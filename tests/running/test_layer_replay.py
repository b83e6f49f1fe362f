"""Stages that run again on their kept inputs give what the whole model did, however it calls its layers."""

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from dynquant.running.streaming.layer_replay import LayerReplay
from tests.helpers.architectures import COMMON
from tests.helpers.tiny_models import randomize

BY_PLACE = {
    "laurel_rank": 4, "activation_sparsity_pattern": [0.0, 0.0], "layer_types": ["full_attention"] * 2,
    "hidden_size_per_layer_input": 8, "vocab_size_per_layer_input": 512, "num_kv_shared_layers": 0,
}  # fmt: skip
"""Gemma 3n gives its layers position embeddings by place, not by name."""


@pytest.mark.parametrize(("model_type", "sizes"), [("llama", {}), ("gemma3n_text", BY_PLACE)])
def test_a_stage_gives_what_the_whole_pass_did(model_type, sizes):
    torch.manual_seed(0)
    config = AutoConfig.for_model(model_type, **COMMON | sizes)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    randomize(model)
    replay = LayerReplay(model, torch.arange(64).reshape(4, 16).split(2))
    whole = list(replay.keep())
    with torch.no_grad():
        last = replay.layer(1, replay.num_layers - 1)
        assert torch.equal(replay.head(1, last), whole[1])
        assert torch.equal(replay.embedded(1), replay.layer_input(1, 0))
