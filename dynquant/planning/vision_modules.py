"""Decides for the vision tower and the projector as wholes: keep them as they are, 8 bits, or types like all others.

The measure is the output error of a module's matrices on held-back pictures, in one type near 4 bits, over that of the
language model's matrices. A module that loses KEEP_RATIO times as much in the median stays whole, one that loses
EIGHT_BIT_RATIO times as much gets 8 bits; the rest of the budget is shared by what is left. Where the budget does not
hold that, or the predicted KL of the whole plan would rise by more than floors may raise it, the module is lowered by a
step, and the plan says so. The two ratios are rules of thumb; `plan --select` measures instead (`selecting`).
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import product
from typing import Literal

from dynquant.analysis.errors.table import ErrorRow, ErrorTable
from dynquant.checkpoints.vision_names import LANGUAGE, PROJECTOR, TRANSPOSED, VISION, part_of
from dynquant.formats.quant_types import QUANT_TYPES
from dynquant.planning.target import MODULE_LEVELS

Level = Literal["keep", "8bit", "lower"]
KEEP_RATIO, EIGHT_BIT_RATIO = 2.0, 1.25
_MEASURED_IN = ("Q4_K", "IQ4_XS", "IQ4_NL", "Q4_0", "Q3_K", "IQ3_S", "IQ3_XXS", "Q5_K", "Q2_K", "IQ2_S")
_NAMES = {VISION: "the vision tower", PROJECTOR: "the projector"}
_WITH: dict[Level, str] = {"keep": "whole", "8bit": "with 8 bits", "lower": "with types like all others"}
_OUTCOMES = {"keep": "stays whole", "8bit": "gets 8 bits", "lower": "takes types like all others"}


@dataclass(frozen=True)
class ModuleChoice:
    """Decision for one module, and the words for it in the plan and on the terminal."""

    part: str
    level: Level
    reason: str


def module_choices(table: ErrorTable, wanted: str) -> Iterator[tuple[ModuleChoice, ...]]:
    """Choices for both modules, from the measured or wanted ones down; without a vision tower nothing is chosen.

    `wanted` is a level of MODULE_LEVELS for both modules, or `auto`; a wanted level is the only one.
    """
    parts = _modules(table)
    if not parts:
        yield ()
    elif wanted != "auto":
        level = next(level for level in MODULE_LEVELS if level == wanted)
        yield tuple(ModuleChoice(part, level, f"{_NAMES[part]} {_OUTCOMES[level]}, as asked for") for part in parts)
    else:
        measured = tuple(_measured(table, part) for part in parts)
        yield measured
        while any(choice.level != MODULE_LEVELS[-1] for choice in measured):
            measured = tuple(map(_lowered, measured))
            yield measured


def every_choice(table: ErrorTable, wanted: str) -> Iterator[tuple[ModuleChoice, ...]]:
    """Every combination of levels of the modules that there are; a wanted level is the only one."""
    if wanted != "auto":
        yield from module_choices(table, wanted)
    else:
        yield from product(*([ModuleChoice(part, level, "") for level in MODULE_LEVELS] for part in _modules(table)))


def with_measured_reasons(
    chosen: tuple[ModuleChoice, ...], measured: Mapping[tuple[ModuleChoice, ...], float], where: str
) -> tuple[ModuleChoice, ...]:
    """The chosen combination with the lowest KL of each level of each module as the reason."""
    explained = []
    for choice in chosen:
        best: dict[Level, float] = {}
        for choices, kl in measured.items():
            level = next(other.level for other in choices if other.part == choice.part)
            best[level] = min(kl, best.get(level, kl))
        told = ", ".join(f"{_WITH[level]} {kl:.4g}" for level, kl in best.items())
        reason = f"{_NAMES[choice.part]} {_OUTCOMES[choice.level]}; KL on {where}: {told}"
        explained.append(ModuleChoice(choice.part, choice.level, reason))
    return tuple(explained)


def held_to(table: ErrorTable, choices: tuple[ModuleChoice, ...]) -> ErrorTable:
    """Only the rows that the choices allow."""
    level_of = {choice.part: choice.level for choice in choices}
    rows: list[ErrorRow] = []
    for name, of_types in table.tensors().items():
        level = "keep" if name == TRANSPOSED else level_of.get(part_of(name), "lower")
        eight_bit = table.row(name, "Q8_0") if level == "8bit" else None
        if level == "lower":
            rows += of_types.values()
        else:  # whole also where no row has 8 bits
            rows += [eight_bit] if eight_bit else [row for row in of_types.values() if QUANT_TYPES[row.type].is_float]
    return table.with_rows(rows)


def _measured(table: ErrorTable, part: str) -> ModuleChoice:
    type_name = next((name for name in _MEASURED_IN if name in table.types), None)
    error, others = (
        type_name
        and table.median_output_error(type_name, (name for name in table.tensors() if part_of(name) == module))
        for module in (part, LANGUAGE)
    )
    if error is None or others is None:
        return ModuleChoice(part, "8bit", f"{_NAMES[part]} gets 8 bits: its output errors were not measured")
    ratio = error / others
    level: Level = "keep" if ratio >= KEEP_RATIO else "8bit" if ratio >= EIGHT_BIT_RATIO else "lower"
    reason = (
        f"{_NAMES[part]} {_OUTCOMES[level]}: its median output error in {type_name} is {error:.1%}, {ratio:.2f} times "
        "that of the language model"
    )
    return ModuleChoice(part, level, reason)


def _modules(table: ErrorTable) -> list[str]:
    """VISION and PROJECTOR, those that the model has."""
    return [part for part in _NAMES if any(part_of(name) == part for name in table.tensors())]


def _lowered(choice: ModuleChoice) -> ModuleChoice:
    if choice.level == MODULE_LEVELS[-1]:
        return choice
    level = MODULE_LEVELS[MODULE_LEVELS.index(choice.level) + 1]
    start = choice.reason.partition(" (")[0]  # a second step replaces the words of the first
    return ModuleChoice(choice.part, level, f"{start} (but the budget does not hold that, so it {_OUTCOMES[level]})")
