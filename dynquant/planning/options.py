"""Options of planning; `target` has those that say what the plan should reach."""

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated

from dynquant.calibration.options import CalibrationOptions
from dynquant.effort import Effort, fill
from dynquant.errors import PlanError
from dynquant.options import MODEL_HELP, AllowDifference, BaseGguf, Exact, Flag, MeasuringEncoder, Mtp, Options, Writes
from dynquant.planning.target import KV_TYPES, Target
from dynquant.resources import shown_value
from dynquant.storage.file_names import files_of_plan

CLOSED_FORM, FISHER, UNIT_KL = METHODS = ("closed-form", "fisher-probe", "unit-kl")  # ways to price tensors
_PLAN_FOLDER = Writes(
    "folder", unless="config_only", beside=lambda output, typed: files_of_plan(output), reuses=("stats",)
)


def parse_range(text: str) -> tuple[float, float]:
    """Return the two numbers of `1.6:4.5`. Raises PlanError: it is something else."""
    try:
        low, high = map(float, text.split(":"))
    except ValueError as error:
        shown = shown_value(text)
        raise PlanError(f"--frontier {shown} is no range of bits per weight; give one as 1.6:4.5.") from error
    return low, high


@dataclass(frozen=True, kw_only=True)
class SearchOptions(Options):
    """Ways to price and select. Tokens are of the calibration source; a probe is one window of `probe_window`
    tokens."""

    methods: Annotated[
        tuple[str, ...],
        Flag(
            "How tensors are priced: closed-form (seconds to minutes), fisher-probe (backward passes against the "
            "bytes of --encoder; much better at low bits), unit-kl (also a backward pass of the plan's own KL; better "
            "still below 2.5 bits). Several: as fisher-probe,unit-kl. Default: closed-form, and all with --select.",
            ("--sensitivity",),
            choices=METHODS,
        ),
    ] = ()
    """Empty for the default; see `with_methods`."""
    select: Annotated[bool, Flag("Render several plans and take the one with the lowest KL on text kept apart.")] = (
        False
    )
    text: Annotated[
        Path | None,
        Flag(
            "Text, or with --data samples, to select on. Default: pieces from all over what calibration left of its "
            "own, or held back.",
            ("--selection-text",),
        ),
    ] = None
    probes: Annotated[int, Flag("Windows of 256 tokens for the Fisher probe.", min=1)] = 32
    probe_window: int = 256
    unit_tokens: int = 4096
    rounds: int = 2
    selection_tokens: int = 4096
    selection_window: int = 256
    """Tokens of the shortest pieces that plans are scored on: many short ones show more of a text than few long."""
    selection_span: int = 131_072
    """Tokens behind the calibrated ones over which the pieces are spread."""
    check_plans: Annotated[
        int, Flag("Also draw this many plans and correlate their predicted and measured KL.", min=0)
    ] = 0
    frontier: Annotated[
        tuple[float, float] | None,
        Flag(
            "Also measure the planner over this range of bits per weight, as 1.6:4.5, beside uniform types, "
            "llama.cpp's mixtures and the R1 recipes; drawn in the report.",
            parse=parse_range,
        ),
    ] = None
    frontier_points: int = 8

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.frontier is not None and not 0 < self.frontier[0] < self.frontier[1] <= 32:
            low, high = self.frontier
            raise PlanError(f"--frontier {low:g}:{high:g} is no range of bits per weight; give one as 1.6:4.5.")
        if self.check_plans and self.check_plans < 5:
            raise PlanError(f"--check-plans {self.check_plans} is too few for a rank correlation; give 5 or more.")

    def refuse_idle(self) -> None:
        """Raise OptionError for what was asked for and goes with something else that was not."""
        measures = self.select or self.frontier is not None
        if not measures and not self.check_plans:
            self.refuse_unused("it goes with --select, --frontier or --check-plans.", "text")
        if FISHER not in self.methods and (self.methods or not measures):
            self.refuse_unused("it goes with --sensitivity fisher-probe.", "probes")

    def with_methods(self, *, on_text: bool) -> "SearchOptions":
        """Return the options with the methods that an empty tuple stands for."""
        measures = on_text and (self.select or self.frontier is not None)
        return replace(self, methods=self.methods or (METHODS if measures else (CLOSED_FORM,)))

    @property
    def runs_model(self) -> bool:
        """True when anything but the closed form is asked for."""
        return self.select or self.runs_on_text

    @property
    def runs_on_text(self) -> bool:
        """True when anything is asked for that samples with pictures do not serve."""
        return self.check_plans > 0 or self.frontier is not None or not {*self.methods} <= {CLOSED_FORM}


@dataclass(frozen=True, kw_only=True)
class PlanOptions(Options):
    """A model, what its plan should reach and how that is found out, and the folder where everything goes."""

    model: Annotated[str | None, Flag(MODEL_HELP, is_argument=True)] = None
    output: Annotated[Path, Flag("Where all files of the plan go.", ("-o", "--output")), _PLAN_FOLDER] = Path("plan")
    target: Target = field(default_factory=Target)
    calibration: CalibrationOptions = field(default_factory=CalibrationOptions)
    stats: Annotated[Path | None, Flag("Use these statistics instead of calibrating.")] = None
    encoder: MeasuringEncoder = "dynquant"
    exact: Exact = False
    base_gguf: BaseGguf = None
    mtp: Mtp = True
    prune_experts: Annotated[
        int,
        Flag(
            "Leave this many routed experts of every layer out: those that the calibration text uses least, never one "
            "that holds a super weight. May pay below about 2 bits per weight, and a rare subject may go with them.",
            min=0,
        ),
    ] = 0
    allow_difference: AllowDifference = False
    search: SearchOptions = field(default_factory=SearchOptions)
    effort: Effort = "normal"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.target.serves is not None:
            self.refuse_unused("it is for plans of GGUF types.", "effort")
        fill(self, self.effort, without=("search",) if self.target.has_types else ())
        if self.search.select and self.target.serves is None:
            object.__setattr__(self, "calibration", self.calibration.for_selected_plans())
        self.search.refuse_idle()
        if self.target.has_types:
            self.search.refuse_unused("--preset, --like and --recipe leave nothing to choose.")
        if self.target.serves is not None:
            self.refuse_unused("schemes of vLLM have an encoder of their own.", "encoder", "exact")
            self.calibration.refuse_two_sided()


@dataclass(frozen=True, kw_only=True)
class FitOptions(Options):
    """A file, and the memory in which it is to run."""

    file: Annotated[Path, Flag("A .gguf file.", is_argument=True, show_default=False)]
    ram: Annotated[
        str | None, Flag("Host memory, as 64GB. Default: enough for the rest, which is told.", min=1, is_size=True)
    ] = None
    gpu: Annotated[
        str | None,
        Flag(
            "Memory of the GPU, as 24GB or 24GiB. Default: none with --ram, else a row for each common card.",
            min=1,
            is_size=True,
        ),
    ] = None
    context: Annotated[
        int | None,
        Flag(
            "Tokens of KV cache. Default: 8192, or what the model was trained for.",
            min=1,
            show_default=False,
            is_tokens=True,
        ),
    ] = None
    kv_type: Annotated[str, Flag("Type of the KV cache: f16, q8_0 or q4_0.", choices=KV_TYPES)] = "f16"
