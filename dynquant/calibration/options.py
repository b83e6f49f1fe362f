"""Options of calibration."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Literal, Self, get_args

from dynquant.errors import OptionError, StatsError
from dynquant.options import (
    AllowDifference,
    BaseGguf,
    CalibrationText,
    Flag,
    ModelPath,
    Options,
    Ray,
    Strict,
    Window,
    Writes,
)
from dynquant.storage.file_names import STATS_NAME, files_beside

Hessians = Literal["none", "activations", "gradients", "two-sided"]
"""Second moments to take; with gradients, a token counts by its squared gradient of the KL divergence too, and with
both sides outputs have second moments of their gradients."""


@dataclass(frozen=True, kw_only=True)
class CalibrationOptions(Options):
    """Text or samples to run the model on (`text=None`: the mix that ships), what to measure, and in how much memory.

    With `data`, a file of samples with images, there is no text.
    """

    text: CalibrationText = None
    data: Annotated[
        str | None,
        Flag(
            "Samples for a vision-language model instead of text: .jsonl, .json or .parquet with images and text, "
            "messages, or question and answer.",
            show_default=False,
        ),
    ] = None
    strict: Strict = False
    tokens: Annotated[int, Flag("Calibrate on at most this many tokens.", min=0, is_tokens=True)] = 131072
    sampled_tokens: Annotated[
        int,
        Flag(
            "Calibrate also on this many tokens that the original writes itself, in its chat template too where it has "
            "one; with --tokens 0 on nothing else.",
            min=0,
            is_tokens=True,
        ),
    ] = 0
    window: Window = 512
    hessians: Annotated[
        Hessians,
        Flag(
            "Second moments for the dynquant encoder: activations, gradients (also a backward pass; better, and three "
            "times as long), two-sided (of gradients as well, so that errors are made up for across rows, too) or "
            "none. Default: activations; two-sided with --select of GGUF types, whose models run backward anyway.",
            show_default=False,
            choices=get_args(Hessians),
        ),
    ] = "activations"
    hessian_memory: Annotated[
        str | None,
        Flag(
            "Memory for second moments (of each side); experts of a layer share one matrix when each has no room. "
            "Default: 8GiB, or what a smaller machine or GPU has room for.",
            show_default=False,
            min=0,
            is_size=True,
        ),
    ] = None
    max_memory: Annotated[
        str | None,
        Flag(
            "Memory of the whole process, as 8GB: the model is streamed, one decoder layer at a time. Default: "
            "streamed when it does not fit into the free memory.",
            show_default=False,
            min=1,
            is_size=True,
        ),
    ] = None
    spill: Annotated[
        Path | None,
        Flag(
            "Directory for hidden states of a streamed model; a killed run goes on from them. Default: the output's.",
            show_default=False,
        ),
        Writes("folder"),
    ] = None
    ray: Ray = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.text is not None and self.data is not None:
            raise StatsError(
                f"Give either text (--calibration {self.text}) or samples with images (--data {self.data})."
            )
        if self.data is None:
            self.refuse_unused("it is for samples with images, given with --data FILE.", "strict")
        else:
            self.refuse_unused("samples, given with --data, have lengths of their own.", "window")
            self.refuse_unused("calibration is on the samples of --data.", "sampled_tokens")
        if not self.tokens + self.sampled_tokens:
            raise StatsError("--tokens 0 leaves nothing to calibrate on; give more, or --sampled-tokens N.")
        if self.hessians == "none":
            self.refuse_unused("--hessians none takes no second moments.", "hessian_memory")

    def refuse_two_sided(self) -> None:
        """Raise OptionError for second moments that the encoder of vLLM's schemes would make nothing of."""
        if self.hessians == "two-sided":
            raise OptionError(
                "--hessians two-sided takes second moments of outputs too, for which the encoder of vLLM's schemes has "
                "no use. Give gradients, activations or none."
            )

    def for_selected_plans(self) -> Self:
        """Return what plans that are chosen by their KL calibrate with: two-sided second moments of text, and of
        samples with images what is asked for."""
        return self if self.data is not None else self.filled({"hessians": "two-sided"})


@dataclass(frozen=True, kw_only=True)
class CalibrateOptions(Options):
    """A model, and the file of its statistics; they come from running it, or from an imatrix of llama.cpp."""

    model: ModelPath
    output: Annotated[
        Path,
        Flag("Where stats.safetensors goes.", ("-o", "--output")),
        Writes(beside=lambda output, typed: files_beside(output), ending=".safetensors"),
    ] = Path(STATS_NAME)
    calibration: CalibrationOptions = field(default_factory=CalibrationOptions)
    base_gguf: BaseGguf = None
    allow_difference: AllowDifference = False
    imatrix: Annotated[Path | None, Flag("Import a llama.cpp imatrix GGUF instead of running the model.")] = None
    imatrix_out: Annotated[
        Path | None, Flag("Also write the statistics as a llama.cpp imatrix GGUF."), Writes(ending=".gguf")
    ] = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.imatrix is not None:
            self.calibration.refuse_unused("--imatrix has statistics of its own.")
