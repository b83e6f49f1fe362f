"""The `config.json` of a Hugging Face checkpoint, with transformers' defaults filled in and every read checked.

Values that a checkpoint leaves out are taken from transformers, so that the GGUF describes the model that transformers
would build. What a family cannot express in GGUF is refused here in one form, with the way out.
"""

import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn, TypeGuard

from dynquant.errors import CheckpointError, unreadable
from dynquant.storage.strict_json import parse_json

WAY_OUT = "Convert it with llama.cpp's own converter and pass the result with --base-gguf FILE."
_MAX_JSON_BYTES = 1 << 28  # the largest tokenizer.json have 35 MB
_MAX_INTEGER = 1 << 31
_LARGEST_FLOAT = float.fromhex("0x1.fffffep+127")  # of float32, which GGUF stores
_LARGEST = {
    "num_hidden_layers": 512, "n_routed_experts": 2048, "num_experts": 2048, "num_local_experts": 2048,
    "vocab_size": 1 << 24,
}  # fmt: skip
"""Numbers of things that are made in memory before any weight is looked at, far beyond any model."""

_COUNT = re.compile(
    r"(.*_)?(hidden_size|intermediate_size|vocab_size|head_dim|lora_rank|d_model|n_embd|(num|n)_(\w*_)?(layers?|heads?|"
    r"experts?(_per_tok)?|groups?)|max_position_embeddings|top_?k)"
)
"""Names of whole numbers, in the file and its parts; lists of them may differ by layer."""
_REAL = re.compile(r"(.*_)?(eps|epsilon|rope_theta|softcapping|multiplier|scaling_factor|rotary_factor|logits_scaling)")
"""Names of finite numbers."""
_REFUSED = re.compile(r"Validation error for field '(\w+)':(.*)", re.DOTALL)
_IN_WORDS = {
    "int": "a whole number", "float": "a number with a point", "str": "a text", "bool": "true or false",
    "dict": "an object", "list": "a list",
}  # fmt: skip
_TYPES = ("dtype", "torch_dtype")
"""Names of the type that the weights were saved in."""
_NEEDED = ("hidden_size", "num_hidden_layers", "num_attention_heads", "vocab_size")
"""Sizes of a language model, which are more than zero and not null."""

_STATED = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "vocab_size")
"""Sizes without which no configuration describes a model."""
_EXPERTS = ("n_routed_experts", "num_experts", "num_local_experts")
_EXPERTS_USED = ("num_experts_per_tok", "top_k_experts")


@dataclass(frozen=True)
class Config:
    """Values of one `config.json`; `raw` holds only what the file itself says."""

    path: Path
    values: dict[str, object]
    raw: dict[str, object]

    @property
    def model_type(self) -> str:
        return str(self.values.get("model_type", ""))

    def get(self, key: str, default: object = None) -> object:
        """The value, or `default` when it is absent or null."""
        value = self.values.get(key)
        return default if value is None else value

    def integer(self, key: str, default: int | None = None) -> int:
        """A non-negative whole number. Raises CheckpointError: absent without a default, or not such a number."""
        value = self.get(key, default)
        if not _is_count(value, key):
            raise CheckpointError(
                f"{self.path} gives `{key}` as {value!r:.80}; a whole number up to {_LARGEST.get(key, _MAX_INTEGER):,} "
                "is needed."
            )
        return value

    def number(self, key: str, default: float | None = None) -> float:
        """A finite number. Raises CheckpointError otherwise."""
        return finite(self.get(key, default), key, self.path)

    def part(self, key: str) -> "Config":
        """The configuration of a part of the model, as `vision_config`. Raises CheckpointError when there is none."""
        values = self.values.get(key)
        if not isinstance(values, dict):
            raise CheckpointError(f"{self.path} has no `{key}`, an object. Fetch the file again.")
        return Config(self.path, values, values)

    def expect(self, key: str, *allowed: object, absent: object = None) -> None:
        """Refuse the checkpoint unless `key` has one of the allowed values; `absent` stands for a missing value."""
        value = self.get(key, absent)
        if value not in allowed:
            alternatives = " or ".join(map(repr, allowed))
            self.refuse(f"`{key}` is {value!r}, but llama.cpp's graph always computes {alternatives}")

    def refuse(self, reason: str) -> NoReturn:
        """Raise the CheckpointError for something that GGUF or llama.cpp cannot express."""
        raise CheckpointError(f"{self.path} ({self.model_type}) cannot be converted: {reason}. {WAY_OUT}")


