"""Values of other options that `--effort` stands for, by their place in the options of a command.

They fill what was not asked for, so that every one of them can still be set by itself.
"""

from collections.abc import Mapping
from typing import Annotated, Any, Literal, get_args

from dynquant.options import Flag, Options

EffortName = Literal["normal", "high"]
EFFORTS: Mapping[str, Mapping[str, Any]] = {
    "normal": {},
    "high": {
        "calibration.hessians": "two-sided",
        "calibration.tokens": 524_288,
        "search.select": True,
        "search.probes": 64,
        "search.unit_tokens": 16_384,
        "search.rounds": 4,
        "search.selection_tokens": 16_384,
        "closing.most_tokens": 524_288,
        "closing.patience": 5,
        "closing.tune_minutes": 60.0,
    },
}
Effort = Annotated[
    EffortName,
    Flag(
        "normal, or high for less damage in a multiple of the time, which is estimated first: --hessians two-sided, "
        "524288 tokens or all that the text has, --select with finer prices, a closing pass of up to an hour on that "
        "text. What you set yourself stays.",
        choices=get_args(EffortName),
    ),
]


def fill(options: Options, effort: str, *, without: tuple[str, ...] = ()) -> None:
    """Give options what an effort stands for, apart from nested ones in `without`."""
    nested: dict[str, dict[str, Any]] = {}
    for place, value in EFFORTS[effort].items():
        part, _, name = place.partition(".")
        if part not in without:
            nested.setdefault(part, {})[name] = value
    for part, values in nested.items():
        if hasattr(options, part):
            object.__setattr__(options, part, getattr(options, part).filled(values))
