"""Three ways to show a stage: bars on a terminal, plain lines in a log, JSON lines for programs."""

import json
import time
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Protocol, TextIO

from rich.console import Console, RenderableType
from rich.progress import BarColumn, Progress, ProgressColumn, Task, TaskID, TextColumn, TimeElapsedColumn
from rich.text import Text

from dynquant.cli.terminal.record import StageRecord
from dynquant.cli.terminal.wording import describe, place, speed, time_left, usage
from dynquant.errors import ExportError

LINE_SECONDS = 5.0
"""Plain lines are at least this far apart."""
JSON_SECONDS = 0.5
"""So are JSON lines within a stage; its first and its last report are always written."""


class Display(Protocol):
    """Shows stages; `close` ends a block of them."""

    def show(self, stage: StageRecord) -> None: ...

    def close(self) -> None: ...  # nothing, unless there is something on the screen


class Bars(Display):
    """One bar a stage, and below them the tensor, the bytes moved and the memory of now."""

    def __init__(self, console: Console) -> None:
        self._stages: dict[TaskID, StageRecord] = {}
        self._tasks: dict[str, TaskID] = {}
        self._bars = _BarsAndStatus(self._stages, console)
        self._stack = ExitStack()
        self._stack.enter_context(self._bars)

    def show(self, stage: StageRecord) -> None:
        if stage.name not in self._tasks:
            task = self._tasks[stage.name] = self._bars.add_task(stage.name, total=stage.total)
            self._stages[task] = stage
        self._bars.latest = stage
        self._bars.update(self._tasks[stage.name], completed=stage.done, total=stage.total)

    def close(self) -> None:
        self._bars.latest = None
        self._stack.close()


class Lines(Display):
    """A line of text every few seconds."""

    def __init__(self, write: Callable[[str], None], clock: Callable[[], float] = time.monotonic) -> None:
        self._write, self._clock = write, clock
        self._last = clock()

    def show(self, stage: StageRecord) -> None:
        if self._clock() - self._last >= LINE_SECONDS:
            self._write(describe(stage))
            self._last = self._clock()


class JsonLines(Display):
    """One JSON object a line, in a file or a stream that stays open from stage to stage."""

    def __init__(self, stream: TextIO, clock: Callable[[], float] = time.monotonic) -> None:
        self._stream, self._clock = stream, clock
        self._last = ("", 0.0)

    @classmethod
    def to_file(cls, path: Path) -> "JsonLines":
        """Raises ExportError when the file cannot be opened for writing."""
        try:
            return cls(path.open("w", encoding="utf-8"))
        except OSError as error:
            raise ExportError(
                f"--json-progress {path} cannot be written: {error.strerror}. Give a file in a directory that exists, "
                "or - for stderr."
            ) from error

    def show(self, stage: StageRecord) -> None:
        name, last = self._last
        if stage.name != name or stage.done >= stage.total or self._clock() - last >= JSON_SECONDS:
            self.write(stage.as_json())
            self._last = (stage.name, self._clock())

    def write(self, line: dict[str, object]) -> None:
        """Write one object and flush it."""
        self._stream.write(json.dumps(line) + "\n")
        self._stream.flush()


class _StageColumn(ProgressColumn):
    """Text of the stage behind a bar."""

    def __init__(self, stages: dict[TaskID, StageRecord], text: Callable[[StageRecord], str]) -> None:
        super().__init__()
        self._stages, self._text = stages, text

    def render(self, task: Task) -> Text:
        return Text(self._text(self._stages[task.id]) if task.id in self._stages else "", style="cyan")


class _BarsAndStatus(Progress):
    """Bars, and a line of what is being worked on."""

    def __init__(self, stages: dict[TaskID, StageRecord], console: Console) -> None:
        self.latest: StageRecord | None = None
        super().__init__(
            TextColumn("{task.description:<22}"), BarColumn(bar_width=20), TextColumn("{task.percentage:>3.0f}%"),
            _StageColumn(stages, speed), TimeElapsedColumn(), _StageColumn(stages, time_left), console=console,
        )  # fmt: skip

    def get_renderables(self) -> list[RenderableType]:  # type: ignore[override]
        bars = [self.make_tasks_table(self.tasks)]
        if (stage := self.latest) is None:
            return bars
        status = ", ".join(part for part in (place(stage), usage(stage)) if part)
        return [*bars, Text(f"  {status}", style="dim", no_wrap=True, overflow="ellipsis")]