def finite(value: object, key: str, path: Path) -> float:
    """`value` as a finite float. Raises CheckpointError naming `key` otherwise."""
    if not _is_finite(value):
        raise CheckpointError(f"{path} gives `{key}` as {value!r:.80}; a finite number is needed.")
    return float(value)


def _is_finite(value: object) -> TypeGuard[int | float]:
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) <= _LARGEST_FLOAT


def _is_count(value: object, key: str, at_least: int = 0) -> TypeGuard[int]:
    is_whole = isinstance(value, int) and not isinstance(value, bool)
    return is_whole and at_least <= value <= _LARGEST.get(key, _MAX_INTEGER)


def _is_float_type(value: object) -> bool:
    if value in (None, "auto") or isinstance(value, dict):
        return True
    import torch

    named = getattr(torch, str(value).removeprefix("torch."), None)
    return isinstance(named, torch.dtype) and named.is_floating_point


def _items(value: object) -> list[object]:
    """Return the values of a list by layer, or of a single one; none for null, which stands for a default."""
    values = value if isinstance(value, list) else [value]
    return [item for item in values if item is not None]


def read_json(path: Path) -> dict[str, object]:
    """A JSON object from a file. Raises CheckpointError: no such file, or not one JSON object."""
    try:
        if path.stat().st_size > _MAX_JSON_BYTES:
            raise ValueError(f"{path.stat().st_size:,} bytes, more than {_MAX_JSON_BYTES:,}")
        content = parse_json(path.read_bytes())
    except FileNotFoundError as error:
        raise CheckpointError(
            f"There is no {path}. Give the directory of a Hugging Face checkpoint (config.json, tokenizer.json and "
            "safetensors files), or a .gguf file."
        ) from error
    except (ValueError, OSError) as error:
        raise CheckpointError(
            unreadable(path, error) or f"{path} is not valid JSON in UTF-8 ({error}). Repair it, or fetch it again."
        ) from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{path} holds a JSON {type(content).__name__}, not an object. Fetch it again.")
    if path.name == "config.json":  # here, since every way to a model reads it before transformers or a converter do
        _check_numbers(content, path)
    return content


def _check_numbers(values: Mapping[str, object], path: Path, prefix: str = "") -> None:
    """Raise CheckpointError for words, negative numbers and the like where every architecture has a number."""
    _check_experts(values, path, prefix)
    for key, value in values.items():
        name, needed = f"{prefix}{key}", ""
        if isinstance(value, dict) and not (_COUNT.fullmatch(key) or _REAL.fullmatch(key)):
            _check_numbers(value, path, f"{name}.")
        elif key in _NEEDED and prefix in ("", "text_config.") and not _is_count(value, key, at_least=1):
            needed = f"a whole number from 1 to {_LARGEST.get(key, _MAX_INTEGER):,}"
        elif _COUNT.fullmatch(key) and not all(_is_finite(item) and 0 <= item == int(item) for item in _items(value)):
            needed = "a whole number"
        elif _REAL.fullmatch(key) and not all(_is_finite(item) and item >= 0 for item in _items(value)):
            needed = "a finite number that is not negative"
        elif key in _TYPES and prefix in ("", "text_config.") and not _is_float_type(value):
            needed = "the name of a float type, as 'bfloat16',"
        if needed:
            raise CheckpointError(
                f"{path} gives `{name}` as {value!r:.80}; {needed} is needed. Correct it, or fetch the file again."
            )


def _check_experts(values: Mapping[str, object], path: Path, prefix: str) -> None:
    """Raise CheckpointError for a router that is to choose more experts than there are; dense models say 0 or 1."""
    stated = {key: value for key in _EXPERTS if isinstance(value := values.get(key), int) and value > 1}
    for used in _EXPERTS_USED:
        chosen = values.get(used)
        if stated and isinstance(chosen, int) and chosen > max(stated.values()):
            name = max(stated, key=stated.__getitem__)
            raise CheckpointError(
                f"{path} gives `{prefix}{used}` as {chosen} and `{prefix}{name}` as {stated[name]}; no more experts "
                "can be chosen than there are. Correct it, or fetch the file again."
            )


