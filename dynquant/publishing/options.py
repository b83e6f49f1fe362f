"""Options of a release: the sizes of a family of files, how they are made and measured, and where they go."""

import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

from dynquant.analysis.errors.options import Types
from dynquant.calibration.options import CalibrationOptions
from dynquant.effort import Effort, fill
from dynquant.errors import OptionError
from dynquant.evaluation.options import Scorings, TaskOptions
from dynquant.exporters.options import ExportOptions
from dynquant.options import EncoderName, Flag, ModelPath, Only, Options, Writes, typed_fields
from dynquant.planning.options import PlanOptions, SearchOptions
from dynquant.planning.target import KV_TYPES, Target
from dynquant.resources import shown_value
from dynquant.storage.file_names import RELEASE_NAME, files_of_plan

CARD_NAME, RECORD_NAME, PLOT_NAME = "README.md", RELEASE_NAME, "kl_against_size"
WORK_NAME, REPORTS_NAME = "work", "evaluation"
"""Folders in a release: what is measured and encoded on the way, and the reports of `eval`."""
DEFAULT_POINTS = 6


def _in_release(output: Path, typed: Mapping[str, Any]) -> list[Path]:
    return [output / RECORD_NAME, *files_of_plan(output / WORK_NAME)]


_CALIBRATION = Only(
    ("text", "data", "strict", "tokens", "sampled_tokens", "window", "hessians", "hessian_memory", "max_memory")
)
_ASKED = Only(("text", "max_tokens", "mmlu_data", "shots", "num_shots", "limit", "scoring", "prompts", "new_tokens"))


@dataclass(frozen=True, kw_only=True)
class ReleaseTasks(TaskOptions):
    """Inputs that every file is measured on, as `eval` does it."""

    text: Annotated[
        tuple[Path, ...],
        Flag("Text that every file is measured on. May be repeated. Default: what calibration left of its own."),
    ] = ()
    max_tokens: Annotated[
        int, Flag("Tokens of each --text; --tokens are those of calibration.", min=2, is_tokens=True)
    ] = 8192
    mmlu_data: Annotated[
        str | None, Flag("Multiple-choice questions for accuracies, .jsonl, .json, .parquet or a datasets id.")
    ] = None
    scoring: Scorings = ("letter",)
    prompts: Annotated[
        int, Flag("Also let every file go on from so many starts of each text: divergence@N and loops.", min=0)
    ] = 0
    new_tokens: Annotated[int, Flag("With --prompts: tokens that it writes after each.", min=1, is_tokens=True)] = 128


