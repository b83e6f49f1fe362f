"""Second moments of a real run: right sums, mergeable, within their memory, and hessians that can be inverted."""

import copy
from pathlib import Path

import pytest
import torch

from dynquant.calibration.importance import importance
from dynquant.calibration.recorders import DEFAULT_LIMIT, MomentRecorder, moment_limits
from dynquant.calibration.run import StatisticsOptions, collect_statistics
from dynquant.calibration.second_moments import DAMPING, OUTPUT, SecondMoments, hessian, output_hessian
from dynquant.calibration.statistics import CalibrationStats, InputStats, StatsProvenance
from dynquant.errors import StatsError
from dynquant.families.open import open_model
from dynquant.inputs.model_inputs import ModelInputs
from dynquant.running.load import load_hf
from dynquant.running.weight_inputs import weight_inputs
from dynquant.storage.file_names import path_beside

GATE, DOWN, DENSE = "blk.2.ffn_gate_exps.weight", "blk.2.ffn_down_exps.weight", "blk.0.ffn_gate.weight"


@pytest.fixture(scope="module")
def moe(small_moe):
    return load_hf(open_model(small_moe))


@pytest.fixture(scope="module")
def tokens():
    return torch.randint(1, 8000, (6, 64), generator=torch.Generator().manual_seed(0))


def collect(moe, tokens, **options):
    provenance = StatsProvenance(fingerprint="f", text_hash="a0", text_name="noise")
    options = StatisticsOptions(**{"hessians": "activations", "held_back": 0.0} | options)
    inputs = ModelInputs(tokens, batch_size=2)
    names = weight_inputs(open_model(moe.name_or_path), moe)
    return collect_statistics(moe, inputs, names=names, provenance=provenance, options=options)


@pytest.fixture(scope="module")
def whole(moe, tokens):
    return collect(moe, tokens)


def test_diagonals_are_the_importance_sums(whole):
    assert set(whole.moments.sums) == set(whole.stats.inputs)
    for key, sums in whole.moments.sums.items():
        stats = whole.stats.inputs[key]
        assert torch.allclose(sums.diagonal(dim1=-2, dim2=-1).double(), stats.in_sum2, rtol=1e-4, atol=1e-5)
        assert torch.equal(sums, sums.transpose(1, 2))
        assert torch.equal(whole.moments.weights[key], stats.counts.double())


def test_weights_that_share_an_input_share_its_moments(whole):
    moments = whole.moments
    assert moments.key_of("blk.2.ffn_up_exps.weight") == moments.key_of(GATE) == GATE
    assert moments.key_of("blk.0.ffn_up.weight") == DENSE
    assert moments.key_of("token_embd.weight") is None


def test_two_runs_merged_equal_one(moe, tokens, whole):
    first, second = collect(moe, tokens[:4]).moments, collect(moe, tokens[4:]).moments
    first.merge(second)
    assert torch.equal(first.tokens, whole.moments.tokens)
    assert first.provenance.num_tokens == whole.moments.provenance.num_tokens
    for key, sums in whole.moments.sums.items():
        assert torch.allclose(first.sums[key], sums, rtol=1e-4, atol=1e-4 * float(sums.abs().max()))
        assert torch.equal(first.weights[key], whole.moments.weights[key])


def test_gradients_weigh_tokens_and_leave_logits_and_statistics_alone(moe, tokens, whole):
    found = collect(moe, tokens, hessians="gradients")
    assert found.moments.kind == "gradients"
    for key, stats in whole.stats.inputs.items():
        assert torch.allclose(found.stats.inputs[key].in_sum2, stats.in_sum2, rtol=1e-4)
        assert torch.equal(found.stats.inputs[key].counts, stats.counts)
    # One plus a mean of one for every token of an expert; as often again for every further reader of a dense input.
    assert torch.allclose(found.moments.weights[GATE], 2 * whole.moments.weights[GATE], rtol=1e-4)
    assert torch.allclose(found.moments.weights[DENSE], 4 * whole.moments.weights[DENSE], rtol=1e-4)
    plain = whole.moments.sums[GATE] / whole.moments.weights[GATE][:, None, None]
    weighted = found.moments.sums[GATE] / found.moments.weights[GATE][:, None, None]
    assert 0.01 < float((plain - weighted).norm() / plain.norm()) < 1
    assert not any(parameter.grad is not None for parameter in moe.parameters())
    assert all(parameter.requires_grad for parameter in moe.parameters())
    again = collect(moe, tokens, hessians="gradients")
    assert torch.equal(again.moments.sums[GATE], found.moments.sums[GATE])


