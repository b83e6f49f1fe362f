"""Three ways to show a stage: bars on a terminal, plain lines in a log, JSON lines for programs."""

import json
import time
from collections.abc import Callable
from typing import TextIO

from rich.console import Console, RenderableType
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeElapsedColumn
from rich.table import Column
from rich.text import Text

from dynquant.cli.terminal.record import StageRecord
from dynquant.cli.terminal.wording import printable
from dynquant.errors import WriteError, reason

LINE_SECONDS = 5.0
"""Plain lines are at least this far apart."""
JSON_SECONDS = 0.5
"""So are JSON lines within a stage; its first and its last report are always written."""


class Bars(Progress):
    """One bar a stage, and below them the tensor, the bytes moved and the memory of now."""

    latest: StageRecord | None = None

    def __init__(self, console: Console) -> None:
        self._bars: dict[str, TaskID] = {}
        super().__init__(
            TextColumn("{task.description:<22}"), BarColumn(bar_width=20), TextColumn("{task.percentage:>3.0f}%"),
            _stage_column("speed"), TimeElapsedColumn(), _stage_column("time_left"), console=console,
        )  # fmt: skip

    def show(self, stage: StageRecord) -> None:
        if stage.name not in self._bars:
            self._bars[stage.name] = self.add_task(stage.name, total=stage.total, stage=stage)
        self.latest = stage
        self.update(self._bars[stage.name], completed=stage.done, total=stage.total)

    def stop(self) -> None:
        """Leave the bars on the screen, without the line below them."""
        self.latest = None
        super().stop()

    def get_renderables(self) -> list[RenderableType]:  # type: ignore[override]
        bars = [self.make_tasks_table(self.tasks)]
        if (stage := self.latest) is None:
            return bars
        return [*bars, Text(printable(f"  {stage.place_and_usage}"), style="dim", no_wrap=True, overflow="ellipsis")]


def _stage_column(name: str) -> TextColumn:
    """A property of the bar's stage, in words."""
    return TextColumn(f"{{task.fields[stage].{name}}}", "cyan", markup=False, table_column=Column())


class Lines:
    """A line of text every few seconds."""

    def __init__(self, write: Callable[[str], None], clock: Callable[[], float] = time.monotonic) -> None:
        self._write, self._clock = write, clock
        self._last = clock()

    def show(self, stage: StageRecord) -> None:
        if self._clock() - self._last >= LINE_SECONDS:
            self._write(str(stage))
            self._last = self._clock()


class JsonLines:
    """One JSON object a line, in a file or a stream that stays open from stage to stage."""

    def __init__(self, stream: TextIO, clock: Callable[[], float] = time.monotonic) -> None:
        self._stream: TextIO | None = stream
        self._clock = clock
        self._last = ("", 0.0)  # stage and time of the last line

    def show(self, stage: StageRecord) -> None:
        name, last = self._last
        if stage.name != name or stage.done >= stage.total or self._clock() - last >= JSON_SECONDS:
            self.write(stage.as_json())
            self._last = (stage.name, self._clock())

    def write(self, line: dict[str, object]) -> None:
        """Write one object and flush it; a reader may go.

        Raises:
            WriteError: the file cannot be written; nothing more is.
        """
        if self._stream is None:
            return
        try:
            self._stream.write(json.dumps(line) + "\n")
            self._stream.flush()
        except OSError as error:
            self._stream = None
            if not isinstance(error, BrokenPipeError):
                raise WriteError(f"--json-progress cannot be written: {reason(error)}. Free some space.") from error
