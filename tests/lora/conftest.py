"""A packed model, the same weights unpacked, and a saved adapter; read only, tests take copies."""

import copy

import pytest

import dynquant
from dynquant.checkpoints.gguf_source import GGUFSource
from dynquant.running.live_weights import LiveWeights
from dynquant.running.load import load_hf
from tests.helpers.adapters import randomized


@pytest.fixture(scope="session")
def model(packed_tiny):
    """Tests take copies."""
    return dynquant.load(packed_tiny.gguf)


@pytest.fixture(scope="session")
def dense(packed_tiny):
    """The original architecture with the decoded weights, in transformers' fused experts."""
    reference, source = load_hf(packed_tiny.model), GGUFSource(packed_tiny.gguf)
    reference.set_experts_implementation("eager")  # the others do not take float64
    live = LiveWeights(packed_tiny.model, reference)
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
