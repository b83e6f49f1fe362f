"""The numbers of the error table against float64, and the table as a value and as files."""

import csv
import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType, GGUFValueType

from dynquant.analysis.errors.measure import ErrorMeter, build_error_table, tensor_formats, unmeasured_table
from dynquant.analysis.errors.sums import ErrorJournal
from dynquant.analysis.errors.table import ErrorRow, ErrorTable
from dynquant.calibration.importance import importance
from dynquant.calibration.statistics import CalibrationStats, InputStats, StatsProvenance
from dynquant.checkpoints.gguf_source import GGUFSource, MetadataField
from dynquant.checkpoints.model import Model
from dynquant.checkpoints.tensor_source import DictSource
from dynquant.errors import PlanError, StatsError, WriteError
from tests.helpers.gguf_writing import finish

DENSE, STACK, EMBEDDING = "blk.0.attn_q.weight", "blk.0.ffn_down_exps.weight", "token_embd.weight"
SAMPLES = 5


class NumpyEncoder:
    """gguf-py's own quantization, independent of the code under test."""

    name, uses_hessians, device = "gguf-py", False, torch.device("cpu")

    def encode(self, quant_type, weights, importance=None, threads=None, *, name="tensor"):
        return torch.from_numpy(gguf.quants.quantize(weights.numpy(), GGMLQuantizationType[quant_type.name]).view("u1"))


def decoded(weights: torch.Tensor, type_name: str) -> torch.Tensor:
    kind = GGMLQuantizationType[type_name]
    return torch.from_numpy(gguf.quants.dequantize(gguf.quants.quantize(weights.numpy(), kind), kind)).double()


def normal(seed: int, *shape: int) -> torch.Tensor:
    return torch.from_numpy(np.random.default_rng(seed).standard_normal(shape).astype(np.float32))


@pytest.fixture(scope="module")
def model() -> Model:
    source = DictSource(
        {
            EMBEDDING: normal(0, 16, 64),
            DENSE: normal(1, 24, 64),
            STACK: normal(2, 3, 8, 64) * torch.tensor([1.0, 3.0, 0.2]).reshape(3, 1, 1),
            "blk.0.ffn_gate_inp.weight": normal(3, 3, 64),
            "output_norm.weight": normal(4, 64),
        }
    )
    keys = {"llama.block_count": 1, "llama.embedding_length": 64}
    fields = [MetadataField("general.architecture", "llama", GGUFValueType.STRING)]
    fields += [MetadataField(key, value, GGUFValueType.UINT32) for key, value in keys.items()]
    return Model(Path("tiny"), source, tuple(fields), lambda name: (name,))


@pytest.fixture(scope="module")
def stats(model) -> CalibrationStats:
    def one(seed: int, counts: list[int], sample_counts: list[int]) -> InputStats:
        scale = normal(seed, len(counts), 64).abs().double() + 0.1
        return InputStats(
            in_sum2=scale * torch.tensor(counts).unsqueeze(1),
            counts=torch.tensor(counts),
            samples=normal(seed + 1, len(counts), SAMPLES, 64).bfloat16(),
            sample_counts=torch.tensor(sample_counts),
        )

    provenance = StatsProvenance(fingerprint=model.fingerprint, text_hash="0" * 64, text_name="made up")
    return CalibrationStats(provenance, {DENSE: one(10, [100], [4]), STACK: one(20, [60, 40, 0], [5, 2, 0])})


@pytest.fixture(scope="module")
def table(model, stats) -> ErrorTable:
    return build_error_table(ErrorMeter(model, stats, NumpyEncoder()), ("Q4_0", "Q8_0", "Q4_K"), stats_hash="s")


def per_expert_errors(model, stats, name, type_name):
    """(weight error, energy), (weighted error, energy), (mean output error, energy) of each expert, in float64."""
    weights = model.source.load(name).reshape(-1, *model.source.info(name).shape[-2:])
    lost, weights = weights.double() - decoded(weights, type_name), weights.double()
    inputs = stats.input_of(name)
    scale = importance(stats, name, model.source.info(name).shape).double()
    rows = []
    for expert in range(len(weights)):
        used = int(inputs.sample_counts[expert])
        X = inputs.samples[expert, :used].double()
        pairs = [
            [m.square().sum(), (m.square() * scale[expert]).sum(), (X @ m.T).square().sum() / max(used, 1)]
            for m in (lost[expert], weights[expert])
        ]
        rows.append(torch.tensor(pairs, dtype=torch.float64).T)
    return torch.stack(rows, 1)  # [measure, expert, (error, energy)]


