"""Options of export, of the closing pass over a finished file, and of adapters for llama.cpp."""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

from dynquant.calibration.options import CalibrationOptions
from dynquant.effort import Effort, fill
from dynquant.options import (
    AllowDifference,
    BaseGguf,
    CalibrationText,
    EncoderName,
    Fallback,
    Flag,
    GroupSize,
    ModelPath,
    Mtp,
    Only,
    Options,
    Preset,
    Ray,
    TensorParallel,
    Window,
    Writes,
)
from dynquant.storage.file_names import STATS_NAME, files_beside

FORMATS = ("gguf", "safetensors", "compressed-tensors")
MMPROJ_TYPES = ("f32", "bf16", "f16", "q8_0")
"""Types that vision tower and projector may have beside those of a plan."""
TUNABLE_PARTS = ("scales", "norms", "biases", "routers")
TUNED_PARTS = TUNABLE_PARTS[:3]
"""Parts that are trained by default. Routers are not: with them textbook-moe-89m ends at KL 0.117 instead of 0.111 at
36.5 MB (reports/encoder.md), and the 16m no lower than without."""


def stats_of_preset(output: Path) -> Path:
    """Return where the statistics of an export by a preset are kept, beside it."""
    return output.with_name(f"{output.name.removesuffix('.gguf')}.{STATS_NAME}")


def modelfile_path(gguf: Path) -> Path:
    """Return the name of the Modelfile beside a GGUF file."""
    return gguf.with_suffix(".Modelfile")


def _beside(output: Path, typed: Mapping[str, Any]) -> list[Path]:
    from dynquant.checkpoints.gguf_layout import mmproj_path  # here, since `--help` imports this module

    files = [mmproj_path(output)] if typed["format"] == "gguf" else []
    if typed["modelfile"]:
        files.append(modelfile_path(output))
    if typed["split_max_size"]:  # first parts that are there, which have all metadata; their number is not known yet
        part = re.compile(rf"{re.escape(output.name.removesuffix('.gguf'))}-00001-of-\d{{5}}\.gguf")
        files += [file for file in output.parent.glob("*.gguf") if part.fullmatch(file.name)]
    if typed["preset"] and not typed["stats"]:
        stats = stats_of_preset(output)
        files += [stats, *files_beside(stats)]
    return files


@dataclass(frozen=True)
class ClosingPassOptions(Options):
    """Parts, text and time of the closing pass."""

    tune_minutes: Annotated[
        float,
        Flag(
            "Minutes of the closing pass at most, without loading the model and what --tune-sampled takes; it ends "
            "before when the held-out KL stops falling.",
            min=0.01,
        ),
    ] = 10.0
    tune_sampled: Annotated[
        int | None,
        Flag(
            "Tokens that the original writes itself, for the closing pass beside the text. Default: three times as "
            "many as the text has on a GPU, where they take seconds to minutes, else none.",
            min=0,
            is_tokens=True,
        ),
    ] = None
    tune_parts: Annotated[
        tuple[str, ...],
        Flag(
            "What the closing pass trains, of scales, norms, biases and routers (which hurt where measured).",
            choices=TUNABLE_PARTS,
        ),
    ] = TUNED_PARTS
    most_tokens: int = 131_072
    """Tokens that are trained on at most where no number is asked for."""
    patience: int = 3
    """Looks at the held-out KL without a gain before training ends."""


