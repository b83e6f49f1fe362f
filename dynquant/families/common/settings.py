"""Settings that decide what a model computes from its weights, which no fingerprint of the weights can see.

They are recorded with statistics, plans and files beside the fingerprint, so that a configuration which was edited
since is noticed, by name. What is not on both sides is not compared: older files hold no record.
"""

from collections.abc import Iterable, Iterator, Mapping
from math import isclose

from dynquant.checkpoints.gguf_source import MetadataField

Setting = bool | int | float | str | list[bool] | list[int] | list[float] | list[str]
Settings = Mapping[str, Setting]

_MAX_ITEMS, _TOLD = 1024, 4
_RESOLUTION = 1e-6  # GGUF stores float32
_OTHER_GGUF_KEYS = ("context_length", "vocab_size")
"""Limits of what is run."""
_OTHER_CONFIG_KEYS = frozenset({
    "architectures", "attn_implementation", "auto_map", "dtype", "gradient_checkpointing", "id2label",
    "initializer_range", "is_decoder", "is_encoder_decoder", "label2id", "max_length", "max_position_embeddings",
    "num_return_sequences", "problem_type", "quantization_config", "router_aux_loss_coef", "tie_word_embeddings",
    "torch_dtype", "transformers_version", "transformers_weights", "use_cache", "vocab_size",
})  # fmt: skip
_OTHER_CONFIG_ENDS = ("_dropout", "dropout", "_name_or_path", "_token_id", "_token_index", "_token", "_version")
"""Names of paths, versions, types and tokens, sizes that weights have, and what only training reads."""
_NAMED_IN_CONFIG = {
    "attention.layer_norm_rms_epsilon": "rms_norm_eps",
    "expert_used_count": "num_experts_per_tok",
    "expert_weights_norm": "norm_topk_prob",
    "rope.freq_base": "rope_theta",
    "expert_weights_scale": "routed_scaling_factor",
    "attention.sliding_window": "sliding_window",
}
"""Names in config.json of what has another one in GGUF."""
_STEERING = (
    *_NAMED_IN_CONFIG, "expert_gating_func", "final_logit_softcapping", "rope.freq_base_swa",
    "rope.scaling.type", "rope.scaling.factor",
)  # fmt: skip
"""Numbers that every form of a model has alike, however its weights are split and joined."""
_OPTIONAL = ("expert_weights_norm", "final_logit_softcapping", "rope.scaling.type", "attention.sliding_window")
"""Keys that are left out where a model does not have the thing."""


def settings_of_metadata(fields: Iterable[MetadataField]) -> dict[str, Setting]:
    """Return the hyperparameters of a GGUF model's architecture, by their names without it."""
    values = {field.key: field.value for field in fields}
    prefix = f"{values.get('general.architecture', '')}."
    numbers = {key.removeprefix(prefix): value for key, value in values.items() if key.startswith(prefix)}
    ahead, count = numbers.pop("nextn_predict_layers", 0), numbers.get("block_count")
    if isinstance(ahead, int) and isinstance(count, int) and 0 < ahead < count:
        # Layers that predict tokens ahead decide nothing that the others compute, and a file may do without them.
        run = {"block_count": count - ahead}
        run |= {key: v[:-ahead] for key, v in numbers.items() if isinstance(v, list | tuple) and len(v) == count}
        numbers |= run
    return _plain({key: value for key, value in numbers.items() if key not in _OTHER_GGUF_KEYS})


def settings_of_config(config: Mapping[str, object], prefix: str = "") -> dict[str, Setting]:
    """Return what a config.json says of the computation, with the names of its parts before those in them."""
    settings: dict[str, Setting] = {}
    for key, value in config.items():
        if key.lstrip("_") in _OTHER_CONFIG_KEYS or key.endswith(_OTHER_CONFIG_ENDS):
            continue
        if isinstance(value, dict):
            settings |= settings_of_config(value, f"{prefix}{key}.")
        else:
            settings |= _plain({f"{prefix}{key}": value})
    return settings


def differing_settings(recorded: Settings, present: Settings) -> str:
    """Return the settings that were edited with both values, as words; empty where none was."""
    if "block_count" in recorded.keys() & present.keys():  # both have keys of GGUF
        recorded, present = ({**dict.fromkeys(_OPTIONAL), **side} for side in (recorded, present))
    changes = [f"{name} was {before} and is {now}" for name, before, now in _differences(recorded, present)]
    more = f" and {len(changes) - _TOLD} more" if len(changes) > _TOLD else ""
    return ", ".join(changes[:_TOLD]) + more


def settings_note(reference: Settings, candidate: Settings) -> str:
    """Return what steers two models otherwise although they may have the same weights, as words; empty for nothing."""
    steering = ({key: side[key] for key in _STEERING if key in side} for side in (reference, candidate))
    return ", ".join(f"{name} ({here} and {there})" for name, here, there in _differences(*steering))


def _differences(
    one: Mapping[str, Setting | None], other: Mapping[str, Setting | None]
) -> Iterator[tuple[str, str, str]]:
    """Yield what both sides have with two values: its names, and both in words."""
    for key in sorted(one.keys() & other.keys()):
        if not _is_same(one[key], other[key]):
            in_config = _NAMED_IN_CONFIG.get(key)
            yield (
                f"`{key}`" + (f" (`{in_config}` in config.json)" if in_config else ""),
                *map(_in_words, (one[key], other[key])),
            )


def _in_words(setting: Setting | None) -> str:
    if setting is None:
        return "absent"
    return f"{setting:.7g}" if isinstance(setting, float) else f"{setting!r:.80}"


def _plain(values: Mapping[str, object]) -> dict[str, Setting]:
    """Return the values that are numbers, texts or short lists of them; lists of one repeated value become it."""
    settings: dict[str, Setting] = {}
    for key, value in values.items():
        if isinstance(value, list | tuple):
            if 0 < len(value) <= _MAX_ITEMS and all(isinstance(item, bool | int | float | str) for item in value):
                settings[key] = value[0] if len(set(value)) == 1 else list(value)
        elif isinstance(value, bool | int | float | str):
            settings[key] = value
    return settings


def _is_same(one: object, other: object) -> bool:
    if isinstance(one, list) and isinstance(other, list):
        return len(one) == len(other) and all(map(_is_same, one, other))
    if isinstance(one, int | float) and isinstance(other, int | float):
        return isclose(one, other, rel_tol=_RESOLUTION)
    return one == other
