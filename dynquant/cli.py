"""The `dynquant` command: parse, call, print. What the commands do is in `workflow.py` and below.

Exit status: 0 done, 1 refused with one paragraph on stderr, 2 wrong usage. Tracebacks are bugs, or --debug.
"""

import sys
from functools import partial
from pathlib import Path
from typing import Annotated, Literal

import typer

from dynquant import __version__
from dynquant.errors import DynquantError, PlanError, StatsError

app = typer.Typer(
    help="Dynamic low-bit quantization: measure where it hurts, keep those places precise, crush the rest.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)

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
ResumeTrainingOpt = Annotated[bool, typer.Option(help="Continue an interrupted run.")]

JsonOpt = Annotated[bool, typer.Option("--json", help="Print JSON instead of tables.")]


@app.command()
def calibrate(
    model: ModelArg,
    output: Annotated[Path, typer.Option("-o", "--output", help="Where stats.safetensors goes.")] = Path(
        "stats.safetensors"
    ),
    calibration: TextOpt = None,
    tokens: TokensOpt = 131072,
    window: WindowOpt = 512,
    seed: SeedOpt = 0,
    hessians: HessiansOpt = "activations",
    hessian_memory: HessianMemoryOpt = "8GiB",
    device: DeviceOpt = None,
    base_gguf: BaseGgufOpt = None,
    imatrix: Annotated[
        Path | None, typer.Option(help="Import a llama.cpp imatrix GGUF instead of running the model.")
    ] = None,
    imatrix_out: Annotated[
        Path | None, typer.Option(help="Also write the statistics as a llama.cpp imatrix GGUF.")
    ] = None,
) -> None:
    """Measure activations: per input channel, per expert, extremes and held-back samples.

    Example: dynquant calibrate ./model --calibration text.jsonl -o stats.safetensors
    """
    from dynquant import workflow

    options = workflow.CalibrationOptions(
        text=calibration, tokens=tokens, window=window, seed=seed,
        hessians=_hessians(hessians), hessian_memory=hessian_memory, device=device,
    )  # fmt: skip
    workflow.calibrate(model, options, output, base_gguf=base_gguf, imatrix=imatrix, imatrix_out=imatrix_out)


@app.command()
def analyze(
    model: ModelArg,
    stats: Annotated[Path, typer.Option(help="stats.safetensors of `dynquant calibrate`.")],
    output: Annotated[Path, typer.Option("-o", "--output", help="Where errors.json (and errors.csv) go.")] = Path(
        "errors.json"
    ),
    types: TypesOpt = None,
    encoder: EncoderOpt = "ggml",
    threads: ThreadsOpt = None,
    base_gguf: BaseGgufOpt = None,
) -> None:
    """Measure what every candidate type does to every tensor: bytes, weight error, activation error.

    Example: dynquant analyze ./model --stats stats.safetensors --types iq1_s,iq2_xxs,q4_k
    """
    from dynquant import workflow

    workflow.analyze(model, stats, output, types=_split(types), encoder=encoder, threads=threads, base_gguf=base_gguf)


@app.command()
def plan(
    model: Annotated[str | None, typer.Argument(help="Hugging Face directory or hub id, or a .gguf file.")] = None,
    output: Annotated[Path, typer.Option("-o", "--output", help="Where all files of the plan go.")] = Path("plan"),
    calibration: TextOpt = None,
    bpw: Annotated[float | None, typer.Option(help="Budget in bits per weight, of the whole file.")] = None,
    size: Annotated[str | None, typer.Option(help="Budget in bytes, or as 140GB, 31.5MB, 12GiB.")] = None,
    fits: Annotated[
        str | None,
        typer.Option(help="Budget as device memory, as 24GB: less the KV cache and what else llama.cpp allocates."),
    ] = None,
    context: Annotated[int, typer.Option(help="Tokens of KV cache, with --fits.")] = 8192,
    kv_type: Annotated[str, typer.Option(help="Type of the KV cache, with --fits: f16, q8_0 or q4_0.")] = "f16",
    couple: Annotated[
        str | None,
        typer.Option(
            help="Give the tensors that a runtime fuses in each layer one type: gate-up, qkv or both, as gate-up,qkv. "
            "llama.cpp does not need it."
        ),
    ] = None,
    preset: PresetOpt = None,
    like: Annotated[
        Path | None,
        typer.Option(help="The types of this .gguf file or plan.json, tensor by tensor.", show_default=False),
    ] = None,
    recipe: Annotated[
        str | None,
        typer.Option(
            help="A llama-quantize command line or lines of regex=type, or a file that holds them.", show_default=False
        ),
    ] = None,
    types: TypesOpt = None,
    floors: Annotated[bool, typer.Option(help="Keep all but routed experts at 4 bits or more.")] = True,
    tokens: TokensOpt = 131072,
    window: WindowOpt = 512,
    seed: SeedOpt = 0,
    hessians: HessiansOpt = "activations",
    hessian_memory: HessianMemoryOpt = "8GiB",
    device: DeviceOpt = None,
    stats: Annotated[Path | None, typer.Option(help="Use these statistics instead of calibrating.")] = None,
    encoder: EncoderOpt = "ggml",
    threads: ThreadsOpt = None,
    base_gguf: BaseGgufOpt = None,
    sensitivity: Annotated[
        str | None,
        typer.Option(
            help="How tensors are priced: closed-form (seconds to minutes), fisher-probe (backward passes against the "
            "very bytes that would ship; much better at low bits), unit-kl (also steps from the plan, measured end to "
            "end). Several: as fisher-probe,unit-kl. Default: closed-form, and fisher-probe with --select."
        ),
    ] = None,
    select: Annotated[
        bool, typer.Option(help="Render several plans and take the one with the lowest KL on text kept apart.")
    ] = False,
    selection_text: Annotated[
        Path | None, typer.Option(help="Text to select on. Default: what calibration left of its text.")
    ] = None,
    probes: Annotated[int, typer.Option(help="Windows of 256 tokens for the Fisher probe.")] = 32,
    check_plans: Annotated[
        int, typer.Option(help="Also draw this many plans and correlate their predicted and measured KL.")
    ] = 0,
    frontier: Annotated[
        str | None,
        typer.Option(
            help="Also measure the planner over this range of bits per weight, as 1.6:4.5, beside uniform types, "
            "llama.cpp's mixtures and the R1 recipes; drawn in the report."
        ),
    ] = None,
    report: Annotated[bool, typer.Option(help="Draw plots and write report.html.")] = True,
    config_only: Annotated[
        Path | None, typer.Option(help="Directory with config.json: sizes a preset or recipe.")
    ] = None,
    serves: Annotated[
        str | None,
        typer.Option(
            "--for",
            help="vllm: choose among the schemes that vLLM serves from compressed-tensors (--types w4a16,w8a16,fp8,"
            "nvfp4a16,mxfp4a16,bf16), for export -f compressed-tensors.",
            show_default=False,
        ),
    ] = None,
    mixed_experts: Annotated[
        bool,
        typer.Option(
            help="With --for vllm: routed experts of each layer have a scheme of their own, NVFP4 and BF16 among them; "
            "vLLM loads that, transformers does not."
        ),
    ] = False,
    as_json: JsonOpt = False,
) -> None:
    """Decide a quant type for every tensor, and show why.

    Without a budget: the smallest file that keeps every floor, and 5 % more. Statistics and errors already in the
    output directory are reused, so another budget costs seconds.

    Example: dynquant plan ./model --calibration text.jsonl --bpw 2.0 -o plan/

    Example: dynquant plan ./model --like published-IQ1_S.gguf -o plan/

    Example: dynquant plan ./model --for vllm --bpw 5 -o plan/
    """
    from dynquant import workflow
    from dynquant.plan_search import SearchOptions

    if serves is not None:
        given = {
            "--fits": fits, "--couple": couple, "--like": like, "--recipe": recipe, "--select": select or None,
            "--frontier": frontier, "--sensitivity": sensitivity, "--config-only": config_only,
            "--base-gguf": base_gguf,
        }  # fmt: skip
        _check_serves(serves, model, [option for option, value in given.items() if value is not None])
        options = workflow.CalibrationOptions(
            text=calibration, tokens=tokens, window=window, seed=seed,
            hessians=_hessians(hessians), hessian_memory=hessian_memory, device=device,
        )  # fmt: skip
        _plan_for_vllm(
            str(model), output, options, stats, as_json,
            preset=preset, bpw=bpw, size=size, schemes=_split(types), mixed_experts=mixed_experts,
        )  # fmt: skip
        return
    if mixed_experts:
        raise PlanError("--mixed-experts goes with --for vllm; GGUF plans choose for each layer anyway.")
    target = workflow.Target(
        preset=preset, bpw=bpw, size=size, fits=fits, context=context, kv_type=kv_type, like=like, patterns=recipe,
        types=_split(types), floors=floors, couple=_split(couple) or (),
    )  # fmt: skip
    if config_only is not None:
        if model is not None:
            raise PlanError("--config-only DIR goes without a MODEL.")
        made = workflow.plan_from_config(config_only, target)
        show = workflow.print_histogram
    elif model is None:
        raise PlanError("Give a MODEL to plan, or --config-only DIR with --preset NAME.")
    else:
        options = workflow.CalibrationOptions(
            text=calibration, tokens=tokens, window=window, seed=seed,
            hessians=_hessians(hessians), hessian_memory=hessian_memory, device=device,
        )  # fmt: skip
        made = workflow.plan(
            model, target, options, output,
            stats_path=stats, encoder=encoder, threads=threads, base_gguf=base_gguf, report=report,
            search=SearchOptions(
                methods=_split(sensitivity) or _default_methods(select or frontier is not None),
                select=select, text=selection_text, probes=probes, check_plans=check_plans, frontier=_range(frontier),
            ),
        )  # fmt: skip
        show = partial(workflow.print_plan, directory=output)
    if as_json:
        print(made.model_dump_json(indent=1))
    else:
        show(made)


@app.command()
def export(
    model: ModelArg,
    output: Annotated[Path, typer.Option("-o", "--output", help="The .gguf file, or the directory of the others.")],
    plan: Annotated[Path | None, typer.Option(help="plan.json of `dynquant plan`.")] = None,
    preset: PresetOpt = None,
    format: Annotated[str, typer.Option("-f", "--format", help="gguf, safetensors or compressed-tensors.")] = "gguf",
    stats: Annotated[Path | None, typer.Option(help="stats.safetensors. Default: the one beside the plan.")] = None,
    calibration: TextOpt = None,
    tokens: TokensOpt = 131072,
    hessians: HessiansOpt = "activations",
    encoder: EncoderOpt = "dynquant",
    device: DeviceOpt = None,
    tune: Annotated[
        int | None,
        typer.Option(
            help="Tokens of the closing pass, which tunes stored scales and norms on the KL to the original; 0 for "
            "none. Default: 16384 with the dynquant encoder, where the model fits in memory."
        ),
    ] = None,
    split_max_size: Annotated[str | None, typer.Option(help="Split into files of at most this size, as 40GB.")] = None,
    resume: Annotated[bool, typer.Option(help="Continue an interrupted export.")] = True,
    threads: ThreadsOpt = None,
    base_gguf: BaseGgufOpt = None,
) -> None:
    """Write the model in the types of a plan or preset.

    Example: dynquant export ./model --plan plan/plan.json -o model.gguf

    Example: dynquant export ./model --plan plan/plan.json -f compressed-tensors -o out/
    """
    from dynquant.export_workflow import export as run
    from dynquant.workflow import CalibrationOptions

    options = CalibrationOptions(text=calibration, tokens=tokens, hessians=_hessians(hessians), device=device)
    run(
        model, output, format=format, plan_path=plan, preset=preset, stats_path=stats, calibration=options,
        encoder=encoder, device=device, split_max_size=split_max_size, resume=resume, threads=threads,
        base_gguf=base_gguf, tune_tokens=tune,
    )  # fmt: skip


@app.command()
def tune(
    file: Annotated[Path, typer.Argument(help="A quantized .gguf file.", show_default=False)],
    reference: Annotated[str, typer.Option(help="Its original: Hugging Face directory or hub id.")],
    output: Annotated[Path, typer.Option("-o", "--output", help="The .gguf file to write; it has the same size.")],
    calibration: TextOpt = None,
    tokens: Annotated[int, typer.Option(help="Train on this many tokens.")] = 16384,
    step_tokens: Annotated[int, typer.Option(help="Tokens in a step.")] = 1024,
    window: WindowOpt = 512,
    seed: SeedOpt = 0,
    device: DeviceOpt = None,
) -> None:
    """Tune the stored scales and norms of any quantized GGUF on the KL to its original; types and size stay.

    Example: dynquant tune model.gguf --reference ./model --calibration text.jsonl -o tuned.gguf
    """
    from dynquant.export_workflow import tune_command
    from dynquant.tuning import TuneOptions

    options = TuneOptions(tokens=tokens, step_tokens=step_tokens, seed=seed)
    tune_command(file, reference, output, options, text=calibration, window=window, device=device)


@app.command("eval")
def evaluate(
    candidate: ModelArg,
    reference: Annotated[str, typer.Option(help="The model to compare with: HF directory, hub id or .gguf.")],
    tasks: Annotated[str, typer.Option(help="Any of kl, ppl, mmlu.")] = "kl,ppl",
    text: Annotated[
        list[Path] | None, typer.Option(help="Text for kl and ppl, .txt or .jsonl. May be repeated.")
    ] = None,
    max_tokens: Annotated[int, typer.Option(help="Tokens of each text.")] = 8192,
    window: WindowOpt = 512,
    mmlu_data: Annotated[
        str | None, typer.Option(help="Questions, .jsonl or a datasets id. Default: cais/mmlu.")
    ] = None,
    shots: Annotated[str | None, typer.Option(help="Few-shot questions, .jsonl.")] = None,
    num_shots: Annotated[int, typer.Option(help="Shots before each question.")] = 5,
    limit: Annotated[int | None, typer.Option(help="At most this many questions, spread evenly.")] = None,
    scoring: Annotated[str, typer.Option(help="letter, cloze or both.")] = "letter,cloze",
    reference_cache: Annotated[Path | None, typer.Option(help="Keep the reference's distributions here.")] = None,
    json_file: Annotated[Path | None, typer.Option("--json", help="Also write the result to this file.")] = None,
    runner: Annotated[
        str, typer.Option(help="What runs GGUF files: llama.cpp, or transformers with packed weights.")
    ] = "llama.cpp",
    rounded: Annotated[
        bool, typer.Option(help="Round activations to 8 bits in packed transformers models, as llama.cpp does.")
    ] = False,
    adapter: Annotated[
        Path | None, typer.Option(help="Run the candidate, packed in transformers, with this LoRA adapter.")
    ] = None,
    device: DeviceOpt = None,
    threads: ThreadsOpt = None,
    seed: SeedOpt = 0,
) -> None:
    """Compare a quantized model with its original: KL divergence, perplexity, multiple choice; before and after.

    Example: dynquant eval model.gguf --reference ./model --tasks kl,ppl,mmlu --text held-out.txt --mmlu-data test.jsonl
    """
    from dynquant import commands

    commands.evaluate(
        candidate, reference, tasks=_split(tasks) or (), text=text or [], max_tokens=max_tokens, window=window,
        mmlu_data=mmlu_data, shots=shots, num_shots=num_shots, limit=limit, cache_dir=reference_cache,
        scoring=_split(scoring) or (), json_file=json_file, runner=runner, rounded=rounded, adapter=adapter,
        device=device, threads=threads, seed=seed,
    )  # fmt: skip


@app.command()
def compare(
    model: ModelArg,
    recipes: Annotated[str, typer.Option(help="Presets, as llama-iq1_s,r1-iq1_s.")],
    output: Annotated[Path, typer.Option("-o", "--output", help="Directory for results and the shared plan.")],
    text: Annotated[list[Path] | None, typer.Option(help="Text for kl and ppl. May be repeated.")] = None,
    tasks: Annotated[str, typer.Option(help="Any of kl, ppl, mmlu.")] = "kl,ppl",
    max_tokens: Annotated[int, typer.Option(help="Tokens of each text.")] = 8192,
    mmlu_data: Annotated[str | None, typer.Option(help="Questions, .jsonl or a datasets id.")] = None,
    shots: Annotated[str | None, typer.Option(help="Few-shot questions, .jsonl.")] = None,
    limit: Annotated[int | None, typer.Option(help="At most this many questions.")] = None,
    scoring: Annotated[str, typer.Option(help="letter, cloze or both.")] = "letter,cloze",
    calibration: TextOpt = None,
    tokens: TokensOpt = 131072,
    encoder: Annotated[str, typer.Option(help="ggml, or dynquant (slower; without its closing pass).")] = "ggml",
    select: Annotated[
        bool, typer.Option(help="Price plans by the Fisher probe and select each by KL, as plan --select.")
    ] = False,
    keep: Annotated[bool, typer.Option(help="Keep the exported files.")] = False,
    threads: ThreadsOpt = None,
) -> None:
    """Measure recipes side by side, and the planner at the bytes of each.

    Example: dynquant compare ./model --recipes llama-iq1_s,r1-iq1_s --text held-out.txt -o comparison/
    """
    from dynquant.compare import Questions
    from dynquant.compare import compare as run
    from dynquant.plan_search import SearchOptions
    from dynquant.workflow import CalibrationOptions

    questions = Questions(
        tasks=_split(tasks) or (), text=tuple(text or ()), max_tokens=max_tokens, mmlu_data=mmlu_data, shots=shots,
        limit=limit, scoring=_split(scoring) or (),
    )  # fmt: skip
    hessians = "activations" if encoder == "dynquant" else "none"
    options = CalibrationOptions(text=calibration, tokens=tokens, hessians=hessians)
    search = SearchOptions(methods=_default_methods(select), select=True) if select else None
    run(
        model, _split(recipes) or (), questions, options, output,
        encoder=encoder, search=search, threads=threads, keep=keep,
    )  # fmt: skip


@app.command("compare-encoders")
def compare_encoders(
    model: ModelArg,
    recipes: Annotated[str, typer.Option(help="Presets, as r1-iq1_s,experts-q2_k,uniform-iq2_xxs.")],
    output: Annotated[Path, typer.Option("-o", "--output", help="Directory for results and statistics.")],
    text: Annotated[list[Path] | None, typer.Option(help="Text for kl and ppl. May be repeated.")] = None,
    tasks: Annotated[str, typer.Option(help="Any of kl, ppl, mmlu.")] = "kl",
    max_tokens: Annotated[int, typer.Option(help="Tokens of each text.")] = 8192,
    mmlu_data: Annotated[str | None, typer.Option(help="Questions, .jsonl or a datasets id.")] = None,
    shots: Annotated[str | None, typer.Option(help="Few-shot questions, .jsonl.")] = None,
    limit: Annotated[int | None, typer.Option(help="At most this many questions.")] = None,
    scoring: Annotated[str, typer.Option(help="letter, cloze or both.")] = "letter",
    calibration: TextOpt = None,
    tokens: TokensOpt = 131072,
    hessians: HessiansOpt = "activations",
    tune: Annotated[int, typer.Option(help="Tokens of the closing pass.")] = 16384,
    variants: Annotated[str, typer.Option(help="Encoders, each also with +tune.")] = "ggml,dynquant,dynquant+tune",
    keep: Annotated[bool, typer.Option(help="Keep the exported files.")] = False,
    device: DeviceOpt = None,
    threads: ThreadsOpt = None,
) -> None:
    """Measure encoders side by side: the same types and statistics, so the same bytes.

    Example: dynquant compare-encoders ./model --recipes r1-iq1_s,experts-q2_k --text held-out.txt -o encoders/
    """
    from dynquant.compare import Questions
    from dynquant.compare_encoders import compare_encoders as run
    from dynquant.workflow import CalibrationOptions

    questions = Questions(
        tasks=_split(tasks) or (), text=tuple(text or ()), max_tokens=max_tokens, mmlu_data=mmlu_data, shots=shots,
        limit=limit, scoring=_split(scoring) or (),
    )  # fmt: skip
    options = CalibrationOptions(text=calibration, tokens=tokens, hessians=_hessians(hessians), device=device)
    run(
        model, _split(recipes) or (), questions, options, output,
        tune_tokens=tune, variants=_split(variants) or (), threads=threads, keep=keep,
    )  # fmt: skip


@app.command("finetune")
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
    resume: ResumeTrainingOpt = True,
    seed: SeedOpt = 0,
    device: DeviceOpt = None,
) -> None:
    """Train a LoRA adapter on a packed model by supervised fine-tuning, and measure it on examples held out.

    Example: dynquant finetune out/ --data chats.jsonl -o adapter/
    """
    from dynquant.training_commands import finetune_command
    from dynquant.training_options import TrainOptions

    options = TrainOptions(
        rank=rank, alpha=alpha, rslora=rslora, experts=experts, llama_cpp=llama_cpp,
        learning_rate=learning_rate, epochs=epochs, max_steps=max_steps, batch_size=batch_size,
        micro_batch=micro_batch, evaluations=evaluations, patience=patience,
        gradient_checkpointing=gradient_checkpointing, seed=seed,
    )  # fmt: skip
    finetune_command(
        packed, data, output, options, held_out_share=held_out, max_length=max_length, tokenizer=tokenizer,
        device=device, resume=resume,
    )  # fmt: skip


