"""What people see in a terminal: progress on stderr, tables on stdout. The only user of rich."""

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, Progress, ProgressColumn, Task, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

out = Console(highlight=False)
err = Console(stderr=True, highlight=False)


class _Speed(ProgressColumn):
    """Items per second in the stage's own unit, as `12.3 M weights/s`."""

    def render(self, task: Task) -> Text:
        speed = task.finished_speed or task.speed
        unit = task.fields.get("unit", "")
        return Text(f"{_short(speed)} {unit}/s" if speed and unit else "", style="cyan")


class StageProgress:
    """Callable `(stage, done, total)` that draws one bar a stage; stages appear when they first report."""

    def __init__(self, progress: Progress) -> None:
        self._progress = progress
        self._tasks: dict[str, int] = {}

    def __call__(self, stage: str, done: int, total: int) -> None:
        if stage not in self._tasks:
            self._tasks[stage] = self._progress.add_task(stage, total=total, unit=_unit(stage))
        self._progress.update(self._tasks[stage], completed=done, total=total)


@contextmanager
def stage_progress() -> Iterator[StageProgress]:
    """Progress bars on stderr for the duration of a block."""
    columns = (
        TextColumn("{task.description:<22}"), BarColumn(), TextColumn("{task.percentage:>4.0f}%"), _Speed(),
        TimeElapsedColumn(), TimeRemainingColumn(),
    )  # fmt: skip
    with Progress(*columns, console=err) as progress:
        yield StageProgress(progress)


def print_table(title: str, columns: Sequence[str], rows: Iterable[Sequence[object]]) -> None:
    """A table on stdout; the first column is text, the others are right-aligned."""
    table = Table(title=title, title_justify="left", title_style="bold")
    for index, column in enumerate(columns):
        table.add_column(column, justify="left" if index == 0 else "right")
    for row in rows:
        table.add_row(*(str(cell) for cell in row))
    out.print(table)


def note(message: str) -> None:
    """A line about what is being done, on stderr."""
    err.print(message, soft_wrap=True)


def fail(message: str) -> None:
    """The one paragraph of a refusal, on stderr."""
    paragraph = " ".join(message.split())  # libraries' messages that we quote may have lines of their own
    err.print(Text("error: ", style="bold red") + Text(paragraph), soft_wrap=True)


def human_bytes(count: int) -> str:
    """Decimal units, as file managers and model hubs show them."""
    value = float(count)
    for unit in ("B", "kB", "MB", "GB"):
        if value < 1000:
            return f"{value:.0f} {unit}" if unit == "B" else f"{value:.2f} {unit}"
        value /= 1000
    return f"{value:.2f} TB"


def _short(number: float) -> str:
    for limit, suffix in ((1e9, " G"), (1e6, " M"), (1e3, " k")):
        if number >= limit:
            return f"{number / limit:.1f}{suffix}"
    return f"{number:.1f}"


def _unit(stage: str) -> str:
    if "question" in stage:
        return "questions"
    if stage.startswith(("reference", "candidate")):
        return "windows"
    if stage.endswith("by layers"):
        return "layers"
    if "calibrat" in stage or "sensitivity" in stage:
        return "tokens"
    return "weights" if "error" in stage or "quantize" in stage else ""
