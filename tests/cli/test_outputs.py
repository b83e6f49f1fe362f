"""Outputs of commands: none destroys what is read, and two processes never write one."""

import os
import re
import signal
import subprocess
import time
from typing import get_args

import pytest

from dynquant.errors import OptionError
from dynquant.exporters.options import AdapterFileOptions
from dynquant.options import Writes
from dynquant.planning.options import PlanOptions
from dynquant.storage.atomic import save_tensors
from tests.helpers.commands import command, linked_copy, refused, run, succeed
from tests.storage.test_lock import holder  # noqa: F401

NOT_PATHS = {
    "preset", "encoder", "format", "runner", "hessians", "kv_type", "vision", "for_", "device", "ray", "tune", "size",
    "fits", "start", "store", "types", "couple", "tasks", "scoring", "presets", "variants", "sensitivity", "frontier",
    "hessian_memory", "max_memory", "split_max_size", "mmproj_type", "output", "imatrix", "fallback", "mtp_type",
    "tune_parts", "gpu", "ram", "sizes", "bpw", "name", "base_model", "quantized_by", "push", "effort", "contexts",
}  # fmt: skip
"""Options of type str that name no file that is read; `output` and `imatrix` are words of what `recipe` prints."""


@pytest.fixture
def model(small_moe, tmp_path):
    return linked_copy(small_moe, tmp_path / "model")


def contents(folder):
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_every_option_is_known_as_path_or_word():
    from dynquant.cli.app import app
    from dynquant.cli.terminal.outputs import PATHS_IN_WORDS

    for made in app.registered_commands:
        hints = made.callback.__annotations__
        words = {option for option, hint in hints.items() if get_args(hint) and get_args(hint)[0] in (str, str | None)}
        assert words <= PATHS_IN_WORDS | NOT_PATHS, (made.name, words - PATHS_IN_WORDS - NOT_PATHS)


