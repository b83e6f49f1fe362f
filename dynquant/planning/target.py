"""Goal of a plan, as a user says it: a budget, a memory, a recipe, or another file's types.

Command lines are made of `Target`, so this module imports what computes only where it is used.
"""

import os
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from dynquant.analysis.errors.options import Types
from dynquant.errors import PlanError
from dynquant.options import Fallback, Flag, GroupSize, Options, Preset, TensorParallel
from dynquant.resources import parse_size

if TYPE_CHECKING:
    from dynquant.analysis.errors.table import ErrorTable
    from dynquant.checkpoints.model import Model
    from dynquant.formats.quant_types import QuantType
    from dynquant.planning.memory.budget import MemoryBudget

KV_TYPES = ("f16", "q8_0", "q4_0")
"""Types of the KV cache that memories are told for."""
GATE_UP, QKV = COUPLINGS = ("gate-up", "qkv")
"""Kinds of tensors that a runtime fuses in each layer; `planner` has their roles."""
MODULE_LEVELS = ("keep", "8bit", "lower")
"""Treatments of a vision tower or its projector: kept as stored, 8 bits, or types like all others."""


@dataclass(frozen=True)
class Target(Options):
    """Goal of a plan: at most one of preset, bits per weight, size, memory to fit in, another file's types and a
    recipe.
    """

    bpw: Annotated[float | None, Flag("Budget in bits per weight, of the whole file.", min=0.1, max=32)] = None
    size: Annotated[str | None, Flag("Budget in bytes, or as 140GB, 31.5MB, 12GiB.", min=1, is_size=True)] = None
    fits: Annotated[
        str | None,
        Flag(
            "Budget as device memory, as 24GB: less the KV cache and what else llama.cpp allocates.",
            min=1,
            is_size=True,
        ),
    ] = None
    context: Annotated[int, Flag("Tokens of KV cache, with --fits.", min=1, is_tokens=True)] = 8192
    kv_type: Annotated[str, Flag("Type of the KV cache, with --fits: f16, q8_0 or q4_0.", choices=KV_TYPES)] = "f16"
    couple: Annotated[
        tuple[str, ...],
        Flag(
            "Give the tensors that a runtime fuses in each layer one type: gate-up, qkv or both, as gate-up,qkv. "
            "llama.cpp does not need it.",
            choices=COUPLINGS,
        ),
    ] = ()
    preset: Preset = None
    like: Annotated[
        Path | None,
        Flag("The types of this .gguf file, or of this plan.json or its folder.", show_default=False),
    ] = None
    patterns: Annotated[
        str | None,
        Flag(
            "A llama-quantize command line or lines of regex=type, or a file that holds them.",
            ("--recipe",),
            show_default=False,
        ),
    ] = None
    fallback: Fallback = ()
    types: Types = ()
    floors: Annotated[
        bool,
        Flag(
            "Keep all but routed experts at 4 bits or more, where that costs no more than a tenth of the predicted KL: "
            "small budgets lower or drop these floors, and the plan says so."
        ),
    ] = True
    mtp_type: Annotated[
        str,
        Flag(
            "Type of the layers that predict tokens ahead (MTP), which no measured error decides: 6 bits or more keep "
            "what they save."
        ),
    ] = "q6_k"
    vision: Annotated[
        str,
        Flag(
            "Vision tower and projector as wholes: keep (as stored), 8bit, lower (types like all others), or auto, "
            "which decides by their output errors, and with --select by the KL of plans of each.",
            choices=("auto", *MODULE_LEVELS),
        ),
    ] = "auto"
    serves: Annotated[
        str | None,
        Flag(
            "vllm: choose among the schemes that vLLM serves from compressed-tensors (--types w2a16 to w8a16, "
            "w2a16_asym to w7a16_asym, fp8, nvfp4a16, mxfp4a16, bf16; default: all but _asym), for export -f "
            "compressed-tensors.",
            ("--for",),
            show_default=False,
            choices=("vllm",),
            parse=str.lower,
        ),
    ] = None
    tensor_parallel: TensorParallel = 1
    group_size: GroupSize = 128
    mixed_experts: Annotated[
        bool,
        Flag(
            "With --for vllm: routed experts of each layer have a scheme of their own, NVFP4 and BF16 among them; vLLM "
            "loads that, transformers does not."
        ),
    ] = False

    def __post_init__(self) -> None:
        super().__post_init__()
        types = {"--preset": self.preset, "--like": self.like, "--recipe": self.patterns}
        goals = types | {"--bpw": self.bpw, "--size": self.size, "--fits": self.fits}
        given = [flag for flag, value in goals.items() if value is not None]
        if self.mixed_experts and self.serves is None:
            raise PlanError("--mixed-experts goes with --for vllm; GGUF plans choose for each layer anyway.")
        if self.serves is None:
            self.refuse_unused("it goes with --for vllm.", "tensor_parallel", "group_size")
        if len(given) > 1:
            raise PlanError(
                f"Give one of --preset, --bpw, --size, --fits, --like and --recipe, not {' and '.join(given)}: each "
                "says alone which types the plan has."
            )
        if self.changed("mtp_type", "fallback"):
            from dynquant.formats.quant_types import quant_type

            for name in (self.mtp_type, *self.fallback):
                quant_type(name)
        if self.fallback and (self.serves is not None or (self.preset is None and self.patterns is None)):
            raise PlanError(
                "--fallback goes with --preset and --recipe; with a budget, Q2_0 and Q1_0 are candidates wherever "
                "blocks of 256 do not fit, and for vLLM there are no such types."
            )
        if self.like is not None or self.patterns is not None or self.serves is not None:
            self.refuse_unused("--like and --recipe have types of their own, and for vLLM they stay BF16.", "mtp_type")
        for flag, is_set in (("--couple", bool(self.couple)), (f"--vision {self.vision}", self.vision != "auto")):
            if is_set and given and given[0] in types:
                raise PlanError(f"{flag} goes with a budget; {given[0]} has types of its own.")
        if self.fits is None:
            self.refuse_unused("it goes with --fits.", "context", "kv_type")
        if self.has_types or self.serves is not None:
            self.refuse_unused("floors are for types of GGUF that the planner chooses.", "floors")

    @property
    def has_types(self) -> bool:
        """True when the types are asked for one by one, so that there is nothing to choose."""
        return self.preset is not None or self.like is not None or self.patterns is not None

    @property
    def fallbacks(self) -> "tuple[QuantType, ...]":
        """The types of `fallback`."""
        from dynquant.formats.quant_types import quant_type

        return tuple(map(quant_type, self.fallback))

    @property
    def recipe(self) -> str:
        """The words under which plan and file record what was asked for."""
        coupled = f", coupled {' '.join(self.couple)}" if self.couple else ""
        coupled += ", mixed experts" if self.mixed_experts else ""
        instead = f", fallback {' '.join(each.name for each in self.fallbacks)}" if self.fallback else ""
        if self.preset:
            return f"preset {self.preset.lower()}{instead}"
        if self.like is not None:
            return f"like {self.like.name}"
        if self.patterns is not None:
            file = f" {os.path.basename(self.patterns)}" if os.path.isfile(self.patterns) else ""
            return f"recipe{file}{instead}"
        if self.bpw is not None:
            return f"bpw {self.bpw:g}{coupled}"
        if self.fits is not None:
            return f"fits {parse_size(self.fits)}, context {self.context}, KV {self.kv_type}{coupled}"
        smallest = "floors" if self.serves is None else "smallest and 5 %"
        return (f"size {parse_size(self.size)}" if self.size else smallest) + coupled

    def memory(self, model: "Model") -> "MemoryBudget | None":
        """Return what `fits` leaves for the file, or None without it. Raises PlanError: KV cache and buffers alone take
        more, or the cache type does not fit the model's heads."""
        if self.fits is None:
            return None
        from dynquant.planning.memory.budget import memory_budget

        return memory_budget(model, parse_size(self.fits), context=self.context, kv_type=self.kv_type)

    def allowed(self, table: "ErrorTable") -> "ErrorTable":
        """Return the rows of the candidate types that were asked for."""
        return table.restricted_to([name.upper() for name in self.types]) if self.types else table

    def budget(self, num_weights: int) -> int | None:
        """File bytes, or None for the planner's default."""
        if self.bpw is not None:
            return int(self.bpw * num_weights / 8)
        return parse_size(self.size) if self.size else None