@app.command("heal")
def heal(
    packed: PackedArg,
    reference: Annotated[str, typer.Option(help="The original: Hugging Face directory, hub id or .gguf.")],
    output: AdapterOutOpt,
    data: Annotated[
        str | None,
        typer.Option(help="Text to train on: .txt, .jsonl or a datasets id. Default: the built-in text."),
    ] = None,
    tokens: Annotated[int, typer.Option(help="Train on at most this many tokens of it.")] = 524288,
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
    resume: ResumeTrainingOpt = True,
    seed: SeedOpt = 0,
    device: DeviceOpt = None,
) -> None:
    """Distill the original into a LoRA adapter on its packed model, to win back what quantization took.

    The original runs first and is freed; its distributions (1 kB a token) stay on the disk.

    Example: dynquant heal out/ --reference ./model --data text.jsonl --text held-out.txt -o healed/
    """
    from dynquant.heal import HealData
    from dynquant.training_commands import heal_command
    from dynquant.training_options import TrainOptions

    options = TrainOptions(
        rank=rank, alpha=alpha, rslora=rslora, experts=experts, llama_cpp=llama_cpp,
        learning_rate=learning_rate, epochs=epochs, max_steps=max_steps, batch_size=batch_size,
        micro_batch=micro_batch, evaluations=evaluations, patience=patience,
        gradient_checkpointing=gradient_checkpointing, seed=seed,
    )  # fmt: skip
    source = HealData(
        data=data, tokens=tokens, window=window, text=text or (), max_tokens=max_tokens, mmlu_data=mmlu_data,
        shots=shots, num_shots=num_shots, limit=limit, cache_dir=reference_cache,
    )  # fmt: skip
    heal_command(packed, reference, output, source, options, device=device, resume=resume)


