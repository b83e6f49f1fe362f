"""Numbers and sizes of every command are refused outside their range, before anything is written."""

import json
from dataclasses import replace
from inspect import Parameter, signature
from pathlib import Path
from typing import get_args

import pytest
import typer

from dynquant.analysis.bench.judge import parsed
from dynquant.analysis.errors.options import DEFAULT_TYPES
from dynquant.calibration import stage
from dynquant.calibration.options import CalibrationOptions
from dynquant.calibration.statistics import CalibrationStats, StatsProvenance
from dynquant.cli.app import app
from dynquant.cli.compare import CompareEncodersOptions, CompareOptions, EncoderTasks, RecipeTasks, _Results
from dynquant.errors import OptionError
from dynquant.evaluation.options import EvalOptions, TaskOptions
from dynquant.exporters.options import ExportOptions
from dynquant.families.open import open_model
from dynquant.options import Flag, Writes, command_words
from dynquant.planning.options import PlanOptions
from dynquant.resources import parse_size, parse_tokens
from dynquant.session import Session
from tests.conftest import CALIBRATION_16M
from tests.helpers.commands import linked_copy, refused, succeed

COMMANDS = typer.main.get_command(app).commands
HUGE = "9" * 400
NEED_TEXT = ("eval", "compare", "compare-encoders")


def shown(command: str) -> dict[str, tuple[Parameter, Flag | None]]:
    """Parameters of a command, with the flags of those that come from options."""
    callback = next(c.callback for c in app.registered_commands if c.name == command)
    return {
        name: (parameter, next((note for note in get_args(parameter.annotation) if isinstance(note, Flag)), None))
        for name, parameter in signature(callback).parameters.items()
        if parameter.annotation is not typer.Context
    }


def kinds_of(parameter: Parameter) -> tuple:
    kind = get_args(parameter.annotation)[0]
    return get_args(kind) or (kind,)


RANGES = [
    pytest.param(command, name, id=f"{command} {name}")
    for command in COMMANDS
    for name, (parameter, flag) in shown(command).items()
    if {int, float} & {*kinds_of(parameter)} or (flag is not None and flag.is_size)
]


CHOICES = [
    pytest.param(command, name, id=f"{command} {name}")
    for command in COMMANDS
    for name, (_, flag) in shown(command).items()
    if flag is not None and flag.choices
]


def error_of(command: str, name: str, value: str, folder: Path) -> Exception:
    """What a command raises at a value of a parameter; all others that it needs have some."""
    _, flag = shown(command)[name]
    line = [flag.option(name), value, *(["--text", str(folder / "text")] if command in NEED_TEXT else [])]
    line += ["--bpw", "3"] if command == "release" else []
    for other, (required, of_other) in shown(command).items():
        if other != name and (required.default is Parameter.empty or other == "output"):
            notes = get_args(required.annotation)
            ending = next((note.ending for note in notes if isinstance(note, Writes)), "") or ".file"
            place = "8GB" if of_other and of_other.is_size else str(folder / f"{other}{ending}")
            line += [place] if of_other and of_other.is_argument else [f"--{other.replace('_', '-')}", place]
    with pytest.raises(Exception) as refusal:
        COMMANDS[command].main(line, standalone_mode=False)
    return refusal.value


@pytest.mark.parametrize("command, name", CHOICES)
def test_values_that_are_no_choices_are_refused(command, name, tmp_path):
    option = shown(command)[name][1].option(name)
    error = error_of(command, name, "magic", tmp_path)
    assert type(error) is OptionError and str(error).startswith(f"{option} magic is not known; give ")
    assert not list(tmp_path.iterdir())


def test_no_choice_is_checked_in_another_way():
    assert {name for _, name in (param.values for param in CHOICES)} >= {
        "couple", "effort", "encoder", "for_", "format", "hessians", "kv_type", "mmproj_type", "runner", "scoring",
        "sensitivity", "start", "store", "tasks", "tune_parts", "variants", "vision",
    }  # fmt: skip


