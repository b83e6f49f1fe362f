"""Ctrl-C and SIGTERM in real processes: gone within a second or two, one line, and the same command goes on."""

import json
import signal
import subprocess
import sys
import time

import pytest

from tests.helpers.commands import run
from tests.helpers.representatives import represented_by

TYPES = "q4_k,q6_k,iq4_xs"
LIMIT_SECONDS = 2.0
"""A second is promised and a quiet machine keeps it; what would hold the process takes ten seconds or more."""

NATIVE = {
    "python": "import time; print('ready', flush=True); time.sleep(60)",
    "called back": "import ctypes; called = lambda: print('ready', flush=True) or time.sleep(60);"
    " ctypes.CFUNCTYPE(None)(called)()",
    "numba": "import numba; print('ready', flush=True); made = (eval(f'lambda x: x * {n}') for n in range(10000));"
    " [numba.njit(function)(1.0) for function in made]",
    "torch": "import torch; a = torch.rand(3000, 3000); print('ready', flush=True); torch.linalg.svd(a)",
    "ggml": "from dynquant.encoding.ggml import _library; from dynquant.formats.quant_types import QUANT_TYPES;"
    " library = _library(); print('ready', flush=True); library.prepare(QUANT_TYPES['IQ1_S'])",
    "side by side": "import torch; from dynquant.workers import side_by_side; a = torch.rand(2000, 2000);"
    " results = side_by_side(lambda i: torch.linalg.svd(a) if i else print('ready', flush=True), range(9), 3);"
    " list(results)",
}
PROGRAM = """
import time
from dynquant.cli.terminal.interrupt import ends_promptly
with ends_promptly(lambda: print('said', flush=True)):
    {work}
    print('finished', flush=True)
"""
HELD = """
import time
from dynquant.cli.app import main
from dynquant.cli.terminal.record import RunRecord

def report(self, stage, done, total, *, told=RunRecord.report, **more):
    told(self, stage, done, total, **more)
    if stage == {stage!r} and {at} * total <= done < total:
        print("reached", flush=True)
        time.sleep(60)

RunRecord.report = report
main()
"""
"""A command that waits for its interruption within a stage, which would else be over before the signal comes."""


@pytest.mark.parametrize("kind", represented_by(("ggml", "called back"), NATIVE))
def test_native_code_does_not_hold_the_process(kind):
    work = NATIVE[kind]
    process = subprocess.Popen([sys.executable, "-c", PROGRAM.format(work=work)], stdout=subprocess.PIPE,
                               stderr=subprocess.PIPE, text=True, cwd="/")  # fmt: skip
    assert process.stdout.readline() == "ready\n"
    time.sleep(0.2)
    seconds, out, err = stop(process, signal.SIGINT)
    assert (process.returncode, out, err) == (130, "said\n", "")
    assert seconds < LIMIT_SECONDS


def test_a_terminal_that_closes_ends_the_process_unless_that_is_ignored():
    for start, left in ((lambda: None, (130, "said\n")), (lambda: signal.signal(signal.SIGHUP, signal.SIG_IGN), None)):
        process = subprocess.Popen([sys.executable, "-c", PROGRAM.format(work=NATIVE["python"])], preexec_fn=start,
                                   stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd="/")  # fmt: skip
        assert process.stdout.readline() == "ready\n"
        process.send_signal(signal.SIGHUP)
        time.sleep(1)
        assert (process.poll() is None) == (left is None)
        _, out, _ = stop(process, signal.SIGINT)
        assert (process.returncode, out) == (130, "said\n")


def test_an_interruption_in_native_code_leaves_no_lock(tmp_path):
    outputs = f"[*map(Path, {[str(tmp_path / name) for name in ('new/plan', 'new/plan/plan.json', 'b')]})]"
    work = "from contextlib import ExitStack; from pathlib import Path; from dynquant.storage.lock import locked\n"
    work += f"    with ExitStack() as locks:\n        [locks.enter_context(locked(path)) for path in {outputs}]\n"
    work += f"        {NATIVE['torch']}"
    process = subprocess.Popen([sys.executable, "-c", PROGRAM.format(work=work)], stdout=subprocess.PIPE,
                               stderr=subprocess.PIPE, text=True, cwd="/")  # fmt: skip
    assert process.stdout.readline() == "ready\n"
    assert sorted(file.name for file in tmp_path.rglob("*.lock")) == [".b.lock", ".plan.json.lock", ".plan.lock"]
    _, out, err = stop(process, signal.SIGINT)
    assert (process.returncode, out, err) == (130, "said\n", "")
    assert list(tmp_path.iterdir()) == []


