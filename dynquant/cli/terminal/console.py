"""Everything that people see of a command: stages, notes and errors on stderr, tables on stdout.

A command has one record of its stages, and JSON lines where `--json-progress` asked for them.
"""

import json
import os
import sys
import warnings
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import replace
from io import TextIOWrapper
from pathlib import Path

from rich.console import Console
from rich.table import Table
from rich.text import Text

from dynquant.cli.terminal.display import Bars, JsonLines, Lines
from dynquant.cli.terminal.record import RunRecord, Spent
from dynquant.cli.terminal.wording import duration, names_to_quote, printable, quoted, short, sizes_and_peaks
from dynquant.errors import ExportError
from dynquant.resources import human_bytes
from dynquant.session import SILENT, Progress, Session

out = Console(highlight=False)
err = Console(stderr=True, highlight=False)

_FOR_AUTHORS = (DeprecationWarning, PendingDeprecationWarning, FutureWarning)
_SHOW_CURSOR = "\x1b[?25h"
_OWN_BYTES = 100_000  # fewer are what the table leaves out: telling of progress reads and writes some itself

_record = RunRecord()
_json_lines: JsonLines | None = None
_has_only_json = False
json_target: Path | None = None
_names: list[str] = []
"""Names of files on the command line that would break or steer a line."""


def begin(words: Sequence[str]) -> None:
    """A command starts, of these words: the line to type for it again."""
    global _record, _json_lines, _has_only_json, json_target, _names
    command = " ".join(map(quoted, words))
    _record, _json_lines, _has_only_json, json_target = RunRecord(command), None, False, None
    _names = names_to_quote(words)
    with suppress(OSError):  # of a directory that is gone
        _names += names_to_quote([os.getcwd()])


def _shown(text: str) -> str:
    return printable(text, _names)


def write_json_to(target: str) -> None:
    """Tell stages as JSON lines in a file, once `open_json_lines` may, or with `-` on stderr and nothing else there."""
    global json_target, _has_only_json, _json_lines
    if target == "-":
        _has_only_json, _json_lines = True, JsonLines(sys.stderr)
    else:
        json_target = Path(target)


def open_json_lines() -> None:
    """Open the file for JSON lines, if there is to be one; or raise ExportError."""
    global _json_lines
    if json_target is None:
        return
    try:
        file = json_target.open("wb", buffering=0)  # nothing is left to fail at exit
        _json_lines = JsonLines(TextIOWrapper(file, encoding="utf-8", write_through=True))
    except OSError as error:
        raise ExportError(
            f"--json-progress {json_target} cannot be written: {error.strerror}. Give a file in a directory that "
            "exists, or - for stderr."
        ) from error


@contextmanager
def stage_progress(kept: str) -> Iterator[Progress]:
    """Context manager: shows the stages that report within it, as bars on a terminal, else a line every few seconds.

    Args:
        kept: A sentence for a run that is stopped here: what is on disk, or what is lost.
    """
    record = _record
    displays = [_json_lines.show] if _json_lines else []
    with ExitStack() as bars:
        if not _has_only_json:
            displays.append(bars.enter_context(Bars(err)).show if err.is_terminal else Lines(note).show)
        record.open(kept, displays)
        try:
            yield record.report
        except Exception:
            record.close()
            raise
        record.close()  # not when interrupted: the last words name the stage


def session(options: Session = SILENT) -> Session:
    """The session of a command: its notes and stages are seen on the terminal."""
    return replace(options, note=note, stage=stage_progress)


