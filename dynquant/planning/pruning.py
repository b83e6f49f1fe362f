"""Experts of no bits: the same number of the least used ones of every layer is left out before planning.

Use is the number of calibration tokens that the router sends there. It mostly lost less KL than the mean norm of what
an expert adds (REAP, arXiv 2510.13999), its sum or energy, the Fisher information of that, and the KL of each expert
missed alone; whether leaving experts out pays at all depends on the model (reports/damage.md). Experts that hold a
super weight or drive massive activations are never left out. A router that chooses among groups first needs groups of
equal size, so each loses as many.
"""

import shutil
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from dynquant.analysis.outliers.options import SuperWeightOptions
from dynquant.analysis.outliers.stage import look_for_super_weights
from dynquant.analysis.outliers.super_experts import find_super_experts
from dynquant.calibration.options import CalibrationOptions
from dynquant.calibration.stage import StatsFile, statistics_at, streaming_limit
from dynquant.calibration.statistics import CalibrationStats
from dynquant.checkpoints.model import Model, PrunedExperts
from dynquant.checkpoints.tensor_roles import Role, layer_of, stored_ahead
from dynquant.checkpoints.tensor_source import ModelSource, TensorInfo
from dynquant.errors import PlanError
from dynquant.families.common.config import read_json
from dynquant.families.linear_layers import LinearCheckpoint
from dynquant.families.open import open_pruned
from dynquant.families.pruned import HAS_EXPERTS, PRUNED_NAME, check_prunable
from dynquant.formats.storage_format import StoredTensor
from dynquant.resources import chosen_device
from dynquant.session import Session
from dynquant.storage.file_names import ORIGINAL_STATS_NAME


def without_experts(
    model: Model, count: int, folder: Path, options: CalibrationOptions, session: Session, *, stats: Path | None = None
) -> Model:
    """Return the model without `count` experts of every layer, as a checkpoint in a plan's folder.

    Statistics of the original, which say how often experts are used, are those of `stats` or are measured beside it.
    What plans before left of other experts is removed from the folder.

    Raises:
        PlanError: statistics do not rank the experts.
        CheckpointError: they are stored in a way that is not known.
    """
    if stats is None:
        measured = statistics_at(folder / ORIGINAL_STATS_NAME, model, replace(options, hessians="none"), session)
    else:
        measured = StatsFile(stats).of(model)
    experts = least_used(model, measured.stats, count, _protected(model, measured.stats, options, session))
    pruned = PrunedExperts(
        original=model.name, fingerprint=model.fingerprint, num_experts=model.hyper.n_expert, experts=experts
    )
    smaller = open_pruned(model, pruned, folder, session)
    remove_pruned(folder, session, but=smaller.path.parent)
    return smaller


def remove_pruned(folder: Path, session: Session, *, but: Path | None = None) -> None:
    """Remove the checkpoints without experts that plans left in their folder, each as large as the model."""
    for checkpoint in sorted({path.parent.parent for path in folder.glob(f"pruned-*/*/{PRUNED_NAME}")} - {but}):
        shutil.rmtree(checkpoint)
        session.note(f"removed {checkpoint}, the checkpoint of a plan before")


@dataclass(frozen=True)
class _Shapes:
    """Tensors as if experts were gone, of which there is nothing to load."""

    source: ModelSource
    num_experts: int
    count: int

    @property
    def fingerprint(self) -> str:
        return self.source.fingerprint

    def names(self) -> list[str]:
        return self.source.names()

    def info(self, name: str) -> TensorInfo:
        info = self.source.info(name)
        if not HAS_EXPERTS.search(name) or info.shape[0] != self.num_experts:
            return info
        return replace(info, shape=(self.num_experts - self.count, *info.shape[1:]))


def sized_without_experts(model: Model, count: int) -> Model:
    """Return a model of the sizes that tensors will have without `count` experts of every layer, whichever these are.

    Raises:
        PlanError: the model has no experts, or too few of them.
        CheckpointError: it is no directory of a language model.
    """
    check_prunable(model)
    _groups(model, count)
    model = model.without_mtp() if model.mtp_tensors else model
    return replace(model, source=_Shapes(model.source, model.hyper.n_expert, count))  # type: ignore[arg-type]