@pytest.mark.parametrize("command, name", RANGES)
def test_numbers_outside_their_range_are_refused(command, name, tmp_path):
    parameter, flag = shown(command)[name]
    assert flag is not None and flag.min is not None, "every number has a range"
    bad = [HUGE, "nan", "inf", "-inf", "1e400", "", "-1"]
    if flag.is_size:
        bad += ["0"] * (flag.min > 0) + ["8388608TiB", "1e9", ".", "1 XB"]
    else:
        below = flag.min - 1 if int in kinds_of(parameter) else flag.min - 1e-9
        bad += [str(below), str(flag.max + 1), "-" + HUGE, "0x10"]
        assert parameter.default in (None, Parameter.empty) or flag.min <= parameter.default <= flag.max
    option = flag.option(name)
    for value in bad:
        error = error_of(command, name, value, tmp_path)
        if type(error) is OptionError:
            assert str(error).startswith(option) and len(str(error)) < 250
        else:
            assert error.exit_code == 2 and option in error.format_message(), (value, error)
        assert not list(tmp_path.iterdir())


def test_a_refusal_is_one_paragraph_that_names_the_range(tmp_path):
    said = refused("calibrate", "model", "--window", -4, "-o", tmp_path / "stats.safetensors")
    assert said == "error: --window -4 is out of range; give a whole number from 2 to 2,147,483,647."
    assert "0.1 to 32" in refused("plan", "model", "--bpw", "nan", "-o", tmp_path / "plan")
    assert "--frontier 4:2" in refused("plan", "model", "--frontier", "4:2", "-o", tmp_path / "plan")
    assert "--frontier nan:3" in refused("plan", "model", "--frontier", "nan:3", "-o", tmp_path / "plan")
    assert "--max-memory 0 is out of range; give a size of at least 1 B" in refused("calibrate", "m", "--max-memory", 0)
    assert "--size nan is not a size; " in refused("plan", "m", "--size", "nan")
    assert "--max-memory '1 XB' is not a size; " in refused("calibrate", "m", "--max-memory", "1 XB")
    assert "--size '' is not a size; " in refused("plan", "m", "--size", "")
    assert "--tokens 1.5x is no number of tokens; " in refused("calibrate", "m", "--tokens", "1.5x")
    assert "--bpw 2.x is no number of bits" in refused("release", "m", "--bpw", "2.x", "-o", tmp_path / "r")
    assert "--frontier 99" in refused("plan", "model", "--frontier", f"{HUGE}:3x", "-o", tmp_path / "plan")
    assert not list(tmp_path.iterdir())


def test_callers_in_python_are_checked_alike():
    with pytest.raises(OptionError, match="--threads 0 is out of range"):
        Session(threads=0)
    with pytest.raises(OptionError, match=r"--tokens 1.5 .*whole number"):
        CalibrationOptions(tokens=1.5)


def test_help_shows_a_range_that_is_not_obvious():
    helps = {p.name: p.help for p in COMMANDS["finetune"].params}
    assert helps["held_out"].endswith("From 0 to 0.9.") and helps["rank"].endswith("From 1 to 4,096.")


def test_help_shows_the_candidate_types_that_are_taken_where_none_are_named():
    for command in ("analyze", "plan", "release"):
        (said,) = (p.help for p in COMMANDS[command].params if p.name == "types")
        assert said.endswith(f"Default: {', '.join(DEFAULT_TYPES).lower()}.")


@pytest.mark.parametrize("text, size", [("0", 0), ("1.5kB", 1500), (" 2 KiB ", 2048), ("8GiB", 8 << 30), ("3", 3)])
def test_sizes(text, size):
    assert parse_size(text) == size


@pytest.mark.parametrize("text", ["", "1.2.3", "-1", "1e3", "GB", "\u0661\u0662", "1GB\n2", HUGE, "9300000TB"])
def test_no_sizes(text):
    with pytest.raises(OptionError, match="is not a size"):
        parse_size(text)


@pytest.mark.parametrize(
    "text, number", [("0", 0), ("16384", 16384), ("16k", 16384), (" 1.5K ", 1536), ("1m", 1 << 20), ("-4k", -4096)]
)
def test_numbers_of_tokens(text, number):
    assert parse_tokens(text) == number


