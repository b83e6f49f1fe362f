"""Record of one command: time, amounts and bytes of every stage, as stages report them.

Time and bytes between two reports belong to the stage that reports second; what lies before a stage's first report
(loading a model, say) belongs to none. A stage that runs again in the same command adds to its own record.
"""

import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from dynquant.cli.terminal.wording import clock_time, short, sizes_and_peaks
from dynquant.resources import cuda_bytes_since, peak_cuda_bytes, peak_memory_bytes, traffic

RATE_SECONDS = 30.0
"""The rate is taken over this much of the stage's latest time, so that a slow tensor soon shows in the time left."""
ESTIMATE_SECONDS = 2.0
"""No time left is told before the stage has worked for so long since its first report of work done: what comes before
also compiled, loaded and warmed up."""


class Spent(NamedTuple):
    """Time that passed and bytes that were moved; None where the system does not tell."""

    seconds: float = 0.0
    read: int | None = 0
    written: int | None = 0

    def plus(self, other: "Spent", sign: int = 1) -> "Spent":
        """Return the sum of two spans; with sign -1, what was spent since `other`."""
        return Spent(*(None if None in pair else pair[0] + sign * pair[1] for pair in zip(self, other, strict=True)))

    @property
    def bytes(self) -> dict[str, object]:
        return {"bytes_read": self.read, "bytes_written": self.written}


@dataclass
class StageRecord:
    """One stage until now. `amount` counts what this command did; `done` also what an earlier run had left."""

    name: str
    unit: str = ""
    done: int = 0
    total: int = 0
    layer: int | None = None
    tensor: str | None = None
    amount: int = 0
    spent: Spent = field(default_factory=Spent)
    cuda_bytes: int | None = None
    """The most that was allocated on a GPU while the stage worked there; None where it did not."""
    _recent: deque[tuple[float, int]] = field(default_factory=deque)
    _before: int = 0  # the amount when the stage began
    _is_warm: bool = False

    def begin(self, done: int, spent: Spent | None = None) -> None:
        """The stage starts here, with `done` left by an earlier run; finding that out took what was spent."""
        self.done, self.spent = done, self.spent.plus(spent or Spent())
        self._recent = deque([(self.spent.seconds, self.amount)])
        self._before, self._is_warm = self.amount, False

    def advance(self, done: int, spent: Spent) -> None:
        """`done` has been reached, and this was spent since the last report."""
        if not self._is_warm and done > self.done and self.amount > self._before:
            self._is_warm = True
            while self._recent[0][1] == self._before:
                self._recent.popleft()  # from the second item on, the first one tells no speed
        self.amount += done - self.done
        self.done = done
        self.spent = self.spent.plus(spent)
        self._recent.append((self.spent.seconds, self.amount))
        while len(self._recent) > 2 and self._recent[1][0] < self.spent.seconds - RATE_SECONDS:
            self._recent.popleft()  # the first entry stays the last one before the span

    def use_gpu(self, cuda_bytes: int | None) -> None:
        """So much was allocated there at most since the last report; None: nothing was."""
        if cuda_bytes is not None:
            self.cuda_bytes = max(cuda_bytes, self.cuda_bytes or 0)

    @property
    def rate(self) -> float | None:
        """Units per second of late."""
        if not self._recent:
            return None
        start, amount = self._recent[0]
        return (self.amount - amount) / (self.spent.seconds - start) if self.spent.seconds > start else None

    @property
    def seconds_left(self) -> float | None:
        """Until `total`, at the latest rate; None until that one tells anything."""
        is_known = self._is_warm and self.spent.seconds - self._recent[0][0] >= ESTIMATE_SECONDS
        return (self.total - self.done) / self.rate if is_known and self.rate else None

    @property
    def speed(self) -> str:
        """`12.3 M weights/s`."""
        return f"{short(float(self.rate))} {self.unit}/s" if self.rate and self.unit else ""

    @property
    def time_left(self) -> str:
        """`2:03 left`, while the stage runs."""
        is_running = self.seconds_left is not None and self.done < self.total
        return f"{clock_time(self.seconds_left or 0)} left" if is_running else ""

    @property
    def place_and_usage(self) -> str:
        """The tensor that is being worked on, or else the layer; bytes moved, and the process's peak memory."""
        place = self.tensor or ("" if self.layer is None else f"layer {self.layer}")
        usage = sizes_and_peaks(read=self.spent.read, written=self.spent.written)
        return ", ".join(part for part in (place, usage) if part)

    def __str__(self) -> str:
        """`quantize 45 %, 7.2 M of 16.0 M weights, 1.2 M weights/s, 0:12 left, blk.3.attn_q.weight, read 4 GB`."""
        share = 100 * self.done / self.total if self.total else 0
        amount = f"{short(self.done)} of {short(self.total)} {self.unit}".rstrip()
        parts = (f"{self.name} {share:.0f} %", amount, self.speed, self.time_left, self.place_and_usage)
        return ", ".join(part for part in parts if part)

    def as_json(self) -> dict[str, object]:
        """One line for programs."""
        amounts = {"stage": self.name, "done": self.done, "total": self.total, "unit": self.unit}
        place = {"rate": _rounded(self.rate), "layer": self.layer, "tensor": self.tensor}
        times = {"seconds": _rounded(self.spent.seconds), "seconds_left": _rounded(self.seconds_left)}
        return amounts | place | self.spent.bytes | times | _peaks() | {"stage_cuda_bytes": self.cuda_bytes}


