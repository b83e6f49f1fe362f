"""Words of a plan about itself: what stays as it is, what has no statistics and why, and which bytes are fixed."""

import re
from collections.abc import Collection, Iterable, Mapping
from itertools import groupby

from dynquant.calibration.statistics import CalibrationStats
from dynquant.checkpoints.tensor_roles import Role
from dynquant.formats.quant_types import QUANT_TYPES
from dynquant.recipes.plan import PlanEntry
from dynquant.resources import human_bytes

_LAYER = re.compile(r"(?<=blk\.)\d+(?=\.)")
_NO_INPUT = {
    Role.EMBEDDING: "rows of an embedding are looked up, and no input weighs their columns",
    Role.PER_LAYER_EMBEDDING: "rows of an embedding are looked up, and no input weighs their columns",
    Role.MTP: "layers that predict tokens ahead were not run",
}
_FIXED = {
    Role.MTP: "layers that predict tokens ahead (--no-mtp leaves them out, --mtp-type TYPE stores them otherwise)",
    Role.INDEXER: "indexer",
    Role.SSM_STATE: "decay and gates of states",
    Role.MIXING: "projections and mixers that llama.cpp never quantizes",
    Role.OTHER: "tensors of unknown purpose",
}


def notes_of(entries: Collection[PlanEntry], stats: CalibrationStats | None) -> tuple[str, ...]:
    """Return a line on the matrices of unknown purpose, and one for each reason why matrices have no statistics."""
    unknown = [entry for entry in entries if entry.role is Role.OTHER and _is_matrix(entry)]
    notes = []
    if unknown:
        types = " and ".join(dict.fromkeys(entry.type for entry in unknown))
        size = human_bytes(sum(entry.bytes for entry in unknown))
        notes.append(f"{_counted(unknown)} of unknown purpose, {size}, kept in {types}: {_names(unknown)}")
    reasons: dict[str, list[PlanEntry]] = {}
    for entry in entries if stats is not None else ():
        assert stats is not None
        if _is_matrix(entry) and not entry.quant_type.is_float and stats.input_of(entry.name) is None:
            role = Role.EMBEDDING if entry.name.endswith(".nextn.embed_tokens.weight") else entry.role
            reason = _NO_INPUT.get(role, "nothing that calibration ran is known to read them")
            reasons.setdefault(reason, []).append(entry)
    for reason, without in reasons.items():
        notes.append(f"{_counted(without)} without statistics, {reason}: {_names(without)}")
    return tuple(notes)


def fixed_words(sizes: Mapping[Role, int], unread: Mapping[str, str], uncut: Mapping[str, int]) -> str:
    """Return which bytes of the smallest file no candidate type makes smaller.

    `sizes` are bytes by role of tensors without a choice, `unread` names the smallest type of each matrix without
    statistics, `uncut` the row length of each matrix that no type's blocks divide.
    """
    named = {words: sizes[role] for role, words in _FIXED.items() if role in sizes}
    named["vectors, norms and routers"] = sum(size for role, size in sizes.items() if role not in _FIXED)
    parts = [f"{human_bytes(size)} of {words}" for words, size in named.items()]
    words = f" Of the smallest size, {', '.join(parts)} have no choice."
    if uncut:
        lengths = " and ".join(f"{length:,}" for length in sorted(set(uncut.values())))
        words += (
            f" Rows of {lengths} weights are no whole number of any quant type's blocks, so these matrices stay "
            f"floats: {', '.join(_templates(uncut))}."
        )
    unread = {name: type_name for name, type_name in unread.items() if name not in uncut}
    if unread:
        types = sorted(set(unread.values()), key=lambda name: QUANT_TYPES[name].bits_per_weight)
        some = ", ".join(_templates(unread))
        words += f" Matrices without statistics go down to {' or '.join(types)} only: {some}."
    return words


def consecutive_runs(numbers: Iterable[int]) -> list[list[int]]:
    """Cut sorted numbers where one is left out: 3 4 5 9 -> [3 4 5] [9]."""
    # Within a run, number minus place stays the same.
    runs = groupby(enumerate(numbers), key=lambda pair: pair[1] - pair[0])
    return [[number for _, number in run] for _, run in runs]


def number_ranges(numbers: Iterable[int]) -> str:
    """Write sorted numbers for people: 3 4 5 9 -> `3-5, 9`."""
    runs = consecutive_runs(numbers)
    return ", ".join(str(run[0]) if len(run) == 1 else f"{run[0]}-{run[-1]}" for run in runs)


def _is_matrix(entry: PlanEntry) -> bool:
    return len(entry.shape) >= 2 and entry.name.endswith(".weight")


def _counted(entries: Collection[PlanEntry]) -> str:
    return f"{len(entries)} {'matrix' if len(entries) == 1 else 'matrices'}"


def _names(entries: Iterable[PlanEntry]) -> str:
    return ", ".join(_templates(entry.name for entry in entries))


def _templates(names: Iterable[str]) -> list[str]:
    """Return names with the layers in which each is: `blk.{0,1,2}.ssm_in.weight`, or `blk.{0-46}` where all are."""
    layers: dict[str, list[int]] = {}
    for name in names:
        number = _LAYER.search(name)
        layers.setdefault(_LAYER.sub("{}", name, count=1), []).extend([int(number[0])] if number else [])
    return [
        template.replace("{}", f"{{{number_ranges(sorted(numbers))}}}" if len(numbers) > 1 else f"{numbers[0]}")
        if numbers
        else template
        for template, numbers in layers.items()
    ]