@app.command("export-adapter")
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
    from dynquant import commands

    commands.export_adapter(adapter, output, base=base)


@app.command()
def inspect(path: ModelArg, as_json: JsonOpt = False) -> None:
    """Types, sizes and bits per weight of a GGUF file or safetensors checkpoint.

    Example: dynquant inspect model.gguf
    """
    from dynquant import commands

    commands.inspect(path, as_json=as_json)


@app.command()
def recipe(
    plan: PlanArg,
    model: Annotated[str, typer.Option(help="The float GGUF to quantize, in the command.")] = "MODEL.gguf",
    imatrix: Annotated[str | None, typer.Option(help="The imatrix file, in the command.", show_default=False)] = None,
    output: Annotated[str, typer.Option("-o", "--output", help="The file to write, in the command.")] = "OUT.gguf",
    as_json: JsonOpt = False,
) -> None:
    """Print the llama-quantize command line that gives the types of a plan or file.

    Example: dynquant recipe plan/plan.json --model model-f32.gguf --imatrix imatrix.gguf -o model.gguf
    """
    from dynquant import commands

    commands.recipe(plan, model=model, imatrix=imatrix, output=output, as_json=as_json)


@app.command()
def diff(before: PlanArg, after: PlanArg, as_json: JsonOpt = False) -> None:
    """Compare the types of two plans or files of one model: what changed in which layers, and the bytes.

    Example: dynquant diff plan/plan.json published.gguf
    """
    from dynquant import commands

    commands.diff(before, after, as_json=as_json)