@pytest.mark.parametrize(
    "arguments",
    [
        "calibrate {m} -o {m}/model.safetensors",
        "calibrate {m} -o {m}",
        "calibrate {m} -o {t}/into/model.safetensors",
        "calibrate {m} -o {t}/soft.safetensors",
        "calibrate {m} -o {t}/hard.safetensors",
        "calibrate {m} --calibration {t}/text.txt -o {t}/text.txt",
        "calibrate {m} --imatrix {t}/i.gguf -o {t}/stats.safetensors --imatrix-out {t}/i.gguf",
        "calibrate {m} -o {t}/both --imatrix-out {t}/into/../both",
        "analyze {m} --stats {t}/s -o {t}/s",
        "analyze {m} --stats {t}/e.csv -o {t}/e.json",
        "analyze {m} --stats {t}/s -o {t}/new.json --json-progress {t}/new.csv",
        "analyze {m} --stats {t}/s -o {t}/text.json",
        "calibrate {m} -o {t}/stats.safetensors",
        "calibrate {m} -o {t}/new.safetensors --imatrix-out {t}/new.hessians.safetensors",
        "calibrate {m} -o {t}/own/x.safetensors --calibration {t}/own/x-text.safetensors",
        "plan {m} --like {t}/plan.json -o {t}",
        "plan {m} --like {t}/g.gguf -o {t}/page",
        "plan {m} --stats {t}/hessians.safetensors -o {t}",
        "export {m} --preset f16 -o {t}/text.gguf",
        "export {m} --preset f16 --split-max-size 1GB -o {t}/p.gguf",
        "export {m} --preset iq2_xxs -o {t}/h.gguf",
        "export {m} --preset f16 --base-gguf {t}/mmproj-text.gguf -o {t}/text.gguf",
        "compare {m} --presets f16,q4_k --text {t}/text.txt -o {t}/c",
        "compare {m} --presets f16,q8 --text {t}/text.txt -o {t}/c",
        "compare-encoders {m} --presets r --text {t}/text.txt -o {t}/c",
        "compare-encoders {m} --presets s --variants dynquant+tune --text {t}/text.txt -o {t}/c",
        "export {m} --plan {t}/plan.json -o {t}/plan.json",
        "export {m} --preset f16 --stats {t}/s -o {t}/s",
        "export {m} --preset f16 -f safetensors -o {m}",
        "export {m} --preset f16 -f compressed-tensors -o {t}/into",
        "export {t}/g.gguf --preset q4_k -o {t}/g.gguf",
        "export {t}/p-00001-of-00002.gguf --preset q4_k -o {t}/p-00002-of-00002.gguf",
        "export {t}/p-00001-of-00002.gguf --preset q4_k --split-max-size 1GB -o {t}/p.gguf",
        "tune {t}/g.gguf --reference {m} -o {t}/g.gguf",
        "tune {t}/g.gguf --reference {m} -o {m}/tokenizer.json",
        "eval {t}/g.gguf --reference {m} --text {t}/text.txt -o {t}/g.gguf",
        "eval {t}/g.gguf --reference {m} --text {t}/text.txt -o {t}/text.txt",
        "eval {t}/g.gguf --reference {m} --text {t}/text.txt -o {m}/config.json",
        "eval {t} --reference {m} --data {t}/text.txt -o {t}/plan.json",
        "finetune {m} --data {t}/text.txt -o {m}",
        "finetune {m} --data {t}/text.txt -o {t}",
        "heal {t}/g.gguf --reference {m} --data {t}/text.txt --text {t}/text.txt -o {t}",
        "export-adapter {m} -o {m}/config.json",
        "inspect {t}/g.gguf --json-progress {t}/g.gguf",
        "export {m} --plan {t}/plan.json -o {t}/new.gguf --json-progress {t}/plan.json",
        "diff {t}/plan.json {t}/g.gguf --json-progress {t}/plan.json",
        "export {m} --preset f16 -o {t}/new.gguf --json-progress {t}/new.gguf",
        "compare {m} --presets f16 --text {t}/text.txt -o {t}/c --json-progress {t}/text.txt",
        "measure-machine -o /dev/null",
    ],
)
def test_what_is_read_is_never_overwritten(arguments, model, tmp_path):
    for name in ("own", "page", "c"):
        (tmp_path / name).mkdir()
    for name in (
        "text.txt", "i.gguf", "s", "plan.json", "g.gguf", "p-00001-of-00002.gguf", "p-00002-of-00002.gguf", "e.csv",
        "text.csv", "hessians.safetensors", "own/x-text.safetensors", "page/report.html", "mmproj-text.gguf",
        "h.hessians.safetensors", "c/q4_k.gguf", "c/r-dynquant+tune.gguf", "c/plan-at-q8.gguf",
        "c/s-dynquant.gguf",
    ):  # fmt: skip
        (tmp_path / name).write_text(f"content of {name}")
    (tmp_path / "into").symlink_to(model)
    (tmp_path / "soft.safetensors").symlink_to(model / "model.safetensors")
    (tmp_path / "hard.safetensors").hardlink_to(model / "model.safetensors")
    before = contents(tmp_path)
    message = refused(*(word.format(m=model, t=tmp_path) for word in arguments.split()))
    assert any(words in message for words in ("would be lost", "give two names", "is a device", "is a directory"))
    assert contents(tmp_path) == before