@pytest.mark.parametrize("type_name", ["Q4_0", "Q8_0", "Q5_0"])
@pytest.mark.parametrize("name", [DENSE, STACK])
def test_errors_equal_a_direct_computation(model, stats, table, name, type_name):
    squared, weighted, outputs = per_expert_errors(model, stats, name, type_name)
    counts = stats.input_of(name).counts.double()
    share = (counts / counts.sum()).unsqueeze(1)
    row = table.row(name, type_name)
    assert row.relative_rms == pytest.approx(float((squared.sum(0)[0] / squared.sum(0)[1]).sqrt()), rel=1e-5)
    error, energy = (share * weighted).sum(0)
    assert row.weighted_error == pytest.approx(float(error / energy), rel=1e-5)
    assert row.weighted_energy == pytest.approx(float(energy), rel=1e-5)
    error, energy = (share * outputs).sum(0)
    assert row.activation_error == pytest.approx(float((error / energy).sqrt()), rel=1e-4)
    if name == STACK:
        assert row.per_expert_weighted_error == pytest.approx((weighted[:, 0] / weighted[:, 1]).tolist(), rel=1e-5)
        ratios = (outputs[:2, 0] / outputs[:2, 1]).sqrt().tolist()
        assert row.per_expert_activation_error[:2] == pytest.approx(ratios, rel=1e-4)
        assert row.per_expert_activation_error[2] is None  # this expert has no samples


def test_the_type_that_a_file_stores_loses_nothing(model, stats, tmp_path):
    writer, kind = gguf.GGUFWriter(tmp_path / "m.gguf", "llama"), GGMLQuantizationType.Q5_0
    for name in (EMBEDDING, DENSE, STACK):
        writer.add_tensor(name, gguf.quants.quantize(model.source.load(name).numpy(), kind), raw_dtype=kind)
    finish(writer)
    stored = replace(model, source=GGUFSource(tmp_path / "m.gguf"))
    provenance = stats.provenance.model_copy(update={"fingerprint": stored.fingerprint})
    meter = ErrorMeter(stored, CalibrationStats(provenance, stats.inputs), NumpyEncoder())
    table = build_error_table(meter, ("Q4_0", "Q5_0"), stats_hash="s")
    for name in (EMBEDDING, DENSE, STACK):
        kept, other = table.row(name, "Q5_0"), table.row(name, "Q4_0")
        assert kept.weighted_error == kept.relative_rms == (kept.activation_error or 0) == 0 < other.weighted_error
        assert kept.weighted_energy == other.weighted_energy


def test_a_tensor_without_statistics_has_no_activation_error(table, model):
    row = table.row(EMBEDDING, "Q8_0")
    assert row.activation_error is None
    assert row.weighted_error == pytest.approx(row.relative_rms**2, rel=1e-6)


def test_statistics_without_samples_give_no_activation_error(model, stats):
    empty = CalibrationStats(stats.provenance, dict(stats.inputs))
    found = stats.inputs[DENSE]
    empty.inputs[DENSE] = InputStats(found.in_sum2, found.counts, found.samples, torch.zeros_like(found.sample_counts))
    table = build_error_table(ErrorMeter(model, empty, NumpyEncoder()), ("Q8_0",), stats_hash="s")
    assert table.row(DENSE, "Q8_0").activation_error is None
    assert table.row(STACK, "Q8_0").activation_error is not None


def test_rows_are_the_quantizable_tensors_in_order(table):
    assert list(table.tensors()) == [EMBEDDING, DENSE, STACK]
    assert list(table.tensors()[DENSE]) == ["Q4_0", "Q8_0", "Q5_0", "F32"]
    assert table.row(DENSE, "F32").relative_rms == 0


def test_a_fallback_row_keeps_what_was_wanted(table):
    row = table.row(DENSE, "Q4_K")
    assert (row.type, row.stands_for) == ("Q5_0", ("Q4_K",))
    assert row is table.row(DENSE, "Q5_0")
    assert table.row(DENSE, "Q8_0").stands_for == ()
    assert table.row(DENSE, "IQ1_S") is None