def linears_without_experts(checkpoint: LinearCheckpoint, model: Model, count: int) -> LinearCheckpoint:
    """Return the linear layers of a model, and what else its checkpoint has, in the sizes that they will have without
    `count` experts of every layer, whichever these are."""
    config, num_experts = read_json(checkpoint.directory / "config.json"), model.hyper.n_expert
    names = filter(HAS_EXPERTS.search, model.source.names())
    routing = {stored for name in names for stored in model.checkpoint_names(name)}

    def smaller(other: StoredTensor) -> StoredTensor:
        if other.key not in routing:
            return other
        axis, shape = int(other.shape[0] == 1), list(other.shape)  # Ernie's corrections are [1, experts]
        shape[axis] -= count
        return other._replace(shape=tuple(shape))

    linears = (
        replace(linear, shape=(num_experts - count, *linear.shape[1:]), modules=linear.modules[count:])
        if linear.is_expert
        else linear
        for linear in checkpoint.linears
    )
    others = (smaller(other) for other in checkpoint.others if not stored_ahead(other.key, config))
    return replace(checkpoint, linears=tuple(linears), others=tuple(others))


def least_used(
    model: Model, stats: CalibrationStats, count: int, protected: set[tuple[str, int]]
) -> dict[int, tuple[int, ...]]:
    """Return by layer the `count` experts with the fewest tokens, in ascending order, but none that is protected.

    Raises:
        PlanError: there are not so many, or nothing ranks them.
    """
    groups, num_experts = _groups(model, count), model.hyper.n_expert
    least = {}
    for name in _downs(model):
        inputs = stats.input_of(name)
        if inputs is None or not inputs.counts.any():
            raise PlanError(
                f"--prune-experts: the statistics do not say how often the experts of `{name}` are used. Calibrate "
                "anew (leave --stats out)."
            )
        ranked = [e for e in torch.argsort(inputs.counts, stable=True).tolist() if (name, e) not in protected]
        size = num_experts // groups
        gone = [e for group in range(groups) for e in [x for x in ranked if x // size == group][: count // groups]]
        if len(gone) < count:
            raise PlanError(
                f"--prune-experts {count}: all but {len(ranked)} experts of `{name}` hold super weights or drive "
                "massive activations, and are never left out. Give a lower number."
            )
        least[layer_of(name) or 0] = tuple(sorted(gone))
    return least


def _downs(model: Model) -> list[str]:
    """Return the down-projections of routed experts, but for those of layers that look ahead."""
    return [name for name, role in model.roles.items() if role is Role.EXPERT_DOWN]


def _groups(model: Model, count: int) -> int:
    """Return among how many groups of experts the router chooses. Raises PlanError: `count` experts cannot go."""
    num_experts, used = model.hyper.n_expert, model.hyper.n_expert_used
    values = {field.key.removeprefix(f"{model.arch}."): field.value for field in model.metadata}
    groups, used_groups = (int(values.get(key) or 1) for key in ("expert_group_count", "expert_group_used_count"))
    if not _downs(model):
        raise PlanError(f"{model.name} has no routed experts; leave --prune-experts out.")
    if count % groups:
        raise PlanError(
            f"--prune-experts {count}: the router of {model.name} chooses among {groups} groups of experts, which have "
            f"to stay of one size. Give a multiple of {groups}."
        )
    needed = max(used, -(-used // min(groups, used_groups)) * groups, 2 * groups if groups > 1 else 0)
    if num_experts - count < needed:
        raise PlanError(
            f"--prune-experts {count}: {model.name} has {num_experts} experts in a layer and needs {needed}, of which "
            f"it uses {used} for a token. Give at most {num_experts - needed}."
        )
    return groups


def _protected(
    model: Model, stats: CalibrationStats, options: CalibrationOptions, session: Session
) -> set[tuple[str, int]]:
    """Return down-projection and number of the experts that hold a super weight or drive massive activations."""
    experts = {(expert.name, expert.expert) for expert in find_super_experts(stats)}
    if options.data is None and streaming_limit(model, options, chosen_device(session.device)) is None:
        search = SuperWeightOptions(model=str(model.path), text=options.text, ablation=False)
        weights = (weight for weight, _ in look_for_super_weights(search, session).weights)
        experts |= {(weight.name, weight.expert) for weight in weights if weight.expert is not None}
    return experts