def test_two_sides_are_those_of_gradients_and_moments_of_output_gradients(moe, tokens, whole):
    seen = []
    layer = moe.model.layers[0].mlp.gate_proj

    def watch(_layer, _inputs, out):
        if out.requires_grad:
            out.register_hook(seen.append)

    hook = layer.register_forward_hook(watch)
    found = collect(moe, tokens, hessians="two-sided")
    hook.remove()
    gradients = torch.cat([gradient.flatten(0, -2) for gradient in seen])
    expected = gradients.T @ gradients
    torch.testing.assert_close(found.moments.sums[DENSE + OUTPUT][0], expected, rtol=1e-3, atol=1e-5)
    for name in (GATE, DOWN):
        assert torch.equal(found.moments.weights[name + OUTPUT], whole.moments.weights[name])
    shape = (8, 256, 256)
    assert torch.linalg.eigvalsh(output_hessian(found.moments, GATE, shape).double()).amin() > 0
    assert torch.equal(found.moments.sums[GATE], collect(moe, tokens, hessians="gradients").moments.sums[GATE])
    assert output_hessian(whole.moments, GATE, shape) is None
    key = "blk.2.attn_kv_b.weight" + OUTPUT
    head = found.moments.sums[key][0, 96 + 32 : 192, 96 + 32 : 192] / found.moments.weights[key].float()
    values = output_hessian(found.moments, "blk.2.attn_v_b.weight", (4, 64, 256))[1]
    off = ~torch.eye(64, dtype=torch.bool)
    ratio = (values[off] / head[off]).double()
    assert ratio.std() < 1e-3 * ratio.mean(), "of the second head: shrunk off the diagonal"
    assert not {"output.weight" + OUTPUT} & set(found.moments.sums)


def test_experts_are_pooled_when_they_do_not_all_fit(moe, tokens, whole):
    limit = 24 * 2**20  # 40 experts with two inputs of 256 channels would take 20 MiB, and the dense inputs 10 more
    assert not collect(moe, tokens, hessian_bytes=(limit, 0)).pools_experts
    pooled = collect(moe, tokens, hessian_bytes=(19 * 2**20, 0))
    assert pooled.pools_experts and not pooled.left_out
    assert torch.allclose(pooled.moments.sums[GATE][0], whole.moments.sums[GATE].sum(0), rtol=1e-3, atol=1e-2)
    matrix = hessian(pooled.moments, pooled.stats, GATE, (8, 256, 256))
    own = importance(pooled.stats, GATE, (8, 256, 256))
    diagonal = matrix.diagonal(dim1=-2, dim2=-1) - DAMPING * own.mean(1, keepdim=True)
    assert torch.allclose(diagonal, own, rtol=1e-3, atol=1e-4), "each expert keeps its own mean squares"


@pytest.mark.gpu
def test_products_of_bfloat16_inputs_are_exact_on_a_gpu(cuda):
    x = torch.randn(700, 192, generator=torch.Generator().manual_seed(0)).to(cuda, torch.bfloat16)
    recorder = MomentRecorder(limits=(10**8, 0), pools_experts=False)
    for part in x.split(300):
        recorder.add("key", part)
    expected = x.double().T @ x.double()
    torch.testing.assert_close(recorder.take()[0]["key"][0].double(), expected.cpu(), rtol=1e-5, atol=1e-3)


def test_memory_of_moments_is_that_of_the_machine_where_none_is_asked_for():
    assert moment_limits("1GiB", 10**10) == (2**30, 2**30)
    assert moment_limits(None, 200 * 10**9) == (DEFAULT_LIMIT, DEFAULT_LIMIT)
    inputs, outputs = moment_limits(None, 16 * 10**9)
    assert outputs < inputs < DEFAULT_LIMIT and inputs + outputs < 8 * 10**9


def test_inputs_without_room_are_listed(moe, tokens):
    found = collect(moe, tokens, hessian_bytes=(2**20, 0))
    assert found.left_out and not set(found.left_out) & set(found.moments.sums)
    assert sum(sums.nbytes for sums in found.moments.sums.values()) <= 2**20
    assert hessian(found.moments, found.stats, found.left_out[-1], (256, 256)) is None


def test_file_round_trip(whole, tmp_path):
    path = tmp_path / "hessians.safetensors"
    whole.moments.save(path)
    loaded = SecondMoments.load(path)
    assert loaded.identity == whole.moments.identity and loaded.kind == "activations"
    assert torch.equal(loaded.tokens, whole.moments.tokens)
    assert all(torch.equal(loaded.sums[key], sums) for key, sums in whole.moments.sums.items())
    loaded.check_belongs_to(whole.stats, path)
    loaded.provenance.text_hash = "b1"
    with pytest.raises(StatsError, match="another calibration than the statistics: its text hash is b1"):
        loaded.check_belongs_to(whole.stats, path)


@pytest.mark.parametrize("content", [b"", b"not safetensors"])
def test_damaged_file_is_refused(content, tmp_path):
    path = tmp_path / "hessians.safetensors"
    path.write_bytes(content)
    with pytest.raises(StatsError, match=r"does not hold second moments|an empty file, not a file of second"):
        SecondMoments.load(path)


