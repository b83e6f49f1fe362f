"""config.json and README.md of a compressed-tensors checkpoint."""

import re
from collections.abc import Iterable

from dynquant import __version__
from dynquant.exporters.model_card import mean_error
from dynquant.families.linear_layers import ServedCheckpoint
from dynquant.formats.vllm_schemes import SCHEMES
from dynquant.recipes.serving_plan import ServingEntry, ServingPlan

_LAYER = re.compile(r"^(?P<before>.*\.layers\.)(?P<layer>\d+)(?P<after>\..*)$")
_EXPERT = re.compile(r"^(?P<before>.*\.layers\.)(?P<layer>\d+)(?P<after>\..*experts\.)\d+\.(?P<part>\w+)$")


def quantization_config(plan: ServingPlan, checkpoint: ServedCheckpoint, num_layers: int) -> dict[str, object]:
    """The entry `quantization_config` of config.json.

    Linear layers are targeted by their full names, routed experts by one expression for each scheme. Only experts get
    expressions: transformers takes the first group whose expressions mention `experts` for the scheme of all experts.
    """
    groups: dict[tuple[str, int], list[ServingEntry]] = {}
    for entry in plan.entries:
        if entry.stored_as.is_quantized:
            groups.setdefault((entry.scheme, entry.group_size), []).append(entry)
    order = sorted(groups, key=lambda key: (list(SCHEMES).index(key[0]), -key[1]))
    formats = {SCHEMES[scheme].format for scheme, _ in groups}
    return {
        "quant_method": "compressed-tensors",
        "format": formats.pop() if len(formats) == 1 else "mixed-precision",
        "quantization_status": "compressed",
        "config_groups": {
            f"group_{number}": SCHEMES[key[0]].config_group(key[1], _targets(groups[key]))
            for number, key in enumerate(order)
        },
        "ignore": _ignored(plan, checkpoint, num_layers),
        "kv_cache_scheme": None,
        "global_compression_ratio": None,
    }


def _targets(entries: Iterable[ServingEntry]) -> list[str]:
    targets: dict[str, None] = {}
    experts: dict[str, tuple[dict[str, None], dict[str, None]]] = {}
    for entry in entries:
        match = _EXPERT.match(entry.modules[0])
        if not entry.is_expert or match is None:
            targets |= dict.fromkeys(entry.modules)
            continue
        layers, parts = experts.setdefault(f"{match['before']}#{match['after']}", ({}, {}))
        layers[match["layer"]] = parts[match["part"]] = None
    for place, (layers, parts) in experts.items():
        before, after = map(re.escape, place.split("#"))
        targets[f"re:^{before}({'|'.join(layers)}){after}\\d+\\.({'|'.join(parts)})$"] = None
    return list(targets)


def _ignored(plan: ServingPlan, checkpoint: ServedCheckpoint, num_layers: int) -> list[str]:
    """Linear layers that are not quantized, as vLLM wants them listed; layers beyond the model's by expression."""
    names = [module for e in plan.entries if not e.stored_as.is_quantized for module in e.modules]
    beyond: dict[str, None] = {}
    for tensor in checkpoint.others:
        if len(tensor.shape) < 2 or not tensor.key.endswith(".weight"):
            continue
        module = tensor.key.removesuffix(".weight")
        match = _LAYER.match(module)
        if match and int(match["layer"]) >= num_layers:
            beyond[f"re:^{re.escape(match['before'] + match['layer'])}\\..*"] = None
        elif "embed" not in module and "norm" not in module:
            names.append(module)
    return list(dict.fromkeys(["lm_head", *names, *beyond]))


def model_card(plan: ServingPlan, *, rounding: str) -> str:
    """README.md: the schemes with their bytes, what fell back and why, and how to load it."""
    lines = [
        "---", "library_name: transformers", "tags: [compressed-tensors, vllm, dynquant]", "---",
        f"# {plan.model}, {plan.bits_per_weight:.2f} bits per weight", "",
        f"{plan.model} ({plan.arch}, {plan.num_weights:,} weights) as a compressed-tensors checkpoint of "
        f"{plan.predicted_bytes:,} bytes, made by dynquant {__version__} (recipe `{plan.recipe}`). Weights alone are "
        f"quantized; {rounding}.", "",
        "| scheme | format | linear layers | weights | bytes | bits per weight |",
        "|---|---|---|---|---|---|",
        *_scheme_rows(plan),
        f"| embedding, head, routers, norms, biases | BF16, or as in the original | | | {plan.other_bytes:,} | |", "",
        "| role | scheme | group | layers | bytes | weighted error |", "|---|---|---|---|---|---|",
        *_role_rows(plan), "",
    ]  # fmt: skip
    fallbacks = [entry for entry in plan.entries if entry.wanted_scheme]
    if fallbacks:
        lines += ["Stored otherwise than asked for:", ""]
        lines += [f"- `{e.name}`: {e.scheme} instead of {e.wanted_scheme} ({e.reason})" for e in fallbacks]
        lines.append("")
    lines += ["```", "vllm serve PATH", "```", "", _transformers_note(plan), ""]
    lines += [f"Checkpoint `{plan.fingerprint}`, plan `{plan.hash}`, statistics `{plan.stats_hash or 'none'}`.", ""]
    return "\n".join(lines)


def transformers_problem(plan: ServingPlan) -> str | None:
    """Why transformers cannot load the routed experts, or None when it can.

    transformers (5.24) dequantizes experts while it merges them into one tensor. It takes one scheme for all of them,
    found by the targets of the groups; without experts among the targets it is that of the first group, and only an
    FP8 group leaves weights without scales as they are. NVFP4's global scale is not read.
    """
    experts = {(entry.scheme, entry.group_size) for entry in plan.entries if entry.is_expert}
    if len(experts) > 1:
        return "it takes one scheme for the routed experts of all layers, and here they differ"
    first = next((name for name in plan.histogram() if SCHEMES[name].is_quantized), "FP8")
    for name, _ in experts:
        if not SCHEMES[name].merges_experts:
            return f"it leaves out the global scale of {name} experts"
        if not SCHEMES[name].is_quantized and first != "FP8":
            return f"it takes experts in BF16 for {first} when other layers are"
    return None


def _transformers_note(plan: ServingPlan) -> str:
    problem = transformers_problem(plan)
    if problem:
        return f"transformers cannot load it: {problem}. vLLM can."
    return "transformers loads it as well, with the package compressed-tensors; it unpacks the weights in memory."


def _scheme_rows(plan: ServingPlan) -> list[str]:
    return [
        f"| {name} | {SCHEMES[name].format} | {layers:,} | {weights:,} | {size:,} | {8 * size / weights:.2f} |"
        for name, (layers, weights, size) in plan.histogram().items()
    ]


def _role_rows(plan: ServingPlan) -> list[str]:
    found: dict[tuple[str, str, int], list[ServingEntry]] = {}
    for entry in plan.entries:
        found.setdefault((entry.role.value, entry.scheme, entry.group_size), []).append(entry)
    rows = []
    for (role, scheme, group), entries in found.items():
        layers = sum(len(entry.modules) for entry in entries)
        size = sum(entry.bytes for entry in entries)
        rows.append(f"| {role} | {scheme} | {group or 'row'} | {layers:,} | {size:,} | {mean_error(entries)} |")
    return rows
