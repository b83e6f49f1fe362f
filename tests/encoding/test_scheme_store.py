"""Weights of linear layers as a store renders them: those of the exported checkpoint, encoded once."""

import pytest
import torch

from dynquant.encoding import scheme_store
from dynquant.encoding.stream import Guidance
from dynquant.errors import CheckpointError
from dynquant.evaluation.rendered_model import RenderedModel
from dynquant.evaluation.runners import load_model
from dynquant.families.linear_layers import linear_checkpoint
from dynquant.families.open import open_model
from dynquant.formats.storage_format import Choice
from dynquant.formats.vllm_schemes import SCHEMES
from dynquant.recipes.build_plan import plan_for_vllm
from dynquant.running.load import load_hf
from tests.helpers.exports import export_compressed_tensors
from tests.helpers.tiny_models import save_tiny

MIXTURE = ("W3A16", "NVFP4A16", "W4A16_ASYM", "BF16", "FP8", "MXFP4A16", "W2A16")


@pytest.fixture(scope="module")
def deepseek(small_moe, tmp_path_factory):
    """Float32, so that what is no linear layer is rounded in every checkpoint."""
    return save_tiny("deepseek-v3", tmp_path_factory.mktemp("tiny") / "deepseek", small_moe, num_hidden_layers=2)


@pytest.fixture
def store(deepseek, tmp_path):
    model = open_model(deepseek)
    checkpoint = linear_checkpoint(model)
    schemes = checkpoint.candidates(SCHEMES, mixed_experts=True)
    by_name = {name: {scheme.name: scheme for scheme in of} for name, of in schemes.items()}
    return scheme_store.SchemeStore(model, checkpoint, by_name, Guidance(), tmp_path / "store", torch.device("cpu"))


@pytest.fixture
def plan(store):
    units = store.checkpoint.units(mixed_experts=True).values()
    wanted = {}
    for number, unit in enumerate(units):
        scheme = next(name for name in (*MIXTURE[number % 7 :], "W4A16") if name in store.schemes[unit[0].name])
        wanted |= {linear.name: Choice(scheme, "") for linear in unit}
    return plan_for_vllm(store.model, store.checkpoint, wanted, recipe="test", mixed_experts=True)


def test_a_rendered_plan_has_the_weights_of_its_checkpoint(store, plan, tmp_path, monkeypatch):
    assert {"NVFP4A16", "BF16", "FP8"} < set(plan.histogram())
    export_compressed_tensors(store.model, plan, store.checkpoint, tmp_path / "written")
    read = load_model(tmp_path / "written").state_dict()
    running, schemes = load_hf(store.model, dtype=torch.float32), {entry.name: entry.type for entry in plan.entries}
    original = {name: values.clone() for name, values in running.state_dict().items()}
    rendered = RenderedModel(running, store)

    def is_all_of(weights):
        return all(torch.equal(values, weights[name]) for name, values in running.state_dict().items())

    rendered.install(schemes)
    assert is_all_of(read) and not is_all_of(original)
    monkeypatch.setattr(scheme_store, "encode_piece", None)  # all that is installed from here on is on disk
    rendered.install({})
    for name in store.fixed:  # embedding, head and routers, which every checkpoint has in BF16
        rendered.write(name, None)
    assert is_all_of(original)
    rendered.install(schemes)
    for name in store.fixed:
        rendered.write(name, "BF16")
    assert is_all_of(read)
    assert store.fixed.keys() == {"token_embd.weight", "output.weight", "blk.1.ffn_gate_inp.weight"}


@pytest.mark.parametrize("damage", [lambda data: data[: len(data) // 2], lambda data: data[:-3] + b"abc"])
def test_a_damaged_layer_is_encoded_anew(store, damage):
    name = store.checkpoint.linears[0].name
    weights = store.decoded(name, "W4A16")
    (file,) = store.directory.iterdir()
    whole = file.read_bytes()
    file.write_bytes(damage(whole))
    assert torch.equal(store.decoded(name, "W4A16"), weights) and file.read_bytes() == whole


def test_layers_without_a_place_are_refused(store):
    rendered = RenderedModel(load_hf(store.model, dtype=torch.float32), store)
    with pytest.raises(CheckpointError, match=r"no place .* for `blk.1.attn_x.weight`"):
        rendered.install({"blk.0.attn_q_a.weight": "BF16", "blk.1.attn_x.weight": "W4A16"})
