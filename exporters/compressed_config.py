"""The configuration of a compressed-tensors checkpoint, and what transformers makes of it."""

import re
from collections.abc import Iterable
from typing import Any

from dynquant.checkpoints.model import Model
from dynquant.families.linear_layers import LinearCheckpoint
from dynquant.formats.vllm_schemes import SCHEMES, Scheme
from dynquant.recipes.plan import Plan, PlanEntry
from dynquant.storage.strict_json import parse_json

_LAYER = re.compile(r"^(?P<before>.*\.layers\.)(?P<layer>\d+)(?P<after>\..*)$")
_EXPERT = re.compile(r"^(?P<before>.*\.layers\.)(?P<layer>\d+)(?P<after>\..*experts\.)\d+\.(?P<part>\w+)$")


def served_config(plan: Plan, checkpoint: LinearCheckpoint, model: Model) -> dict[str, Any]:
    """Return config.json of the checkpoint that a plan gives."""
    config = parse_json((checkpoint.directory / "config.json").read_bytes())
    config.pop("torch_dtype", None)  # the former name of `dtype`
    config |= {"dtype": "bfloat16", "quantization_config": quantization_config(plan, checkpoint, model.hyper.n_layer)}
    if config.get("model_type") == "deepseek_v3":
        config.setdefault("topk_method", "noaux_tc")  # transformers 5 drops it; without it vLLM knows no router bias
    if model.has_own_output:
        config["tie_word_embeddings"] = False  # vLLM would believe a configuration that ties them
    return config


def quantization_config(plan: Plan, checkpoint: LinearCheckpoint, num_layers: int) -> dict[str, object]:
    """Return the entry `quantization_config` of config.json.

    Linear layers are targeted by their full names, routed experts by one expression for each scheme. Only experts get
    expressions: transformers takes the first group whose expressions mention `experts` for the scheme of all experts.
    """
    groups: dict[Scheme, list[PlanEntry]] = {}
    for entry in plan.entries:
        if entry.scheme.is_quantized:
            groups.setdefault(entry.scheme, []).append(entry)
    order = sorted(groups, key=lambda scheme: (list(SCHEMES).index(scheme.name), -scheme.group_size))
    formats = {scheme.format for scheme in groups}
    return {
        "quant_method": "compressed-tensors",
        "format": formats.pop() if len(formats) == 1 else "mixed-precision",
        "quantization_status": "compressed",
        "config_groups": {
            f"group_{number}": scheme.config_group(_targets(groups[scheme])) for number, scheme in enumerate(order)
        },
        "ignore": _ignored(plan, checkpoint, num_layers),
        "kv_cache_scheme": None,
        "global_compression_ratio": None,
    }


def _targets(entries: Iterable[PlanEntry]) -> list[str]:
    targets: dict[str, None] = {}
    experts: dict[str, tuple[dict[str, None], dict[str, None]]] = {}
    for entry in entries:
        match = _EXPERT.match(entry.modules[0])
        if not entry.is_expert_stack or match is None:
            targets |= dict.fromkeys(entry.modules)
            continue
        layers, parts = experts.setdefault(f"{match['before']}#{match['after']}", ({}, {}))
        layers[match["layer"]] = parts[match["part"]] = None
    for place, (layers, parts) in experts.items():
        before, after = map(re.escape, place.split("#"))
        targets[f"re:^{before}({'|'.join(layers)}){after}\\d+\\.({'|'.join(parts)})$"] = None
    return list(targets)


def _ignored(plan: Plan, checkpoint: LinearCheckpoint, num_layers: int) -> list[str]:
    """Return the linear layers that are not quantized, as vLLM wants them; layers beyond the model's by expression."""
    names = [module for e in plan.entries if not e.scheme.is_quantized for module in e.modules]
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


def transformers_problem(plan: Plan) -> str | None:
    """Return why transformers cannot load the checkpoint, or None when it can.

    transformers (5.24) dequantizes experts while it merges them into one tensor. It takes one scheme for all of them,
    found by the targets of the groups; without experts among the targets it is that of the first group, and only an
    FP8 group leaves weights without scales as they are. NVFP4's global scale is not read. Zero points it expects as
    compressed-tensors (0.20) has them in memory, not packed as in files.
    """
    if any(entry.scheme.has_zero_points for entry in plan.entries):
        return "it does not unpack zero points"
    experts = {entry.scheme for entry in plan.entries if entry.is_expert_stack}
    if len(experts) > 1:
        return "it takes one scheme for the routed experts of all layers, and here they differ"
    first = next((name for name in plan.histogram() if SCHEMES[name].is_quantized), "FP8")
    for scheme in experts:
        if not scheme.merges_experts:
            return f"it leaves out the global scale of {scheme.name} experts"
        if not scheme.is_quantized and first != "FP8":
            return f"it takes experts in BF16 for {first} when other layers are"
    return None
