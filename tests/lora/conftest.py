"""A packed model, the same weights unpacked, and a saved adapter; read only, tests take copies."""

import copy

import pytest

import dynquant
from dynquant.checkpoints.gguf_source import GGUFSource
from dynquant.running.live_weights import LiveWeights
from dynquant.running.load import load_hf
from tests.helpers.adapters import randomized
from tests.helpers.packed_models import export_both
from tests.helpers.tiny_models import save_tiny


@pytest.fixture(scope="session")
def tiny(small_moe, tmp_path_factory):
    """A packed DeepSeek-V3 of three layers: MLA, a dense layer, routed and shared experts; many quant types."""
    folder = tmp_path_factory.mktemp("tiny")
    return export_both(save_tiny("deepseek-v3", folder / "float", small_moe), folder)


@pytest.fixture(scope="session")
def model(tiny):
    """Tests take copies."""
    return dynquant.load(tiny.gguf)


@pytest.fixture(scope="session")
def dense(tiny):
    """The original architecture with the decoded weights, in transformers' fused experts."""
    reference, source = load_hf(tiny.model), GGUFSource(tiny.gguf)
    reference.set_experts_implementation("eager")  # the others do not take float64
    live = LiveWeights(tiny.model, reference)
    for name in live.names():
        live.write(name, source.load(name))
    return reference


@pytest.fixture(scope="session")
def saved(model, tmp_path_factory):
    """A saved adapter on everything, no longer zero."""
    from dynquant.lora import add_adapter

    directory = tmp_path_factory.mktemp("adapter")
    randomized(add_adapter(copy.deepcopy(model), rank=4, alpha=8)).save_pretrained(directory)
    return directory