def test_code_that_swallows_the_interruption_does_not_hold_the_process():
    work = """
    try:
        print('ready', flush=True)
        time.sleep(60)
    except BaseException:
        time.sleep(60)
"""
    process = subprocess.Popen([sys.executable, "-c", PROGRAM.format(work=work.strip())], stdout=subprocess.PIPE,
                               stderr=subprocess.PIPE, text=True, cwd="/")  # fmt: skip
    assert process.stdout.readline() == "ready\n"
    seconds, out, _ = stop(process, signal.SIGTERM)
    assert (process.returncode, out) == (130, "said\n")
    assert seconds < LIMIT_SECONDS


def test_handlers_are_put_back(small_moe):
    before = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    assert run("version").returncode == 0
    assert (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)) == before


@pytest.mark.nightly
def test_interrupted_export_goes_on_to_the_same_bytes(small_moe, calibrated_16m, tmp_path):
    stats = calibrated_16m / "stats.safetensors"
    broken, whole = tmp_path / "broken", tmp_path / "whole"
    for directory in (broken, whole):
        directory.mkdir()

    def arguments(directory):
        return ("export", small_moe, "--preset", "uniform-q4_k", "--stats", stats, "--encoder", "ggml",
                "--threads", "1", "-o", directory / "model.gguf")  # fmt: skip

    line = interrupted(arguments(broken), tmp_path / "progress.jsonl", "quantize", at=0.2)
    assert "in quantize at" in line and "Finished tensors are kept" in line and str(broken) in line
    assert sorted(file.name for file in broken.iterdir()) == ["model.gguf.journal", "model.gguf.partial"]
    for directory in (broken, whole):
        assert run(*arguments(directory)).returncode == 0
        assert [file.name for file in directory.iterdir()] == ["model.gguf"]
    assert (broken / "model.gguf").read_bytes() == (whole / "model.gguf").read_bytes()


@pytest.mark.nightly
@pytest.mark.parametrize(
    ("errors", "model", "options"),
    [
        ("errors.json", "tiny_moe", ("--tokens", "32768", "--types", TYPES, "--threads", "1", "--no-report")),
        ("serving_errors.json", "small_moe", ("--tokens", "32768", "--for", "vllm")),
    ],
)
def test_interrupted_plan_goes_on_to_the_same_files(errors, model, options, request, tmp_path):
    checkpoint = request.getfixturevalue(model)

    def arguments(directory):
        return ("plan", checkpoint, "--hessians", "none", *options, "-o", directory)

    broken, whole = tmp_path / "broken", tmp_path / "whole"
    line = interrupted(arguments(broken), tmp_path / "progress.jsonl", "calibrate", at=0.2, number=signal.SIGTERM)
    assert "in calibrate at" in line and "lost" in line and str(broken) in line
    assert not broken.exists() or not list(broken.iterdir())
    line = interrupted(arguments(broken), tmp_path / "progress.jsonl", "measuring errors", at=0.6)
    assert "in measuring errors at" in line and "Statistics and the errors measured so far are kept" in line
    assert sorted(file.name for file in broken.iterdir()) == [f"{errors}.journal", "stats.safetensors"]
    measured = (broken / f"{errors}.journal").read_text().splitlines()[1:]
    assert measured
    for directory in (broken, whole):
        done = run(*arguments(directory))
        assert done.returncode == 0, done.stderr
        goes_on = f"going on with the interrupted {errors}, {len(measured)} parts"
        assert (goes_on in done.stderr) == (directory == broken)
    files = {file.name: file.read_bytes() for file in whole.iterdir()}
    assert {"stats.safetensors", errors, "plan.json"} <= files.keys()
    assert {file.name: file.read_bytes() for file in broken.iterdir()} == files
    assert f"reusing {broken / errors}" in run(*arguments(broken)).stderr


def interrupted(arguments, progress, stage, *, at, number=signal.SIGINT) -> str:
    """Start a command, stop it when `stage` is this far, and return the line that it leaves."""
    program, words = HELD.format(stage=stage, at=at), map(str, (*arguments, "--json-progress", progress))
    process = subprocess.Popen([sys.executable, "-c", program, *words], stdout=subprocess.PIPE,
                               stderr=subprocess.PIPE, text=True, cwd="/")  # fmt: skip
    assert "reached\n" in iter(process.stdout.readline, ""), process.communicate()
    seconds, _, err = stop(process, number)
    assert process.returncode == 130, err
    assert seconds < LIMIT_SECONDS
    assert "Traceback" not in err
    [line] = [line for line in err.splitlines() if line.startswith("Interrupted")]
    assert line.endswith(f"--json-progress {progress}") and "run the same command again: dynquant " in line
    summary = json.loads(progress.read_text().splitlines()[-1])["summary"]
    assert (summary["status"], summary["message"]) == ("interrupted", line)
    progress.unlink()
    return line


def stop(process, number) -> tuple[float, str, str]:
    """Seconds until the process was gone, and the rest of what it printed."""
    start = time.monotonic()
    process.send_signal(number)
    out, err = process.communicate(timeout=60)
    return time.monotonic() - start, out, err