@app.command("super-weights")
def super_weights(
    model: ModelArg,
    text: TextOpt = None,
    tokens: Annotated[int, typer.Option(help="Tokens of the text to run.")] = 512,
    ablation: Annotated[bool, typer.Option(help="Measure perplexity with each super weight set to zero.")] = True,
    as_json: JsonOpt = False,
) -> None:
    """Find the single weights that the model cannot do without, and show what happens when they are zeroed.

    Example: dynquant super-weights ./model --text wikitext.txt
    """
    from dynquant import commands

    commands.super_weights(model, text=text, tokens=tokens, ablation=ablation, as_json=as_json)


@app.command()
def demo(
    output: Annotated[Path, typer.Option("-o", "--output", help="Directory for everything the demo makes.")] = Path(
        "demo-out"
    ),
) -> None:
    """Plan, export and evaluate the bundled 16M mixture-of-experts model; about a minute and a half on two cores."""
    from dynquant import commands

    commands.demo(output)


@app.command()
def version() -> None:
    """Print the version."""
    print(__version__)


def _check_serves(serves: str, model: str | None, given: list[str]) -> None:
    if serves.lower() != "vllm":
        raise PlanError(f"--for {serves} is not known; give vllm, or leave it out for GGUF types.")
    if model is None:
        raise PlanError("Give a MODEL to plan with --for vllm.")
    if given:
        raise PlanError(
            f"{' and '.join(given)} is for plans of GGUF types; --for vllm goes with --bpw, --size, --preset, --types "
            "and options of calibration."
        )