@dataclass(frozen=True, kw_only=True)
class ReleaseOptions(Options):
    """A model, the sizes in which it is published, and the folder that holds them with their card."""

    model: ModelPath
    output: Annotated[Path, Flag("Folder of the release.", ("-o", "--output")), Writes("folder", beside=_in_release)]
    sizes: Annotated[
        str | None,
        Flag(
            f"Range of bits per weight, as 1.8:5.0: {DEFAULT_POINTS} sizes, evenly in logarithm; 1.8:5.0:8 for eight.",
            show_default=False,
        ),
    ] = None
    bpw: Annotated[tuple[str, ...], Flag("Sizes in bits per weight, as 1.8,2.1,2.5,3.0,4.5.")] = ()
    fits: Annotated[tuple[str, ...], Flag("Sizes as device memories that a file should fit in, as 8GB,16GB,24GB.")] = ()
    context: Annotated[
        int,
        Flag("Tokens of context that memories are told for, and that --fits leaves room for.", min=1, is_tokens=True),
    ] = 8192
    kv_type: Annotated[str, Flag("Type of the KV cache in these memories: f16, q8_0 or q4_0.", choices=KV_TYPES)] = (
        "f16"
    )
    types: Types = ()
    calibration: Annotated[CalibrationOptions, _CALIBRATION] = field(default_factory=CalibrationOptions)
    select: Annotated[bool, Flag("Choose every size among several plans by its KL, as plan --select.")] = False
    encoder: EncoderName = "dynquant"
    tune: Annotated[
        int,
        Flag(
            "Tokens of export's closing pass for every file, which lowers the KL in minutes a file.",
            min=0,
            is_tokens=True,
        ),
    ] = 0
    effort: Effort = "normal"
    like: Annotated[
        tuple[Path, ...],
        Flag(
            "A published recipe to compare with: a .gguf file, a plan, or OWNER/REPO/FILE.gguf of the Hub. Its types "
            "are measured as a row of the card, and not released. May be repeated."
        ),
    ] = ()
    packed: Annotated[bool, Flag("Also write every size as packed safetensors for transformers.")] = False
    asked: Annotated[ReleaseTasks, _ASKED] = field(default_factory=ReleaseTasks)
    name: Annotated[str | None, Flag("First word of the files' names. Default: the model's.", show_default=False)] = (
        None
    )
    base_model: Annotated[
        str | None, Flag("OWNER/NAME of the original, for the card. Default: MODEL where it is a hub id.")
    ] = None
    quantized_by: Annotated[str | None, Flag("Your name, for the card.")] = None
    push: Annotated[
        str | None, Flag("Show what would go to this repository of the Hub, OWNER/REPO; with --yes it goes there.")
    ] = None
    yes: Annotated[bool, Flag("With --push: create the repository and upload, one commit a file.")] = False
    selection_span: int = SearchOptions.selection_span
    """Tokens behind the calibrated ones, of which plans are chosen on pieces; without a text, `release` leaves some
    behind them to measure on."""

    def __post_init__(self) -> None:
        super().__post_init__()
        fill(self, self.effort)
        flags = {"--sizes": self.sizes, "--bpw": self.bpw, "--fits": self.fits}
        given = [flag for flag, value in flags.items() if value]
        if len(given) != 1:
            raise OptionError(
                f"Give the sizes once, as --sizes LOW:HIGH, --bpw or --fits, not {' and '.join(given) or 'none'}: each "
                "says alone which files there are."
            )
        if self.name is not None and not _names_a_file(self.name):
            raise OptionError(f"--name {self.name!r}: files are called by it, so it is one word of a name without /.")
        if self.push is not None and not re.fullmatch(r"[\w.-]+/[\w.-]+", self.push, re.ASCII):
            raise OptionError(f"--push {self.push} is no repository of the Hub; give it as OWNER/REPO.")
        if self.push is None:
            self.refuse_unused("it goes with --push OWNER/REPO.", "yes")
        if not self.asked.prompts:
            self.asked.refuse_unused("it goes with --prompts N.", "new_tokens")
        if self.asked.mmlu_data is None:
            self.asked.refuse_unused(
                "it is for questions, given with --mmlu-data.", "shots", "num_shots", "limit", "scoring"
            )
        recipes = [target.recipe for target in self.targets]
        if twice := [recipe for recipe in recipes if recipes.count(recipe) > 1]:
            raise OptionError(f"The size `{twice[0]}` is asked for twice; leave one out.")

    @property
    def targets(self) -> list[Target]:
        """Goals of the plans, one a file, as `plan` takes them."""
        if self.fits:
            memory = {"context": self.context, "kv_type": self.kv_type, "types": self.types}
            return [Target(fits=size, **memory) for size in self.fits]
        bits = _evenly(self.sizes) if self.sizes else [_number(size, "--bpw") for size in self.bpw]
        with typed_fields(()):  # what was typed is the release's: its card tells of --context
            return [Target(bpw=size, types=self.types) for size in bits]

    def asking_for(self, requests: Collection[str]) -> "ReleaseOptions":
        """Return the options of a run that asks for these sizes alone, which are some of this one's."""
        targets = [target for target in self.targets if target.recipe in requests]
        if len(targets) == len(self.targets):
            return self
        if self.fits:
            return self.changed_to({"fits": tuple(str(target.fits) for target in targets)})
        return self.changed_to({"sizes": None, "bpw": tuple(str(target.bpw) for target in targets)})

    @property
    def of_plans(self) -> PlanOptions:
        """Options by which all sizes are planned; `target` is none of them."""
        return PlanOptions(
            model=self.model,
            output=self.output / WORK_NAME,
            calibration=self.calibration,
            encoder=self.encoder,
            search=SearchOptions(select=self.select, selection_span=self.selection_span),
            effort=self.effort,
        )

    def of_export(self, output: Path, plan: Path) -> ExportOptions:
        """Return the options by which one size is written."""
        is_default = self.effort != "normal" and not self.changed("tune")
        return ExportOptions(
            model=self.model,
            output=output,
            plan=plan,
            max_memory=self.calibration.max_memory,
            encoder=self.encoder,
            tune=None if is_default else self.tune,
            effort=self.effort,
        )


def _names_a_file(name: str) -> bool:
    """Return whether a text is the name of a file, or its beginning; empty, `.` and `..` are none."""
    return Path(name).name == name and name.isprintable() and name.strip(". ") != ""


def _evenly(sizes: str) -> list[float]:
    """Return bits per weight of a range as `1.8:5.0` or `1.8:5.0:8`, evenly in logarithm."""
    parts, shown = sizes.split(":"), shown_value(sizes)
    if len(parts) not in (2, 3):
        raise OptionError(f"--sizes {shown} is no range of bits per weight; give one as 1.8:5.0, or 1.8:5.0:8.")
    low, high, count = (_number(part, "--sizes") for part in (*parts, str(DEFAULT_POINTS))[:3])
    if not (0 < low < high <= 32 and 2 <= count <= 99 and count == int(count)):
        raise OptionError(
            f"--sizes {shown} is no range: bits per weight rise from above 0 to 32 at most, with 2 to 99 sizes."
        )
    return [round(low * (high / low) ** (step / (int(count) - 1)), 2) for step in range(int(count))]


def _number(text: str, flag: str) -> float:
    try:
        return float(text)
    except ValueError as error:
        raise OptionError(f"{flag} {shown_value(text)} is no number of bits per weight.") from error
