"""What stages tell, and how it is shown: bars, lines of text, lines of JSON, and the summary."""

import io
import json

import pytest
import torch
from rich.console import Console

from dynquant import resources
from dynquant.cli.terminal import console
from dynquant.cli.terminal import record as recording
from dynquant.cli.terminal.display import Bars, JsonLines, Lines
from dynquant.cli.terminal.record import RATE_SECONDS, RunRecord
from dynquant.errors import ExportError
from tests.helpers.commands import refused, run

FIELDS = ("stage", "done", "total", "unit", "rate", "layer", "tensor", "bytes_read", "bytes_written", "seconds",
          "seconds_left", "peak_memory_bytes", "peak_cuda_bytes", "stage_cuda_bytes")  # fmt: skip


class Clock:
    """A clock that tests set."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock():
    return Clock()


@pytest.fixture
def record(clock):
    return RunRecord(clock=clock)


def tell(record, stage, done, total, *, unit="weights", layer=None, tensor=None):
    record.report(stage, done, total, unit=unit, layer=layer, tensor=tensor)
    return record.stages[stage]


def test_time_belongs_to_the_stage_that_reports_and_loading_to_none(record, clock):
    clock.now += 7  # loading
    tell(record, "a", 0, 10)
    clock.now += 2
    tell(record, "a", 10, 10)
    clock.now += 5  # loading for b
    tell(record, "b", 0, 4)
    clock.now += 1
    tell(record, "b", 4, 4)
    clock.now += 3  # b's files are moved to their names
    record.close()
    assert {name: stage.spent.seconds for name, stage in record.stages.items()} == {"a": 2, "b": 4}
    assert record.spent.seconds == 18


def test_rate_and_time_left_ignore_what_an_earlier_run_had_done(record, clock):
    stage = tell(record, "quantize", 600, 1000)
    assert (stage.rate, stage.seconds_left) == (None, None)
    clock.now += 10
    tell(record, "quantize", 700, 1000)
    assert (stage.rate, stage.seconds_left, stage.amount) == (10.0, None, 100)
    clock.now += 10
    tell(record, "quantize", 800, 1000)
    assert (stage.rate, stage.seconds_left, stage.amount) == (10.0, 20.0, 200)


def test_the_first_item_and_two_more_seconds_tell_no_time_left(record, clock):
    stage = tell(record, "quantize", 0, 1000)
    for seconds, done in ((20, 0), (20, 10), (0.1, 10), (0.9, 20)):  # the first one waits for compilation
        clock.now += seconds
        tell(record, "quantize", done, 1000, tensor=f"blk.{done}.attn_q.weight")
        assert stage.seconds_left is None and "left" not in str(stage)
    assert stage.rate == 10.0
    clock.now += 1
    tell(record, "quantize", 30, 1000)
    assert (stage.rate, stage.seconds_left) == (10.0, 97.0) and "1:37 left" in str(stage)
    tell(record, "quantize", 0, 1000)  # it counts anew
    clock.now += 20
    tell(record, "quantize", 10, 1000)
    assert (stage.rate, stage.seconds_left) == (0.5, None)


def test_a_stage_that_counts_again_from_the_start_adds_to_its_amount(record, clock):
    for total in (4, 2):
        for done in range(total + 1):
            clock.now += 1
            stage = tell(record, "original", done, total)
    record.close()
    assert (stage.amount, stage.done, stage.spent.seconds) == (6, 2, 7)


def test_parts_of_an_earlier_run_tell_no_speed_wherever_they_come(record, clock):
    stage = tell(record, "measure", 0, 1000)
    for done in range(100, 700, 100):  # a journal is read
        clock.now += 0.1
        record.report("measure", done, 1000, unit="weights", resumed=True)
    assert (stage.rate, stage.amount, round(stage.spent.seconds, 6)) == (None, 0, 0.6)
    clock.now += 10
    tell(record, "measure", 700, 1000)
    assert (round(stage.rate, 6), stage.amount, stage.done) == (10.0, 100, 700)


def test_stages_that_worked_on_the_gpu_are_told_apart(record, clock, monkeypatch, capsys):
    taken = iter([None, None, 3_000_000_000, 5_000_000_000, None, 4_000_000, None])
    monkeypatch.setattr(recording, "cuda_bytes_since", lambda: next(taken))
    tell(record, "read", 0, 1)
    tell(record, "read", 1, 1)
    tell(record, "load for quantize", 0, 1)  # what it did before it first reported belongs to none
    record.stages.pop("load for quantize")
    for done in range(3):
        tell(record, "quantize", done, 2)
    record.close()
    read, quantize = record.stages["read"], record.stages["quantize"]
    assert (read.cuda_bytes, quantize.cuda_bytes) == (None, 4_000_000)
    assert quantize.as_json()["stage_cuda_bytes"] == 4_000_000
    assert [stage["cuda_bytes"] for stage in record.summary("done", None)["summary"]["stages"]] == [None, 4_000_000]
    monkeypatch.setattr(console, "_record", record)
    console.finish("done")
    header, rule, *rows = [line for line in capsys.readouterr().err.splitlines() if "GPU" in line or "quantize" in line]
    assert "GPU" in header and "4.00 MB" in " ".join([rule, *rows])


def test_rate_follows_a_change_of_speed(record, clock):
    stage = tell(record, "quantize", 0, 10_000)
    for _ in range(60):
        clock.now += 1
        tell(record, "quantize", stage.done + 100, 10_000)
    for _ in range(int(RATE_SECONDS) + 1):
        clock.now += 1
        tell(record, "quantize", stage.done + 10, 10_000)
    assert stage.rate == 10.0


def test_a_stage_that_runs_again_adds_up(record, clock):
    for _ in range(2):
        record.open("", ())
        tell(record, "quantize", 0, 50)
        clock.now += 3
        tell(record, "quantize", 50, 50)
        record.close()
    stage = record.stages["quantize"]
    assert (stage.amount, stage.spent.seconds, stage.done) == (100, 6, 50)


def test_a_tensor_gives_the_layer(record):
    assert tell(record, "quantize", 0, 1, tensor="blk.12.attn_q.weight").layer == 12
    assert tell(record, "quantize", 0, 1, tensor="output.weight").layer is None
    assert tell(record, "calibrate", 0, 1, layer=3).layer == 3


def test_bytes_read_and_written_are_counted(record, tmp_path):
    if resources.traffic() == (None, None):
        pytest.skip("this system does not count a process's bytes")
    stage = tell(record, "quantize", 0, 1)
    (tmp_path / "file").write_bytes(bytes(3_000_000))
    (tmp_path / "file").read_bytes()
    resources.count_mapped(5_000_000)
    tell(record, "quantize", 1, 1)
    assert 3_000_000 <= stage.spent.written < 3_100_000
    assert 8_000_000 <= stage.spent.read < 8_100_000


def test_lines_are_seconds_apart_and_say_everything(record, clock):
    lines = []
    display = Lines(lines.append, clock)
    for done in range(0, 13_000_000, 1_000_000):
        display.show(tell(record, "quantize", done, 16_000_000, tensor="blk.3.attn_q.weight"))
        clock.now += 1
    assert len(lines) == 2
    for words in ("quantize 62 %", "10.0 M of 16.0 M weights", "1.0 M weights/s", "0:06 left", "blk.3.attn_q.weight",
                  "peak memory"):  # fmt: skip
        assert words in lines[1]


def test_json_lines_keep_first_and_last_and_have_every_field(record, clock):
    stream = io.StringIO()
    display = JsonLines(stream, clock)
    for done in range(101):
        display.show(tell(record, "quantize", done, 100, tensor="blk.3.attn_q.weight"))
        clock.now += 0.01
    lines = [json.loads(line) for line in stream.getvalue().splitlines()]
    assert [tuple(line) for line in lines] == [FIELDS] * len(lines)
    assert (lines[0]["done"], lines[-1]["done"]) == (0, 100)
    assert len(lines) == 3
    assert (lines[1]["layer"], lines[1]["rate"], lines[1]["seconds_left"]) == (3, 100.0, None)
    assert lines[1]["peak_memory_bytes"] > 10_000_000


def test_bars_show_stage_speed_and_tensor(record, clock):
    screen = Console(file=io.StringIO(), force_terminal=True, width=120)
    bars = Bars(screen)
    bars.start()
    bars.show(tell(record, "quantize", 0, 4_000_000))
    clock.now += 9
    bars.show(tell(record, "quantize", 500_000, 4_000_000))
    clock.now += 2
    bars.show(tell(record, "quantize", 1_500_000, 4_000_000, tensor="blk.3.attn_q.weight"))
    bars.refresh()
    bars.stop()
    shown = screen.file.getvalue()
    for words in ("quantize", "38%", "500.0 k weights/s", "0:05 left", "blk.3.attn_q.weight", "peak memory"):
        assert words in shown


def test_description_of_a_stage_without_an_amount(record):
    assert str(tell(record, "drawing plots", 0, 0, unit="")).startswith("drawing plots 0 %, 0 of 0, ")


def test_export_tells_every_tensor_in_a_file_and_a_summary_on_stderr(small_moe, tmp_path):
    lines_file, output = tmp_path / "progress.jsonl", tmp_path / "model.gguf"
    done = run("export", small_moe, "--preset", "uniform-q8_0", "--encoder", "ggml", "-o", output,
               "--json-progress", lines_file)  # fmt: skip
    assert done.returncode == 0, done.stderr
    *stages, last = [json.loads(line) for line in lines_file.read_text().splitlines()]
    assert {line["stage"] for line in stages} == {"quantize"}
    assert (stages[0]["done"], stages[0]["unit"]) == (0, "weights")
    assert stages[-1]["done"] == stages[-1]["total"] > 15_000_000
    summary = last["summary"]
    assert (summary["status"], summary["stages"][0]["amount"]) == ("done", stages[-1]["total"])
    if summary["bytes_read"] is not None:
        assert summary["stages"][0]["bytes_read"] >= (small_moe / "model.safetensors").stat().st_size * 0.99
        assert summary["bytes_written"] >= output.stat().st_size
    assert "peak memory" in done.stderr and "15.9 M weights" in done.stderr
    assert "quantize" not in done.stdout


def test_on_stderr_there_is_nothing_but_json(small_moe, tmp_path):
    done = run("--json-progress", "-", "export", small_moe, "--preset", "f16", "-o", tmp_path / "model.gguf")
    assert done.returncode == 0
    lines = [json.loads(line) for line in done.stderr.splitlines()]
    assert "15.9 M weights" in lines[0]["note"] and lines[-1]["summary"]["status"] == "done"
    done = run("export", tmp_path / "nowhere", "--preset", "f16", "-o", tmp_path / "model.gguf", "--json-progress=-")
    [line] = done.stderr.splitlines()
    summary = json.loads(line)["summary"]
    assert (done.returncode, summary["status"]) == (1, "refused") and "nowhere" in summary["message"]


def test_a_file_that_cannot_be_written_is_refused(small_moe, tmp_path):
    arguments = ("export", small_moe, "--preset", "f16", "-o", tmp_path / "model.gguf")
    message = refused(*arguments, "--json-progress", tmp_path / "missing" / "progress.jsonl")
    assert "--json-progress" in message and "missing" in message
    assert list(tmp_path.iterdir()) == []


def test_a_failing_stage_leaves_no_display_open():
    console.begin(["dynquant", "test"])
    with pytest.raises(ExportError), console.stage_progress("Nothing is kept.") as report:
        report("quantize", 0, 4)
        raise ExportError("no space")
    with console.stage_progress("Nothing is kept.") as report:
        report("quantize", 4, 4)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_work_on_a_gpu_is_told_from_weights_that_lie_there():
    weights = torch.zeros(10_000_000, device="cuda")
    assert resources.cuda_bytes_since() >= 40_000_000 and resources.cuda_bytes_since() is None
    del weights
    product = torch.zeros(20_000_000, device="cuda") * 2
    del product
    assert resources.cuda_bytes_since() >= 160_000_000 and resources.cuda_bytes_since() is None
    assert resources.peak_cuda_bytes() >= 160_000_000, "the peak of the process is not forgotten"
