"""Tables from drawn rows against those of all rows: on the bundled model, and on made-up rows for many seeds."""

import json

import pytest
import torch

from dynquant.analysis.errors.measure import ErrorMeter, build_error_table
from dynquant.analysis.errors.options import AnalyzeOptions, TableOptions
from dynquant.analysis.errors.sampled_sums import SampledSums
from dynquant.analysis.errors.sampling import Extent, Sampling, blocks_of, draw
from dynquant.analysis.errors.stage import analyze
from dynquant.analysis.errors.sums import ErrorJournal
from dynquant.analysis.errors.table import ErrorTable
from dynquant.calibration.options import CalibrateOptions, CalibrationOptions
from dynquant.calibration.stage import StatsFile, calibrate
from dynquant.encoding.stream import TensorEncoder, guidance_of, load_encoder
from dynquant.formats import decode
from dynquant.formats.checksum import checksum
from dynquant.formats.quant_types import QUANT_TYPES
from dynquant.session import Session
from tests.helpers.representatives import represented_by

TYPES = ("Q3_K", "Q4_0")
STACK, MATRIX = "blk.2.ffn_down_exps.weight", "blk.1.attn_output.weight"


@pytest.fixture(scope="module")
def stats(small_moe, tmp_path_factory):
    path = tmp_path_factory.mktemp("calibrated") / "stats.safetensors"
    options = CalibrationOptions(tokens=1024, window=128)
    calibrate(CalibrateOptions(model=str(small_moe), output=path, calibration=options))
    return StatsFile(path)


@pytest.fixture(scope="module")
def table_of(moe_model, stats):
    def measured(sampling, *, threads=None, **options):
        meter = ErrorMeter(moe_model, stats.stats, load_encoder("ggml"), threads=threads, sampling=sampling)
        return build_error_table(meter, TYPES, stats_hash="s", **options)

    return measured


@pytest.fixture(scope="module")
def exact(table_of):
    return table_of(None)


@pytest.fixture(scope="module")
def sampled(table_of):
    return table_of(Sampling(seed=3))


def sampled_rows(table):
    return [row for row in table.rows if row.weighted_error_se]


def test_estimates_are_within_their_errors_of_the_exact_table(exact, sampled):
    rows = sampled_rows(sampled)
    assert len(rows) > 100
    distances = torch.tensor(
        [(row.weighted_error - exact.row(row.name, row.type).weighted_error) / row.weighted_error_se for row in rows]
    )
    assert 0.7 < float(distances.square().mean().sqrt()) < 1.4
    assert float((distances.abs() < 2).float().mean()) > 0.88
    limits = Sampling()
    for row in rows:
        of_all = exact.row(row.name, row.type)
        assert row.weighted_error_se <= max(limits.target * row.weighted_error, limits.negligible)
        assert row.relative_rms == pytest.approx(of_all.relative_rms, rel=0.1)
        assert row.activation_error == pytest.approx(of_all.activation_error or 0, rel=0.2) or row.layer is None
    assert sampled.checksums == exact.checksums


def test_what_was_measured_whole_equals_the_exact_table(exact, sampled):
    whole = [row for row in sampled.rows if row.weighted_error_se is None]
    assert whole and all(row.weighted_error_se is None for row in exact.rows)
    for row in whole:
        assert row.weighted_error == pytest.approx(exact.row(row.name, row.type).weighted_error, rel=1e-9)


def test_a_seed_repeats_its_rows_and_another_one_draws_others(table_of, sampled):
    assert table_of(Sampling(seed=3)) == sampled
    other = table_of(Sampling(seed=4))
    assert other.seed == 4
    assert other.row(STACK, "Q4_0").weighted_error != sampled.row(STACK, "Q4_0").weighted_error


@pytest.mark.parametrize("threads", represented_by((1,), (3, 1)))
@pytest.mark.parametrize("name", represented_by(("sampled",), ("sampled", "exact")))
def test_processes_measure_what_one_thread_does(name, threads, table_of, request):
    found = table_of(Sampling(seed=3) if name == "sampled" else None, threads=threads)
    assert found == request.getfixturevalue(name)


