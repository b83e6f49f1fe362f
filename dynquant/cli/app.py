"""The `dynquant` command: parse, call, print. What the commands do is in `workflow.py` and below.

Exit status: 0 done, 1 refused with one paragraph on stderr, 2 wrong usage, 130 interrupted. Tracebacks are bugs, or
--debug.
"""

import shlex
import sys
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from dynquant import __version__
from dynquant.cli import train as cli_training
from dynquant.cli.options import (
    BaseGgufOpt,
    DataOpt,
    DeviceOpt,
    EncoderOpt,
    HessianMemoryOpt,
    HessiansOpt,
    JsonOpt,
    MaxMemoryOpt,
    ModelArg,
    PlanArg,
    PresetOpt,
    RayOpt,
    SeedOpt,
    SpillOpt,
    StreamMemoryOpt,
    StrictOpt,
    TextOpt,
    ThreadsOpt,
    TokensOpt,
    TypesOpt,
    WindowOpt,
)
from dynquant.cli.terminal.interrupt import ends_promptly
from dynquant.errors import DynquantError, EvaluationError, PlanError, StatsError

if TYPE_CHECKING:
    from dynquant.calibration.stage import CalibrationOptions
    from dynquant.recipes.plan import Plan

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)


@app.callback()
def every_command(
    json_progress: Annotated[
        str | None,
        typer.Option(
            metavar="FILE",
            help="Tell progress as JSON lines in FILE, or with - on stderr. May stand behind the command.",
            show_default=False,
        ),
    ] = None,
    debug: Annotated[bool, typer.Option("--debug", help="Show tracebacks of refusals.")] = False,
) -> None:
    """Dynamic low-bit quantization: measure where it hurts, keep those places precise, crush the rest."""
    if json_progress is not None:
        from dynquant.cli.terminal import console

        console.write_json_to(json_progress)


@app.command()
def calibrate(
    model: ModelArg,
    output: Annotated[Path, typer.Option("-o", "--output", help="Where stats.safetensors goes.")] = Path(
        "stats.safetensors"
    ),
    calibration: TextOpt = None,
    data: DataOpt = None,
    strict: StrictOpt = False,
    tokens: TokensOpt = 131072,
    window: WindowOpt = 512,
    seed: SeedOpt = 0,
    hessians: HessiansOpt = "activations",
    hessian_memory: HessianMemoryOpt = "8GiB",
    device: DeviceOpt = None,
    max_memory: StreamMemoryOpt = None,
    spill: SpillOpt = None,
    base_gguf: BaseGgufOpt = None,
    imatrix: Annotated[
        Path | None, typer.Option(help="Import a llama.cpp imatrix GGUF instead of running the model.")
    ] = None,
    ray: RayOpt = None,
    imatrix_out: Annotated[
        Path | None, typer.Option(help="Also write the statistics as a llama.cpp imatrix GGUF.")
    ] = None,
) -> None:
    """Measure activations: per input channel, per expert, extremes and held-back samples.

    Example: dynquant calibrate ./model --calibration text.jsonl -o stats.safetensors

    Example: dynquant calibrate ./vision-model --data pictures.jsonl -o stats.safetensors
    """
    from dynquant.calibration.stage import CalibrationOptions, calibrate_model
    from dynquant.cli.terminal import console

    options = CalibrationOptions(
        text=calibration, tokens=tokens, window=window,
        hessians=_hessians(hessians), hessian_memory=hessian_memory, ray=ray,
        max_memory=max_memory, spill=spill, data=data, strict=strict,
    )  # fmt: skip
    _check_one_source(calibration, data)
    session = console.session(device, seed=seed)
    file = calibrate_model(
        model, options, output, session, base_gguf=base_gguf, imatrix=imatrix, imatrix_out=imatrix_out
    )
    stats = file.stats
    console.out.print(f"{output}: {stats.provenance.num_tokens:,} tokens, {len(stats.inputs)} inputs")


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
    ray: RayOpt = None,
) -> None:
    """Measure what every candidate type does to every tensor: bytes, weight error, activation error.

    Example: dynquant analyze ./model --stats stats.safetensors --types iq1_s,iq2_xxs,q4_k
    """
    from dynquant.analysis.errors.stage import DEFAULT_TYPES, TableOptions
    from dynquant.analysis.errors.stage import analyze as run
    from dynquant.cli.terminal import console

    options = TableOptions(_split(types) or DEFAULT_TYPES, encoder, base_gguf, ray)
    table = run(model, stats, output, options, console.session(threads=threads))
    console.out.print(f"{output}: {len(table.tensors())} tensors, {len(table.rows)} rows")


