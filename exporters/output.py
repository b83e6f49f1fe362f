"""Parts that every exporter shares: checks of its inputs, the identity of its bytes, and what becomes of a run that
fails."""

from collections.abc import Iterator
from contextlib import contextmanager

from dynquant import __version__
from dynquant.calibration.second_moments import SecondMoments
from dynquant.calibration.statistics import CalibrationStats
from dynquant.checkpoints.model import Model
from dynquant.encoding.interface import Encoder
from dynquant.encoding.stream import encoder_version
from dynquant.errors import ClusterError, DynquantError, PlanError, StatsError, WriteError
from dynquant.recipes.plan import Plan
from dynquant.storage.resumable_output import ResumableOutput


@contextmanager
def writing(target: ResumableOutput) -> Iterator[None]:
    """Context manager: closes `target`; what is written of inputs that cannot be exported at all is removed.

    A full disk, a lost cluster or an interruption keeps it, so that the same call goes on.
    """
    with target:
        try:
            yield
        except (WriteError, ClusterError):
            raise
        except DynquantError:
            target.discard()
            raise


def check_stats(model: Model, plan: Plan, stats: CalibrationStats | None) -> None:
    """Refuse statistics that are not those of the plan.

    Raises:
        StatsError: missing, or of another checkpoint.
        PlanError: there are some, but the plan was made without.
    """
    if stats is None and plan.stats_hash is not None:
        raise StatsError(
            f"The plan was made from calibration statistics ({plan.stats_hash[:12]}), and the same ones are needed to "
            "export it. Give the stats.safetensors that lies beside the plan."
        )
    if stats is not None:
        if plan.stats_hash is None:
            raise PlanError(
                "The plan was made without calibration statistics, so its size and types do not hold with them. Plan "
                "again with the statistics, or export without them."
            )
        stats.check_belongs_to(model.fingerprint, model.name)


def export_identity(plan: Plan, encoder: Encoder, header_hash: str, moments: SecondMoments | None) -> dict[str, str]:
    """Return what decides an export's bytes; an interrupted one goes on only under an equal identity."""
    return {
        "plan": plan.hash,
        "encoder": encoder.name,
        "encoder_version": encoder_version(encoder),
        "dynquant_version": __version__,
        "header": header_hash,
        "hessians": moments.identity if moments is not None else "none",
    }