def test_an_interrupted_sample_goes_on_to_the_same_table(table_of, sampled, tmp_path):
    class StoppedError(Exception):
        pass

    def stop(_stage, done, total, **_):
        if done > total / 2:
            raise StoppedError

    path = tmp_path / "errors.json"
    with pytest.raises(StoppedError), ErrorJournal(path, {}) as journal:
        table_of(Sampling(seed=3), journal=journal, progress=stop)
    with ErrorJournal(path, {}) as journal:
        assert journal.num_parts
        assert table_of(Sampling(seed=3), journal=journal) == sampled


def test_a_limit_of_weights_is_kept(moe_model, stats, exact):
    stack = moe_model.source.load(STACK)
    limits = Sampling(most_weights=4 * 8 * stack.shape[2], target=1e-6)
    meter = ErrorMeter(moe_model, stats.stats, load_encoder("ggml"), sampling=limits)
    row = build_error_table(meter, TYPES, stats_hash="s").row(STACK, "Q4_0")
    assert row.weighted_error == pytest.approx(exact.row(STACK, "Q4_0").weighted_error, abs=4 * row.weighted_error_se)


def test_drawn_rows_have_the_bytes_of_an_export(moe_model, stats):
    """Under second moments, `weighted_error` is what their blocks lose of the output's energy."""
    encoder, experts = load_encoder("dynquant", "cpu"), range(8)
    meter = ErrorMeter(moe_model, stats.stats, encoder, stats.moments)
    (part,) = meter.parts(STACK, tuple(moe_model.source.info(STACK).shape), ("Q2_K",))
    sums = meter.sums(part)["Q2_K"]
    packed = TensorEncoder(moe_model, guidance_of(stats.stats, stats.moments), encoder).tensor(
        STACK, QUANT_TYPES["Q2_K"]
    )
    weights = moe_model.source.load(STACK)
    lost = (weights - decode("Q2_K", packed, tuple(weights.shape))).double()
    moments = guidance_of(stats.stats, stats.moments).hessian(STACK, weights.shape, slice(None)).double()
    for expert in experts:
        error = float(((lost[expert] @ moments[expert]) * lost[expert]).sum())
        assert sums.weighted[expert][0] == pytest.approx(error, rel=1e-4)
    assert sums.checksum == checksum(weights)


def made_up(seed, num_experts, sampling=None, odd=False):
    """Rows with energies of several magnitudes, drawn; and errors of all, which differ by expert or in an odd one."""
    generator = torch.Generator().manual_seed(5)
    weights = torch.randn(num_experts, 60, 32, generator=generator)
    weights *= torch.randn(num_experts, 60, 1, generator=generator).mul(0.8).exp()
    shares = torch.rand(num_experts, dtype=torch.float64, generator=generator)
    shares /= shares.sum()
    energies = weights.square().sum(-1, dtype=torch.float64)
    noise = torch.randn(num_experts, 60, generator=generator, dtype=torch.float64).mul(0.3).exp()
    of_experts = torch.linspace(0.5, 1.5, num_experts, dtype=torch.float64)
    if odd:
        of_experts = torch.linspace(0.99, 1.01, num_experts, dtype=torch.float64)
        of_experts[::16] = 0.8
    errors = 0.1 * energies * noise * of_experts.unsqueeze(1)
    blocks = [(e, r, weights[e.start : e.stop, r.start : r.stop]) for e, r in blocks_of(weights.shape, 320)]
    rows = draw("a", weights.shape, blocks, None, shares, sampling or Sampling(seed=seed))
    return rows, weights, shares, errors, energies


def numbers_of(drawn, weights):
    """Find drawn rows again by their weights."""
    return (drawn[:, :, None] == weights[:, None]).all(-1).int().argmax(-1)


