"""Options of a step are one dataclass beside its door; `Flag` says what the command line shows of a field.

    tokens: Annotated[int, Flag("Calibrate on this many tokens.")] = 131072

`cli/terminal/parameters.py` turns such fields into parameters of a command, so that a flag, its default and its help
stand once.
A field without a `Flag` is for callers in Python; a field that is itself such a dataclass shows its fields, or those
that `Only` names.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal


@dataclass(frozen=True)
class Flag:
    """Appearance of a field of an options dataclass on the command line."""

    help: str
    names: tuple[str, ...] = ()
    """Such as `("-o", "--output")`; empty for the field's own name with dashes."""
    is_argument: bool = False
    show_default: bool = True
    min: float | None = None
    max: float | None = None
    parse: Callable[[str], Any] | None = None
    """Makes the value of what was typed; a field of type tuple[str, ...] is split at commas without it."""


@dataclass(frozen=True)
class Only:
    """Fields of a nested options dataclass that a command shows; the others keep their defaults."""

    names: tuple[str, ...]


@dataclass(frozen=True)
class Writes:
    """Note on the path of an output: no other process writes it meanwhile, and it is none of what the command reads."""

    kind: Literal["file", "folder", "new folder", "either"] = "file"
    """A folder may hold inputs, too; a new folder is deleted and made again."""
    unless: str = ""
    """Parameter under which the command does not write it."""


MODEL_HELP = "Hugging Face directory or hub id, or a .gguf file."
ModelPath = Annotated[str, Flag(MODEL_HELP, is_argument=True, show_default=False)]
BaseGguf = Annotated[
    Path | None, Flag("F32/F16/BF16 GGUF by llama.cpp's converter, for architectures dynquant does not convert.")
]
Types = Annotated[tuple[str, ...], Flag("Candidate quant types, as iq1_s,iq2_xxs,q4_k.")]
Preset = Annotated[
    str | None,
    Flag("f32, f16, bf16, uniform-TYPE, llama-FTYPE (llama.cpp's mixtures) or r1-iq1_s|iq1_m|iq2_xxs|q2_k_xl."),
]
EncoderName = Annotated[
    str, Flag("dynquant: loses less at the same bytes. ggml: byte-equal to llama-quantize.", ("--encoder",))
]
MeasuringEncoder = Annotated[
    str,
    Flag(
        "Encoder that errors are measured with. They are those of the bytes that ship where `export` gets the same "
        "one; its default is dynquant, which loses less at the same bytes. ggml: byte-equal to llama-quantize.",
        ("--encoder",),
    ),
]
CalibrationText = Annotated[
    str | None,
    Flag(
        "Calibration text: .txt, .jsonl, .csv, .parquet or a datasets id. Default: a small built-in text.",
        ("--calibration",),
    ),
]
Strict = Annotated[
    bool, Flag("With --data: refuse images that cannot be decoded instead of skipping them.", ("--strict",))
]
Window = Annotated[int, Flag("Tokens in a window.")]
Ray = Annotated[
    str | None,
    Flag(
        "Spread the work over a Ray cluster: its address HOST:PORT, or auto for one that Ray finds, else all of this "
        "machine.",
        show_default=False,
    ),
]
"""Fields that several steps share."""
