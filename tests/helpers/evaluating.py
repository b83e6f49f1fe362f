"""Evaluations of tests: the door with a session of the test's own."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from dynquant.evaluation.evaluate import evaluate
from dynquant.evaluation.options import EvalOptions, TaskOptions
from dynquant.evaluation.report import EvalReport, PictureReport
from dynquant.session import Progress, Session, ignore_progress


def evaluated(
    candidate: str | Path,
    reference: str | Path,
    *,
    threads: int | None = None,
    device: str | None = None,
    seed: int = 0,
    progress: Progress = ignore_progress,
    **options: Any,
) -> EvalReport | PictureReport:
    """Return what `evaluate` finds; `options` are fields of `EvalOptions` and of its `TaskOptions`."""

    @contextmanager
    def stage(_kept: str) -> Iterator[Progress]:
        yield progress

    session = Session(device=device, threads=threads, seed=seed, stage=stage)
    of_tasks = {name: options.pop(name) for name in list(options) if name in TaskOptions.__dataclass_fields__}
    asked = TaskOptions(**of_tasks)
    return evaluate(EvalOptions(candidate=str(candidate), reference=str(reference), asked=asked, **options), session)
