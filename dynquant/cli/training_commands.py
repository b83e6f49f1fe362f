"""The commands that train adapters: progress, the before/after table, and where the files are."""

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from dynquant.cli.terminal import console
from dynquant.evaluation.statistics import Estimate
from dynquant.training.finetune import finetune
from dynquant.training.heal import HealData, heal
from dynquant.training.options import TrainOptions

_KEPT = "The last checkpoint is kept; steps after it are lost."


def finetune_command(packed: str, data: Path, output: Path, options: TrainOptions, **more: Any) -> None:
    """Fine-tune and print what changed."""
    with console.stage_progress(_KEPT) as progress, _without_notices():
        report = finetune(packed, data, output, options, progress=progress, **more)
    _print(report, output)


def heal_command(packed: str, reference: str, output: Path, data: HealData, options: TrainOptions, **more: Any) -> None:
    """Heal and print what changed."""
    with console.stage_progress(_KEPT) as progress, _without_notices():
        report = heal(packed, reference, output, data, options, progress=progress, **more)
    _print(report, output)
    cache = data.cache_dir or output.with_name(f"{output.name}.reference")
    console.note(f"the original's distributions are in {cache}, for further runs on the same text; it may be deleted")


@contextmanager
def _without_notices() -> Iterator[None]:
    """Libraries tell each other's authors what will be renamed; who trains an adapter can do nothing about it."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        warnings.filterwarnings("ignore", message="Could not find a config file")  # PEFT, of GGUF files
        yield


def _print(report: Any, output: Path) -> None:
    rows = [(change.name, _interval(change.before), _interval(change.after)) for change in report.changes]
    rows += [(f"share of the KL closed, {name}", "", _interval(share)) for name, share in report.gap_closed.items()]
    steps = f"step {report.best_step} of {report.steps}"
    console.print_table(f"{report.base}: adapter of {steps}", ("held out", "without adapter", "with adapter"), rows)
    for line in report.notes:
        console.note(line)
    if not report.has_helped:
        console.note("Training did not lower the held-out loss below that of the adapter's start.")
    console.out.print(f"adapter: {output}\nlosses:  {output / 'loss.png'}")


def _interval(estimate: Estimate) -> str:
    return f"{estimate.value:.4g} [{estimate.low:.4g}, {estimate.high:.4g}]"