def test_types_that_need_statistics_are_left_out_without_them(model, stats):
    without = CalibrationStats(stats.provenance)
    table = build_error_table(ErrorMeter(model, without, NumpyEncoder()), ("Q8_0",), stats_hash="s")
    assert all(row.activation_error is None for row in table.rows)


def test_statistics_of_another_model_are_refused(model, stats):
    other = CalibrationStats(stats.provenance.model_copy(update={"fingerprint": "e" * 64}))
    with pytest.raises(StatsError, match="eeeeeeeeeeee"):
        build_error_table(ErrorMeter(model, other, NumpyEncoder()), ("Q8_0",), stats_hash="s")


def test_the_sizes_are_known_before_anything_is_measured(model, stats, table):
    types = ("Q4_0", "Q8_0", "Q4_K")
    before = unmeasured_table(model, tensor_formats(model, stats, types), types)
    known = [(row.name, row.role, row.layer, row.type, row.stands_for, row.bytes) for row in table.rows]
    assert [(row.name, row.role, row.layer, row.type, row.stands_for, row.bytes) for row in before.rows] == known


class StoppedError(Exception):
    """Stands for whatever ends a run."""


class CountingEncoder(NumpyEncoder):
    """Stops at the call number `stop`."""

    def __init__(self, stop=None):
        self.calls, self.stop = 0, stop

    def encode(self, *args, **options):
        if self.calls == self.stop:
            raise StoppedError
        self.calls += 1
        return super().encode(*args, **options)


@pytest.mark.parametrize("experts_at_once", [1, 8])
def test_an_interrupted_table_goes_on_to_the_same_bytes(model, stats, tmp_path, monkeypatch, experts_at_once):
    monkeypatch.setattr(ErrorMeter, "weights_in_memory", experts_at_once * 8 * 64)
    path, identity = tmp_path / "errors.json", {"types": "Q4_0 Q8_0 Q4_K"}

    def measure(encoder, journal=None):
        return build_error_table(
            ErrorMeter(model, stats, encoder, threads=1), ("Q4_0", "Q8_0", "Q4_K"), stats_hash="s", journal=journal
        )

    undisturbed = CountingEncoder()
    whole = measure(undisturbed).model_dump_json()
    per_part = 4  # Q4_0, Q8_0, Q5_0 and the float type
    for stop in range(1, undisturbed.calls, 3):
        with pytest.raises(StoppedError), ErrorJournal(path, identity) as journal:
            measure(CountingEncoder(stop), journal)
        rest = CountingEncoder()
        with ErrorJournal(path, identity) as journal:
            assert journal.num_parts == stop // per_part
            assert measure(rest, journal).model_dump_json() == whole
            journal.remove()
        assert rest.calls == undisturbed.calls - stop // per_part * per_part
        assert not list(tmp_path.iterdir())


_LARGE = """
import torch
from pathlib import Path
from dynquant.analysis.errors import measure as measure_errors
from dynquant.running.streaming.stream_memory import resident_memory
from dynquant.checkpoints.model import Model
from dynquant.encoding.stream import load_encoder
from dynquant.calibration.statistics import CalibrationStats, StatsProvenance
from dynquant.checkpoints.tensor_source import DictSource

torch.set_num_threads(1)
measure_errors.ErrorMeter.weights_in_memory = 1 << 18
stack = torch.ones(1, dtype=torch.bfloat16).expand(96, 512, 512)
source = DictSource({f"blk.{layer}.ffn_up_exps.weight": stack for layer in range(2)})
stats = CalibrationStats(StatsProvenance(fingerprint=source.fingerprint, text_hash="0" * 64, text_name="none"))
seen = []
model = Model(Path("made up"), source, (), lambda name: (name,))
meter = measure_errors.ErrorMeter(model, stats, load_encoder("ggml"), threads=1)
measure_errors.build_error_table(
    meter, ("Q8_0", "Q4_0"), stats_hash="", progress=lambda *_, **__: seen.append(resident_memory())
)
print(len(seen), max(seen) - seen[len(seen) // 8])
"""