def finish(status: str, message: str | None = None) -> None:
    """The command ends: where its time and bytes went, for people when it is done, and for programs in any case."""
    if _json_lines:
        _json_lines.write(_record.summary(status, message))
    if status != "done" or _has_only_json or not _record.stages:
        return

    total, stages = _record.spent, _record.stages.values()
    had_gpu = any(stage.cuda_bytes is not None for stage in stages)

    def row(name: str, amount: str, spent: Spent, cuda_bytes: int | None = None) -> tuple[str, ...]:
        sizes = [spent.read, spent.written, cuda_bytes][: 2 + had_gpu]
        cells = ("" if size is None or size < _OWN_BYTES else human_bytes(size) for size in sizes)
        return (name, duration(spent.seconds), amount, *cells)

    rest = total
    for stage in stages:
        rest = rest.plus(stage.spent, -1)
    rows = [row(stage.name, f"{short(stage.amount)} {stage.unit}", stage.spent, stage.cuda_bytes) for stage in stages]
    rows += [row("loading and other", "", rest), row("all", "", total)]
    print_table("", ("stage", "time", "amount", "read", "written", "GPU")[: 5 + had_gpu], rows, console=err)
    note(sizes_and_peaks())


def interrupted() -> None:
    """The line that a stopped command leaves: where it was, what is kept, how to go on.

    It goes past rich: the thread that was stopped may hold rich's locks for ever.
    """
    stage = _record.current
    place = f" in {stage.name} at {100 * stage.done // max(1, stage.total)} %" if stage else ""
    kept = _record.kept or "Finished stages are kept, and used again where a file holds them."
    message = f"Interrupted{place}. {kept} To go on, run the same command again: {_record.command}"
    if not _has_only_json:
        sys.stderr.write(f"{_SHOW_CURSOR if err.is_terminal else ''}{_shown(message)}\n")
        sys.stderr.flush()
    if _json_lines:
        _json_lines.write(_record.summary("interrupted", message))


def print_table(
    title: str, columns: Sequence[str], rows: Iterable[Sequence[object]], *, console: Console = out
) -> None:
    """A table on stdout; the first column is text, the others are right-aligned."""
    table = Table(title=Text(_shown(title), "bold") if title else None, title_justify="left")
    for index, column in enumerate(columns):
        table.add_column(Text(_shown(column)), justify="left" if index == 0 else "right")
    for row in rows:
        table.add_row(*(Text(_shown(str(cell))) for cell in row))  # as Text: names may look like markup
    console.print(table)


def say(text: str) -> None:
    """Print a line of results on stdout."""
    out.print(Text(_shown(text)), soft_wrap=True)


def show_json(document: object) -> None:
    """Print what `--json` asks for, on stdout."""
    values = json.loads(document) if isinstance(document, str) else document
    sys.stdout.write(json.dumps(values, indent=1, default=str))  # ASCII: C1 controls in names would steer a terminal
    sys.stdout.write("\n")


def note(message: str) -> None:
    """A line about what is being done, on stderr."""
    if _has_only_json and _json_lines:
        _json_lines.write({"note": message})
    else:
        err.print(Text(_shown(message).replace("\n", "\n  ")), soft_wrap=True)  # no name forges a line of its own


@contextmanager
def noted_warnings(*, of_all_kinds: bool) -> Iterator[None]:
    """Context manager: warnings of this program and its libraries are notes of one line.

    What libraries tell each other's authors (deprecations) is left out, unless those `of_all_kinds` are wanted. The
    same words are noted once.
    """
    noted: set[str] = set()

    def show(
        message: Warning | str, category: type[Warning], filename: str, lineno: int, *_: object, **__: object
    ) -> None:
        if of_all_kinds or not issubclass(category, _FOR_AUTHORS):
            where = f" ({category.__name__}, {filename}:{lineno})" if of_all_kinds else ""
            line = f"warning: {' '.join(_shown(str(message)).split())}{where}"
            if line not in noted:
                noted.add(line)
                note(line)

    with warnings.catch_warnings():
        warnings.showwarning = show
        yield


def fail(message: str) -> None:
    """The one paragraph of a refusal, on stderr."""
    paragraph = " ".join(_shown(message).split())  # libraries' messages that we quote may have lines of their own
    if not _has_only_json:
        err.print(Text("error: ", style="bold red") + Text(paragraph), soft_wrap=True)
    finish("refused", paragraph)
