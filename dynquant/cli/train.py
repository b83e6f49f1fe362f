"""The commands of `dynquant` about adapters; `cli` registers them."""

from pathlib import Path
from typing import Annotated

import typer

from dynquant.cli.options import DeviceOpt, SeedOpt, WindowOpt

PackedArg = Annotated[
    str, typer.Argument(help="Packed model: directory of `export -f safetensors`, or a .gguf file.", show_default=False)
]
AdapterOutOpt = Annotated[Path, typer.Option("-o", "--output", help="Directory of the adapter.")]
RankOpt = Annotated[int, typer.Option(help="Rank of the adapter.", min=1)]
AlphaOpt = Annotated[
    int | None, typer.Option(help="The adapter is scaled by alpha / rank. Default: twice the rank.", min=1)
]
RsLoraOpt = Annotated[bool, typer.Option("--rslora", help="Scale by alpha / sqrt(rank) instead.")]
ExpertsOpt = Annotated[bool, typer.Option(help="Adapt the routed experts too.")]
LlamaCppOpt = Annotated[
    bool, typer.Option("--llama-cpp", help="Adapt only layers to which llama.cpp applies adapters, for export-adapter.")
]
RateOpt = Annotated[float, typer.Option(help="Highest learning rate; warmup, then a cosine to zero.", min=0.0)]
EpochsOpt = Annotated[float, typer.Option(help="Passes over the training part, at most.", min=0.0)]
StepsOpt = Annotated[int | None, typer.Option(help="Optimizer steps instead of --epochs.", min=1)]
MicroBatchOpt = Annotated[int | None, typer.Option(help="Examples run at a time. Default: the whole batch.", min=1)]
EvaluationsOpt = Annotated[
    int, typer.Option(help="Measure the held-out loss, and save a checkpoint, this many times.", min=1)
]
PatienceOpt = Annotated[int, typer.Option(help="Stop after this many measurements without a new minimum.", min=1)]
CheckpointingOpt = Annotated[
    bool | None,
    typer.Option(
        help="Recompute activations to save memory. Default: on a GPU, from a billion weights.", show_default=False
    ),
]
StoreOpt = Annotated[str, typer.Option(help="Type of the adapter's file: float32, or bfloat16 in half the bytes.")]
ResumeTrainingOpt = Annotated[bool, typer.Option(help="Continue an interrupted run.")]


def finetune(
    packed: PackedArg,
    output: AdapterOutOpt,
    data: Annotated[
        Path,
        typer.Option(help='.jsonl with "messages", "prompt" and "completion", or "text" in each line.'),
    ],
    held_out: Annotated[float, typer.Option(help="Share of the lines that is held out.", min=0.0, max=0.9)] = 0.1,
    max_length: Annotated[int, typer.Option(help="Tokens of an example; longer ones are cut.", min=2)] = 1024,
    tokenizer: Annotated[
        str | None, typer.Option(help="Model whose tokenizer to use. Default: that of the packed model.")
    ] = None,
    rank: RankOpt = 16,
    alpha: AlphaOpt = None,
    rslora: RsLoraOpt = False,
    experts: ExpertsOpt = True,
    llama_cpp: LlamaCppOpt = False,
    learning_rate: RateOpt = 5e-4,
    epochs: EpochsOpt = 3.0,
    max_steps: StepsOpt = None,
    batch_size: Annotated[int, typer.Option(help="Examples of an optimizer step.", min=1)] = 8,
    micro_batch: MicroBatchOpt = None,
    evaluations: EvaluationsOpt = 10,
    patience: PatienceOpt = 3,
    gradient_checkpointing: CheckpointingOpt = None,
    store: StoreOpt = "float32",
    resume: ResumeTrainingOpt = True,
    seed: SeedOpt = 0,
    device: DeviceOpt = None,
) -> None:
    """Train a LoRA adapter on a packed model by supervised fine-tuning, and measure it on examples held out.

    Example: dynquant finetune out/ --data chats.jsonl -o adapter/
    """
    from dynquant.cli.training_commands import finetune_command
    from dynquant.training.options import TrainOptions

    options = TrainOptions(
        rank=rank, alpha=alpha, rslora=rslora, experts=experts, llama_cpp=llama_cpp,
        learning_rate=learning_rate, epochs=epochs, max_steps=max_steps, batch_size=batch_size,
        micro_batch=micro_batch, evaluations=evaluations, patience=patience,
        gradient_checkpointing=gradient_checkpointing, seed=seed, store=store,
    )  # fmt: skip
    finetune_command(
        packed, data, output, options, held_out_share=held_out, max_length=max_length, tokenizer=tokenizer,
        device=device, resume=resume,
    )  # fmt: skip


