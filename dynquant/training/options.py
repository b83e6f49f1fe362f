"""Options of training adapters."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from dynquant.options import Flag, Former, Options, Window, Writes

if TYPE_CHECKING:
    import torch

STORED = ("float32", "bfloat16")
RESIDUAL, ZERO = "residual", "zero"
"""Starts of an adapter: from what quantization took, or as no change at all."""
_BLEND = {RESIDUAL: 0.5, ZERO: 1.0}
"""Default shares: the start at the residual knows what training forgets."""
LARGE = 1_000_000_000
"""Weights from which a model is large: memory decides what else there is room for."""
KEPT = "The last checkpoint is kept; steps after it are lost."
LearningRate = Annotated[float, Flag("Highest learning rate; warmup, then a cosine to zero.", min=0, max=1)]
Packed = Annotated[
    str,
    Flag("Packed model: directory of `export -f safetensors`, or a .gguf file.", is_argument=True, show_default=False),
]
Output = Annotated[Path, Flag("Directory of the adapter.", ("-o", "--output")), Writes("new folder")]
Resume = Annotated[bool, Flag("Continue an interrupted run.")]


@dataclass(frozen=True)
class TrainOptions(Options):
    """The adapter and its training. Rates follow a cosine with `warmup` as a share of all steps.

    `batch_size` counts the examples of an optimizer step, which are run `micro_batch` at a time. The held-out loss is
    measured `evaluations` times; after `patience` measurements without a new minimum the run stops, and the adapter of
    the minimum is kept. `gradient_checkpointing` None recomputes activations on a GPU from 10^9 weights.
    """

    rank: Annotated[int, Flag("Rank of the adapter.", min=1, max=4096)] = 16
    alpha: Annotated[
        int | None, Flag("The adapter is scaled by alpha / rank. Default: twice the rank.", min=1, max=65536)
    ] = None
    rslora: Annotated[bool, Flag("Scale by alpha / sqrt(rank) instead.", ("--rslora",))] = False
    experts: Annotated[bool, Flag("Adapt the routed experts too.")] = True
    llama_cpp: Annotated[
        bool,
        Flag("Adapt only layers to which llama.cpp applies adapters, for export-adapter.", ("--for-llama-cpp",)),
        Former("--llama-cpp"),
    ] = False
    learning_rate: LearningRate = 5e-4
    epochs: Annotated[float, Flag("Passes over the training part, at most.", min=0, max=1000)] = 3.0
    max_steps: Annotated[int | None, Flag("Optimizer steps instead of --epochs.", min=1)] = None
    batch_size: Annotated[int, Flag("Examples of an optimizer step.", min=1, max=65536)] = 8
    micro_batch: Annotated[int | None, Flag("Examples run at a time. Default: the whole batch.", min=1, max=65536)] = (
        None
    )
    warmup: float = 0.05
    evaluations: Annotated[int, Flag("Measure the held-out loss, and save a checkpoint, this many times.", min=1)] = 10
    patience: Annotated[int, Flag("Stop after this many measurements without a new minimum.", min=1)] = 3
    gradient_checkpointing: Annotated[
        bool | None,
        Flag("Recompute activations to save memory. Default: on a GPU, from a billion weights.", show_default=False),
    ] = None
    seed: int = 0
    store: Annotated[
        str, Flag("Type of the adapter's file: float32, or bfloat16 in half the bytes.", choices=STORED)
    ] = "float32"
    """One of STORED; the adapter is trained in float32."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.max_steps is not None:
            self.refuse_unused("--max-steps says how long to train.", "epochs")

    @property
    def lora_alpha(self) -> int:
        """`alpha`, by default twice the rank."""
        return 2 * self.rank if self.alpha is None else self.alpha

    @property
    def stored_dtype(self) -> "torch.dtype":
        """`store` as PyTorch has it."""
        import torch

        return getattr(torch, self.store)


@dataclass(frozen=True)
class HealTrainOptions(TrainOptions):
    """The adapter of `heal` and its training."""

    learning_rate: LearningRate = 1e-3
    batch_size: Annotated[int, Flag("Windows of an optimizer step.", min=1, max=65536)] = 4