@pytest.mark.nightly
def test_memory_does_not_grow_with_the_number_of_parts():
    done = subprocess.run([sys.executable, "-c", _LARGE], capture_output=True, text=True, check=True, cwd="/")
    steps, growth = map(int, done.stdout.split())
    assert steps == 2 * 96 + 1
    assert growth < 32 << 20  # of 192 parts of 1 MiB, each with several arrays of it; their results are a few numbers


def test_only_whole_lines_of_the_same_table_count(model, stats, tmp_path):
    path = tmp_path / "errors.json"
    with ErrorJournal(path, {"types": "Q8_0"}) as journal:
        build_error_table(
            ErrorMeter(model, stats, NumpyEncoder(), threads=1), ("Q8_0",), stats_hash="s", journal=journal
        )
    lines = journal.path.read_text().splitlines(keepends=True)
    assert len(lines) == 4

    def found(content, **identity):
        journal.path.write_text(content)
        with ErrorJournal(path, {"types": "Q8_0"} | identity) as again:
            return again.num_parts

    assert found("".join(lines)) == 3
    assert found("".join(lines)[:-10]) == 2
    assert found("".join([*lines[:2], lines[2].replace('"experts": [0, 1]', '"experts": [0, 2]'), lines[3]])) == 1
    assert found("".join(lines), types="Q4_0") == 0
    with pytest.raises(WriteError, match=r"errors\.json\.journal is in the way"):
        found("not a journal\n")
    (tmp_path / "file").touch()
    with pytest.raises(PlanError, match=r"errors\.json\.journal, which keeps .* cannot be written"):
        ErrorJournal(tmp_path / "file" / "errors.json", {})


def test_restricted_to(table):
    assert {row.type for row in table.restricted_to(("Q8_0",)).rows} == {"Q8_0"}
    assert {row.type for row in table.restricted_to(("Q4_K",)).rows} == {"Q5_0"}
    assert table.restricted_to(("IQ1_S",)).rows == table.rows


def test_extended_by(model, stats, table):
    more = build_error_table(ErrorMeter(model, stats, NumpyEncoder()), ("Q5_0", "Q4_1"), stats_hash="s")
    both = table.extended_by(more)
    assert both.types == ("Q4_0", "Q8_0", "Q4_K", "Q5_0", "Q4_1")
    assert list(both.tensors()) == list(table.tensors())
    assert set(both.tensors()[DENSE]) == {"Q4_0", "Q8_0", "Q5_0", "F32", "Q4_1"}
    assert both.row(DENSE, "Q4_K").stands_for == ("Q4_K",)
    assert len(both.rows) == len({(row.name, row.type) for row in both.rows})


def test_json_round_trip_and_refusals(table, tmp_path):
    path = tmp_path / "errors.json"
    table.save(path)
    assert ErrorTable.load(path) == table
    content = json.loads(path.read_text())
    for broken in ("", "[]", json.dumps({**content, "schema_version": 2}), json.dumps({**content, "extra": 1})):
        path.write_text(broken)
        with pytest.raises(PlanError, match=r"errors\.json is (not|an empty file, not) an error table"):
            ErrorTable.load(path)
    with pytest.raises(PlanError, match="none"):
        ErrorTable.load(tmp_path / "none.json")


def test_a_table_of_other_types_is_read_where_they_are_known(table, tmp_path):
    path = tmp_path / "serving_errors.json"
    other = table.with_rows(row.model_copy(update={"type": "W4A16"}) for row in table.rows)
    other.save(path)
    assert ErrorTable.load(path, known_types=("W4A16", "FP8")) == other
    with pytest.raises(PlanError, match="unknown type 'W4A16'"):
        ErrorTable.load(path)


def test_csv_is_tidy(table, tmp_path):
    table.save(tmp_path / "errors.json")
    with (tmp_path / "errors.csv").open(newline="") as file:
        lines = list(csv.DictReader(file))
    assert [(line["name"], line["type"]) for line in lines] == [(row.name, row.type) for row in table.rows]
    for line, row in zip(lines, table.rows, strict=True):
        assert float(line["relative_rms"]) == row.relative_rms
        assert line["role"] == row.role.value
        assert (line["activation_error"] == "") == (row.activation_error is None)
    assert set(lines[0]) < set(ErrorRow.model_fields)