@pytest.mark.parametrize("name", ["stats", "hessians"])
def test_a_flipped_byte_and_values_that_are_not_finite_are_refused(whole, tmp_path, name):
    part, path = (whole.stats if name == "stats" else whole.moments), tmp_path / f"{name}.safetensors"
    part.save(path)
    content = bytearray(path.read_bytes())
    content[-len(content) // 3] ^= 1
    path.write_bytes(content)
    with pytest.raises(StatsError, match="checksum"):
        type(part).load(path)
    path.unlink()
    broken = copy.deepcopy(part)
    (broken.inputs[DENSE].in_sum2 if name == "stats" else broken.sums[DENSE])[0, 0] = torch.nan
    with pytest.raises(StatsError, match=rf"NaN or infinite values in `{DENSE}"):
        broken.save(path)
    assert not path.exists()


def test_statistics_are_no_second_moments(whole, tmp_path):
    path = tmp_path / "stats.safetensors"
    whole.stats.save(path)
    with pytest.raises(StatsError, match="does not hold second moments"):
        SecondMoments.load(path)


def test_runs_that_do_not_match_are_not_merged(whole):
    other = SecondMoments(whole.moments.provenance.model_copy(update={"fingerprint": "g"}), whole.moments.tokens)
    with pytest.raises(StatsError, match="cannot be merged"):
        other.merge(whole.moments)
    pooled = SecondMoments(
        whole.moments.provenance, whole.moments.tokens, sums={GATE: torch.zeros(1, 256, 256)}, weights={}
    )
    with pytest.raises(StatsError, match="--hessian-memory"):
        pooled.merge(whole.moments)


@pytest.mark.parametrize(
    "stats, expected",
    [
        ("stats.safetensors", "hessians.safetensors"),
        ("m.stats.safetensors", "m.hessians.safetensors"),
        ("calibration.safetensors", "calibration.hessians.safetensors"),
    ],
)
def test_where_moments_lie(stats, expected):
    assert path_beside(Path("d") / stats) == Path("d") / expected


def made(counts: list[int], columns: int = 64) -> tuple[SecondMoments, CalibrationStats, torch.Tensor]:
    """Moments of experts that saw `counts` tokens of correlated noise; the first channel is dead."""
    generator = torch.Generator().manual_seed(1)
    mixing = torch.randn(columns, columns, generator=generator)
    mixing[:, 0] = 0
    x = [torch.randn(n, columns, generator=generator) @ mixing for n in counts]
    sums = torch.stack([rows.T @ rows for rows in x])
    provenance = StatsProvenance(fingerprint="f", text_hash="a0", text_name="noise")
    stats = CalibrationStats(provenance)
    stats.inputs["w"] = InputStats(sums.diagonal(dim1=-2, dim2=-1).double(), torch.tensor(counts))
    weights = torch.tensor(counts, dtype=torch.float64)
    return SecondMoments(provenance, torch.zeros(1, 1), sums={"w": sums}, weights={"w": weights}), stats, sums


def test_off_diagonals_count_as_much_as_tokens_can_know_them():
    counts = [0, 1, 8, 100_000]
    moments, stats, sums = made(counts)
    found = hessian(moments, stats, "w", (4, 3, 64))
    layer = sums.sum(0) / sum(counts)
    for expert, tokens in enumerate(counts):
        torch.linalg.cholesky(found[expert].double())
        mean = (sums[expert] + 16 * layer) / (tokens + 16)
        trust = (tokens + 16) / (tokens + 16 + 64)
        expected = trust * mean + (1 - trust) * torch.diag(mean.diagonal())
        expected += DAMPING * mean.diagonal().mean() * torch.eye(64)
        assert torch.allclose(found[expert], expected, rtol=1e-3, atol=1e-3 * float(expected.abs().max()))
    own = sums[3] / 100_000
    assert float((found[3] - own).norm() / own.norm()) < 0.05
    dead = found[:, 0]
    assert torch.equal(dead[:, 1:], torch.zeros(4, 63)) and (dead[:, 0] > 0).all()


def test_experts_can_be_asked_for_one_by_one():
    moments, stats, _ = made([50, 60, 70])
    whole = hessian(moments, stats, "w", (3, 5, 64))
    assert torch.equal(hessian(moments, stats, "w", (3, 5, 64), slice(1, 3)), whole[1:])


def test_all_channels_dead():
    moments, stats, _ = made([50])
    moments.sums["w"].zero_()
    assert torch.equal(hessian(moments, stats, "w", (5, 64)), DAMPING * torch.eye(64).unsqueeze(0))


def test_moments_of_another_width_or_count_are_not_used():
    moments, stats, _ = made([50, 60])
    assert hessian(moments, stats, "w", (2, 5, 32)) is None
    assert hessian(moments, stats, "w", (3, 5, 64)) is None
    assert hessian(moments, stats, "other", (5, 64)) is None
