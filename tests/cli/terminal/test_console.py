"""What files of strangers and odd paths bring to the terminal: shown, never obeyed."""

import io
import json
import os
import subprocess
import warnings

import pytest
from rich.console import Console

from dynquant.cli.terminal import console
from dynquant.cli.terminal.display import Bars
from dynquant.cli.terminal.record import RunRecord
from tests.helpers.commands import refused, run, succeed

HOSTILE = "x\x1b[2J[/red][bold]\x9b5m\u202e\r\b\x07"
SHOWN = "x\ufffd[2J[/red][bold]\ufffd5m\ufffd\ufffd\ufffd\ufffd"


@pytest.fixture
def screens(monkeypatch):
    """Stdout and stderr as terminals that keep what they get."""
    screens = {name: io.StringIO() for name in ("out", "err")}
    for name, stream in screens.items():
        monkeypatch.setattr(console, name, Console(file=stream, force_terminal=True, width=200, highlight=False))
    monkeypatch.setattr(console, "_record", RunRecord())
    return screens


@pytest.mark.parametrize(
    "show",
    [
        lambda: console.say(HOSTILE),
        lambda: console.note(HOSTILE),
        lambda: console.fail(HOSTILE.replace("\r", "\u202e")),  # the paragraph of a refusal is one line
        lambda: console.print_table(HOSTILE, (HOSTILE * 3,), [], console=console.out),
        lambda: console.print_table("", ("a", "b"), [(HOSTILE, HOSTILE)], console=console.out),
    ],
)
def test_names_are_shown_and_not_obeyed(screens, show):
    show()
    seen = screens["out"].getvalue() + screens["err"].getvalue()
    assert SHOWN in seen
    assert "\x1b[2J" not in seen and not set("\x9b\u202e\r\b\x07") & set(seen)


@pytest.mark.filterwarnings("always")
def test_a_warning_is_a_note_of_one_line(screens):
    with console.noted_warnings(of_all_kinds=False):
        warnings.warn(f"first\n{HOSTILE.replace(chr(13), '')}", stacklevel=1)
        warnings.warn("to authors", FutureWarning, stacklevel=1)
    with console.noted_warnings(of_all_kinds=True):
        warnings.warn("to authors, too", FutureWarning, stacklevel=1)
    first, *others = screens["err"].getvalue().splitlines()
    assert first == f"warning: first {SHOWN[:-1]}"
    assert len(others) == 1 and others[0].startswith("warning: to authors, too (FutureWarning, ")


def test_warnings_of_a_command_are_notes(monkeypatch):
    monkeypatch.setattr(console, "say", lambda text: warnings.warn(HOSTILE, stacklevel=2))
    done = run("version")
    assert done.returncode == 0 and done.stderr.startswith("warning: x\ufffd[2J[/red]") and ".py" not in done.stderr


def test_a_tensor_below_a_bar_is_shown_and_not_obeyed(screens):
    record = RunRecord()
    with Bars(console.err) as bars:
        record.open("", [bars.show])
        record.report("quantize", 1, 2, unit="weights", tensor=HOSTILE)
        bars.refresh()
    seen = screens["err"].getvalue()
    assert SHOWN in seen and "\x1b[2J" not in seen and "\x9b" not in seen


def test_json_for_programs_is_ascii(capsys):
    for document in ({"name": HOSTILE}, json.dumps({"name": HOSTILE}, ensure_ascii=False)):
        console.show_json(document)
        text = capsys.readouterr().out
        assert text.isascii() and json.loads(text) == {"name": HOSTILE}


def test_a_name_cannot_forge_a_line(screens):
    console.note("model\nerror: all is lost")
    assert screens["err"].getvalue().splitlines() == ["model", "  error: all is lost"]


def test_file_names_that_break_or_steer_lines_are_quoted_on_every_way_out(screens, monkeypatch):
    monkeypatch.setattr(console, "_names", [])
    console.begin(["dynquant", "export", "in a/x\ny.gguf", "--output=it's\x1b\n/z", "plain.gguf"])
    for file in ("in a/x\ny.gguf", "x\ny-1.gguf", "it's\x1b\n/z", "plain.gguf"):
        console.say(file)
        console.note(f"wrote {file}\n2 lines")
        console.fail(f"{file} is gone")
        console.print_table(file, ("file",), [(file,)], console=console.out)
        with console.noted_warnings(of_all_kinds=False):
            warnings.warn(f"{file} is old", stacklevel=1)
    out, err = (screen.getvalue() for screen in screens.values())
    assert out.count(r"in a/$'x\ny.gguf'") == out.count(r"$'x\ny'-1.gguf") == out.count("plain.gguf") == 3
    assert out.count(r"$'it\'s\U0000001b\n'/z") == 3
    assert r"wrote in a/$'x\ny.gguf'" in err and "\n  2 lines\n" in err
    assert r"in a/$'x\ny.gguf' is gone" in err and r"warning: in a/$'x\ny.gguf' is old" in err


def test_what_is_to_be_typed_again_is_what_was_typed(capsys):
    words = ["dynquant", "plan", "a\nb\x9bc\td'\\e\udcff", "it's", "--bpw", "3"]
    console.begin(words)
    console.interrupted()
    said = capsys.readouterr().err.splitlines()
    line = said[-1].partition("run the same command again: ")[2]
    typed = subprocess.run(["bash", "-c", f"LC_ALL=C.UTF-8; printf '%s\\0' {line}"], capture_output=True, check=True)
    assert len(said) == 1 and os.fsdecode(typed.stdout).split("\0")[:-1] == words


def test_a_command_shows_a_directory_with_such_a_name_in_one_line(small_moe, tmp_path):
    (tmp_path / "x\ny").symlink_to(small_moe)
    assert r"$'x\ny'" in succeed("inspect", tmp_path / "x\ny")
    assert rf"{tmp_path}/$'x\nz' " in refused("inspect", tmp_path / "x\nz")