@pytest.mark.parametrize(
    "text", ["9" * 5000, "", "k", "1.5", "0.3k", "1e3", "16kB", "16g", "1,024", "\u0661", HUGE + "x", "0x10"]
)
def test_no_numbers_of_tokens(text):
    with pytest.raises(OptionError, match="is no number of tokens; give one as 16384, 16k"):
        parse_tokens(text)


def test_every_option_that_counts_tokens_takes_them_by_the_thousand(tmp_path):
    counts = {
        name: flag
        for command in COMMANDS
        for name, (parameter, flag) in shown(command).items()
        if flag is not None and int in kinds_of(parameter) and "oken" in flag.help
    }
    others = {name for name, flag in counts.items() if not flag.is_tokens}
    assert others == {"probes", "prompts"}, "they count windows and starts"
    assert all("16k is 16,384." in flag.range for name, flag in counts.items() if name not in others)
    asked = parsed(
        ExportOptions, ("m", "-o", "o", "--preset", "p", *["--tune", "16k", "--tune-sampled", "1m", "--tokens", "8K"])
    )
    assert (asked.tune, asked.closing.tune_sampled, asked.calibration.tokens) == (16384, 1 << 20, 8192)
    assert {"8192", "16384", "1048576"} < {*command_words(asked, ())}
    assert parsed(EvalOptions, ("c", "--reference", "r", "--text", "t", "--contexts", "1k,600")).contexts == (
        "1024",
        "600",
    )
    said = refused("calibrate", "model", "--sampled-tokens", "16kB", "-o", tmp_path / "stats.safetensors")
    assert said == (
        "error: --sampled-tokens 16kB is no number of tokens; give one as 16384, 16k, 1.5k or 1m, where k is 1,024."
    )
    said = refused("calibrate", "model", "--window", "3m", "--tokens", "9999m", "-o", tmp_path / "stats.safetensors")
    assert said.startswith("error: --tokens 10484711424 is out of range")


@pytest.mark.parametrize(
    "line",
    [
        "calibrate m --strict",
        "calibrate m --data d --window 9",
        "calibrate m --hessians none --hessian-memory 1GB",
        "calibrate m --imatrix i --tokens 9",
        "plan m --context 9",
        "plan m --bpw 2 --kv-type q8_0",
        "plan m --preset f16 --no-floors",
        "plan m --preset f16 --select",
        "plan m --for vllm --encoder dynquant",
        "plan m --select --sensitivity unit-kl --probes 9",
        "plan m --selection-text t",
        "plan --config-only c --preset f16 --tokens 9",
        "plan --config-only c --preset f16 --stats s",
        "export m --plan p --tokens 9",
        "export m --preset f16 --stats s --calibration t",
        "export m --preset f16 -f compressed-tensors --encoder ggml",
        "export m --plan p -f compressed-tensors --tune=0 --tune-minutes 9",
        "export m --plan p --tune=0 --tune-parts norms",
        "export m --plan p --encoder=ggml --tune-sampled 9",
        "eval m --reference r --data d --tasks vqa --window 9",
        "eval m --reference r --data d --tasks vqa --adapter a",
        "finetune g --data d --max-steps 3 --epochs 2",
        "heal g --reference r --shots s",
        # Asked for is what was typed, be it the default.
        "calibrate m --data d --window 512",
        "calibrate m --imatrix i --tokens 131072",
        "plan m --preset f16 --floors",
        "plan m --for vllm --encoder ggml",
        "export m --plan p --hessians activations",
        "finetune g --data d --max-steps 3 --epochs 3",
        "heal g --reference r --num-shots 5",
    ],
)
def test_options_that_would_do_nothing_are_refused(line, tmp_path):
    command, *_ = line.split()
    ending = {"calibrate": ".safetensors", "export": ".gguf" * ("-f" not in line)}.get(command, "")
    output = [] if "--config-only" in line or command == "eval" else ["-o", tmp_path / f"out{ending}"]
    said = refused(*line.split(), *output)
    option = next(word for word in reversed(line.split()) if word.startswith("--"))
    assert said.startswith(f"error: {option} would do nothing: ") and not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "others, seed, words",
    [
        ({}, 0, "reusing"),
        ({"hessians": "none"}, 0, "reusing"),
        ({"tokens": 600}, 0, "other --tokens:"),
        ({"window": 128}, 0, "other --window:"),
        ({"hessians": "gradients"}, 0, "other --hessians:"),
        ({"text": None}, 0, "other text:"),
        ({"tokens": 600}, 5, "other --tokens, --seed:"),
    ],
)
def test_statistics_of_a_folder_are_used_for_the_same_options_alone(
    calibrated_16m, small_moe, tmp_path, monkeypatch, others, seed, words
):
    path = linked_copy(calibrated_16m, tmp_path) / "stats.safetensors"
    as_before = dict(zip(("text", "tokens", "window"), CALIBRATION_16M[1::2], strict=True))
    options = CalibrationOptions(**(as_before | others))
    monkeypatch.setattr(stage, "run_calibration", lambda *_, **__: stage.StatsFile(path))
    notes = []
    stage.statistics_at(path, open_model(small_moe), options, Session(seed=seed, note=notes.append))
    assert words in notes[0] and ("calibrating anew" in notes[0]) == (words != "reusing")