def quantization_of(directory: Path) -> dict[str, Any]:
    """Return `quantization_config` of a directory; empty where config.json has none. Raises CheckpointError: as
    `read_json`."""
    stated = read_json(directory / "config.json").get("quantization_config")
    return stated if isinstance(stated, dict) else {}


def read_config(directory: Path, known: Collection[str], *, same_as: Mapping[str, str] | None = None) -> Config:
    """Read `config.json` and fill in transformers' defaults; of a model with a vision tower, its language model's part.

    `same_as` gives types that transformers does not have the type whose configuration they share.

    Raises:
        CheckpointError: missing or damaged file, a `model_type` not in `known`, or values that transformers refuses.
    """
    path = directory / "config.json"
    raw = read_json(path)
    if not isinstance(raw.get("model_type"), str):
        raise CheckpointError(f"{path} has no `model_type`, so its architecture is unknown. Fetch the file again.")
    if raw["model_type"] not in known:
        raise CheckpointError(
            f"{path} has model_type {raw['model_type']!r}, which dynquant cannot convert (it can: "
            f"{', '.join(sorted(known))}). {WAY_OUT}"
        )
    unstated = [] if "text_config" in raw else [key for key in _STATED if raw.get(key) is None]
    if unstated:
        raise CheckpointError(
            f"{path} does not state `{'`, `'.join(unstated)}`. transformers would take defaults of the architecture, "
            "which need not be this model's. Fetch the file again, or add what is missing."
        )
    defaults = _with_defaults(directory, raw, (same_as or {}).get(raw["model_type"]))
    text, stated = defaults.get("text_config"), raw.get("text_config")
    if isinstance(text, dict):
        raw, defaults = stated if isinstance(stated, dict) else {}, text
    return Config(path, {**raw, **defaults}, raw)


def _with_defaults(directory: Path, raw: dict[str, object], same_as: str | None) -> dict[str, object]:
    from transformers import AutoConfig

    if same_as is None:
        return hf_config(directory).to_dict()
    values = {key: value for key, value in raw.items() if key not in ("model_type", "auto_map")}
    try:
        return AutoConfig.for_model(same_as, **values).to_dict()
    except Exception as error:  # transformers validates with many exception types, none of them a contract
        raise CheckpointError(refused_value(directory, error)) from error


def hf_config(directory: Path) -> Any:
    """Return transformers' configuration of a directory. Raises CheckpointError: it does not accept config.json."""
    from transformers import AutoConfig

    try:
        config = AutoConfig.from_pretrained(directory, trust_remote_code=False, local_files_only=True)
    except Exception as error:  # transformers validates with many exception types, none of them a contract
        raise CheckpointError(refused_value(directory, error)) from error
    if isinstance(getattr(config, "text_config", None), dict):
        raise CheckpointError(
            f"{directory / 'config.json'} has a `text_config`, which a {config.model_type!r} has no place for, so that "
            "transformers would not read it. Correct it, or fetch the file again."
        )
    return config


def check_values(directory: Path) -> None:
    """Raise CheckpointError for a value that an architecture of transformers cannot have; others are not checked."""
    try:
        hf_config(directory)
    except CheckpointError as error:
        if names_value(error.__cause__):
            raise


def names_value(error: BaseException | None) -> bool:
    """Return whether transformers says which value of config.json it does not accept."""
    return _REFUSED.match(str(error)) is not None


def refused_value(directory: Path, error: Exception) -> str:
    """Return the paragraph for a config.json that transformers does not accept; it names the value where that can."""
    path = directory / "config.json"
    raw = read_json(path)
    field = _REFUSED.match(str(error))
    if field is None:
        said = " ".join(str(error).split())
        return f"transformers does not accept {path} (model_type {raw.get('model_type')!r}): {said}. Correct the file."
    parts = [raw, *(part for part in raw.values() if isinstance(part, dict))]
    name = "rope_scaling" if field[1] == "rope_parameters" and "rope_parameters" not in raw else field[1]
    value = next((part[name] for part in parts if name in part), None)
    types = dict.fromkeys(_IN_WORDS[kind] for kind in re.findall(r"expected (\w+)", field[2]) if kind in _IN_WORDS)
    needed = f"; {' or '.join(types)} is needed" if types else ""
    return (
        f"{path} gives `{name}` as {value!r:.80}, which a {raw.get('model_type')!r} cannot have{needed}. Correct it, "
        "or fetch the file again."
    )
