"""Commands take their parameters from the fields of options dataclasses."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Literal

import pytest
import typer
from typer.testing import CliRunner

from dynquant.cli.terminal import parameters
from dynquant.cli.terminal.parameters import from_options
from dynquant.options import Flag, Only
from dynquant.planning.options import PlanOptions
from dynquant.session import Session


@dataclass(frozen=True)
class Inner:
    text: Annotated[str | None, Flag("What to read.", ("--inner-text",))] = None
    level: Annotated[Literal["low", "high"], Flag("How much.")] = "low"
    hidden: int = 7


@dataclass(frozen=True, kw_only=True)
class Options:
    model: Annotated[str, Flag("A model.", is_argument=True)]
    text: Annotated[tuple[Path, ...], Flag("Texts.")] = ()
    kinds: Annotated[tuple[str, ...], Flag("Kinds.")] = ("a", "b")
    span: Annotated[tuple[int, int] | None, Flag("A span.", parse=lambda t: tuple(map(int, t.split(":"))))] = None
    serves: Annotated[str | None, Flag("For whom.", ("--for",))] = None
    is_loud: Annotated[bool, Flag("Say more.")] = True
    inner: Annotated[Inner, Only(("text",))] = field(default_factory=Inner)


@pytest.fixture
def run():
    seen = []
    app = typer.Typer()

    def command(options: Options, session: Annotated[Session, Only(("seed",))], as_json: bool = False) -> None:
        """Do it."""
        seen.append((options, session, as_json))

    app.command()(from_options(command))

    def invoke(*arguments):
        result = CliRunner().invoke(app, arguments)
        return result, seen

    return invoke


def test_defaults_are_those_of_the_dataclass(run):
    _, ((options, session, as_json),) = run("m")
    assert (options.model, options.text, options.kinds, options.span) == ("m", (), ("a", "b"), None)
    assert (session.seed, session.device, as_json) == (0, None, False)


def test_what_is_typed_reaches_its_field(run):
    _, ((options, session, as_json),) = run(
        "m", "--text", "x", "--text", "y", "--kinds", "c, d", "--span", "1:2", "--for", "vllm", "--no-is-loud",
        "--inner-text", "z", "--seed", "3", "--as-json",
    )  # fmt: skip
    assert options.text == (Path("x"), Path("y")) and options.kinds == ("c", "d") and options.span == (1, 2)
    assert (options.serves, options.is_loud, options.inner.text, session.seed, as_json) == ("vllm", False, "z", 3, True)


def test_a_field_that_is_not_shown_keeps_its_default_and_has_no_flag(run):
    for flag in ("--level", "--hidden", "--threads"):
        result, seen = run("m", flag, "1")
        assert result.exit_code == 2 and not seen


def test_words_are_parsed_without_a_lock_on_what_they_would_write(monkeypatch, tmp_path: Path) -> None:
    monkeypatch.setattr(parameters, "guarded", lambda *_: pytest.fail("an output was locked"))
    options = parameters.parsed(PlanOptions, ("model", "-o", str(tmp_path / "plan"), "--tokens", "4096", "--select"))
    assert (options.output, options.calibration.tokens) == (tmp_path / "plan", 4096)