@pytest.mark.parametrize("extent", [Extent(1, 20), Extent(12, 8), Extent(24, 60)])
def test_estimates_are_unbiased_and_their_errors_honest(extent):
    num_experts = 1 if extent.experts == 1 else 24
    found = []
    seeds = range(1 if extent.rows == 60 else 120)
    for seed in seeds:
        rows, weights, shares, errors, energies = made_up(seed, num_experts)
        drawn = rows.experts[: extent.experts]
        number = numbers_of(rows.weights[drawn, : extent.rows], weights[drawn])
        these = [values[drawn].gather(1, number) for values in (errors, energies)]
        counted = shares[drawn] / rows.expert_chances(extent)
        error, energy = ((rows.totals(values, extent) * counted).sum() for values in these)
        found.append((float(error / energy), rows.standard_error(*these, shares[drawn], extent)))
    truth = float((errors.sum(1) * shares).sum() / (energies.sum(1) * shares).sum())
    estimates, claimed = torch.tensor(found, dtype=torch.float64).T
    if rows.is_whole(extent):
        assert (float(estimates), float(claimed)) == (pytest.approx(truth), 0)
        return
    spread = float(estimates.std())
    assert abs(float(estimates.mean()) - truth) < max(3 * spread / len(seeds) ** 0.5, 0.01 * truth)
    assert float(claimed.square().mean().sqrt()) == pytest.approx(spread, rel=0.25)
    assert float(((estimates - truth).abs() < 1.96 * claimed).double().mean()) > 0.85


@pytest.mark.parametrize("num_experts", [16, 48])
def test_a_sample_that_stops_at_its_goal_knows_its_error(num_experts):
    """One expert in 16 loses less than the others, which few experts do not show."""
    distances, limits = [], Sampling(target=0.03)
    for seed in range(60):
        rows, weights, shares, errors, energies = made_up(seed, num_experts, Sampling(seed=seed), odd=True)
        sampled = SampledSums(rows, shares, ("Q4_0",), limits)
        for experts, drawn, places in sampled.rounds():
            number = numbers_of(drawn, weights[experts])
            lost, energy = (values[experts].gather(1, number).expand(2, -1, -1) for values in (errors, energies))
            sampled.add(places, energy, {"Q4_0": lost})
        sums = sampled.sums(0)["Q4_0"]
        if sums.sample is None:  # all rows were measured
            continue
        counted = shares[sums.sample.experts] / torch.tensor(sums.sample.chances)
        error, energy = counted @ torch.tensor(sums.weighted, dtype=torch.float64)
        truth = (errors.sum(1) * shares).sum() / (energies.sum(1) * shares).sum()
        distances.append(float((error / energy - truth) / sums.sample.weighted_error_se))
    assert len(distances) > 40
    distances = torch.tensor(distances)
    assert 0.75 < float(distances.square().mean().sqrt()) < 1.25
    assert float((distances.abs() < 1.96).float().mean()) > 0.88


def test_a_matrix_read_in_blocks_draws_the_rows_of_one_read_whole():
    limits = Sampling(seed=1, most_weights=32 * 20)
    rows, weights, shares, *_ = made_up(1, 1, limits)
    whole = draw("a", weights.shape, [(range(1), range(60), weights)], None, shares, limits)
    assert torch.equal(rows.weights, whole.weights)
    assert torch.equal(rows.row_keys, whole.row_keys)


def test_exact_tables_replace_estimates_and_not_the_other_way_round(small_moe, stats, tmp_path):
    def run(exact, seed=0):
        table = TableOptions(types=("Q4_0",), encoder="ggml", exact=exact)
        options = AnalyzeOptions(model=str(small_moe), stats=stats.path, output=tmp_path / "errors.json", table=table)
        return analyze(options, Session(seed=seed))

    assert run(exact=False, seed=2).seed == 2
    content = json.loads((tmp_path / "errors.json").read_text())
    assert any(row["weighted_error_se"] for row in content["rows"])
    assert run(exact=True).seed is None
    assert not sampled_rows(ErrorTable.load(tmp_path / "errors.json"))


def test_the_error_of_a_plan_counts_that_of_its_table(sampled):
    row = sampled.row(STACK, "Q4_0")
    assert sampled.cost_se(row) == pytest.approx(row.weighted_error_se)
    priced = sampled.with_sensitivity({STACK: 2.0}, {STACK: 0.5})
    expected = ((0.5 * row.weighted_error) ** 2 + (2 * row.weighted_error_se) ** 2) ** 0.5
    assert priced.cost_se(row) == pytest.approx(expected)
