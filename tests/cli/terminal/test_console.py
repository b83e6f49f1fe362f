"""What files of strangers and odd paths bring to the terminal: shown, never obeyed."""

import io
import json
import warnings

import pytest
from rich.console import Console

from dynquant.cli.terminal import console
from dynquant.cli.terminal.display import Bars
from dynquant.cli.terminal.record import RunRecord
from tests.helpers.commands import run

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
