"""README.md of an exported checkpoint: what it is, how to load it, the plan, and the damage where it was measured."""

from collections.abc import Sequence
from math import prod

from dynquant import __version__
from dynquant.checkpoints.tensor_roles import Role
from dynquant.recipes.plan import Plan, PlanEntry
from dynquant.recipes.serving_plan import ServingEntry


def model_card(plan: Plan, *, encoder: str, stored_bytes: int) -> str:
    """The card as Markdown with the hub's metadata block; `stored_bytes` counts the tensors as written."""
    weights = plan.num_weights
    has_vision = any(entry.role.is_vision for entry in plan.entries)
    auto_class = "AutoModelForImageTextToText" if has_vision else "AutoModelForCausalLM"
    lines = [
        "---",
        "library_name: transformers",
        "tags: [dynquant, quantized]",
        "---",
        f"# {plan.model}, {8 * stored_bytes / weights:.2f} bits per weight",
        "",
        f"{plan.model} ({plan.arch}, {weights:,} weights) with GGUF blocks as its weights, {stored_bytes:,} bytes, "
        f"made by dynquant {__version__} (recipe `{plan.recipe}`, encoder `{encoder}`). uint8 tensors hold the same "
        "bytes as the GGUF export of the same plan; `quantization_config` in config.json gives their types.",
        "",
        "```python",
        "import dynquant  # tells transformers how to load it",
        f"from transformers import {auto_class}",
        "",
        f'model = {auto_class}.from_pretrained("PATH", device_map="auto")',
        "```",
        "",
        "## Damage",
        "",
        *_damage(plan, "kl,vqa --data questions.jsonl" if has_vision else "kl,ppl --text held-out.txt"),
        "",
        "## Plan",
        "",
        "| role | type | tensors | weights | bytes | weighted error |",
        "|---|---|---|---|---|---|",
        *_plan_rows(plan),
        "",
        f"Checkpoint `{plan.fingerprint}`, plan `{plan.hash}`, statistics `{plan.stats_hash or 'none'}`.",
        "",
    ]
    return "\n".join(lines)


def _damage(plan: Plan, tasks: str) -> list[str]:
    lines = []
    if plan.selected_kl is not None:
        lines.append(
            f"- KL divergence to the original on the selection text, measured: {plan.selected_kl:.4f} nats a token"
        )
    if plan.predicted_kl is not None:
        spread = f" ± {plan.predicted_kl_se:.4f}" if plan.predicted_kl_se is not None else ""
        lines.append(
            f"- KL divergence as the plan predicts it, not measured: {plan.predicted_kl:.4f}{spread} nats a token"
        )
    if plan.selected_kl is None:
        lines.append(
            f"- Not measured on this file. Measure it: `dynquant eval PATH --reference ORIGINAL --tasks {tasks}`"
        )
    return lines


def _plan_rows(plan: Plan) -> list[str]:
    groups: dict[tuple[Role, str], list[PlanEntry]] = {}
    for entry in plan.entries:
        groups.setdefault((entry.role, entry.type), []).append(entry)
    return [
        f"| {role.value} | {type_name} | {len(entries)} | {sum(prod(e.shape) for e in entries):,} "
        f"| {sum(e.bytes for e in entries):,} | {mean_error(entries)} |"
        for (role, type_name), entries in groups.items()
    ]


def mean_error(entries: Sequence[PlanEntry | ServingEntry]) -> str:
    """Mean of the relative squared errors, weighted by size; empty where the plan has none."""
    known = [(entry.weighted_error, prod(entry.shape)) for entry in entries if entry.weighted_error is not None]
    return f"{sum(error * size for error, size in known) / sum(size for _, size in known):.2e}" if known else ""
