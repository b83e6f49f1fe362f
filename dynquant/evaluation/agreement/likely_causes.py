"""Likely causes of a difference between llama.cpp and transformers, from config.json and a GGUF file's metadata."""

from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple

from dynquant.checkpoints.model import Model
from dynquant.families.common.config import read_json

Config = dict[str, Any]


class KnownDifference(NamedTuple):
    """Something that llama.cpp computes otherwise than transformers, and that no file can undo."""

    kl: float
    """Mean KL in nats of a tiny model of random weights (reports/architectures.md)."""
    applies: Callable[[Config], bool]
    reason: str


_KNOWN = (
    KnownDifference(
        4e-3,
        lambda config: _rope(config).get("truncate") is False and "yarn" in _rope(config).values(),
        "llama.cpp rounds the borders of YaRN to whole dimensions (ggml_rope_yarn_corr_dims), and `truncate: false` in "
        "the rope parameters of config.json says not to",
    ),
    KnownDifference(
        0.3,
        lambda config: _model_type(config) == "phimoe",
        "llama.cpp's graph (models/phi3.cpp) has RMS norms for phimoe's layer norms and a softmax for its sparsemixer",
    ),
    KnownDifference(
        0.2,
        lambda config: (
            _model_type(config) == "exaone4"
            and bool(config.get("sliding_window"))
            and config["num_hidden_layers"] != 64
        ),
        "llama.cpp gives windows, and global layers without RoPE, only to EXAONE 4 of 64 layers (models/exaone4.cpp)",
    ),
    KnownDifference(
        1e-3,
        lambda config: _model_type(config) == "nemotron_h" and config.get("time_step_min") != 0,
        "transformers keeps the time steps of Mamba layers above `time_step_min`, llama.cpp has no lower limit "
        "(ggml_ssm_scan)",
    ),
    KnownDifference(
        2e-5,
        lambda config: _model_type(config) == "gemma3n" and any(config.get("activation_sparsity_pattern") or ()),
        "llama.cpp divides by n - 1 in the deviation that gemma3n's sparse layers take, transformers by n "
        "(gaussian_topk in models/gemma3n.cpp)",
    ),
    KnownDifference(
        3e-6,
        lambda config: any("gelu" in str(config.get(name)) for name in _ACTIVATIONS),
        "GELU on a CPU is in llama.cpp the tanh form in a table of 16-bit values (ggml_vec_gelu_f32)",
    ),
)
_ACTIVATIONS = ("hidden_act", "hidden_activation", "activation_function")
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
    config: Config = raw | (raw["text_config"] if isinstance(raw.get("text_config"), dict) else {})
    keys, names = {field.key.partition(".")[2]: field.value for field in model.metadata}, model.source.names()
    differences = known_differences(config)
    causes = [f"{difference.reason} (random weights: a KL of {difference.kl:g})" for difference in differences]
    causes += _routing_causes(config, keys, names) if "expert_count" in keys else ()
    if config.get("sliding_window") and "attention.sliding_window" not in keys and config.get("use_sliding_window", 1):
        causes.append("config.json has a sliding_window, the file has none")
    return causes or ["a setting of config.json that the converter left out, or an older converter or llama.cpp"]


def known_differences(config: Config) -> list[KnownDifference]:
    """Return what llama.cpp is known to compute otherwise for a configuration, by what was measured."""
    return [difference for difference in _KNOWN if difference.applies(config)]


def _rope(config: Config) -> Config:
    return config.get("rope_parameters") or config.get("rope_scaling") or {}


def _model_type(config: Config) -> str:
    return str(config.get("model_type")).removesuffix("_text")


def _routing_causes(config: Config, keys: dict[str, Any], names: Iterable[str]) -> Iterator[str]:
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