@app.command()
def plan(
    model: Annotated[str | None, typer.Argument(help="Hugging Face directory or hub id, or a .gguf file.")] = None,
    output: Annotated[Path, typer.Option("-o", "--output", help="Where all files of the plan go.")] = Path("plan"),
    calibration: TextOpt = None,
    data: DataOpt = None,
    strict: StrictOpt = False,
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
    vision: Annotated[
        str,
        typer.Option(
            help="Vision tower and projector as wholes: keep (as stored), 8bit, lower (types like all others), or "
            "auto, which decides by their output errors, and with --select by the KL of plans of each."
        ),
    ] = "auto",
    tokens: TokensOpt = 131072,
    window: WindowOpt = 512,
    seed: SeedOpt = 0,
    hessians: HessiansOpt = "activations",
    hessian_memory: HessianMemoryOpt = "8GiB",
    device: DeviceOpt = None,
    max_memory: StreamMemoryOpt = None,
    spill: SpillOpt = None,
    ray: RayOpt = None,
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
        Path | None,
        typer.Option(help="Text, or with --data samples, to select on. Default: what calibration left of its own."),
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
    machine: Annotated[
        Path | None,
        typer.Option(help="With --config-only: also time and memory of each stage, on a machine of `measure-machine`."),
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
    from dynquant.cli.plan import print_histogram, print_plan
    from dynquant.cli.terminal import console
    from dynquant.planning import stage
    from dynquant.planning.search import SearchOptions
    from dynquant.planning.target import Target

    session = console.session(device, threads, seed)
    if serves is not None:
        given = {
            "--data": data,
            "--fits": fits, "--couple": couple, "--like": like, "--recipe": recipe, "--select": select or None,
            "--frontier": frontier, "--sensitivity": sensitivity, "--config-only": config_only,
            "--base-gguf": base_gguf,
        }  # fmt: skip
        _check_serves(serves, model, [option for option, value in given.items() if value is not None])
        options = stage.CalibrationOptions(
            text=calibration, tokens=tokens, window=window,
            hessians=_hessians(hessians), hessian_memory=hessian_memory, max_memory=max_memory, spill=spill,
        )  # fmt: skip
        _plan_for_vllm(
            str(model), output, options, session, stats, as_json,
            preset=preset, bpw=bpw, size=size, schemes=_split(types), mixed_experts=mixed_experts,
        )  # fmt: skip
        return
    _check_one_source(calibration, data)
    if mixed_experts:
        raise PlanError("--mixed-experts goes with --for vllm; GGUF plans choose for each layer anyway.")
    target = Target(
        preset=preset, bpw=bpw, size=size, fits=fits, context=context, kv_type=kv_type, like=like, patterns=recipe,
        types=_split(types), floors=floors, couple=_split(couple) or (), vision=vision,
    )  # fmt: skip
    options = stage.CalibrationOptions(
        text=calibration, tokens=tokens, window=window,
        hessians=_hessians(hessians), hessian_memory=hessian_memory, ray=ray,
        max_memory=max_memory, spill=spill, data=data, strict=strict,
    )  # fmt: skip
    if config_only is not None:
        if model is not None:
            raise PlanError("--config-only DIR goes without a MODEL.")
        made = stage.plan_from_config(config_only, target, session)
        show = print_histogram
        if machine is not None:
            show = partial(_print_with_costs, config_only, machine, options, target.types)
    elif machine is not None:
        raise PlanError("--machine goes with --config-only DIR.")
    elif model is None:
        raise PlanError("Give a MODEL to plan, or --config-only DIR with --preset NAME.")
    else:
        made = stage.plan(
            model, target, options, output, session,
            stats_path=stats, encoder=encoder, base_gguf=base_gguf,
            search=SearchOptions(
                methods=_split(sensitivity) or _default_methods(data is None and (select or frontier is not None)),
                select=select, text=selection_text, probes=probes, check_plans=check_plans, frontier=_range(frontier),
            ),
        )  # fmt: skip
        if report:
            from dynquant.analysis.report.stage import write_plan_report

            write_plan_report(model, output, session, base_gguf=base_gguf)
        show = partial(print_plan, directory=output)
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
    mmproj_type: Annotated[
        str | None,
        typer.Option(
            help="One type for vision tower and projector, which go to mmproj-NAME.gguf: f32, bf16, f16 or q8_0. "
            "Default: the types of the plan.",
            show_default=False,
        ),
    ] = None,
    max_memory: MaxMemoryOpt = None,
    ray: RayOpt = None,
    ship_weights: Annotated[
        bool,
        typer.Option(help="With --ray: send weights and statistics to workers that cannot read them by path."),
    ] = False,
    threads: ThreadsOpt = None,
    base_gguf: BaseGgufOpt = None,
) -> None:
    """Write the model in the types of a plan or preset.

    Example: dynquant export ./model --plan plan/plan.json -o model.gguf

    Example: dynquant export ./model --plan plan/plan.json -f compressed-tensors -o out/

    Example: dynquant export ./vision-model --plan plan/plan.json -f safetensors -o out/
    """
    from dynquant.calibration.stage import CalibrationOptions
    from dynquant.cli import commands
    from dynquant.cli.terminal import console

    options = CalibrationOptions(text=calibration, tokens=tokens, hessians=_hessians(hessians), max_memory=max_memory)
    commands.export(
        model, output, console.session(device, threads), format=format, plan_path=plan, preset=preset,
        stats_path=stats, calibration=options,
        encoder=encoder, split_max_size=split_max_size, resume=resume,
        base_gguf=base_gguf, tune_tokens=tune, max_memory=max_memory, ray=ray, ship_weights=ship_weights,
        mmproj_type=mmproj_type,
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
    from dynquant.cli.terminal import console
    from dynquant.exporters.closing_pass import TuneOptions
    from dynquant.exporters.stage import tune_command

    options = TuneOptions(tokens=tokens, step_tokens=step_tokens, seed=seed)
    session = console.session(device)
    for path in tune_command(file, reference, output, options, session, text=calibration, window=window):
        console.out.print(str(path))


@app.command("eval")
def evaluate(
    candidate: ModelArg,
    reference: Annotated[str, typer.Option(help="The model to compare with: HF directory, hub id or .gguf.")],
    tasks: Annotated[str, typer.Option(help="Any of kl, ppl, mmlu; with --data kl and vqa.")] = "kl,ppl",
    text: Annotated[
        list[Path] | None, typer.Option(help="Text for kl and ppl, .txt or .jsonl. May be repeated.")
    ] = None,
    data: Annotated[
        Path | None,
        typer.Option(
            help="Questions with pictures, .jsonl, for kl and vqa of a vision-language model. The candidate is then a "
            "plan.json, its folder, a Hugging Face directory, packed or not, or a .gguf file with its mmproj file.",
            show_default=False,
        ),
    ] = None,
    mmproj: Annotated[
        Path | None,
        typer.Option(help="With --data: the vision part of a .gguf candidate. Default: mmproj-NAME.gguf beside it."),
    ] = None,
    strict: StrictOpt = False,
    encoder: Annotated[str, typer.Option(help="What renders a plan with --data: dynquant or ggml.")] = "dynquant",
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

    Example: dynquant eval plan/ --reference ./vision-model --tasks kl,vqa --data questions.jsonl

    Example: dynquant eval model.gguf --reference ./vision-model --tasks kl,vqa --data questions.jsonl
    """
    from dynquant.cli import commands

    if data is not None:
        if text or mmlu_data:
            raise EvaluationError("--data goes without --text and --mmlu-data: all of its tasks run on its samples.")
        commands.evaluate_on_samples(
            Path(candidate), reference, data, tasks=_split(tasks) or (), limit=limit, strict=strict, device=device,
            encoder=encoder, mmproj=mmproj, json_file=json_file,
        )  # fmt: skip
        return
    if mmproj is not None:
        raise EvaluationError("--mmproj is for questions with pictures; give them with --data FILE.")
    if "vqa" in tasks:
        raise EvaluationError("The task vqa needs questions with pictures; give them with --data FILE.")
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
    from dynquant.calibration.stage import CalibrationOptions
    from dynquant.cli.compare import Questions
    from dynquant.cli.compare import compare as run
    from dynquant.cli.terminal import console
    from dynquant.planning.search import SearchOptions

    questions = Questions(
        tasks=_split(tasks) or (), text=tuple(text or ()), max_tokens=max_tokens, mmlu_data=mmlu_data, shots=shots,
        limit=limit, scoring=_split(scoring) or (),
    )  # fmt: skip
    hessians = "activations" if encoder == "dynquant" else "none"
    options = CalibrationOptions(text=calibration, tokens=tokens, hessians=hessians)
    search = SearchOptions(methods=_default_methods(select), select=True) if select else None
    run(
        model, _split(recipes) or (), questions, options, output,
        session=console.session(threads=threads), encoder=encoder, search=search, keep=keep,
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
    from dynquant.calibration.stage import CalibrationOptions
    from dynquant.cli.compare import Questions
    from dynquant.cli.compare_encoders import compare_encoders as run
    from dynquant.cli.terminal import console

    questions = Questions(
        tasks=_split(tasks) or (), text=tuple(text or ()), max_tokens=max_tokens, mmlu_data=mmlu_data, shots=shots,
        limit=limit, scoring=_split(scoring) or (),
    )  # fmt: skip
    options = CalibrationOptions(text=calibration, tokens=tokens, hessians=_hessians(hessians))
    run(
        model, _split(recipes) or (), questions, options, output,
        session=console.session(device, threads), tune_tokens=tune, variants=_split(variants) or (), keep=keep,
    )  # fmt: skip


app.command("finetune")(cli_training.finetune)
app.command("heal")(cli_training.heal)
app.command("export-adapter")(cli_training.export_adapter)


@app.command()
def inspect(path: ModelArg, as_json: JsonOpt = False) -> None:
    """Types, sizes and bits per weight of a GGUF file or safetensors checkpoint.

    Example: dynquant inspect model.gguf
    """
    from dynquant.cli import commands

    commands.inspect(path, as_json=as_json)


@app.command("measure-machine")
def measure_machine(
    output: Annotated[Path, typer.Option("-o", "--output", help="Where the machine file goes.")] = Path("machine.json"),
) -> None:
    """Measure this machine's CPU and disk for `plan --config-only DIR --machine FILE`: some minutes.

    Example: dynquant measure-machine -o machine.json
    """
    from dynquant.cli import commands

    commands.measure(output)


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
    from dynquant.cli import commands

    commands.recipe(plan, model=model, imatrix=imatrix, output=output, as_json=as_json)


@app.command()
def diff(before: PlanArg, after: PlanArg, as_json: JsonOpt = False) -> None:
    """Compare the types of two plans or files of one model: what changed in which layers, and the bytes.

    Example: dynquant diff plan/plan.json published.gguf
    """
    from dynquant.cli import commands

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
    from dynquant.cli import commands

    commands.super_weights(model, text=text, tokens=tokens, ablation=ablation, as_json=as_json)


@app.command()
def demo(
    output: Annotated[Path, typer.Option("-o", "--output", help="Directory for everything the demo makes.")] = Path(
        "demo-out"
    ),
) -> None:
    """Plan, export and evaluate the bundled 16M mixture-of-experts model; about a minute and a half on two cores."""
    from dynquant.cli import commands

    commands.demo(output)


@app.command()
def version() -> None:
    """Print the version."""
    print(__version__)


def _check_one_source(calibration: str | None, data: str | None) -> None:
    if calibration is not None and data is not None:
        raise StatsError(f"Give either text (--calibration {calibration}) or samples with images (--data {data}).")


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
    model: str, output: Path, options: object, session: object, stats: Path | None, as_json: bool, **target: object
) -> None:
    from dynquant.cli.plan import print_serving_plan
    from dynquant.planning import serving_stage

    made = serving_stage.plan_for_vllm(
        model, serving_stage.ServingTarget(**target), options, output, session, stats_path=stats
    )
    if as_json:
        print(made.model_dump_json(indent=1))
    else:
        print_serving_plan(made, output)


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


def _print_with_costs(
    directory: Path, machine: Path, options: "CalibrationOptions", types: tuple[str, ...] | None, made: "Plan"
) -> None:
    from dynquant.cli import commands
    from dynquant.cli.plan import print_histogram

    print_histogram(made)
    commands.print_costs(directory, made, machine, options, types and [name.upper() for name in types])


def _split(value: str | None) -> tuple[str, ...] | None:
    return tuple(part.strip() for part in value.split(",") if part.strip()) if value else None


def _global_options_first(arguments: list[str]) -> list[str]:
    """Options of all commands may stand anywhere on the line; typer wants them before the command."""
    first, rest = [], list(arguments)
    for option, num_words in (("--debug", 1), ("--json-progress", 2)):
        for index, word in enumerate(rest):
            if word == option or (num_words == 2 and word.startswith(f"{option}=")):
                end = index + (num_words if word == option else 1)
                first += rest[index:end]
                del rest[index:end]
                break
    return first + rest


for _command in app.registered_commands:
    _command.epilog = "Every command also takes --json-progress FILE (- is stderr) and --debug."


def main() -> None:
    """Entry point of the `dynquant` command."""
    from dynquant.cli.terminal import console

    arguments = _global_options_first(sys.argv[1:])
    console.begin(shlex.join(["dynquant", *sys.argv[1:]]))
    with ends_promptly(console.interrupted):
        try:
            app(args=arguments, prog_name="dynquant")
        except DynquantError as error:
            if "--debug" in arguments:
                raise
            console.fail(str(error))
            sys.exit(1)
        except Exception as error:
            console.finish("failed", f"{type(error).__name__}: {error}")
            raise
        except SystemExit as left:
            console.finish("failed" if left.code else "done")
            raise
