"""The error table of the schemes that vLLM serves: its numbers, and what an interrupted run leaves of it."""

import pytest
import torch

from dynquant.analysis.errors import measure_schemes
from dynquant.analysis.errors import stage as error_stage
from dynquant.analysis.errors.measure import build_error_table
from dynquant.analysis.errors.measure_schemes import SchemeMeter
from dynquant.analysis.errors.sums import ErrorJournal
from dynquant.calibration.importance import importance
from dynquant.calibration.options import CalibrationOptions
from dynquant.calibration.stage import run_calibration
from dynquant.calibration.statistics import CalibrationStats
from dynquant.encoding.vllm import encode_layers, encode_layers_under
from dynquant.families.linear_layers import linear_checkpoint
from dynquant.families.open import open_model
from dynquant.formats.vllm_schemes import SCHEMES
from tests.helpers.commands import run
from tests.helpers.representatives import represented_by
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
    candidates = checkpoint.candidates(SCHEMES, mixed_experts=True)

    def measured(journal, threads=1):
        meter = SchemeMeter(model, stats, checkpoint, candidates, torch.device("cpu"), threads=threads)
        return build_error_table(meter, tuple(SCHEMES), stats_hash="s", journal=journal)

    return measured


def test_errors_equal_a_direct_computation(directory, stats_path, measure, tmp_path):
    stats, scheme = CalibrationStats.load(stats_path), SCHEMES["W4A16"]
    linears = {linear.name: linear for linear in linear_checkpoint(open_model(directory)).linears}
    with ErrorJournal(tmp_path / "errors.json", {}) as journal:
        table = measure(journal)
    for name in (DENSE, STACK):
        linear, row = linears[name], table.row(name, scheme.name)
        weights = torch.stack([linear.load(expert) for expert in range(linear.num_experts)])
        weights = weights[:, :: weights.shape[1] // 64]
        scale = importance(stats, name, linear.shape)
        encoded = encode_layers(scheme.for_shapes([linear.shape[-2:]]), weights, importance=scale)
        weights, decoded = weights.double(), torch.stack([one.decoded() for one in encoded]).double()
        counts = stats.input_of(name).counts.double()
        metric = (counts / counts.sum()).reshape(-1, 1, 1) * scale.double().unsqueeze(1)
        error, energy = (float((m.square() * metric).sum()) for m in (weights - decoded, weights))
        assert row.weighted_error == pytest.approx(error / energy, rel=1e-5)
        assert row.weighted_energy == pytest.approx(energy, rel=1e-5)
        assert row.relative_rms == pytest.approx(float((weights - decoded).norm() / weights.norm()), rel=1e-5)


def test_processes_side_by_side_measure_the_same(measure):
    assert measure(None, threads=2) == measure(None)


@pytest.mark.parametrize("experts_at_once", represented_by((1,), (1, 8)))
@pytest.mark.nightly
def test_an_interrupted_table_goes_on_to_the_same_bytes(measure, tmp_path, monkeypatch, experts_at_once):
    monkeypatch.setattr(SchemeMeter, "weights_in_memory", experts_at_once * 256 * 64)
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
