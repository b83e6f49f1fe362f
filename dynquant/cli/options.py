"""Arguments and options that several commands share."""

from pathlib import Path
from typing import Annotated

import typer

ModelArg = Annotated[str, typer.Argument(help="Hugging Face directory or hub id, or a .gguf file.", show_default=False)]
PlanArg = Annotated[Path, typer.Argument(help="A plan.json or a .gguf file.", show_default=False)]
BaseGgufOpt = Annotated[
    Path | None,
    typer.Option(help="F32/F16/BF16 GGUF by llama.cpp's converter, for architectures dynquant does not convert."),
]
TextOpt = Annotated[
    str | None,
    typer.Option(help="Calibration text: .txt, .jsonl or a datasets id. Default: a small built-in text."),
]
DataOpt = Annotated[
    str | None,
    typer.Option(
        help="Samples for a vision-language model instead of text: .jsonl with images and text, messages, or question "
        "and answer.",
        show_default=False,
    ),
]
StrictOpt = Annotated[
    bool, typer.Option("--strict", help="With --data: refuse images that cannot be decoded instead of skipping them.")
]
TokensOpt = Annotated[int, typer.Option(help="Calibrate on at most this many tokens.")]
WindowOpt = Annotated[int, typer.Option(help="Tokens in a window.")]
SeedOpt = Annotated[int, typer.Option(help="Seed of everything that is sampled.")]
ThreadsOpt = Annotated[int | None, typer.Option(help="Threads. Default: one per usable core.")]
TypesOpt = Annotated[str | None, typer.Option(help="Candidate quant types, as iq1_s,iq2_xxs,q4_k.")]
PresetOpt = Annotated[
    str | None,
    typer.Option(
        help="f32, f16, bf16, uniform-TYPE, llama-FTYPE (llama.cpp's mixtures) or r1-iq1_s|iq1_m|iq2_xxs|q2_k_xl."
    ),
]
EncoderOpt = Annotated[
    str, typer.Option(help="dynquant: loses less at the same bytes. ggml: byte-equal to llama-quantize.")
]
DeviceOpt = Annotated[str | None, typer.Option(help="cpu or cuda. Default: cuda where there is one.")]
HessiansOpt = Annotated[
    str,
    typer.Option(
        help="Second moments for the dynquant encoder: activations, gradients (also a backward pass; better, and three "
        "times as long) or none."
    ),
]
HessianMemoryOpt = Annotated[
    str, typer.Option(help="Memory for second moments; experts of a layer share one matrix when each has no room.")
]
MaxMemoryOpt = Annotated[
    str | None, typer.Option(help="Host memory that the command may take, as 8GiB.", show_default=False)
]
StreamMemoryOpt = Annotated[
    str | None,
    typer.Option(
        "--max-memory",
        help="Memory of the whole process, as 8GB: the model is streamed, one decoder layer at a time. Default: "
        "streamed when it does not fit into the free memory.",
        show_default=False,
    ),
]
SpillOpt = Annotated[
    Path | None,
    typer.Option(
        help="Directory for hidden states of a streamed model; a killed run goes on from them. Default: the output's.",
        show_default=False,
    ),
]
RayOpt = Annotated[
    str | None,
    typer.Option(
        "--ray",
        help="Spread the work over a Ray cluster: its address HOST:PORT, or auto for one that Ray finds, else all of "
        "this machine.",
        show_default=False,
    ),
]
JsonOpt = Annotated[bool, typer.Option("--json", help="Print JSON instead of tables.")]
