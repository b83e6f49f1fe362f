"""The table of per-layer inputs (Gemma 3n and 4) has a sensitivity of its own, beside that of the token embedding."""

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from dynquant.analysis.sensitivity.closed_form import output_sensitivity
from dynquant.inputs.model_inputs import ModelInputs
from dynquant.running.weight_inputs import weight_inputs
from tests.helpers.architectures import converted_model

SIZES = {
    "vocab_size": 96, "vocab_size_per_layer_input": 96, "hidden_size": 64, "intermediate_size": 64,
    "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 32,
    "hidden_size_per_layer_input": 32, "layer_types": ["sliding_attention", "full_attention"],
    "num_kv_shared_layers": 0, "activation_sparsity_pattern": [0.0, 0.0], "laurel_rank": 8,
}  # fmt: skip
TABLE = "per_layer_token_embd.weight"


def test_the_table_of_each_layer_is_priced_by_what_its_errors_do(tmp_path):
    torch.manual_seed(0)
    hf_model = AutoModelForCausalLM.from_config(AutoConfig.for_model("gemma3n_text", **SIZES)).eval()
    for parameter in hf_model.parameters():  # some begin as zeros, and stop all gradients
        torch.nn.init.normal_(parameter, mean=float(parameter.dim() < 2), std=parameter.shape[-1] ** -0.5)
    hf_model.save_pretrained(tmp_path)
    weights = weight_inputs(converted_model(tmp_path, [], arch="gemma3n"), hf_model)
    table, windows = weights.embeddings[TABLE], torch.randint(0, 96, (8, 32))
    assert table is not weights.embeddings["token_embd.weight"] and tuple(table.weight.shape) == (96, 64)
    sensitivity, errors = output_sensitivity(hf_model, weights, ModelInputs(windows))
    noise = torch.randn_like(table.weight)
    noise *= 0.1 * table.weight.norm(dim=1, keepdim=True) / noise.norm(dim=1, keepdim=True)
    with torch.no_grad():
        before = hf_model(windows).logits.log_softmax(-1)
        table.weight += noise
        divergence = (before.exp() * (before - hf_model(windows).logits.log_softmax(-1))).sum(-1).mean()
    assert 0 < errors[TABLE] < sensitivity[TABLE]
    assert sensitivity[TABLE] * 0.1**2 == pytest.approx(float(divergence), rel=0.6)
