"""Layers that run one after the other: what reaches the head is that of a whole model, or the model is refused."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM

from dynquant.errors import StatsError
from dynquant.running.load import load_hf
from dynquant.running.streaming.chained_layers import gives_tuples
from dynquant.running.streaming.layer_stream import LayerStream, decoder_layers
from dynquant.running.streaming.staged_passes import StagedPasses
from tests.helpers.architectures import COMMON, converted_model
from tests.helpers.tiny_models import randomize

MAMBA = {"mamba_n_heads": 2, "mamba_d_head": 16, "mamba_d_ssm": 32, "mamba_d_state": 16, "mamba_chunk_size": 8}
BLOOM = {"n_head": 4, "n_layer": 2}
PER_LAYER = {"hidden_size_per_layer_input": 8, "vocab_size_per_layer_input": 512}
ALTUP = {"laurel_rank": 4, "activation_sparsity_pattern": [0.0, 0.0], "layer_types": ["full_attention"] * 2}
SHARED_KEYS = {"num_kv_shared_layers": 1, "hidden_size_per_layer_input": 0, "layer_types": ["full_attention"] * 2}
SELECTED = {
    "num_key_value_heads": 4,
    "kv_lora_rank": 16,
    "q_lora_rank": 16,
    "qk_nope_head_dim": 16,
    "qk_rope_head_dim": 16,
    "v_head_dim": 16,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 16,
    "index_n_heads": 2,
    "index_head_dim": 32,
    "first_k_dense_replace": 1,
    "n_group": 1,
    "topk_group": 1,
    "mlp_layer_types": ["dense", "sparse"],
    "indexer_types": ["full", "full"],
}


def tiny(model_type: str, sizes: dict[str, Any]) -> Any:
    made = AutoModelForCausalLM.from_config(AutoConfig.for_model(model_type, **COMMON | sizes), dtype=torch.float32)
    randomize(made)
    return made.eval()


def entering(head: nn.Module, seen: list[Tensor]) -> Any:
    return head.register_forward_pre_hook(lambda _module, args: seen.append(args[0][:, -1]))


@pytest.mark.parametrize(
    ("model_type", "sizes"),
    [
        # The scaled embedding is no hidden state of the head; buffers of the layers that the whole model sets; tuples.
        ("granite", {"embedding_multiplier": 30.0, "rms_norm_eps": 1e-2}),
        ("falcon_h1", MAMBA | {"ssm_multipliers": [2.0, 0.5, 1.5, 1.0, 3.0]}),
        ("bloom", BLOOM),
    ],
)
def test_the_head_sees_what_a_whole_model_gives_it(model_type: str, sizes: dict[str, Any], tmp_path: Path) -> None:
    tiny(model_type, sizes).save_pretrained(tmp_path / "model")
    model = converted_model(tmp_path / "model", [])
    tokens, whole, staged = torch.arange(3, 27).view(2, 12), [], []
    hf_model = load_hf(model)
    with torch.no_grad(), entering(hf_model.get_output_embeddings(), whole):
        hf_model(input_ids=tokens, use_cache=False)
    stream = LayerStream(model)
    passes = StagedPasses(stream, [tokens], tmp_path)
    with stream.running(), entering(stream.hf_model.get_output_embeddings(), staged):
        for stage in range(passes.head + 1):
            passes.forward(stage)
    assert torch.equal(staged[0], whole[0])


@pytest.mark.parametrize(
    ("model_type", "sizes", "reason"),
    [
        ("gemma4_text", PER_LAYER, "`per_layer_input`, which depends on the text"),
        ("gemma4_text", SHARED_KEYS, "keys and values of other"),
        ("gemma3n_text", PER_LAYER | ALTUP | {"num_kv_shared_layers": 0}, "do not pass on hidden states of 64 ch"),
        ("rwkv", {}, "pass on more than hidden states"),
    ],
)
def test_layers_that_share_more_than_hidden_states_are_refused(
    model_type: str, sizes: dict[str, Any], reason: str
) -> None:
    hf_model = tiny(model_type, sizes)
    with pytest.raises(StatsError, match=reason) as refused:
        gives_tuples(hf_model, decoder_layers(hf_model), torch.float32, torch.device("cpu"))
    assert "leave out --max-memory" in str(refused.value)


def test_layers_of_gemma_4_without_shared_state_are_streamed() -> None:
    hf_model = tiny("gemma4_text", {"hidden_size_per_layer_input": 0})
    assert not gives_tuples(hf_model, decoder_layers(hf_model), torch.float32, torch.device("cpu"))
