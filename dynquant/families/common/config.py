"""The `config.json` of a Hugging Face checkpoint, with transformers' defaults filled in and every read checked.

Values that a checkpoint leaves out are taken from transformers, so that the GGUF describes the model that transformers
would build. What a family cannot express in GGUF is refused here in one form, with the way out.
"""

import sys
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

from dynquant.errors import CheckpointError, unreadable
from dynquant.storage.strict_json import parse_json

WAY_OUT = "Convert it with llama.cpp's own converter and pass the result with --base-gguf FILE."
_MAX_JSON_BYTES = 1 << 28  # the largest tokenizer.json have 35 MB
_MAX_INTEGER = 1 << 31
_LARGEST = {
    "num_hidden_layers": 512, "n_routed_experts": 2048, "num_experts": 2048, "num_local_experts": 2048,
    "vocab_size": 1 << 24,
}  # fmt: skip
"""Numbers of things that are made in memory before any weight is looked at, far beyond any model."""

_STATED = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "vocab_size")
"""Sizes without which no configuration describes a model."""


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
        largest = _LARGEST.get(key, _MAX_INTEGER)
        if not isinstance(value, int) or isinstance(value, bool) or not 0 <= value <= largest:
            raise CheckpointError(
                f"{self.path} gives `{key}` as {value!r:.80}; a whole number up to {largest:,} is needed."
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
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    if not is_number or not abs(value) <= sys.float_info.max:  # type: ignore[arg-type]
        raise CheckpointError(f"{path} gives `{key}` as {value!r:.80}; a finite number is needed.")
    return float(value)


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
            unreadable(path, error)
            or f"{path} is not valid JSON ({error}). It is truncated or corrupt; fetch it again."
        ) from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{path} holds a JSON {type(content).__name__}, not an object. Fetch it again.")
    return content


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

    try:
        if same_as is not None:
            values = {key: value for key, value in raw.items() if key not in ("model_type", "auto_map")}
            return AutoConfig.for_model(same_as, **values).to_dict()
        return AutoConfig.from_pretrained(directory, trust_remote_code=False, local_files_only=True).to_dict()
    except Exception as error:  # transformers validates with many exception types, none of them a contract
        raise CheckpointError(
            f"transformers does not accept {directory / 'config.json'} (model_type {raw['model_type']!r}): {error}. "
            f"{WAY_OUT}"
        ) from error
