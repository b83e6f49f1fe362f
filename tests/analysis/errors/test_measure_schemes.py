"""The error table of the schemes that vLLM serves: its numbers, and what an interrupted run leaves of it."""

import pytest
import torch

from dynquant.analysis.errors import measure_schemes
from dynquant.analysis.errors import stage as error_stage
from dynquant.analysis.errors.measure import build_error_table
from dynquant.analysis.errors.measure_schemes import SchemeMeter
from dynquant.analysis.errors.sampling import Sampling
from dynquant.analysis.errors.sums import ErrorJournal
from dynquant.analysis.errors.table import ErrorTable
from dynquant.calibration.importance import importance
from dynquant.calibration.options import CalibrationOptions
from dynquant.calibration.second_moments import hessian, load_beside
from dynquant.calibration.stage import run_calibration
from dynquant.calibration.statistics import CalibrationStats
from dynquant.checkpoints.safetensors_source import SafetensorsSource
from dynquant.encoding.vllm import encode_layers, encode_layers_under
from dynquant.families.linear_layers import linear_checkpoint
from dynquant.families.open import open_model
from dynquant.formats.vllm_schemes import SCHEMES
from dynquant.recipes.plan import Plan
from tests.helpers.commands import run
from tests.helpers.tiny_models import save_tiny

DENSE, STACK = "blk.0.ffn_down.weight", "blk.1.ffn_down_exps.weight"


class StoppedError(Exception):
    """Stands for whatever ends a run."""


class NotedEncoding:
    """`encode_layers_under`, which notes what it is asked for and stops at the call number `stop`."""

    def __init__(self, monkeypatch, stop=None):
        self.calls, self.stop = [], stop
        monkeypatch.setattr(measure_schemes, "encode_layers_under", self)

    def __call__(self, loss, scheme, *arguments, name, **options):
        if len(self.calls) == self.stop:
            raise StoppedError
        self.calls.append((name, scheme.name))
        return encode_layers_under(loss, scheme, *arguments, name=name, **options)


@pytest.fixture(scope="module")
def directory(small_moe, tmp_path_factory):
    return save_tiny("deepseek-v3", tmp_path_factory.mktemp("tiny") / "deepseek", small_moe, num_hidden_layers=2)


@pytest.fixture(scope="module")
def stats_path(directory, tmp_path_factory):
    path = tmp_path_factory.mktemp("stats") / "stats.safetensors"
    run_calibration(open_model(directory), CalibrationOptions(tokens=512, window=64, hessians="none"), path)
    return path


@pytest.fixture(scope="module")
def measure(directory, stats_path):
    model, stats = open_model(directory), CalibrationStats.load(stats_path)
    checkpoint = linear_checkpoint(model)

    def measured(journal, threads=1, schemes=SCHEMES, **how):
        candidates = checkpoint.candidates(schemes, mixed_experts=True)
        meter = SchemeMeter(model, stats, checkpoint, candidates, torch.device("cpu"), threads=threads, **how)
        return build_error_table(meter, tuple(schemes), stats_hash="s", journal=journal)

    return measured


def test_errors_equal_a_direct_computation(directory, stats_path, measure):
    stats, scheme = CalibrationStats.load(stats_path), SCHEMES["W4A16"]
    linears = {linear.name: linear for linear in linear_checkpoint(open_model(directory)).linears}
    table = measure(None, schemes={scheme.name: scheme}, sampling=Sampling(target=0, negligible=0))
    for name in (DENSE, STACK):
        linear, row = linears[name], table.row(name, scheme.name)
        weights = torch.stack([linear.load(expert) for expert in range(linear.num_experts)])
        scale = importance(stats, name, linear.shape)
        encoded = encode_layers(scheme.for_shapes([linear.shape[-2:]]), weights, importance=scale)
        weights, decoded = weights.double(), torch.stack([one.decoded() for one in encoded]).double()
        counts = stats.input_of(name).counts.double()
        metric = (counts / counts.sum()).reshape(-1, 1, 1) * scale.double().unsqueeze(1)
        error, energy = (float((m.square() * metric).sum()) for m in (weights - decoded, weights))
        assert row.weighted_error == pytest.approx(error / energy, rel=1e-5)
        assert row.weighted_energy == pytest.approx(energy, rel=1e-5)
        assert row.relative_rms == pytest.approx(float((weights - decoded).norm() / weights.norm()), rel=1e-5)
        assert row.weighted_error_se is None


