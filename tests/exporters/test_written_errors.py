"""Exact errors of what an export writes, entered into the table beside the plan: the numbers of `--exact`."""

from contextlib import suppress

import pytest
import torch

from dynquant.analysis.errors.measure import ErrorMeter, build_error_table
from dynquant.analysis.errors.sampling import Sampling
from dynquant.analysis.errors.stage import written_errors
from dynquant.analysis.errors.table import ErrorTable, Price
from dynquant.calibration.stage import StatsFile
from dynquant.encoding.parts import PartLimits
from dynquant.session import Session
from tests.helpers.exports import export_gguf
from tests.helpers.tiny_gguf import GGML, WatchedEncoder, left_in, stop_after, tiny_model, tiny_plan, tiny_stats

STACK, MATRIX = "blk.0.ffn_up_exps.weight", "token_embd.weight"
IDENTITY = {"plan": "of this test"}


@pytest.fixture(scope="module")
def model():
    generator = torch.Generator().manual_seed(1)
    large = {STACK: torch.randn(3, 400, 256, generator=generator), MATRIX: torch.randn(900, 256, generator=generator)}
    return tiny_model(**large)


@pytest.fixture(scope="module")
def stats(model):
    return tiny_stats(model)


@pytest.fixture(scope="module")
def exact(model, stats):
    return build_error_table(ErrorMeter(model, stats, GGML), ("Q4_K", "Q6_K"), stats_hash="s")


@pytest.fixture
def folder(model, stats, tmp_path):
    """A plan folder whose table is estimated, and priced by a method."""
    stats.save(tmp_path / "stats.safetensors")
    meter = ErrorMeter(model, stats, GGML, sampling=Sampling(most_weights=1 << 14, first_rows=32))
    table = build_error_table(meter, ("Q4_K", "Q6_K"), stats_hash=StatsFile(tmp_path / "stats.safetensors").hash)
    prices = {name: {stored: Price(kl=2.0, se=0.5) for stored in rows} for name, rows in table.tensors().items()}
    table.with_prices("probe", prices).save(tmp_path / "errors.json")
    return tmp_path


@pytest.fixture
def exported(model, folder):
    def export(encoder=GGML, *, identity=IDENTITY):
        stats, output = StatsFile(folder / "stats.safetensors"), folder / "out" / "m.gguf"
        plan = tiny_plan(model, stats=stats.stats, stats_hash=stats.hash)
        types = {entry.name: entry.type for entry in plan.entries}
        meter, notes = ErrorMeter(model, stats.stats, GGML), []
        with written_errors(folder / "errors.json", meter, stats, types, output).begin(identity) as errors:
            limits = PartLimits(1 << 20)
            options = {"encoder": encoder, "errors": errors, "limits": limits, "threads": 1}
            export_gguf(model, plan, stats.stats, output, **options)
            errors.save(Session(note=notes.append))
        assert left_in(output.parent) == ["m.gguf"]
        assert written_errors(folder / "errors.json", meter, stats, types, output) is None, "nothing is left to measure"
        return ErrorTable.load(folder / "errors.json"), notes

    return export


def check_exact(table, exact, name):
    row, whole = table.row(name, "Q4_K"), exact.row(name, "Q4_K")
    assert row.weighted_error_se is None
    for field in ("weighted_error", "relative_rms", "weighted_energy"):
        assert getattr(row, field) == pytest.approx(getattr(whole, field), rel=1e-6), field
    assert row.per_expert_weighted_error == pytest.approx(whole.per_expert_weighted_error, rel=1e-6)


def test_an_export_enters_the_numbers_of_the_exact_table(folder, exported, exact):
    before = ErrorTable.load(folder / "errors.json")
    table, notes = exported()
    for name in (STACK, MATRIX):
        estimate = before.row(name, "Q4_K")
        assert estimate.weighted_error_se > 0
        check_exact(table, exact, name)
        ratio = table.row(name, "Q4_K").weighted_error / estimate.weighted_error
        assert table.prices["probe"][name]["Q4_K"].kl == pytest.approx(2 * ratio)
    assert table.row(MATRIX, "Q6_K") == before.row(MATRIX, "Q6_K")
    assert table.num_exact == before.num_exact + 2
    assert "exact errors of 2 tensors" in notes[0]


def test_exact_rows_outlast_types_that_are_added(exported, exact, model, stats):
    table, _ = exported()
    more = ErrorMeter(model, stats, GGML, sampling=Sampling(most_weights=1 << 14, first_rows=32))
    both = table.extended_by(build_error_table(more, ("Q4_K", "Q5_K"), stats_hash="s"))
    check_exact(both, exact, STACK)
    assert both.row(STACK, "Q5_K").weighted_error_se > 0


def test_an_interrupted_export_goes_on_with_what_it_measured(exported, exact, folder):
    with suppress(KeyboardInterrupt):
        exported(WatchedEncoder(stop_after(5)))
    assert {"m.gguf.errors.journal", "m.gguf.partial"} <= set(left_in(folder / "out"))
    with (folder / "out" / "m.gguf.errors.journal").open("a") as journal:
        journal.write('{"name": "token_embd.weight", "rows": [0], "sums": []}\n')  # of no use, and no reason to stop
    table, _ = exported()
    check_exact(table, exact, STACK)
    check_exact(table, exact, MATRIX)


def test_a_table_that_another_plan_put_in_its_place_stays_as_it_is(model, stats, folder):
    """The numbers are those of another encoder, or of other statistics."""
    path, file = folder / "errors.json", StatsFile(folder / "stats.safetensors")
    plan, meter = tiny_plan(model, stats=stats, stats_hash=file.hash), ErrorMeter(model, stats, GGML)
    types, output = {entry.name: entry.type for entry in plan.entries}, folder / "m.gguf"
    with written_errors(path, meter, file, types, output).begin(IDENTITY) as errors:
        export_gguf(model, plan, stats, output, encoder=GGML, errors=errors)
        other = ErrorTable.load(path).model_copy(update={"encoder": "dynquant 2"})
        other.save(path)
        errors.save(Session())
    assert ErrorTable.load(path) == other
