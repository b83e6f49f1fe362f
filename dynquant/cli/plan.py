"""Tables of plans."""

from math import prod
from pathlib import Path

from dynquant.cli.terminal import console
from dynquant.exporters.compressed_config import transformers_problem
from dynquant.formats.quant_types import quant_type
from dynquant.recipes.folder import PLAN_NAME
from dynquant.recipes.plan import Plan
from dynquant.resources import human_bytes


def print_histogram(plan: Plan) -> None:
    """Size in GiB and the number of tensors of each type."""
    console.print_table(
        f"{plan.model}: {plan.recipe}", ("type", "tensors"), [(name, count) for name, count in plan.histogram().items()]
    )
    console.out.print(
        f"{plan.predicted_bytes / 2**30:.2f} GiB ({plan.predicted_bytes:,} bytes), {len(plan.entries):,} tensors, "
        f"{plan.bits_per_weight:.3f} bits per weight"
    )


def print_plan(plan: Plan, directory: Path) -> None:
    """Print what was kept, what was crushed, and the size."""
    by_role: dict[str, list] = {}
    for entry in plan.entries:
        by_role.setdefault(entry.role.value, []).append(entry)
    rows = []
    for role, entries in sorted(by_role.items(), key=lambda item: -sum(e.bytes for e in item[1])):
        types = sorted({e.type for e in entries}, key=lambda name: -quant_type(name).bits_per_weight)
        size = sum(e.bytes for e in entries)
        weights = sum(prod(e.shape) for e in entries)
        share = f"{size / plan.predicted_bytes:.1%}"
        rows.append((role, len(entries), " ".join(types), f"{8 * size / weights:.3f}", human_bytes(size), share))
    console.print_table(f"{plan.model}: {plan.recipe}", ("role", "tensors", "types", "bpw", "size", "share"), rows)
    exceptions = [e for e in plan.entries if "super " in e.reason or "stands out" in e.reason]
    for entry in exceptions:
        console.out.print(f"  {entry.name}: {entry.type}, {entry.reason}")
    fallbacks = [e for e in plan.entries if e.wanted_type]
    if fallbacks:
        console.out.print(f"  {len(fallbacks)} tensors took another type because of their row length (see the plan)")
    if plan.predicted_kl is not None:
        error = f" ± {plan.predicted_kl_se:.4f}" if plan.predicted_kl_se else ""
        measured = "" if plan.selected_kl is None else f", measured {plan.selected_kl:.4f}"
        console.out.print(f"  KL to the original, nats per token: predicted {plan.predicted_kl:.4f}{error}{measured}")
    console.out.print(
        f"{human_bytes(plan.predicted_bytes)} ({plan.predicted_bytes:,} bytes), "
        f"{plan.bits_per_weight:.3f} bits per weight. Plan: {directory / PLAN_NAME}"
    )


def print_serving_plan(plan: Plan, directory: Path) -> None:
    """Schemes, what fell back, and the size."""
    rows = [
        (
            name,
            sum(len(entry.modules) for entry in entries),
            f"{8 * sum(e.bytes for e in entries) / sum(prod(e.shape) for e in entries):.3f}",
            human_bytes(sum(e.bytes for e in entries)),
            f"{sum(e.bytes for e in entries) / plan.predicted_bytes:.1%}",
        )
        for name, entries in plan.by_type().items()
    ]
    rows.append(("everything else", "", "", human_bytes(plan.other_bytes),
                 f"{plan.other_bytes / plan.predicted_bytes:.1%}"))  # fmt: skip
    console.print_table(f"{plan.model}: {plan.recipe}", ("scheme", "linear layers", "bpw", "size", "share"), rows)
    for entry in plan.entries:
        if entry.wanted_type:
            console.out.print(f"  {entry.name}: {entry.type} instead of {entry.wanted_type}, {entry.reason}")
    problem = transformers_problem(plan)
    if problem is not None:
        console.note(f"vLLM will load this checkpoint, transformers will not: {problem}")
    if plan.predicted_kl is not None:
        console.out.print(f"  KL to the original, nats per token: predicted {plan.predicted_kl:.4f}")
    console.out.print(
        f"{human_bytes(plan.predicted_bytes)} ({plan.predicted_bytes:,} bytes), "
        f"{plan.bits_per_weight:.3f} bits per weight. Plan: {directory / PLAN_NAME}"
    )