@pytest.mark.parametrize(
    "place, bpw",
    [("directory", "14"), pytest.param("small_moe", "6.2", marks=pytest.mark.nightly)],
)
def test_a_plan_is_priced_by_the_errors_that_ship(place, bpw, request, tmp_path):
    """Second moments decide both, and the errors of the written checkpoint under them are those of the table."""
    plan_folder, out = tmp_path / "plan", tmp_path / "out"
    calibration = ("--tokens", 2048, "--window", 256)
    original = request.getfixturevalue(place)
    done = run("plan", original, "--for", "vllm", "--bpw", bpw, *calibration, "-o", plan_folder)
    assert done.returncode == 0, done.stderr
    plan = Plan.load(plan_folder / "plan.json", "vllm")
    table = ErrorTable.load(plan_folder / "serving_errors.json", known_types=SCHEMES)
    done = run(
        "export", original, "-f", "compressed-tensors", "--plan", plan_folder / "plan.json", "--tune", 0, "-o", out
    )
    assert done.returncode == 0, done.stderr
    stats = CalibrationStats.load(plan_folder / "stats.safetensors")
    moments, written = load_beside(plan_folder / "stats.safetensors", stats), SafetensorsSource(out)
    assert table.moments == moments.identity
    linears, shipped, told = {one.name: one for one in linear_checkpoint(open_model(original)).linears}, 0.0, 0.0
    for entry in plan.entries:
        linear, row = linears[entry.name], table.row(entry.name, entry.type)
        weights = torch.stack([linear.load(expert) for expert in range(linear.num_experts)])
        lost = weights - torch.stack([written.load(f"{module}.weight") for module in linear.modules])
        metric, counts = hessian(moments, stats, linear.name, linear.shape), stats.input_of(linear.name).counts.double()
        error, energy = (((m @ metric) * m).sum((-1, -2)).double() @ (counts / counts.sum()) for m in (lost, weights))
        actual = float(error / energy)
        close = max(0.02 * row.weighted_error, 5 * (row.weighted_error_se or 0.0))
        assert row.weighted_error == pytest.approx(actual, abs=close), entry.name
        shipped += table.sensitivity[entry.name] * actual
        told += table.cost(row)
    assert told == pytest.approx(plan.predicted_kl) == pytest.approx(shipped, rel=0.03)


def test_a_table_that_was_encoded_otherwise_is_measured_again(directory, stats_path, tmp_path):
    again = ("plan", directory, "--for", "vllm", "--stats", stats_path, "-o", tmp_path)
    assert run(*again).returncode == 0
    assert "reusing" in run(*again).stderr
    path = tmp_path / "serving_errors.json"
    old = ErrorTable.load(path, known_types=SCHEMES).model_copy(update={"encoder": "dynquant, diagonal"})
    old.save(path)
    assert "reusing" not in run(*again).stderr
    assert ErrorTable.load(path, known_types=SCHEMES).encoder == "dynquant"


def test_processes_side_by_side_measure_the_same(measure):
    assert measure(None, threads=2) == measure(None)


@pytest.mark.nightly
def test_an_interrupted_table_goes_on_to_the_same_bytes(measure, tmp_path, monkeypatch):
    path, undisturbed = tmp_path / "serving_errors.json", NotedEncoding(monkeypatch)
    with ErrorJournal(path, {}) as journal:
        whole = measure(journal).model_dump_json()
        journal.remove()
    layers = [layer for layer, _ in undisturbed.calls]
    middle = layers.index(layers[len(layers) // 2])
    for stop, is_cut in [(1, False), (middle, True), (middle + 1, False), (len(layers) - 1, False)]:
        NotedEncoding(monkeypatch, stop)
        with pytest.raises(StoppedError), ErrorJournal(path, {}) as journal:
            measure(journal)
        if is_cut:
            journal.path.write_bytes(journal.path.read_bytes()[:-10])
        first = layers.index(layers[stop - 1 if is_cut else stop])
        rest = NotedEncoding(monkeypatch)
        with ErrorJournal(path, {}) as journal:
            assert journal.num_parts == len(set(layers[:first]))
            assert measure(journal).model_dump_json() == whole
            journal.remove()
        assert rest.calls == undisturbed.calls[first:]
        assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("number", ["1e999", "1" + 400 * "0", '"x"', "[]"])
def test_numbers_that_are_none_are_measured_again(number, tmp_path):
    for experts in (f"[0, {number}]", "[0, 1]"):
        record = f'{{"name": "a", "experts": {experts}, "sums": {{"Q4_K": [[[{number}, 1]], [[1, 1]], null]}}}}'
        (tmp_path / "errors.json.journal").write_text(f'{{"identity": {{}}}}\n{record}\n')
        with ErrorJournal(tmp_path / "errors.json", {}) as journal:
            assert journal.num_parts == 0


@pytest.mark.nightly
def test_the_command_goes_on_under_the_same_identity_alone(directory, stats_path, tmp_path, monkeypatch):
    def planned(name, stop=None):
        noted = NotedEncoding(monkeypatch, stop)
        done = run("plan", directory, "--for", "vllm", "--stats", stats_path, "--threads", "1", "-o", tmp_path / name)
        assert done.returncode == 0, done.stderr
        return noted.calls, done.stderr

    every, _ = planned("whole")
    for name in ("same", "other"):
        with pytest.raises(StoppedError):
            planned(name, stop=len(every) // 2)
        left = {file.name for file in (tmp_path / name).iterdir()}
        assert left == {"serving_errors.json.journal", "stats.safetensors"}
    calls, said = planned("same")
    assert "going on with the interrupted serving_errors.json, " in said
    assert len(every) / 2 <= len(calls) < 0.6 * len(every) and calls == every[-len(calls) :]
    monkeypatch.setattr(error_stage, "__version__", "0.0")
    calls, said = planned("other")
    assert "going on" not in said and calls == every
    whole = {file.name: file.read_bytes() for file in (tmp_path / "whole").iterdir()}
    for name in ("same", "other"):
        assert {file.name: file.read_bytes() for file in (tmp_path / name).iterdir()} == whole
    calls, said = planned("same")
    assert f"reusing {tmp_path / 'same' / 'serving_errors.json'}" in said and not calls
