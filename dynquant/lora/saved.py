"""A saved LoRA adapter read without PEFT or a model: what was adapted, and the factors of each weight.

Tensors are named as PEFT names them. A layer's factors are `PATH.lora_A.weight` [r, C] and `PATH.lora_B.weight`
[N, r]; those of routed experts [r E, C] and [N, r E] (`lora.layers`), where the parameter that was wrapped first has
one `.base_layer` more in its name. Where the output head or the embedding is adapted, PEFT saves an unchanged copy of
its base weight too, `PATH.base_layer.weight`.

The files may come from strangers: the configuration is checked field by field, only safetensors are read, never a
pickle, and patterns run in linear time.
"""

import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError
from safetensors import SafetensorError, safe_open
from torch import Tensor

from dynquant.errors import AdapterError, unreadable
from dynquant.patterns import compile_pattern
from dynquant.storage.atomic import opened_tensors
from dynquant.storage.documents import first_fault
from dynquant.storage.strict_json import parse_json

CONFIG_NAME, WEIGHTS_NAME = "adapter_config.json", "adapter_model.safetensors"
_COPY = re.compile(r"base_model\.model\.(?P<path>.+)\.base_layer\.weight")
_KEY = re.compile(r"base_model\.model\.(?P<path>.+?)(?P<depth>(\.base_layer)*)\.lora_(?P<factor>[AB])\.weight")
_UNSUPPORTED = (
    "use_dora", "use_qalora", "use_bdlora", "lora_bias", "alora_invocation_tokens", "layer_replication",
    "trainable_token_indices", "arrow_config", "kasa_config", "monteclora_config", "velora_config",
)  # fmt: skip
_KEEPS_BASE = (True, False, None, "gaussian", "eva", "orthogonal")
_N = TypeVar("_N", int, float)
Rank = Annotated[int, Field(ge=1, le=65536)]
Alpha = Annotated[float, Field(gt=0, le=1e6, allow_inf_nan=False)]


class AdapterConfig(BaseModel):
    """Fields of adapter_config.json that decide what the factors mean; all others are kept for PEFT."""

    model_config = ConfigDict(extra="allow", strict=True)
    peft_type: Literal["LORA"]
    r: Rank
    lora_alpha: Alpha
    use_rslora: bool | None = False
    rank_pattern: dict[str, Rank] | None = None
    alpha_pattern: dict[str, Alpha] | None = None
    target_modules: list[str] | str | None = None
    exclude_modules: list[str] | str | None = None
    target_parameters: list[str] | None = None
    modules_to_save: list[str] | None = None
    layers_pattern: (
        list[Annotated[str, Field(pattern=r"^[\w.]*$")]] | Annotated[str, Field(pattern=r"^[\w.]*$")] | None
    ) = None
    bias: Literal["none", "all", "lora_only"] = "none"
    init_lora_weights: bool | str | None = True
    base_model_name_or_path: str | None = None

    def rank_of(self, name: str) -> int:
        """Return the rank of the module or parameter `name`: the first pattern that matches its end decides."""
        return _first_of(self.rank_pattern, name, self.r)

    def alpha_of(self, name: str) -> float:
        """Return alpha of the module or parameter `name`: the first pattern that matches its end decides."""
        return _first_of(self.alpha_pattern, name, self.lora_alpha)


def _first_of(patterns: Mapping[str, _N] | None, name: str, otherwise: _N) -> _N:
    return next((value for pattern, value in (patterns or {}).items() if ends_in(pattern, name)), otherwise)


def ends_in(pattern: str, name: str) -> bool:
    """Return True where PEFT applies `pattern` of `rank_pattern` or `alpha_pattern` to `name`."""
    return bool(compile_pattern(rf"(.*\.)?({pattern})$").match(name))


@dataclass(frozen=True)
class AdaptedWeight:
    """Names of the two factors of one weight of the module `path`; `depth` counts the `.base_layer` in them."""

    path: str
    depth: int
    a_key: str
    b_key: str


class SavedAdapter:
    """A directory that `save_pretrained` of a LoRA model wrote; tensors are read one by one.

    Raises:
        AdapterError: no adapter there, one that is not plain LoRA, or tensors that are no LoRA factors, each named.
    """

    def __init__(self, directory: Path) -> None:
        self.directory = Path(directory)
        self.config = read_adapter_config(self.directory)
        self._path = self.directory / WEIGHTS_NAME
        keys = stored_keys(self.directory)
        self._file = safe_open(self._path, "pt")
        self.copies = base_copies(keys)
        self.weights = list(_paired(self._path, [key for key in keys if key not in self.copies]))

    def load(self, key: str) -> Tensor:
        """One factor, float32. Raises AdapterError: NaN or infinite values."""
        values = self._file.get_tensor(key).float()
        if not values.isfinite().all():
            raise AdapterError(f"`{key}` in {self._path} holds NaN or infinite values: training diverged. Train again.")
        return values

    def shape(self, key: str) -> list[int]:
        """Rows and columns of one factor."""
        return self._file.get_slice(key).get_shape()

    def scaling(self, name: str, rank: int) -> float:
        """Return the factor of the product of the low-rank matrices of the parameter or module `name`."""
        alpha = self.config.alpha_of(name)
        return alpha / (math.sqrt(rank) if self.config.use_rslora else rank)


