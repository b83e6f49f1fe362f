"""Everything that people see of a command: stages, notes and errors on stderr, tables on stdout.

A command has one session: the record of its stages, and the JSON lines that `--json-progress` asked for.
"""

import json
import sys
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from rich.console import Console
from rich.table import Table
from rich.text import Text

from dynquant.cli.terminal.display import Bars, Display, JsonLines, Lines
from dynquant.cli.terminal.record import RunRecord
from dynquant.cli.terminal.wording import duration, memory_peaks, short
from dynquant.resources import human_bytes
from dynquant.session import Progress, Session

out = Console(highlight=False)
err = Console(stderr=True, highlight=False)

_SHOW_CURSOR = "\x1b[?25h"


@dataclass
class _Session:
    command: str = "dynquant"
    json_lines: JsonLines | None = None
    has_only_json: bool = False
    record: RunRecord = field(default_factory=RunRecord)
    kept: str = ""
    """Words for what an interruption now would leave and lose."""


_session = _Session()


def begin(command: str) -> None:
    """A command starts; `command` is the line to type for it."""
    global _session
    _session = _Session(command)


def write_json_to(target: str) -> None:
    """Tell the stages of this command as JSON lines in a file; `-` is stderr, which then has nothing else.

    Raises:
        ExportError: the file cannot be written.
    """
    _session.has_only_json = target == "-"
    _session.json_lines = JsonLines(sys.stderr) if target == "-" else JsonLines.to_file(Path(target))


@contextmanager
def stage_progress(kept: str) -> Iterator[Progress]:
    """Show the stages that report within the block: bars on a terminal, else a line every few seconds.

    Args:
        kept: A sentence for a run that is stopped here: what is on disk, or what is lost.
    """
    session = _session
    session.kept = kept
    session.record.open()
    displays: list[Display] = [session.json_lines] if session.json_lines else []
    if not session.has_only_json:
        displays.append(Bars(err) if err.is_terminal else Lines(note))

    def report(
        stage: str, done: int, total: int, /, *, unit: str = "", layer: int | None = None, tensor: str | None = None
    ) -> None:
        session.record.report(stage, done, total, unit=unit, layer=layer, tensor=tensor)
        for display in displays:
            display.show(session.record.stages[stage])

    try:
        yield report
    except Exception:
        session.record.close()
        raise
    else:
        session.record.close()
        session.kept = ""
    finally:
        for display in displays:
            display.close()


def session(device: str | None = None, threads: int | None = None, seed: int = 0) -> Session:
    """The session of a command: its notes and stages are seen on the terminal."""
    return Session(device, threads, seed, note=note, stage=stage_progress)


def finish(status: str, message: str | None = None) -> None:
    """The command ends: where its time and bytes went, for people when it is done, and for programs in any case."""
    record = _session.record
    if _session.json_lines:
        _session.json_lines.write(record.summary(_session.command, status, message))
    if status != "done" or _session.has_only_json or not record.stages:
        return
    rows = [
        (stage.name, duration(stage.seconds), f"{short(stage.amount)} {stage.unit}", *map(_bytes, stage.traffic))
        for stage in record.stages.values()
    ]
    rest = record.seconds - sum(stage.seconds for stage in record.stages.values())
    rows += [
        ("loading and other", duration(rest), "", "", ""),
        ("all", duration(record.seconds), "", *map(_bytes, record.traffic)),
    ]
    print_table("", ("stage", "time", "amount", "read", "written"), rows, console=err)
    note(memory_peaks())


def interrupted() -> None:
    """The line that a stopped command leaves: where it was, what is kept, how to go on.

    It goes past rich: the thread that was stopped may hold rich's locks for ever.
    """
    record, stage = _session.record, _session.record.current
    place = f" in {stage.name} at {100 * stage.done // max(1, stage.total)} %" if stage else ""
    kept = _session.kept or "Finished stages are kept, and used again where a file holds them."
    message = f"Interrupted{place}. {kept} To go on, run the same command again: {_session.command}"
    if not _session.has_only_json:
        sys.stderr.write(f"{_SHOW_CURSOR if err.is_terminal else ''}{message}\n")
        sys.stderr.flush()
    if _session.json_lines:
        _session.json_lines.write(record.summary(_session.command, "interrupted", message))


def print_table(
    title: str, columns: Sequence[str], rows: Iterable[Sequence[object]], *, console: Console = out
) -> None:
    """A table on stdout; the first column is text, the others are right-aligned."""
    table = Table(title=title or None, title_justify="left", title_style="bold")
    for index, column in enumerate(columns):
        table.add_column(column, justify="left" if index == 0 else "right")
    for row in rows:
        table.add_row(*(Text(printable(str(cell))) for cell in row))
    console.print(table)


def say(text: str) -> None:
    """Print a line of results on stdout."""
    out.print(Text(printable(text)), soft_wrap=True)


def show_json(document: object) -> None:
    """Print what `--json` asks for, on stdout."""
    sys.stdout.write(document if isinstance(document, str) else json.dumps(document, indent=1, default=str))
    sys.stdout.write("\n")


def note(message: str) -> None:
    """A line about what is being done, on stderr."""
    if _session.has_only_json and _session.json_lines:
        _session.json_lines.write({"note": message})
    else:
        err.print(Text(printable(message)), soft_wrap=True)


def fail(message: str) -> None:
    """The one paragraph of a refusal, on stderr."""
    paragraph = " ".join(message.split())  # libraries' messages that we quote may have lines of their own
    if not _session.has_only_json:
        err.print(Text("error: ", style="bold red") + Text(printable(paragraph)), soft_wrap=True)
    finish("refused", paragraph)


def printable(text: str) -> str:
    """`text` without what steers a terminal: names and metadata come from files of strangers."""
    return "".join(letter if letter.isprintable() or letter in "\n\t" else "\ufffd" for letter in text)


def _bytes(count: int | None) -> str:
    return "" if count is None else human_bytes(count)