def heal(
    packed: PackedArg,
    reference: Annotated[str, typer.Option(help="The original: Hugging Face directory, hub id or .gguf.")],
    output: AdapterOutOpt,
    data: Annotated[
        str | None,
        typer.Option(help="Text to train on: .txt, .jsonl or a datasets id. Default: the built-in text."),
    ] = None,
    tokens: Annotated[int, typer.Option(help="Train on at most this many tokens of it.")] = 524288,
    sampled_tokens: Annotated[
        int, typer.Option(help="Also train on this many tokens that the original writes itself.", min=0)
    ] = 0,
    window: WindowOpt = 512,
    text: Annotated[
        list[Path] | None,
        typer.Option(help="Held-out text to measure on. May be repeated. Default: a part of the data, kept apart."),
    ] = None,
    max_tokens: Annotated[int, typer.Option(help="Tokens of each held-out text.")] = 8192,
    mmlu_data: Annotated[
        str | None, typer.Option(help="Questions to measure accuracy on, .jsonl or a datasets id.")
    ] = None,
    shots: Annotated[str | None, typer.Option(help="Few-shot questions, .jsonl.")] = None,
    num_shots: Annotated[int, typer.Option(help="Shots before each question.")] = 5,
    limit: Annotated[int | None, typer.Option(help="At most this many questions, spread evenly.")] = None,
    reference_cache: Annotated[
        Path | None, typer.Option(help="Keep the original's distributions here. Default: beside the output.")
    ] = None,
    start: Annotated[
        str,
        typer.Option(
            help="residual: the adapter starts from what quantization took of the weights. zero: as no change."
        ),
    ] = "residual",
    blend: Annotated[
        float | None,
        typer.Option(
            help="Share of the way from the start to what training made of the adapter; less keeps more of what the "
            "text does not ask for. Default: 0.5 from the residual, 1 from zero.",
            min=0,
            max=1,
        ),
    ] = None,
    rank: RankOpt = 16,
    alpha: AlphaOpt = None,
    rslora: RsLoraOpt = False,
    experts: ExpertsOpt = True,
    llama_cpp: LlamaCppOpt = False,
    learning_rate: RateOpt = 1e-3,
    epochs: EpochsOpt = 3.0,
    max_steps: StepsOpt = None,
    batch_size: Annotated[int, typer.Option(help="Windows of an optimizer step.", min=1)] = 4,
    micro_batch: MicroBatchOpt = None,
    evaluations: EvaluationsOpt = 10,
    patience: PatienceOpt = 3,
    gradient_checkpointing: CheckpointingOpt = None,
    store: StoreOpt = "float32",
    resume: ResumeTrainingOpt = True,
    seed: SeedOpt = 0,
    device: DeviceOpt = None,
) -> None:
    """Distill the original into a LoRA adapter on its packed model, to win back what quantization took.

    The original runs first and is freed; its distributions (1 kB a token) stay on the disk.

    Example: dynquant heal out/ --reference ./model --data text.jsonl --text held-out.txt -o healed/
    """
    from dynquant.cli.training_commands import heal_command
    from dynquant.training.heal import HealData
    from dynquant.training.options import TrainOptions

    options = TrainOptions(
        rank=rank, alpha=alpha, rslora=rslora, experts=experts, llama_cpp=llama_cpp,
        learning_rate=learning_rate, epochs=epochs, max_steps=max_steps, batch_size=batch_size,
        micro_batch=micro_batch, evaluations=evaluations, patience=patience,
        gradient_checkpointing=gradient_checkpointing, seed=seed, store=store,
    )  # fmt: skip
    source = HealData(
        data=data, tokens=tokens, sampled_tokens=sampled_tokens, window=window, text=text or (),
        max_tokens=max_tokens, mmlu_data=mmlu_data, shots=shots, num_shots=num_shots, limit=limit,
        cache_dir=reference_cache,
    )  # fmt: skip
    heal_command(packed, reference, output, source, options, start=start, blend=blend, device=device, resume=resume)


def export_adapter(
    adapter: Annotated[Path, typer.Argument(help="Directory that save_pretrained wrote.", show_default=False)],
    output: Annotated[Path, typer.Option("-o", "--output", help="The .gguf file to write.")],
    base: Annotated[
        Path | None,
        typer.Option(
            help="The model that the adapter was trained on: packed or original directory, or .gguf file. Default: "
            "where the adapter says it was loaded from.",
            show_default=False,
        ),
    ] = None,
) -> None:
    """Write a LoRA adapter for llama.cpp: use it with any GGUF of its base, as --lora FILE or Llama(lora_path=...).

    Example: dynquant export-adapter adapter/ --base model.gguf -o adapter.gguf
    """
    from dynquant.cli import commands

    commands.export_adapter(adapter, output, base=base)