def stored_keys(directory: Path) -> list[str]:
    """Return the names of the tensors of an adapter.

    Raises:
        AdapterError: no safetensors file, or one that cannot be read.
    """
    file = directory / WEIGHTS_NAME
    if not file.is_file():
        pickled = next((path.name for path in directory.glob("adapter_model.*")), None)
        why = f"{pickled} is there, which may be a pickle, and a pickle can run code. " if pickled else ""
        raise AdapterError(f"{directory} holds no {WEIGHTS_NAME}. {why}Save the adapter with PEFT's `save_pretrained`.")
    try:
        with opened_tensors(file) as opened:
            return list(opened.keys())
    except (SafetensorError, OSError) as error:
        raise AdapterError(
            unreadable(file, error) or f"{file} cannot be read ({error}): it is cut short or damaged. Save it again."
        ) from error


def base_copies(keys: list[str]) -> dict[str, str]:
    """Return names of copies of base weights -> the module, as PEFT saves them beside an adapted head or embedding."""
    return {key: match["path"] for key in keys if (match := _COPY.fullmatch(key))}


def read_adapter_config(directory: Path) -> AdapterConfig:
    """Return the configuration of a plain LoRA adapter.

    Raises:
        AdapterError: no such file, not JSON, another method, or a field of a wrong kind or value, which is named.
    """
    path = directory / CONFIG_NAME
    try:
        content = parse_json(path.read_bytes())
    except (FileNotFoundError, NotADirectoryError) as error:
        raise AdapterError(
            f"{directory} holds no {CONFIG_NAME}. Give the directory that `save_pretrained` wrote."
        ) from error
    except (OSError, ValueError) as error:
        raise AdapterError(
            unreadable(path, error) or f"{path} is not valid JSON ({error}). It is cut short or damaged; save it again."
        ) from error
    if not isinstance(content, dict) or content.get("peft_type") != "LORA":
        method = content.get("peft_type") if isinstance(content, dict) else None
        raise AdapterError(f"{path} gives the method {method!r:.100}; only LORA adapters can be read.")
    try:
        config = AdapterConfig.model_validate(content)
        for pattern in [*(config.rank_pattern or {}), *(config.alpha_pattern or {})]:
            compile_pattern(pattern)
    except ValidationError as error:
        raise AdapterError(f"In {path}, {first_fault(error)}. Save the adapter again.") from error
    except ValueError as error:
        raise AdapterError(f"{path} has the pattern `{pattern:.100}`, which cannot be run: {error}.") from error
    if config.init_lora_weights not in _KEEPS_BASE:
        raise AdapterError(
            f"{path} has `init_lora_weights` {config.init_lora_weights!r}: it began by taking something out of the "
            "base weights, so its factors do not belong to the original model. Save it again with "
            "`save_pretrained(..., path_initial_model_for_weight_conversion=...)`, which makes plain LoRA of it."
        )
    if option := next(filter(content.get, _UNSUPPORTED), None):
        raise AdapterError(
            f"{path} sets `{option}`, which is not plain LoRA: its factors alone do not give the change."
        )
    return config


def _paired(file: Path, keys: list[str]) -> Iterator[AdaptedWeight]:
    pairs: dict[tuple[str, int], dict[str, str]] = {}
    for key in sorted(keys):
        match = _KEY.fullmatch(key)
        if match is None:
            raise AdapterError(
                f"{file} holds `{key}`, which is no LoRA factor of a linear layer or of experts: the adapter trained "
                "whole weights, biases or embeddings too. Train without `train_norms`, `train_router` and "
                "`modules_to_save`."
            )
        depth = match["depth"].count(".base_layer")
        pairs.setdefault((match["path"], depth), {})[match["factor"]] = key
    for (path, depth), factors in pairs.items():
        if len(factors) != 2:
            raise AdapterError(f"{file} holds only one of the two factors of `{path}`. It is damaged; save it again.")
        yield AdaptedWeight(path, depth, factors["A"], factors["B"])
    if not pairs:
        raise AdapterError(f"{file} holds no tensors. Save the adapter again.")
