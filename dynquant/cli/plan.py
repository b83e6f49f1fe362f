"""`dynquant plan`, and the tables of plans."""

from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from dynquant.cli.terminal import console
from dynquant.cli.terminal.parameters import AsJson
from dynquant.errors import PlanError
from dynquant.options import Only
from dynquant.planning.options import PlanOptions
from dynquant.resources import human_bytes, parse_size
from dynquant.session import Session
from dynquant.storage.file_names import REPORT_NAME

if TYPE_CHECKING:
    from dynquant.recipes.plan import Plan, PlanEntry


def plan(
    options: PlanOptions,
    session: Annotated[Session, Only(("seed", "device", "threads"))],
    report: Annotated[bool, typer.Option(help="Draw plots and write report.html.")] = True,
    config_only: Annotated[
        Path | None, typer.Option(help="Directory with config.json: sizes a preset or recipe.")
    ] = None,
    machine: Annotated[
        Path | None,
        typer.Option(help="With --config-only: also time and memory of each stage, on a machine of `measure-machine`."),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Decide a quant type for every tensor, and show why.

    Without a budget: the smallest file that keeps every floor, and 5 % more. Statistics and errors already in the
    output directory are reused, so another budget costs seconds, or with --select minutes; the plan of the one before
    stays there as bpw-2.5.plan.json or the like.

    Example: dynquant plan ./model --calibration text.jsonl --bpw 2.0 -o plan/

    Example: dynquant plan ./model --like published-IQ1_S.gguf -o plan/

    Example: dynquant plan ./model --for vllm --bpw 5 -o plan/
    """
    from dynquant.planning import stage
    from dynquant.publishing.effort_time import with_estimate

    if config_only is not None:
        if options.model is not None:
            raise PlanError("--config-only DIR goes without a MODEL.")
        if config_only.is_file():
            raise PlanError(f"{config_only} (--config-only) is a file; give the directory that config.json is in.")
        why = "--config-only runs and writes nothing."
        options.refuse_unused(why, "stats", "encoder", "exact", "base_gguf", "mtp", "prune_experts", "effort")
        options.search.refuse_unused(why)
        options.calibration.refuse_unused(why, *(("text", "data", "strict", "spill", "ray") if machine else ()))
        sized = stage.plan_from_config(config_only, options.target, session)
        if as_json:
            console.show_json(sized.model_dump_json(indent=1))
            return
        print_histogram(sized)
        if machine is not None:
            print_costs(sized, config_only, machine, options)
        return
    if machine is not None:
        raise PlanError("--machine goes with --config-only DIR.")
    decided = stage.make_plan(options, with_estimate(options, session))
    if report and options.target.serves is None:
        from dynquant.analysis.report.stage import write_plan_report

        write_plan_report(str(options.model), options.output, session, base_gguf=options.base_gguf)
    elif (drawn := options.output / REPORT_NAME).is_file():
        session.note(f"{drawn} and the plots are of an earlier plan: this one has none")
    if as_json:
        console.show_json(decided.model_dump_json(indent=1))
    else:
        print_plan(decided, options.output)


def print_histogram(plan: "Plan") -> None:
    """Show the size in GiB and the number of tensors of each type."""
    console.print_table(
        f"{plan.model}: {plan.recipe}", ("type", "tensors"), [(name, count) for name, count in plan.histogram().items()]
    )
    console.say(
        f"{plan.predicted_bytes / 2**30:.2f} GiB ({plan.predicted_bytes:,} bytes), {len(plan.entries):,} tensors, "
        f"{plan.bits_per_weight:.3f} bits per weight"
    )
    _print_remarks(plan)


def _print_remarks(plan: "Plan") -> None:
    for line in plan.remarks():
        console.say(f"  {line}")


def print_plan(plan: "Plan", directory: Path) -> None:
    """Show what was kept, what was crushed, what fell back, and the size."""
    columns, rows = _by_role(plan) if plan.target == "gguf" else _by_scheme(plan)
    console.print_table(f"{plan.model}: {plan.recipe}", (*columns, "bpw", "size", "share"), rows)
    if plan.target == "gguf":
        for entry in plan.entries:
            if "super " in entry.reason or "stands out" in entry.reason:
                console.say(f"  {entry.name}: {entry.type}, {entry.reason}")
        for done, reason in (("lowered", "lowered from"), ("dropped", "no floor at this budget")):
            if count := sum(reason in entry.reason for entry in plan.entries):
                console.say(f"  floors {done} at this budget: {count} tensors (--floors); plan.json has each reason")
    else:
        from dynquant.exporters.compressed_config import transformers_problem

        if problem := transformers_problem(plan):
            console.note(f"vLLM will load this checkpoint, transformers will not: {problem}")
    _print_remarks(plan)
    if plan.predicted_kl is not None:
        from dynquant.evaluation.statistics import shown_kl  # here, since `--help` imports this module

        error = f" ± {shown_kl(plan.predicted_kl_se)} (sampling error alone)" if plan.predicted_kl_se else ""
        measured = (
            "" if plan.selected_kl is None else f", measured {shown_kl(plan.selected_kl)} on the text of the choice"
        )
        whole = plan.pruned is None or plan.selected_kl is not None  # a prediction alone prices only what is left
        compared = "the original" if whole else "the model without these experts"
        console.say(f"  KL to {compared}, nats per token: predicted {shown_kl(plan.predicted_kl)}{error}{measured}")
    console.say(
        f"{human_bytes(plan.predicted_bytes)} ({plan.predicted_bytes:,} bytes), "
        f"{plan.bits_per_weight:.3f} bits per weight. Plan: {directory / 'plan.json'}"
    )


def _by_role(plan: "Plan") -> tuple[tuple[str, ...], list[tuple[object, ...]]]:
    """Return columns and rows of a plan for llama.cpp, the role with most bytes first."""
    precision = list(plan.by_type())  # most precise first
    by_role: dict[str, list[PlanEntry]] = {}
    for entry in plan.entries:
        by_role.setdefault(entry.role.value, []).append(entry)
    rows = []
    for role, entries in sorted(by_role.items(), key=lambda item: -sum(entry.bytes for entry in item[1])):
        types = sorted({entry.type for entry in entries}, key=precision.index)
        rows.append((role, len(entries), " ".join(types), *_size_cells(entries, plan)))
    return ("role", "tensors", "types"), rows


def _by_scheme(plan: "Plan") -> tuple[tuple[str, ...], list[tuple[object, ...]]]:
    """Return columns and rows of a plan for vLLM, the most precise scheme first."""
    rows: list[tuple[object, ...]] = [
        (name, sum(len(entry.modules) for entry in entries), *_size_cells(entries, plan))
        for name, entries in plan.by_type().items()
    ]
    share = f"{plan.other_bytes / plan.predicted_bytes:.1%}"
    return ("scheme", "linear layers"), [*rows, ("everything else", "", "", human_bytes(plan.other_bytes), share)]


def _size_cells(entries: "list[PlanEntry]", plan: "Plan") -> tuple[str, str, str]:
    """Return bits per weight, size, and share of the plan's bytes."""
    num_bytes = sum(entry.bytes for entry in entries)
    bits_per_weight = 8 * num_bytes / sum(prod(entry.shape) for entry in entries)
    return f"{bits_per_weight:.3f}", human_bytes(num_bytes), f"{num_bytes / plan.predicted_bytes:.1%}"


def print_costs(plan: "Plan", directory: Path, machine_file: Path, options: PlanOptions) -> None:
    """Show time and memory of each stage for a model that is known by its configuration only."""
    from dynquant.analysis.costs.machine import Machine
    from dynquant.analysis.costs.model import CostOptions, predict
    from dynquant.analysis.errors.options import DEFAULT_TYPES
    from dynquant.calibration.recorders import moment_limits
    from dynquant.families.open import open_config

    machine, calibration = Machine.load(machine_file), options.calibration
    limit = None if calibration.max_memory is None else parse_size(calibration.max_memory)
    inputs = {
        "tokens": calibration.tokens + calibration.sampled_tokens,
        "window": calibration.window,
        "hessians": calibration.hessians,
    }
    types = tuple(name.upper() for name in options.target.types) or DEFAULT_TYPES
    hessian_bytes, _ = moment_limits(calibration.hessian_memory, machine.memory_bytes)
    work = CostOptions(**inputs, hessian_bytes=hessian_bytes, types=types, limit_bytes=limit)
    costs = predict(open_config(directory), plan, machine, work)
    rows = [
        (cost.stage, f"{cost.seconds:,.0f} s", human_bytes(cost.memory_bytes), human_bytes(cost.bytes_read))
        for cost in costs
    ]
    streamed = "" if limit is None else f", streamed within {human_bytes(limit)}"
    title = f"on {machine.name}, {machine.threads} threads, {work.tokens:,} calibration tokens{streamed} (estimated)"
    console.print_table(title, ("stage", "time", "memory", "reads"), rows)
    for cost in costs:
        if cost.memory_bytes > (limit or machine.memory_bytes):
            way_out = "give a higher --max-memory." if limit else "run it elsewhere, or streamed (--max-memory)."
            console.note(f"{cost.stage} does not fit in {human_bytes(limit or machine.memory_bytes)}: {way_out}")
