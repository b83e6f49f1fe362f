"""Goal of a plan, as a user says it: a budget, a memory, a recipe, or another file's types."""

import os
from dataclasses import dataclass
from pathlib import Path

from dynquant.checkpoints.model import Model
from dynquant.errors import PlanError
from dynquant.planning.memory_budget import MemoryBudget, check_cache, memory_budget
from dynquant.planning.planner import check_couplings
from dynquant.planning.vision_modules import LEVELS
from dynquant.resources import parse_size


@dataclass(frozen=True)
class Target:
    """Goal of a plan: at most one of preset, bits per weight, size, memory to fit in, another file's types and a
    recipe.

    `like` is a .gguf or plan.json; `patterns` a llama-quantize command line, `regex=type` lines, or a file with either.
    """

    preset: str | None = None
    bpw: float | None = None
    size: str | None = None
    like: Path | None = None
    patterns: str | None = None
    types: tuple[str, ...] | None = None
    floors: bool = True
    fits: str | None = None
    """Device memory that must hold the file, the KV cache of `context` tokens and llama.cpp's buffers."""
    context: int = 8192
    kv_type: str = "f16"
    couple: tuple[str, ...] = ()
    """Kinds of `planner.COUPLINGS`."""
    vision: str = "auto"
    """Treatment of a vision tower and its projector: keep, 8bit, lower, or auto for what was measured."""

    def __post_init__(self) -> None:
        fields = {
            "preset": "preset",
            "bpw": "bpw",
            "size": "size",
            "fits": "fits",
            "like": "like",
            "patterns": "recipe",
        }
        given = [f"--{option}" for field, option in fields.items() if getattr(self, field) is not None]
        if len(given) > 1:
            raise PlanError(
                f"Give one of --preset, --bpw, --size, --fits, --like and --recipe, not {' and '.join(given)}: each "
                "says alone which types the plan has."
            )
        check_couplings(self.couple)
        if self.vision not in ("auto", *LEVELS):
            raise PlanError(f"--vision {self.vision} is not known; give auto, {', '.join(LEVELS)}.")
        if self.couple and given and given[0] in ("--preset", "--like", "--recipe"):
            raise PlanError(f"--couple goes with a budget; {given[0]} has types of its own.")
        if self.vision != "auto" and given and given[0] in ("--preset", "--like", "--recipe"):
            raise PlanError(f"--vision {self.vision} goes with a budget; {given[0]} has types of its own.")
        if self.fits is not None:
            parse_size(self.fits)
            check_cache(self.context, self.kv_type)
        if self.bpw is not None and not 0 < self.bpw <= 32:
            raise PlanError(f"--bpw {self.bpw} is not a number of bits per weight; give one between 1.6 and 16.")
        if self.size is not None:
            parse_size(self.size)

    @property
    def recipe(self) -> str:
        """The words under which plan and file record what was asked for."""
        coupled = f", coupled {' '.join(self.couple)}" if self.couple else ""
        if self.preset:
            return f"preset {self.preset.lower()}"
        if self.like is not None:
            return f"like {self.like.name}"
        if self.patterns is not None:
            return f"recipe {os.path.basename(self.patterns)}" if os.path.isfile(self.patterns) else "recipe"
        if self.bpw is not None:
            return f"bpw {self.bpw:g}{coupled}"
        if self.fits is not None:
            return f"fits {parse_size(self.fits)}, context {self.context}, KV {self.kv_type}{coupled}"
        return (f"size {parse_size(self.size)}" if self.size else "floors") + coupled

    def memory(self, model: Model) -> MemoryBudget | None:
        """Return what `fits` leaves for the file, or None without it.

        Raises:
            PlanError: KV cache and buffers alone take more, or the cache type does not fit the model's heads.
        """
        if self.fits is None:
            return None
        return memory_budget(model, parse_size(self.fits), context=self.context, kv_type=self.kv_type)

    def budget(self, num_weights: int) -> int | None:
        """File bytes, or None for the planner's default."""
        if self.bpw is not None:
            return int(self.bpw * num_weights / 8)
        return parse_size(self.size) if self.size else None