@pytest.mark.parametrize(
    ("arguments", "ending"),
    [
        ("calibrate {m} -o {o}", ".safetensors"),
        ("calibrate {m} -o {t}/s.safetensors --imatrix-out {o}", ".gguf"),
        ("analyze {m} --stats {t}/s.safetensors -o {o}", ".json"),
        ("eval {m} --reference {m} --text {t}/text.txt -o {o}", ".json"),
        ("export {m} --preset f16 -o {o}", ".gguf"),
        ("tune {t}/g.gguf --reference {m} -o {o}", ".gguf"),
        ("export-adapter {m} -o {o}", ".gguf"),
        ("measure-machine -o {o}", ".json"),
    ],
)
def test_a_file_has_the_ending_of_its_kind(arguments, ending, small_moe, tmp_path):
    def said(output):
        places = {"m": small_moe, "t": tmp_path, "o": tmp_path / output}
        return refused(*(word.format(**places) for word in arguments.split()))

    for typed, advised in (("x.bin", f"x{ending}"), (f"x{ending.upper()}", f"x{ending}"), ("x-2.5", f"x-2.5{ending}")):
        assert said(typed).endswith(f"does not end in {ending}, as such files do; name it {tmp_path / advised}.")
    assert re.search(rf"reads like that of a folder.*made/NAME{ending}", said("made"))
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize(
    "arguments",
    [
        "plan {m} -o {o}",
        "export {m} --preset f16 -f safetensors -o {o}",
        "export {m} --preset f16 -f compressed-tensors -o {o}",
        "release {m} -o {o} --bpw 3",
        "finetune {m} --data {t}/text.txt -o {o}",
        "heal {m} --reference {m} --data {t}/text.txt -o {o}",
        "compare {m} --presets f16 --text {t}/text.txt -o {o}",
        "compare-encoders {m} --presets f16 --text {t}/text.txt -o {o}",
        "demo -o {o}",
    ],
)
def test_a_folder_has_no_ending_of_a_file(arguments, small_moe, tmp_path):
    for ending in (".json", ".GGUF"):
        names = {"m": small_moe, "t": tmp_path, "o": tmp_path / f"plan-2.5{ending}"}
        message = refused(*(word.format(**names) for word in arguments.split()))
        assert message.endswith(f"Give a name without {ending}, as {tmp_path / 'plan-2.5'}.")
    assert not any(tmp_path.iterdir())


def test_every_file_has_an_ending():
    from dynquant.cli.app import app

    for made in app.registered_commands:
        notes = [note for hint in made.callback.__annotations__.values() for note in get_args(hint)]
        assert all(note.ending for note in notes if isinstance(note, Writes) and note.kind == "file"), made.name


def test_callers_in_python_hear_of_names_as_well(tmp_path):
    with pytest.raises(OptionError, match=r"does not end in \.gguf"):
        AdapterFileOptions(adapter=tmp_path / "a", output=tmp_path / "b.bin")
    (tmp_path / "old.json").mkdir()
    with pytest.raises(OptionError, match="has the name of a file"):
        PlanOptions(model="model", output=tmp_path / "new.json")
    assert PlanOptions(model="model", output=tmp_path / "old.json").output.is_dir(), "it is there, so it is meant"


@pytest.mark.nightly
def test_files_beside_what_is_read_may_be_written_and_written_again(model, tmp_path):
    for _ in range(2):
        succeed("calibrate", model, "--tokens", 600, "--window", 64, "-o", model / "stats.safetensors")
        succeed("export", model, "--preset", "f16", "-o", model / "model-f16.gguf", "--json-progress", model / "log")
    text = model.parent / "text.txt"
    text.write_text("The words of a text that is long enough to be a window of some tokens. " * 9)
    for _ in range(2):
        succeed("eval", model, "--reference", model, "--text", text, "--window", 64, "-o", model / "eval.json")


def test_a_file_in_a_folder_that_is_being_planned_is_not_written(small_moe, tmp_path):
    text = tmp_path / "text.txt"
    text.write_text("The words of a text that is long enough. " * 99)
    planning = subprocess.Popen(
        command("plan", small_moe, "--calibration", text, "-o", tmp_path / "plan"), stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )  # fmt: skip
    try:
        while not (tmp_path / "plan" / ".plan.json.lock").is_file():
            assert planning.poll() is None
            time.sleep(0.01)
        os.kill(planning.pid, signal.SIGSTOP)
        stats = tmp_path / "plan" / "stats.safetensors"
        for name, how in (
            (stats.name, ("calibrate", small_moe, "--calibration", text)),
            ("errors.json", ("analyze", small_moe, "--stats", stats)),
        ):
            message = refused(*how, "-o", tmp_path / "plan" / name)
            assert f"{name} is being written by process {planning.pid} on " in message
    finally:
        planning.kill()
        planning.wait()