@dataclass(frozen=True, kw_only=True)
class ExportOptions(Options):
    """A model, the plan or preset in whose types it is written, and what it becomes."""

    model: ModelPath
    output: Annotated[
        Path,
        Flag("The .gguf file, or the directory of the others.", ("-o", "--output")),
        Writes("either", beside=_beside),
    ]
    plan: Annotated[Path | None, Flag("plan.json of `dynquant plan`, or its folder.")] = None
    preset: Preset = None
    fallback: Fallback = ()
    format: Annotated[
        str,
        Flag(
            "gguf, safetensors (for transformers) or compressed-tensors (for vLLM).",
            ("-f", "--format"),
            choices=FORMATS,
        ),
    ] = "gguf"
    stats: Annotated[Path | None, Flag("stats.safetensors. Default: the one beside the plan.")] = None
    calibration: Annotated[CalibrationOptions, Only(("text", "tokens", "sampled_tokens", "hessians"))] = field(
        default_factory=CalibrationOptions
    )
    encoder: EncoderName = "dynquant"
    asymmetric: Annotated[
        int,
        Flag(
            "Tokens of asymmetric calibration, as 32768: every matrix makes up for what quantized ones before it lost. "
            "Both models run six times, a layer at a time, on the text of the second moments, which it needs; the "
            "dynquant encoder alone does it. 0 for none.",
            min=0,
            is_tokens=True,
        ),
    ] = 0
    tune: Annotated[
        int | None,
        Flag(
            "Tokens of the closing pass at most, which tunes what has no codes (scales, norms, biases) on the KL "
            "to the original; 0 for none. Default: as many as help, up to 131072 (524288 with --effort high), with the "
            "dynquant encoder, "
            "where the model fits in memory.",
            min=0,
            is_tokens=True,
        ),
    ] = None
    closing: ClosingPassOptions = field(default_factory=ClosingPassOptions)
    split_max_size: Annotated[
        str | None, Flag("Split into files of at most this size, as 40GB.", min=1, is_size=True)
    ] = None
    resume: Annotated[bool, Flag("Continue an interrupted export.")] = True
    mmproj_type: Annotated[
        str | None,
        Flag(
            "One type for vision tower and projector, which go to mmproj-NAME.gguf: f32, bf16, f16 or q8_0. Default: "
            "the types of the plan.",
            show_default=False,
            choices=MMPROJ_TYPES,
            parse=str.lower,
        ),
    ] = None
    modelfile: Annotated[bool, Flag("Also write NAME.Modelfile, with which Ollama makes a model of the file.")] = False
    max_memory: Annotated[
        str | None, Flag("Host memory that the command may take, as 8GiB.", show_default=False, min=1, is_size=True)
    ] = None
    ray: Ray = None
    ship_weights: Annotated[
        bool, Flag("With --ray: send weights and statistics to workers that cannot read them by path.")
    ] = False
    base_gguf: BaseGguf = None
    mtp: Mtp = True
    tensor_parallel: TensorParallel = 1
    group_size: GroupSize = 128
    allow_difference: AllowDifference = False
    effort: Effort = "normal"
    blocks: Path | None = None
    """Folder of `encoding.store` that keeps every tensor's blocks, and what the original writes, for other exports of
    the model."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.format == "compressed-tensors" and self.effort == "high":  # no scheme is searched across rows
            object.__setattr__(self, "calibration", self.calibration.filled({"hessians": "gradients"}))
        fill(self, self.effort)
        if self.format == "compressed-tensors":
            self.calibration.refuse_two_sided()


@dataclass(frozen=True, kw_only=True)
class TuneFileOptions(Options):
    """A quantized file or checkpoint, its original, and the text on which it is tuned."""

    file: Annotated[
        Path,
        Flag("A quantized .gguf file, or a compressed-tensors directory.", is_argument=True, show_default=False),
    ]
    reference: Annotated[str, Flag("Its original: Hugging Face directory or hub id.")]
    output: Annotated[
        Path,
        Flag("The .gguf file or new directory to write; it has the same size.", ("-o", "--output")),
        Writes("either"),
    ]
    text: CalibrationText = None
    tokens: Annotated[
        int,
        Flag("Train on at most this many tokens; fewer when the held-out KL stops falling.", min=1, is_tokens=True),
    ] = 131072
    closing: ClosingPassOptions = field(default_factory=ClosingPassOptions)
    step_tokens: Annotated[
        int | None,
        Flag("Tokens in a step. Default: so many that there are about 128, 1024 to 4096.", min=1, is_tokens=True),
    ] = None
    window: Window = 512


@dataclass(frozen=True, kw_only=True)
class AdapterFileOptions(Options):
    """A LoRA adapter as PEFT saves it, and the file that llama.cpp reads."""

    adapter: Annotated[Path, Flag("Directory that save_pretrained wrote.", is_argument=True, show_default=False)]
    output: Annotated[Path, Flag("The .gguf file to write.", ("-o", "--output")), Writes(ending=".gguf")]
    base: Annotated[
        Path | None,
        Flag(
            "The model that the adapter was trained on: packed or original directory, or .gguf file; of architectures "
            "that llama.cpp's converter names, the original. Default: where the adapter says it was loaded from.",
            show_default=False,
        ),
    ] = None