@dataclass(frozen=True)
class HealData(Options):
    """Text to train on and text to measure on. Without `text`, the part of the data that was kept apart is measured."""

    data: Annotated[str | None, Flag("Text to train on, as --calibration takes it. Default: dynquant-mix-2.")] = None
    tokens: Annotated[int, Flag("Train on at most this many tokens of it.", min=2, is_tokens=True)] = 524_288
    sampled_tokens: Annotated[
        int, Flag("Also train on this many tokens that the original writes itself.", min=0, is_tokens=True)
    ] = 0
    window: Window = 512
    text: Annotated[
        tuple[Path, ...],
        Flag("Held-out text to measure on, likewise. May be repeated. Default: a part of the data, kept apart."),
    ] = ()
    max_tokens: Annotated[
        int, Flag("Tokens of each --text; --tokens are those to train on.", min=2, is_tokens=True)
    ] = 8192
    mmlu_data: Annotated[str | None, Flag("Questions to measure accuracy on, as eval takes them.")] = None
    shots: Annotated[str | None, Flag("Few-shot questions, in the same forms.")] = None
    num_shots: Annotated[int, Flag("Shots before each question.", min=0)] = 5
    limit: Annotated[int | None, Flag("At most this many questions, spread evenly.", min=1)] = None
    cache_dir: Annotated[
        Path | None, Flag("Keep the original's distributions here. Default: beside the output.", ("--reference-cache",))
    ] = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.mmlu_data is None:
            self.refuse_unused("it goes with --mmlu-data.", "shots", "num_shots", "limit")


@dataclass(frozen=True, kw_only=True)
class FinetuneOptions(Options):
    """A packed model, the chats that it learns, and the adapter."""

    packed: Packed
    output: Output
    data: Annotated[
        Path,
        Flag('.jsonl, .json, .csv or .parquet with "messages", "prompt" and "completion", or "text" in each record.'),
    ]
    held_out: Annotated[float, Flag("Share of the lines that is held out.", min=0, max=0.9)] = 0.1
    max_length: Annotated[int, Flag("Tokens of an example; longer ones are cut.", min=2, is_tokens=True)] = 1024
    base: Annotated[
        str | None,
        Flag(
            "The original, Hugging Face directory or hub id. A .gguf file of an architecture without a family is "
            "loaded by it; its tokenizer is used."
        ),
    ] = None
    tokenizer: Annotated[
        str | None, Flag("Model whose tokenizer to use. Default: that of --base, or of the packed model.")
    ] = None
    training: TrainOptions = field(default_factory=TrainOptions)
    resume: Resume = True


@dataclass(frozen=True, kw_only=True)
class HealOptions(Options):
    """A packed model, its original, the text between them, and the adapter."""

    packed: Packed
    reference: Annotated[
        str,
        Flag(
            "The original: Hugging Face directory, hub id or .gguf; the directory or id for a packed .gguf file of an "
            "architecture without a family."
        ),
    ]
    output: Output
    data: HealData = field(default_factory=HealData)
    start: Annotated[
        str,
        Flag(
            "residual: the adapter starts from what quantization took of the weights. zero: as no change.",
            choices=tuple(_BLEND),
        ),
    ] = RESIDUAL
    blend: Annotated[
        float | None,
        Flag(
            "Share of the way from the start to what training made of the adapter; less keeps more of what the text "
            "does not ask for. Default: 0.5 from the residual, 1 from zero.",
            min=0,
            max=1,
        ),
    ] = None
    training: HealTrainOptions = field(default_factory=HealTrainOptions)
    resume: Resume = True

    @property
    def share(self) -> float:
        """Share of the way from its start to the best step that the adapter goes."""
        return _BLEND[self.start] if self.blend is None else self.blend

    @property
    def reference_cache(self) -> Path:
        """Directory of the original's distributions."""
        return self.data.cache_dir or self.output.with_name(f"{self.output.name}.reference")