def test_a_plan_may_name_the_statistics_in_its_own_folder(small_moe, tmp_path):
    stats = tmp_path / "stats.safetensors"
    save_tensors(stats, {}, {})
    message = refused("plan", small_moe, "--preset", "none", "--stats", stats, "-o", tmp_path)
    assert "There is no preset `none`" in message and list(tmp_path.iterdir()) == [stats]


def test_parts_of_an_earlier_export_are_written_again_even_when_one_is_lost(small_moe, tmp_path):
    arguments = ("--preset", "uniform-q8_0", "--encoder", "ggml", "--split-max-size", "9MB", "-o", tmp_path / "p.gguf")
    before = {}
    for _ in range(2):
        succeed("export", small_moe, *arguments)
        assert len(contents(tmp_path)) > 1 and contents(tmp_path) == (before or contents(tmp_path))
        before = contents(tmp_path)
        max(before).unlink()


@pytest.mark.nightly
def test_two_exports_to_one_name_leave_one_whole_file(small_moe, tmp_path):
    alone, both = tmp_path / "alone" / "model.gguf", tmp_path / "both" / "model.gguf"
    arguments = ("export", small_moe, "--preset", "uniform-q8_0", "--encoder", "ggml", "-o")
    succeed(*arguments, alone)
    first = subprocess.Popen(command(*arguments, both), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, cwd="/")
    try:
        lock = both.parent / ".model.gguf.lock"
        while not (lock.is_file() and lock.stat().st_size):  # its owner's name is written once the lock is taken
            assert first.poll() is None
            time.sleep(0.01)
        os.kill(first.pid, signal.SIGSTOP)
        message = refused(*arguments, both)
        assert f"process {first.pid} " in message and time.strftime("started at %Y-%m-%d") in message
        os.kill(first.pid, signal.SIGCONT)
        assert first.wait(120) == 0
    finally:
        first.kill()
        first.wait()
    assert contents(both.parent) == {both: alone.read_bytes()}


@pytest.mark.parametrize(
    "arguments",
    [
        "plan {m} -o {o}",
        "calibrate {m} -o {o}.safetensors",
        "calibrate {m} -o {t}/new.safetensors --imatrix-out {o}.gguf",
        "calibrate {m} -o {t}/new.safetensors --max-memory 4GB --spill {o}",
        "analyze {m} --stats {t}/s -o {o}.json",
        "eval {m} --reference {m} --text {t}/text.txt -o {o}.json",
        "finetune {m} --data {t}/text.txt -o {o}",
        "heal {m} --reference {m} --data {t}/text.txt -o {o}",
        "tune {t}/g.gguf --reference {m} -o {o}.gguf",
        "export-adapter {t} -o {o}.gguf",
        "compare {m} --presets f16 --text {t}/text.txt -o {o}",
        "compare-encoders {m} --presets f16 --text {t}/text.txt -o {o}",
        "measure-machine -o {o}.json",
        "demo -o {o}",
        "inspect {m} --json-progress {o}",
    ],
)
def test_every_output_has_one_writer(arguments, small_moe, tmp_path, holder):  # noqa: F811
    output = tmp_path / f"out{arguments.rpartition('{o}')[2]}"
    process = holder(output)
    message = refused(*(word.format(m=small_moe, t=tmp_path, o=tmp_path / "out") for word in arguments.split()))
    assert f"{output} is being written by process {process.pid} on " in message
    assert [path.name for path in tmp_path.iterdir()] == [f".{output.name}.lock"]


