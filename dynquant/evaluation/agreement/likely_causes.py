"""Likely causes of a difference between llama.cpp and transformers, from config.json and a GGUF file's metadata."""

from collections.abc import Iterable, Iterator
from typing import Any

from dynquant.checkpoints.model import Model
from dynquant.families.common.config import read_json

_SIGMOID = 2  # llama.cpp's number of the gating function, where a file has no number softmax is taken
_ROUTING_KEYS = {
    "n_group": "expert_group_count",
    "topk_group": "expert_group_used_count",
    "routed_scaling_factor": "expert_weights_scale",
}
_WITHOUT_EFFECT = (None, 1, 1.0)


def likely_causes(model: Model) -> list[str]:
    """Return what configuration and file say that may explain a difference, in words."""
    assert model.hf_directory is not None
    raw = read_json(model.hf_directory / "config.json")
    config = raw | (raw["text_config"] if isinstance(raw.get("text_config"), dict) else {})
    keys, names = {field.key.partition(".")[2]: field.value for field in model.metadata}, model.source.names()
    causes = [*_rope_causes(config), *(_routing_causes(config, keys, names) if "expert_count" in keys else ())]
    if config.get("sliding_window") and "attention.sliding_window" not in keys and config.get("use_sliding_window", 1):
        causes.append("config.json has a sliding_window, the file has none")
    return causes or ["a setting of config.json that the converter left out, or an older converter or llama.cpp"]


def _rope_causes(config: dict[str, Any]) -> Iterator[str]:
    rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
    if "yarn" in (rope.get("rope_type"), rope.get("type")) and rope.get("truncate") is False:
        yield (
            "llama.cpp rounds the borders of YaRN to whole dimensions, and `truncate: false` in the rope parameters of "
            "config.json says not to (gpt-oss; a KL of about 2e-3)"
        )


def _routing_causes(config: dict[str, Any], keys: dict[str, Any], names: Iterable[str]) -> Iterator[str]:
    if config.get("norm_topk_prob") is False and keys.get("expert_weights_norm") is not False:
        yield "norm_topk_prob is false in config.json, and llama.cpp's graph may make the weights of experts sum to 1"
    has_correction = any("exp_probs_b" in name for name in names)
    if has_correction and keys.get("expert_gating_func") != _SIGMOID and config.get("scoring_func") != "sigmoid":
        yield (
            "config.json has no scoring_func, from which the converter takes how experts are scored, so that llama.cpp "
            'takes softmax (a router with a correction bias has sigmoid: write `"scoring_func": "sigmoid"`)'
        )
    absent = [
        name for name, key in _ROUTING_KEYS.items() if key not in keys and config.get(name) not in _WITHOUT_EFFECT
    ]
    if absent:
        yield f"the file has no key for {' and '.join(absent)} of config.json"
