"""README.md of an exported checkpoint: what it is, how to load it, the plan, and the damage where it was measured."""

from collections.abc import Sequence
from math import prod

from dynquant import __version__
from dynquant.evaluation.statistics import shown_kl
from dynquant.exporters.compressed_config import transformers_problem
from dynquant.formats.vllm_schemes import SCHEMES
from dynquant.recipes.plan import Plan, PlanEntry

CARD_NAME = "README.md"
_CLOSING = "\n\n## Closing pass\n\n"  # the last section
_TEXT_TASKS = "kl,ppl --text held-out.txt"
_UNMEASURED = "- Not measured on this file. Measure it: "
_MEASURED_BELOW = "- Measured on this file by the closing pass alone, see below. Measure it on other text: "


def packed_card(plan: Plan, *, encoder: str, stored_bytes: int) -> str:
    """Return the card of a checkpoint of GGUF blocks; `stored_bytes` counts the tensors as written."""
    has_vision = any(entry.role.is_vision for entry in plan.entries)
    auto_class = "AutoModelForImageTextToText" if has_vision else "AutoModelForCausalLM"
    rows = "\n".join(
        f"| {group[0].role.value} | {group[0].type} | {len(group)} | {sum(prod(e.shape) for e in group):,} "
        f"| {sum(e.bytes for e in group):,} | {_mean_error(group)} |"
        for group in _grouped(plan)
    )
    about = (
        f"with GGUF blocks as its weights, {stored_bytes:,} bytes, made by dynquant {__version__} (recipe "
        f"`{plan.recipe}`, encoder `{encoder}`). uint8 tensors hold the same bytes as the GGUF export of the same "
        "plan; `quantization_config` in config.json gives their types."
    )
    body = f"""```python
import dynquant  # tells transformers how to load it
from transformers import {auto_class}

model = {auto_class}.from_pretrained("PATH", device_map="auto")
```

## Damage

{_damage(plan, "kl,vqa --data questions.jsonl" if has_vision else _TEXT_TASKS)}

## Plan

| role | type | tensors | weights | bytes | weighted error |
|---|---|---|---|---|---|
{rows}"""
    return _card(plan, "dynquant, quantized", 8 * stored_bytes / plan.num_weights, about, body)


def compressed_card(plan: Plan, *, rounding: str) -> str:
    """Return the card of a compressed-tensors checkpoint; `rounding` says how rounding errors were kept small."""
    about = (
        f"as a compressed-tensors checkpoint of {plan.predicted_bytes:,} bytes, made by dynquant {__version__} (recipe "
        f"`{plan.recipe}`). Weights alone are quantized; {rounding}."
    )
    schemes = "\n".join(_scheme_row(name, entries) for name, entries in plan.by_type().items())
    rows = "\n".join(
        f"| {group[0].role.value} | {group[0].type} | {group[0].group_size or 'row'} "
        f"| {sum(len(e.modules) for e in group):,} | {sum(e.bytes for e in group):,} | {_mean_error(group)} |"
        for group in _grouped(plan)
    )
    replaced = [e for e in plan.entries if e.wanted_type]
    fallbacks = [f"- `{e.name}`: {e.type} instead of {e.wanted_type} ({e.reason})" for e in replaced]
    otherwise = "\n".join(["\n\nStored otherwise than asked for:", "", *fallbacks]) if fallbacks else ""
    loads = "transformers loads it as well, with the package compressed-tensors; it unpacks the weights in memory."
    if problem := transformers_problem(plan):
        loads = f"transformers cannot load it: {problem}. vLLM can."
    if since := max(dict(entry.scheme.read_since).get("vllm", "") for entry in plan.entries):
        loads = f"Its schemes take vLLM {since}, where Humming kernels run 2, 3, 5, 6 and 7 bits on CUDA. {loads}"
    body = f"""```
vllm serve PATH
```

{loads}

## Damage

{_damage(plan, _TEXT_TASKS)}

## Plan

| scheme | format | linear layers | weights | bytes | bits per weight |
|---|---|---|---|---|---|
{schemes}
| embedding, head, routers, norms, biases | BF16, or as in the original | | | {plan.other_bytes:,} | |

| role | scheme | group | layers | bytes | weighted error |
|---|---|---|---|---|---|
{rows}{otherwise}"""
    return _card(plan, "compressed-tensors, vllm, dynquant", plan.bits_per_weight, about, body)


def with_closing_pass(card: str, outcome: str) -> str:
    """Return a card that also says what came of the closing pass, instead of what an earlier one says."""
    before = card.partition(_CLOSING)[0].rstrip().replace(_UNMEASURED, _MEASURED_BELOW)
    return f"{before}{_CLOSING}{outcome[0].upper()}{outcome[1:]}.\n"


def _card(plan: Plan, tags: str, bits_per_weight: float, about: str, body: str) -> str:
    """Return a card as Markdown with the hub's metadata block."""
    gone = f"\n\nRouted experts of the original that are left out: {plan.pruned}." if plan.pruned else ""
    return f"""---
library_name: transformers
tags: [{tags}]
---
# {plan.model}, {bits_per_weight:.2f} bits per weight

{plan.model} ({plan.arch}, {plan.num_weights:,} weights) {about}{gone}

{body}

Checkpoint `{plan.fingerprint}`, plan `{plan.hash}`, statistics `{plan.stats_hash or "none"}`.
"""


def _damage(plan: Plan, tasks: str) -> str:
    measured, predicted, lines = plan.selected_kl, plan.predicted_kl, []
    if measured is not None:
        lines.append(
            f"- KL divergence to the original on the selection text, measured: {shown_kl(measured)} nats a token"
        )
    if predicted is not None:
        spread = f" ± {shown_kl(plan.predicted_kl_se)}" if plan.predicted_kl_se is not None else ""
        lines.append(
            f"- KL divergence as the plan predicts it, not measured: {shown_kl(predicted)}{spread} nats a token"
        )
    if measured is None:
        command = f"dynquant eval PATH --reference ORIGINAL --tasks {tasks}"
        lines.append(f"{_UNMEASURED}`{command}`")
    return "\n".join(lines)


def _scheme_row(name: str, entries: Sequence[PlanEntry]) -> str:
    layers, weights = sum(len(entry.modules) for entry in entries), sum(prod(entry.shape) for entry in entries)
    size = sum(entry.bytes for entry in entries)
    return f"| {name} | {SCHEMES[name].format} | {layers:,} | {weights:,} | {size:,} | {8 * size / weights:.2f} |"


def _grouped(plan: Plan) -> list[list[PlanEntry]]:
    """Return the entries of each role, type and group size, in the order in which the plan has the roles."""
    groups: dict[tuple[object, ...], list[PlanEntry]] = {}
    roles = list(dict.fromkeys(entry.role for entry in plan.entries))
    for entry in sorted(plan.entries, key=lambda entry: roles.index(entry.role)):
        groups.setdefault((entry.role, entry.type, entry.group_size), []).append(entry)
    return list(groups.values())


def _mean_error(entries: Sequence[PlanEntry]) -> str:
    """Return the mean of the relative squared errors, weighted by size; empty where the plan has none."""
    measured = [(entry.weighted_error, prod(entry.shape)) for entry in entries if entry.weighted_error is not None]
    total = sum(size for _, size in measured)
    return f"{sum(error * size for error, size in measured) / total:.2e}" if measured else ""
