"""Differences between two lists of types of one model: which parts of which layers changed type, and what it costs."""

from dataclasses import dataclass

from dynquant.checkpoints.inspect import TensorRecord
from dynquant.checkpoints.tensor_roles import Role, layer_of
from dynquant.errors import PlanError
from dynquant.formats.quant_types import QUANT_TYPES
from dynquant.recipes.type_lists import TypeList, without_leading_ones


@dataclass(frozen=True)
class TypeChange:
    """Tensors of one role that go from one type to another. Bytes are those of all of them together."""

    role: Role
    before: str
    after: str
    tensors: tuple[str, ...]
    bytes_before: int
    bytes_after: int

    @property
    def layers(self) -> tuple[int, ...]:
        """Sorted layer numbers; empty for tensors outside the layers."""
        return tuple(sorted({layer for name in self.tensors if (layer := layer_of(name)) is not None}))


@dataclass(frozen=True)
class TypeShare:
    """The tensors of one type on each side."""

    type: str
    tensors_before: int
    tensors_after: int
    bytes_before: int
    bytes_after: int


@dataclass(frozen=True)
class PlanDiff:
    """`changes` come with the largest change of bytes first, `histogram` with the most precise type first."""

    before: TypeList
    after: TypeList
    changes: tuple[TypeChange, ...]
    histogram: tuple[TypeShare, ...]


def compare_types(before: TypeList, after: TypeList) -> PlanDiff:
    """Compare two plans or files. Raises PlanError: they have not the same tensors in the same shapes; the first that
    differs is named."""
    old, new = ({tensor.name: tensor for tensor in side.tensors} for side in (before, after))
    _check_same_model(before, after, old, new)
    groups: dict[tuple[Role, str, str], list[str]] = {}
    for name, tensor in old.items():
        if tensor.type != new[name].type:
            groups.setdefault((tensor.role, tensor.type, new[name].type), []).append(name)
    changes = []
    for (role, was, now), names in groups.items():
        sizes = (sum(side[name].num_bytes for name in names) for side in (old, new))
        changes.append(TypeChange(role, was, now, tuple(names), *sizes))
    changes.sort(key=lambda change: -abs(change.bytes_after - change.bytes_before))
    return PlanDiff(before, after, tuple(changes), _histogram(before.tensors, after.tensors))


def _check_same_model(
    before: TypeList, after: TypeList, old: dict[str, TensorRecord], new: dict[str, TensorRecord]
) -> None:
    for owner, other, names in ((before, after, old.keys() - new.keys()), (after, before, new.keys() - old.keys())):
        if names:
            more = f" and {len(names) - 1} more" if len(names) > 1 else ""
            raise PlanError(
                f"{owner.name} ({owner.arch}) and {other.name} ({other.arch}) are not of one model: only {owner.name} "
                f"has `{min(names)}`{more}. Compare plans or files of the same checkpoint."
            )
    for name, tensor in old.items():
        if without_leading_ones(tensor.shape) != without_leading_ones(new[name].shape):
            raise PlanError(
                f"{before.name} and {after.name} are not of one model: `{name}` has the shapes {list(tensor.shape)} "
                f"and {list(new[name].shape)}. Compare plans or files of the same checkpoint."
            )


def _histogram(before: tuple[TensorRecord, ...], after: tuple[TensorRecord, ...]) -> tuple[TypeShare, ...]:
    precision = {name: place for place, name in enumerate(QUANT_TYPES)}
    names = {tensor.type for tensor in (*before, *after)}
    shares = []
    for name in sorted(names, key=lambda name: (precision.get(name, len(precision)), name)):
        old, new = ([tensor for tensor in side if tensor.type == name] for side in (before, after))
        sizes = (sum(tensor.num_bytes for tensor in side) for side in (old, new))
        shares.append(TypeShare(name, len(old), len(new), *sizes))
    return tuple(shares)