@pytest.mark.parametrize(
    ("arguments", "name"),
    [
        ("export {m} --preset f16 -o {t}/o.gguf", "o.gguf.partial"),
        ("export {m} --preset f16 -o {t}/o.gguf --no-resume", "o.gguf.journal"),
        ("export {m} --preset f16 -o {t}/o.gguf", "mmproj-o.gguf.partial"),
        ("export {m} --preset iq2_xxs -o {t}/o.gguf", ".o.gguf.written.safetensors"),
        ("export {m} --preset f16 -o {t}/o.gguf", ".o.gguf.lock"),
        ("export {m} --preset f16 --split-max-size 20MB -o {t}/o.gguf", "o-00002-of-00002.gguf.partial"),
        ("export {m} --preset f16 -f safetensors -o {t}/o", "o/model.safetensors.partial"),
        ("export {m} --preset f16 -f safetensors -o {t}/o", "o/model-00001-of-00002.safetensors"),
        ("export {m} --preset uniform-w8a16 -f compressed-tensors -o {t}/o", ".o.partial/config.json"),
        ("tune {t}/none.gguf --reference {m} -o {t}/o.gguf", "o.gguf.journal"),
        ("analyze {m} --stats {t}/none -o {t}/o.json", "o.json.journal"),
        ("plan {m} -o {t}/o", "o/errors.json.journal"),
        ("plan {m} --for vllm -o {t}/o", "o/serving_errors.json.journal"),
        ("calibrate {m} --max-memory 4GB -o {t}/o.safetensors", ".o.safetensors.streaming/notes"),
        ("calibrate {m} --max-memory 4GB --spill {t}/s -o {t}/o.safetensors", "s/.o.safetensors.streaming/notes"),
    ],
)
def test_what_has_the_name_of_a_work_file_is_refused_and_stays(arguments, name, small_moe, tmp_path):
    (tmp_path / name).parent.mkdir(exist_ok=True, parents=True)
    (tmp_path / name).write_text("mine")
    message = refused(*(word.format(m=small_moe, t=tmp_path) for word in arguments.split()))
    assert str(tmp_path / name).startswith(message.removeprefix("error: ").split(" ")[0])
    assert contents(tmp_path) == {tmp_path / name: b"mine"}


@pytest.mark.parametrize(
    ("arguments", "link"),
    [
        pytest.param(
            "export {m} --preset uniform-w8a16 --stats {s} -f compressed-tensors --tune 0 -o {t}/out",
            ".out.partial",
            marks=pytest.mark.nightly,
        ),
        (
            "calibrate {m} --tokens 600 --window 64 --max-memory 4GB -o {t}/out.safetensors",
            ".out.safetensors.streaming",
        ),
        (
            "calibrate {m} --tokens 600 --window 64 --max-memory 4GB --spill {t}/spill -o {t}/out.safetensors",
            "spill/.out.safetensors.streaming",
        ),
    ],
)
def test_a_link_where_work_is_kept_does_not_lead_elsewhere(arguments, link, model, calibrated_16m, tmp_path):
    before = contents(model)
    (tmp_path / link).parent.mkdir(exist_ok=True)
    (tmp_path / link).symlink_to(model)
    names = {"m": model, "t": tmp_path, "s": calibrated_16m / "stats.safetensors"}
    output = tmp_path / ("out" if "compressed" in arguments else "out.safetensors")
    succeed(*(word.format(**names) for word in arguments.split()))
    assert contents(model) == before and output.exists() and not output.is_symlink()


def test_a_lock_does_not_hinder_who_writes_nothing(small_moe, tmp_path, holder):  # noqa: F811
    holder(tmp_path / "plan")
    done = run("plan", "--config-only", small_moe, "--preset", "f16", "-o", tmp_path / "plan")
    assert done.returncode == 0, done.stderr
