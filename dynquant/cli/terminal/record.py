"""Record of one command: time, amounts and bytes of every stage, as stages report them.

Time and bytes between two reports belong to the stage that reports second; what lies before a stage's first report
(loading a model, say) belongs to none. A stage that runs again in the same command adds to its own record.
"""

import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field

from dynquant.resources import Traffic, peak_cuda_bytes, peak_memory_bytes, traffic

RATE_SECONDS = 30.0
"""The rate is taken over this much of the stage's latest time, so that a slow tensor soon shows in the time left."""


@dataclass
class StageRecord:
    """One stage until now. `amount` counts what this command did; `done` also what an earlier run had left."""

    name: str
    unit: str = ""
    done: int = 0
    total: int = 0
    layer: int | None = None
    tensor: str | None = None
    seconds: float = 0.0
    amount: int = 0
    traffic: Traffic = field(default_factory=lambda: Traffic(0, 0))
    _recent: deque[tuple[float, int]] = field(default_factory=deque)

    @property
    def rate(self) -> float | None:
        """Units per second of late."""
        if not self._recent:
            return None
        start, amount = self._recent[0]
        return (self.amount - amount) / (self.seconds - start) if self.seconds > start else None

    @property
    def seconds_left(self) -> float | None:
        """Until `total`, at the latest rate."""
        return (self.total - self.done) / self.rate if self.rate else None

    def begin(self, done: int) -> None:
        """The stage starts here, with `done` left by an earlier run."""
        self.done = done
        self._recent = deque([(self.seconds, self.amount)])

    def advance(self, done: int, seconds: float, moved: Traffic) -> None:
        """`done` has been reached, `seconds` and `moved` bytes after the last report."""
        self.amount += done - self.done
        self.done = done
        self.seconds += seconds
        self.traffic = self.traffic.plus(moved)
        self._recent.append((self.seconds, self.amount))
        while len(self._recent) > 2 and self._recent[1][0] < self.seconds - RATE_SECONDS:
            self._recent.popleft()

    def as_json(self) -> dict[str, object]:
        """One line for programs."""
        return {
            "stage": self.name,
            "done": self.done,
            "total": self.total,
            "unit": self.unit,
            "rate": _rounded(self.rate),
            "layer": self.layer,
            "tensor": self.tensor,
            "bytes_read": self.traffic.read,
            "bytes_written": self.traffic.written,
            "seconds": _rounded(self.seconds),
            "seconds_left": _rounded(self.seconds_left),
            "peak_memory_bytes": peak_memory_bytes(),
            "peak_cuda_bytes": peak_cuda_bytes(),
        }


class RunRecord:
    """All stages of a command in the order of their first reports."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self.stages: dict[str, StageRecord] = {}
        self.current: StageRecord | None = None
        self._clock = clock
        self._start = self._last = clock()
        self._start_traffic = self._last_traffic = traffic()
        self._begun: set[str] = set()

    @property
    def seconds(self) -> float:
        """Since the command began."""
        return self._clock() - self._start

    @property
    def traffic(self) -> Traffic:
        """Since the command began."""
        return traffic().since(self._start_traffic)

    def open(self) -> None:
        """A block of stages begins: each of them starts anew with its first report."""
        self._begun.clear()

    def report(self, stage: str, done: int, total: int, *, unit: str, layer: int | None, tensor: str | None) -> None:
        """Take down one report; `current` is then its stage."""
        from dynquant.checkpoints.tensor_roles import layer_of

        record = self.stages.setdefault(stage, StageRecord(stage))
        seconds, moved = self._passed()
        if stage in self._begun:
            record.advance(done, seconds, moved)
        else:
            self._begun.add(stage)
            record.begin(done)
        record.total, record.unit = total, unit or record.unit
        record.tensor = tensor
        record.layer = layer_of(tensor) if layer is None and tensor is not None else layer
        self.current = record

    def close(self) -> None:
        """The block ends; what its last stage did since its last report still belongs to it."""
        seconds, moved = self._passed()
        if self.current is not None:
            self.current.advance(self.current.done, seconds, moved)
        self.current = None

    def summary(self, command: str, status: str, message: str | None = None) -> dict[str, object]:
        """The last line for programs."""
        stages = [
            {
                "stage": stage.name, "seconds": _rounded(stage.seconds), "amount": stage.amount, "unit": stage.unit,
                "bytes_read": stage.traffic.read, "bytes_written": stage.traffic.written,
            }
            for stage in list(self.stages.values())
        ]  # fmt: skip
        total = self.traffic
        return {
            "summary": {
                "command": command, "status": status, "message": message, "seconds": _rounded(self.seconds),
                "stages": stages, "bytes_read": total.read, "bytes_written": total.written,
                "peak_memory_bytes": peak_memory_bytes(), "peak_cuda_bytes": peak_cuda_bytes(),
            }
        }  # fmt: skip

    def _passed(self) -> tuple[float, Traffic]:
        now, moved = self._clock(), traffic()
        passed = now - self._last, moved.since(self._last_traffic)
        self._last, self._last_traffic = now, moved
        return passed


def _rounded(number: float | None) -> float | None:
    return None if number is None else round(number, 3)
