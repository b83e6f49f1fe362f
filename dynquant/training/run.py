"""The directory of a training run, which survives a kill, and its report.

Checkpoints lie in `.NAME.training` beside the output until the run is done; the output itself appears whole or not at
all. A restart goes on from the last complete checkpoint, and only under the same options, data and base.
"""

import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from pydantic import Field

from dynquant import __version__
from dynquant.analysis.plots.style import plot_settings, save_figure
from dynquant.analysis.plots.training import draw_training
from dynquant.errors import TrainingError, WriteError
from dynquant.evaluation.statistics import Estimate
from dynquant.storage.atomic import write_atomically, writing_folder
from dynquant.storage.documents import FrozenRecord
from dynquant.storage.journal import Journal, differing_key
from dynquant.storage.work_files import check_folder, remove_folder, remove_work

SCHEMA_VERSION = 1
REPORT_NAME = "training.json"
_STATE = "trainer_state.json"


class LossPoint(FrozenRecord):
    """Losses logged after `step` optimizer steps, in nats per token; one of them is None."""

    step: int
    train: float | None = None
    held_out: float | None = None


class Change(FrozenRecord):
    """One measure on held-out data, without and with the adapter."""

    name: str
    before: Estimate
    after: Estimate


class TrainingReport(FrozenRecord):
    """training.json beside the adapter. `best_step` is the step whose adapter was kept."""

    schema_version: int = SCHEMA_VERSION
    tool_version: str = __version__
    task: str
    base: str
    identity: dict[str, str]
    options: dict[str, Any]
    trained_examples: int
    held_out_examples: int
    steps: int
    best_step: int
    history: list[LossPoint]
    changes: list[Change]
    gap_closed: dict[str, Estimate] = Field(default_factory=dict)
    """Share of the KL to the original that the adapter took away, by text."""
    notes: list[str]
    seconds: float

    @property
    def has_helped(self) -> bool:
        """True when the held-out loss fell below that of the adapter as it started."""
        losses = [point.held_out for point in self.history if point.held_out is not None]
        return min(losses) < losses[0]


class RunDirectory:
    """The unfinished run beside `output`; `identity` is what decides its result.

    Raises:
        TrainingError: an unfinished run of another identity, or an output that is no adapter of an earlier run.
        WriteError: the directory cannot be made, or something else has its name.
    """

    def __init__(self, output: Path, identity: Mapping[str, object], *, resume: bool) -> None:
        self.output = output
        self.checkpoints = output.with_name(f".{output.name}.training")
        self.identity = {key: str(value) for key, value in identity.items()}
        if output.exists() and not (output / REPORT_NAME).is_file() and (not output.is_dir() or any(output.iterdir())):
            raise TrainingError(
                f"{output} exists and is not the adapter of an earlier run (it has no {REPORT_NAME}); it is left "
                "alone. Choose another output directory."
            )
        check_folder(self.checkpoints)
        with Journal(self.checkpoints / "run.json") as journal:
            if not resume or journal.identity is None or self.last_checkpoint() is None:
                remove_folder(self.checkpoints)
            elif key := differing_key(journal.identity, self.identity):
                old, new = journal.identity.get(key, "nothing"), self.identity.get(key, "nothing")
                raise TrainingError(
                    f"{self.checkpoints} holds an unfinished run with {key} = {old}; this one has {new}. Repeat the "
                    "earlier command to finish it, or give --no-resume to start afresh."
                )
            try:
                journal.start(self.identity, ())
            except OSError as error:
                raise WriteError(
                    f"{journal.path} could not be written: {error.strerror}. Free some space or choose another place."
                ) from error

    def last_checkpoint(self) -> str | None:
        """Return the last complete checkpoint; what was being written when the run was killed is removed."""
        steps = {int(path.name.rpartition("-")[2]): path for path in self.checkpoints.glob("checkpoint-*")}
        for _, path in sorted(steps.items(), reverse=True):
            if (path / _STATE).is_file():  # transformers writes it after weights and optimizer
                return str(path)
            shutil.rmtree(path)
        return None

    def finish(self, save: Callable[[Path], None], *, measure: str, **fields: Any) -> TrainingReport:
        """Put the report of these `fields`, its plot and what `save` writes in the output's place; drop checkpoints.

        `measure` is what the losses are, with its unit.
        """
        report = TrainingReport(identity=self.identity, **fields)
        way_out = "Free some space and run the same command again: checkpoints are kept."
        with writing_folder(self.output, way_out, replace=True) as folder:
            save(folder)
            _write_report(folder, report, measure)
        remove_folder(self.checkpoints)
        remove_work(self.output)
        return report


def _write_report(directory: Path, report: TrainingReport, measure: str) -> None:
    write_atomically(directory / REPORT_NAME, report.model_dump_json(indent=2) + "\n")
    with plot_settings():
        figure, headline = draw_training(
            [(point.step, point.train) for point in report.history if point.train is not None],
            [(point.step, point.held_out) for point in report.history if point.held_out is not None],
            best_step=report.best_step,
            measure=measure,
            data=f"{report.base}, {report.trained_examples:,} examples",
        )
        save_figure(figure, directory, "loss", headline)