class RunRecord:
    """All stages of a command in the order of their first reports."""

    def __init__(self, command: str = "dynquant", clock: Callable[[], float] = time.monotonic) -> None:
        self.command = command
        self.kept = ""  # words for what an interruption now would leave and lose
        self.stages: dict[str, StageRecord] = {}
        self.current: StageRecord | None = None
        self.displays: Sequence[Callable[[StageRecord], None]] = ()
        self._clock = clock
        self._start = self._last = self._now()
        self._begun: set[str] = set()  # stages that have reported in this block

    @property
    def spent(self) -> Spent:
        """Time and bytes since the command began."""
        return self._now().plus(self._start, -1)

    def open(self, kept: str, displays: Sequence[Callable[[StageRecord], None]]) -> None:
        """A block of stages begins: each of them starts anew with its first report."""
        self.kept, self.displays = kept, displays
        self._begun.clear()

    def report(
        self,
        stage: str,
        done: int,
        total: int,
        *,
        unit: str = "",
        layer: int | None = None,
        tensor: str | None = None,
        resumed: bool = False,
    ) -> None:
        """Take down one report of a `Progress` and show its stage, which is then `current`."""
        from dynquant.checkpoints.tensor_roles import layer_of

        record = self.stages.setdefault(stage, StageRecord(stage))
        spent, cuda_bytes = self._since_last(), cuda_bytes_since()
        if stage not in self._begun:
            self._begun.add(stage)
            record.begin(done)
        else:
            record.use_gpu(cuda_bytes)
            if resumed or done < record.done:  # fewer: the stage counts anew
                record.begin(done, spent)
            else:
                record.advance(done, spent)
        record.total, record.unit = total, unit or record.unit
        record.tensor = tensor
        record.layer = layer_of(tensor) if layer is None and tensor is not None else layer
        self.current = record
        for show in self.displays:
            show(record)

    def close(self) -> None:
        """The block ends; what its last stage did since its last report still belongs to it."""
        spent = self._since_last()
        if self.current is not None:
            self.current.advance(self.current.done, spent)
            self.current.use_gpu(cuda_bytes_since())
        self.current, self.kept = None, ""

    def summary(self, status: str, message: str | None) -> dict[str, object]:
        """The last line for programs."""
        stages = [
            {"stage": stage.name, "seconds": _rounded(stage.spent.seconds), "amount": stage.amount, "unit": stage.unit}
            | stage.spent.bytes
            | {"cuda_bytes": stage.cuda_bytes}
            for stage in list(self.stages.values())  # a copy: an interruption is told by a thread of its own
        ]
        spent = self.spent
        end = {"command": self.command, "status": status, "message": message, "seconds": _rounded(spent.seconds)}
        return {"summary": end | {"stages": stages} | spent.bytes | _peaks()}

    def _now(self) -> Spent:
        return Spent(self._clock(), *traffic())

    def _since_last(self) -> Spent:
        before, self._last = self._last, self._now()
        return self._last.plus(before, -1)


def _peaks() -> dict[str, object]:
    return {"peak_memory_bytes": peak_memory_bytes(), "peak_cuda_bytes": peak_cuda_bytes()}


def _rounded(number: float | None) -> float | None:
    return None if number is None else round(number, 3)