@pytest.mark.parametrize("value, words", [(0, "reusing"), (9, "other of_newer:")])
def test_statistics_that_a_newer_dynquant_made_otherwise_are_not_reused(
    calibrated_16m, small_moe, tmp_path, monkeypatch, value, words
):
    path = linked_copy(calibrated_16m, tmp_path) / "stats.safetensors"
    stats = CalibrationStats.load(path)
    stats.provenance = StatsProvenance(**stats.provenance.model_dump(), of_newer=value)
    stats.save(path)
    as_before = dict(zip(("text", "tokens", "window"), CALIBRATION_16M[1::2], strict=True))
    monkeypatch.setattr(stage, "run_calibration", lambda *_, **__: stage.StatsFile(path))
    notes = []
    stage.statistics_at(path, open_model(small_moe), CalibrationOptions(**as_before), Session(note=notes.append))
    assert words in notes[0]


@pytest.mark.nightly
def test_statistics_of_a_text_shorter_than_a_window_are_used_again(small_moe, tmp_path):
    path, notes, model = tmp_path / "stats.safetensors", [], open_model(small_moe)
    (tmp_path / "t.txt").write_text("A text of some words, which is shorter than one window of tokens. " * 9)

    def calibrated(window):
        options = CalibrationOptions(text=str(tmp_path / "t.txt"), window=window, hessians="none")
        stage.statistics_at(path, model, options, Session(note=notes.append))
        return [note for note in notes if note.startswith((f"reusing {path}", f"{path} was made with other"))][-1:]

    assert calibrated(512) == []
    for window, words in ((512, "reusing"), (400, "reusing"), (100, "other --window:"), (512, "other --window:")):
        (said,) = calibrated(window)
        assert words in said, window
    assert "reusing" in calibrated(512)[0]


def test_what_does_nothing_for_this_preset_or_these_tasks_is_said(small_moe, tmp_path):
    said = succeed("export", small_moe, "--preset", "uniform-q8_0", "--tokens", 9, "-o", tmp_path / "out.gguf")
    assert "--tokens did nothing: no type of uniform-q8_0 uses statistics" in said
    asked = TaskOptions(tasks=("mmlu",), text=(Path("t"),), max_tokens=9, limit=3)
    idle = EvalOptions(candidate="c", reference="r", asked=asked, window=9).idle
    assert idle == ["--text", "--tokens", "--window"]
    asked = replace(asked, tasks=("kl",), num_shots=0)
    assert EvalOptions(candidate="c", reference="r", asked=asked).idle == ["--num-shots", "--limit"]


