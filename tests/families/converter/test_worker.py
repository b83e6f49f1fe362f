"""Small decisions of the worker, which the converter's tree is not needed for."""

import pytest

from dynquant.families.converter.worker import _as_expected, _turned_experts


@pytest.mark.parametrize(("width", "hidden"), [(96, 128), (64, 128), (128, 128)])
def test_experts_of_qwen3_vl_are_turned_where_transformers_saved_them(width: int, hidden: int) -> None:
    config = {"model_type": "qwen3_vl_moe", "text_config": {"moe_intermediate_size": width, "hidden_size": hidden}}
    gate, down = "layers.0.mlp.experts.gate_up_proj", "layers.0.mlp.experts.down_proj"
    saved = {gate: (8, 2 * width, hidden), down: (8, hidden, width), "norm.weight": (hidden,)}
    published = {gate: (8, hidden, 2 * width), down: (8, width, hidden), "norm.weight": (hidden,)}
    assert _turned_experts(config, saved) == {gate, down}
    assert _turned_experts(config, published) == frozenset()
    assert _turned_experts({"model_type": "gpt_oss"}, saved) == frozenset()


def test_configurations_are_put_in_the_converter_s_words() -> None:
    hybrid = {"model_type": "granitemoehybrid", "layer_types": ["linear_attention", "full_attention"]}
    assert _as_expected(hybrid)["layer_types"] == ["mamba", "attention"]
    assert _as_expected({"model_type": "minimax_m2", "quantization_config": {}}) == {
        "model_type": "minimax_m2", "scoring_func": "sigmoid",
    }  # fmt: skip
    assert _as_expected({"model_type": "glm4_moe_lite", "scoring_func": "softmax"})["scoring_func"] == "softmax"
    assert _as_expected({"model_type": "olmo2", "layer_types": ["full_attention"]})["layer_types"] == ["full_attention"]
    angles = {"rope_type": "default", "partial_rotary_factor": 0.5}
    assert _as_expected({"model_type": "gpt_neox", "rope_parameters": angles})["rotary_pct"] == 0.5
    assert _as_expected({"model_type": "gpt_neox", "rope_parameters": angles, "rotary_pct": 1.0})["rotary_pct"] == 1.0
    assert _as_expected({"model_type": "cohere2"})["rotary_pct"] == 1.0
