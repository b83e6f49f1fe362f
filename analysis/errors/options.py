"""Options of the error table."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

from dynquant.options import BaseGguf, Exact, Flag, MeasuringEncoder, ModelPath, Options, Ray, Writes
from dynquant.storage.file_names import ERRORS_NAME, table_beside

DEFAULT_TYPES = (
    "IQ1_S", "IQ1_M", "IQ2_XXS", "IQ2_S", "Q2_K", "IQ3_XXS", "IQ3_S", "IQ4_XS", "Q5_K", "Q6_K", "Q8_0",
)  # fmt: skip
"""Candidates of `plan`: the useful types of each size. IQ2_XS and Q3_K lose to their neighbours at equal bytes."""
Types = Annotated[
    tuple[str, ...],
    Flag(
        f"Candidate quant types, as iq1_s,iq2_xxs,q4_k. Default: {', '.join(DEFAULT_TYPES).lower()}.",
        show_default=False,
    ),
]


@dataclass(frozen=True, kw_only=True)
class TableOptions(Options):
    """Which types are measured (none: `DEFAULT_TYPES`), by which encoder, how exactly, and where."""

    types: Types = ()
    encoder: MeasuringEncoder = "dynquant"
    exact: Exact = False
    base_gguf: BaseGguf = None
    ray: Ray = None


@dataclass(frozen=True, kw_only=True)
class AnalyzeOptions(Options):
    """A model with its statistics, and the file of its error table."""

    model: ModelPath
    stats: Annotated[Path, Flag("stats.safetensors of `dynquant calibrate`.")]
    output: Annotated[
        Path,
        Flag("Where errors.json (and errors.csv) go.", ("-o", "--output")),
        Writes(beside=lambda output, typed: [table_beside(output)], ending=".json"),
    ] = Path(ERRORS_NAME)
    table: TableOptions = field(default_factory=TableOptions)
