"""Differences of llama.cpp that are told by a configuration."""

from typing import Any

import pytest

from dynquant.evaluation.agreement.likely_causes import known_differences

WINDOWS = {"model_type": "exaone4", "sliding_window": 4096}
SPARSE = {"model_type": "gemma3n_text", "hidden_activation": "gelu_pytorch_tanh", "activation_sparsity_pattern": [0.95]}


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ({"model_type": "llama", "hidden_act": "silu"}, []),
        ({"rope_parameters": {"rope_type": "yarn", "truncate": False}}, ["borders of YaRN"]),
        ({"rope_parameters": {"rope_type": "yarn"}}, []),
        ({"rope_scaling": {"type": "yarn", "truncate": False}}, ["borders of YaRN"]),
        ({"model_type": "phimoe", "hidden_act": "silu"}, ["sparsemixer"]),
        ({**WINDOWS, "num_hidden_layers": 4}, ["64 layers"]),
        ({**WINDOWS, "num_hidden_layers": 64}, []),
        ({"model_type": "exaone4", "sliding_window": None, "num_hidden_layers": 30}, []),
        ({"model_type": "nemotron_h", "time_step_min": 0.001}, ["time_step_min"]),
        ({"model_type": "nemotron_h", "time_step_min": 0.0}, []),
        (SPARSE, ["n - 1", "table of 16-bit"]),
        ({"model_type": "gpt_neox", "hidden_act": "gelu"}, ["table of 16-bit"]),
    ],
)
def test_what_llama_cpp_computes_otherwise_is_known_from_the_configuration(
    config: dict[str, Any], words: list[str]
) -> None:
    reasons = [known.reason for known in known_differences(config)]
    assert len(reasons) == len(words)
    assert all(word in reason for word, reason in zip(words, reasons, strict=True))
