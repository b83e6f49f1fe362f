"""The folder that `plan` leaves behind: what other steps read from it. Its names are in `storage.file_names`."""

from itertools import count
from pathlib import Path
from typing import Any

from pydantic import model_validator

from dynquant.calibration.stage import StatsFile
from dynquant.errors import PlanError, StatsError
from dynquant.recipes.plan import Plan
from dynquant.session import Session
from dynquant.storage.atomic import write_atomically
from dynquant.storage.documents import FrozenRecord, read_document
from dynquant.storage.file_names import PLAN_NAME, STATS_NAME, request_in_name

_LONGEST_REQUEST = 100
"""Characters of a request in a file name; coupled tensors and names of files are in some."""


class SuperWeight(FrozenRecord):
    """`name[expert][row, col]`, in the order of discovery. `max_in` and `max_out` are signed."""

    name: str  # GGUF name of the tensor; `expert` is None for dense and shared projections
    module: str
    expert: int | None
    layer: int
    row: int
    col: int
    value: float
    max_in: float
    max_out: float
    position: int  # token at which `max_out` occurs
    ratio: float  # |max_out| over the median of the layers' maxima
    share: float  # part of `max_out` that this one weight contributes
    effect: float  # mean change of a token's log-probability, in nats, when the weight is zeroed


class SuperWeights(FrozenRecord):
    """Content of super_weights.json."""

    stats_hash: str = ""  # SHA-256 of the statistics beside which they were looked for; files before had none
    super_weights: tuple[SuperWeight, ...] = ()

    @model_validator(mode="before")
    @classmethod
    def _read_older(cls, document: Any) -> Any:
        """Older files hold the list alone."""
        return {"super_weights": document} if isinstance(document, list) else document


def load_super_weights(path: Path) -> SuperWeights:
    """Read super_weights.json; an absent file means that none were looked for."""
    if not path.is_file():
        return SuperWeights()
    return read_document(path, SuperWeights, "a list of super weights", "Delete it and plan again.")


def save_plan(plan: Plan, path: Path, session: Session) -> None:
    """Write plan.json; one of another request that was there stays beside it, named by that, and the note says so."""
    former = _read(path)
    if former is not None and (former.recipe, former.target) != (plan.recipe, plan.target):
        note = f"{path} was the plan of {former.recipe}, which is kept as {_kept(former, path)}"
        if former.stats_hash in (None, plan.stats_hash):
            note += f"; `export --plan` takes it as well{_other_moments(former, plan)}"
        session.note(note)
    plan.save(path)
    if plan.stats_hash is not None:
        note_lost_plans(path.parent, plan.stats_hash, session, before=former and former.stats_hash)


def _other_moments(former: Plan, plan: Plan) -> str:
    """Say that a kept plan was made with second moments of another kind than those that are now in the folder."""
    if former.hessians is None or former.hessians == plan.hessians:
        return ""
    there = f"{plan.hessians} second moments" if plan.hessians else "no second moments"
    return f", but encodes it with {there} instead of the {former.hessians} ones that it was made with"


def note_lost_plans(folder: Path, stats_hash: str, session: Session, *, before: str | None) -> None:
    """Say which plans of a folder cannot be exported any more, now that its statistics are those of this hash.

    `before` is the hash of those that were there, None where it is not known; plans of yet others were told earlier.
    """
    plans = {path.name: _read(path) for path in sorted({*folder.glob(PLAN_NAME), *folder.glob(f"*.{PLAN_NAME}")})}
    hashes = {name: plan.stats_hash for name, plan in plans.items() if plan is not None}
    lost = [name for name, of in hashes.items() if of not in (None, stats_hash) and before in (None, of)]
    if lost:
        it, were = ("they", "were") if len(lost) > 1 else ("it", "was")
        session.note(
            f"{', '.join(lost)} in {folder} {were} made from the statistics that were there before, so {it} cannot be "
            "exported; plan again for the same request"
        )


def _read(path: Path) -> Plan | None:
    """Return the plan of a file; None without one, or for one that is damaged or of another version."""
    try:
        return read_document(path, Plan, "a plan", "") if path.is_file() else None
    except PlanError:
        return None


def _kept(plan: Plan, path: Path) -> Path:
    """Copy a plan to the first name of its request that is free, or has it already; return that."""
    stem, content = request_in_name(plan.recipe)[:_LONGEST_REQUEST].strip("-."), path.read_bytes()
    stem += "-vllm" * (plan.target == "vllm")
    names = (path.with_name(f"{stem}{f'-{number}' * (number > 1)}.{PLAN_NAME}") for number in count(1))
    kept = next(name for name in names if not name.exists() or name.read_bytes() == content)
    write_atomically(kept, content)
    return kept


def stats_of_plan(stats_hash: str | None, path: Path) -> StatsFile | None:
    """Return the statistics with this hash, from which a plan was made; None for a plan without. Raises StatsError:
    they are not at `path`, or are others; both hashes are named."""
    if stats_hash is None:
        return None
    if path.is_dir():
        raise StatsError(f"{path} is a directory; give the {STATS_NAME} in it.")
    if not path.is_file():
        raise StatsError(
            f"The plan was made from calibration statistics, but there is no {path}. Give them with --stats FILE."
        )
    file = StatsFile(path)
    if file.hash != stats_hash:
        _ = file.stats  # raises where it is something else than statistics
        raise StatsError(
            f"{path} has the hash {file.hash[:12]}, but the plan was made from statistics {stats_hash[:12]}. Give the "
            "stats.safetensors that was written beside the plan or, where a later run has replaced it, plan again for "
            "the same request."
        )
    return file