def test_a_comparison_goes_on_with_the_same_options_alone(tmp_path):
    (tmp_path / "text").write_text("One text.")
    asked = RecipeTasks(text=(tmp_path / "text",))
    options = CompareOptions(model="m", recipes=("f16",), output=tmp_path, asked=asked)
    _Results(tmp_path / "compare.json", options, Session()).record("f16", {"bytes": 1})
    more = replace(asked, tasks=("kl", "ppl", "mmlu"), mmlu_data="questions.jsonl")
    assert _Results(tmp_path / "compare.json", replace(options, asked=more), Session()).rows.keys() == {"f16"}
    (tmp_path / "text").write_text("Another text.")
    changed = replace(options, asked=replace(asked, max_tokens=9), select=True)
    with pytest.raises(OptionError, match=r"`f16` in .* other --max-tokens and --select and --text\."):
        _Results(tmp_path / "compare.json", changed, Session())
    assert json.loads((tmp_path / "compare.json").read_text())["f16"]["bytes"] == 1


def test_encoders_without_a_closing_pass_go_on_whatever_its_tokens(tmp_path):
    asked = EncoderTasks(text=(tmp_path / "text",))
    options = CompareEncodersOptions(model="m", recipes=("f16",), output=tmp_path, asked=asked, tune=9)
    _Results(tmp_path / "encoders.json", options, Session()).record("f16 ggml", {"bytes": 1})
    _Results(tmp_path / "encoders.json", replace(options, tune=8, variants=("ggml",)), Session())
    with pytest.raises(OptionError, match="other --tune"):
        _Results(tmp_path / "encoders.json", replace(options, tune=8), Session())


def test_former_names_of_options_work_and_are_not_shown(small_moe, tmp_path):
    """Whoever knows a name from an older version, or from another command, gets the option that is shown."""
    demo_text = small_moe.parent / "demo_text.txt"
    for command, former, present in (
        ("eval", "--max-tokens", "--tokens"), ("eval", "--json", "--output"), ("compare", "--recipes", "--presets"),
        ("compare-encoders", "--recipes", "--presets"), ("heal", "--llama-cpp", "--for-llama-cpp"),
        ("finetune", "--llama-cpp", "--for-llama-cpp"),
    ):  # fmt: skip
        opts = {name for parameter in COMMANDS[command].params for name in parameter.opts}
        assert present in opts and former not in opts
    for word in (["--max-tokens", "1"], ["--max-tokens=1"], ["--tokens", "1"]):
        said = refused("eval", small_moe, "--reference", small_moe, "--text", demo_text, *word)
        assert said.startswith("error: --tokens 1 is out of range")
    said = refused("eval", small_moe, "--reference", small_moe, "--text", demo_text, "--json", demo_text)
    assert f"{demo_text} (--output)" in said
    tree = tmp_path / "llama.cpp"
    for place in ("conversion", "gguf-py/gguf"):
        (tree / place).mkdir(parents=True)
        (tree / place / "__init__.py").touch()
    for word in (["--llama-cpp"], ["--llama-cpp", tree], [f"--llama-cpp={tree}"], ["--for-llama-cpp"]):
        said = refused("finetune", tmp_path / "none", *word, "--data", tmp_path / "none.jsonl", "-o", tmp_path / "a")
        assert "none.jsonl" in said, "the words behind the option are still read"


def test_an_effort_fills_what_was_not_asked_for():
    def planned(*words: str) -> PlanOptions:
        return parsed(PlanOptions, ("model", *words))

    high = planned("--effort", "high", "--tokens", "131072", "--selection-text", "text.txt")
    assert high.calibration.tokens == 131072, "typed, be it the default"
    assert high.calibration.hessians == "two-sided" and high.search.select and high.search.rounds > 2
    assert not high.calibration.changed("hessians"), "nobody is told to leave out what the effort set"
    assert planned("--effort", "normal") == planned() and planned().calibration.hessians == "activations"
    assert not planned("--effort", "high", "--preset", "uniform-q4_k").search.select, "there is nothing to choose"
    exported = {"model": "model", "output": Path("file"), "effort": "high"}
    for form, hessians in (("gguf", "two-sided"), ("compressed-tensors", "gradients")):
        options = ExportOptions(**exported, format=form)
        assert options.closing.patience > 3 and options.calibration.hessians == hessians
    for words in (("--effort", "higher"), ("--effort", "high", "--for", "vllm"), ("--selection-text", "text.txt")):
        with pytest.raises(OptionError):
            planned(*words)
