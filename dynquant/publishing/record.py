"""Record of a release (release.json): its files, what made them, and what they were compared with."""

from collections.abc import Iterable
from pathlib import Path
from typing import Any, Literal

from pydantic import Field

from dynquant import __version__
from dynquant.checkpoints.model import Model
from dynquant.errors import OptionError
from dynquant.evaluation.report import EvalReport
from dynquant.publishing.options import RECORD_NAME, REPORTS_NAME
from dynquant.storage.atomic import file_hash
from dynquant.storage.documents import FrozenRecord, read_document


class ReleaseRun(FrozenRecord):
    """A command, and the sizes that it planned together: where plans are selected by KL, the search for a size goes on
    from that for the next larger one, so that its bytes are those of this command alone."""

    command: tuple[str, ...]
    sizes: dict[str, dict[str, Any]]  # what each asks for, as {"bpw": 2.1}, by `ReleasedFile.request`
    device: str
    versions: dict[str, str]


class ReleasedFile(FrozenRecord):
    """One size. `files` are its names in the folder with their SHA-256, the .gguf file first."""

    request: str  # as `bpw 2.1`
    name: str
    files: dict[str, str] = Field({})
    bytes: int
    bits_per_weight: float
    types: dict[str, int]  # tensors of each type, the most precise first
    plan_hash: str
    predicted_kl: float | None = None
    is_released: bool = True  # False for a published recipe that the files are compared with
    measured_with: dict[str, Any] = Field({})

    @property
    def packed(self) -> list[str]:
        """Names of the files of packed safetensors, in a folder of their own."""
        return [name for name in self.files if "/" in name]

    def with_files(self, folder: Path, files: Iterable[Path]) -> "ReleasedFile":
        """Return the row with these files of the folder beside its others."""
        hashes = {file.relative_to(folder).as_posix(): file_hash(file) for file in files}
        return self.model_copy(update={"files": self.files | hashes})


class Release(FrozenRecord):
    """release.json: `command` is the last one that was given, `commands` those of the `runs` that planned the files.

    `settings`, which all runs share, and its run decide the bytes of a file.
    """

    schema_version: Literal[1] = 1
    tool_version: str = __version__
    model: str
    arch: str
    fingerprint: str
    num_weights: int
    settings: dict[str, Any]
    command: tuple[str, ...] = ()
    commands: tuple[tuple[str, ...], ...] = ()
    runs: tuple[ReleaseRun, ...] = ()
    versions: dict[str, str] = Field({})
    stats_hash: str = ""
    calibration: str = ""
    extra_files: dict[str, str] = Field({})  # imatrix
    files: tuple[ReleasedFile, ...] = ()

    @classmethod
    def load(cls, folder: Path) -> "Release | None":
        """Read the record of a folder; None when there is none. Raises PlanError: it is no record of a release."""
        path = folder / RECORD_NAME
        return read_document(path, cls, "the record of a release", "Give another -o.") if path.is_file() else None

    def row(self, request: str) -> ReleasedFile | None:
        """Return the row of what was asked for."""
        return next((row for row in self.files if row.request == request), None)

    def run_of(self, request: str) -> ReleaseRun | None:
        """Return the run that planned a size."""
        return next((run for run in self.runs if request in run.sizes), None)

    def with_file(self, row: ReleasedFile) -> "Release":
        """Return the record with a row in place of that of the same request, smallest file first."""
        rows = [*(other for other in self.files if other.request != row.request), row]
        return self.model_copy(update={"files": tuple(sorted(rows, key=lambda row: row.bytes))})

    def check_same(self, folder: Path, model: Model, settings: dict[str, Any]) -> None:
        """Refuse a folder whose files are of another model, or were made with other options."""
        if self.fingerprint != model.fingerprint:
            raise OptionError(
                f"{folder} holds a release of {self.model} (checkpoint {self.fingerprint[:12]}), and {model.name} is "
                f"another checkpoint ({model.fingerprint[:12]}). Give another -o."
            )
        pairs = [(option, self.settings.get(option), value) for option, value in sorted(settings.items())]
        others = [f"{name} ({_shown(there)}, now {_shown(now)})" for name, there, now in pairs if there != now]
        if others:
            raise OptionError(
                f"The files in {folder} were made with other {' and '.join(others)}. Repeat the options of then to go "
                "on, or give another -o: files of one release differ in nothing but their sizes."
            )

    def report(self, folder: Path, name: str) -> EvalReport | None:
        """Return what `eval` said of a file, or None where it was not measured."""
        path = folder / REPORTS_NAME / f"{name}.json"
        if not path.is_file():
            return None
        return read_document(path, EvalReport, "a report of `dynquant eval`", "Delete it and run the release again.")


def _shown(setting: Any) -> str:
    """Return a setting as it was typed, but a file by the beginning of its hash."""
    return ",".join(f"{each!s:.12}" for each in (setting if isinstance(setting, list) else [setting])) or "none"