def _plan_for_vllm(
    model: str, output: Path, options: object, stats: Path | None, as_json: bool, **target: object
) -> None:
    from dynquant import serving_workflow

    made = serving_workflow.plan_for_vllm(
        model, serving_workflow.ServingTarget(**target), options, output, stats_path=stats
    )
    if as_json:
        print(made.model_dump_json(indent=1))
    else:
        serving_workflow.print_serving_plan(made, output)


def _default_methods(is_measured: bool) -> tuple[str, ...]:
    return ("closed-form", "fisher-probe") if is_measured else ("closed-form",)


def _range(text: str | None) -> tuple[float, float] | None:
    if text is None:
        return None
    try:
        low, high = map(float, text.split(":"))
    except ValueError as error:
        raise PlanError(f"--frontier {text} is no range of bits per weight; give one as 1.6:4.5.") from error
    return low, high


def _hessians(value: str) -> Literal["none", "activations", "gradients"]:
    for known in ("none", "activations", "gradients"):
        if value == known:
            return known
    raise StatsError(f"--hessians {value} is not known; give activations, gradients or none.")


def _split(value: str | None) -> tuple[str, ...] | None:
    return tuple(part.strip() for part in value.split(",") if part.strip()) if value else None


def main() -> None:
    """Entry point of the `dynquant` command."""
    debug = "--debug" in sys.argv
    if debug:
        sys.argv.remove("--debug")
    try:
        app()
    except (DynquantError, KeyboardInterrupt) as error:
        if debug:
            raise
        from dynquant import console

        if isinstance(error, KeyboardInterrupt):
            console.fail("Interrupted. Run the same command again; finished stages and tensors are kept.")
            sys.exit(130)
        console.fail(str(error))
        sys.exit(1)
