"""A saved LoRA adapter read without PEFT or a model: what was adapted, and the factors of each weight.

Tensors are named as PEFT names them. A layer's factors are `PATH.lora_A.weight` [r, C] and `PATH.lora_B.weight`
[N, r]; those of routed experts [r E, C] and [N, r E] (`lora.layers`), where the parameter that was wrapped first has
one `.base_layer` more in its name. Where the output head or the embedding is adapted, PEFT saves an unchanged copy of
its base weight too, `PATH.base_layer.weight` or `PATH.weight`. Under the latter name it also saves what
`modules_to_save` lists: whole weights that took part in the training.

The files may come from strangers: the configuration is checked field by field, only safetensors are read, never a
pickle, and patterns run in linear time.
"""

import math
import re
from collections.abc import Callable, Iterator, Mapping
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
_WHOLE = re.compile(r"base_model\.model\.(?P<path>(?:(?!\.lora_).)+?)(?P<copy>\.base_layer)?\.weight")
_KEY = re.compile(r"base_model\.model\.(?P<path>.+?)(?P<depth>(\.base_layer)*)\.lora_(?P<factor>[AB])\.weight")
_UNSUPPORTED = (
    "use_dora", "use_qalora", "use_bdlora", "lora_bias", "alora_invocation_tokens", "layer_replication",
    "trainable_token_indices", "arrow_config", "kasa_config", "monteclora_config", "velora_config",
)  # fmt: skip
_FLOATS = ("F64", "F32", "F16", "BF16")
_WITHOUT_IT = (
    "Merge it into the model that it was trained on (`merge_and_unload` of PEFT, then `save_pretrained`) and export "
    "that, or train plain LoRA."
)
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
        self.copies, self.whole = whole_weights(keys, self.config)
        factors = [key for key in keys if key not in self.copies and key not in self.whole]
        self.weights = list(_paired(self._path, factors))

    def load(self, key: str) -> Tensor:
        """One factor, float32. Raises AdapterError: NaN or infinite values."""
        return finite_factor(self.stored(key).float(), key, self.directory)

    def stored(self, key: str) -> Tensor:
        """One tensor in the type of the file."""
        return self._file.get_tensor(key)

    def shape(self, key: str) -> list[int]:
        """Rows and columns of one factor. Raises AdapterError: it is no matrix."""
        shape = self._file.get_slice(key).get_shape()
        if len(shape) != 2:
            raise AdapterError(f"`{key}` in {self._path} has the shape {shape}, and is no matrix. {_WITHOUT_IT}")
        return shape

    def scaling(self, name: str, rank: int) -> float:
        """Return the factor of the product of the low-rank matrices of the parameter or module `name`."""
        alpha = self.config.alpha_of(name)
        return alpha / (math.sqrt(rank) if self.config.use_rslora else rank)


def stored_keys(directory: Path) -> list[str]:
    """Return the names of the tensors of an adapter.

    Raises:
        AdapterError: no safetensors file, one that cannot be read, or factors that are no floats.
    """
    file = directory / WEIGHTS_NAME
    if not file.is_file():
        pickled = next((path.name for path in directory.glob("adapter_model.*")), None)
        why = f"{pickled} is there, which may be a pickle, and a pickle can run code. " if pickled else ""
        raise AdapterError(f"{directory} holds no {WEIGHTS_NAME}. {why}Save the adapter with PEFT's `save_pretrained`.")
    try:
        with opened_tensors(file) as opened:
            keys = list(opened.keys())
            types = {key: opened.get_slice(key).get_dtype() for key in keys if ".lora_" in key}
    except (SafetensorError, OSError) as error:
        raise AdapterError(
            unreadable(file, error) or f"{file} cannot be read ({error}): it is cut short or damaged. Save it again."
        ) from error
    if whole := next((key for key, dtype in types.items() if dtype not in _FLOATS), None):
        raise AdapterError(
            f"{file} stores `{whole}` as {types[whole]}, and the scales that such numbers need have no place in LoRA. "
            f"Save the adapter with factors in {', '.join(_FLOATS[1:])}."
        )
    return keys


def finite_factor(values: Tensor, key: str, directory: Path) -> Tensor:
    """Return the values of a factor, or raise AdapterError for NaN or infinite ones."""
    if not values.isfinite().all():
        raise AdapterError(
            f"`{key}` in {directory / WEIGHTS_NAME} holds NaN or infinite values: training diverged. Train again."
        )
    return values


def whole_weights(keys: list[str], config: AdapterConfig) -> tuple[dict[str, str], dict[str, str]]:
    """Return names of whole weights -> their modules: unchanged copies, and what `modules_to_save` lists."""
    matches = {key: match for key in keys if (match := _WHOLE.fullmatch(key))}
    listed = tuple(config.modules_to_save or ())
    saved = {key: m["path"] for key, m in matches.items() if not m["copy"] and m["path"].endswith(listed)}
    return {key: match["path"] for key, match in matches.items() if key not in saved}, saved


def check_copies(directory: Path, copies: Mapping[str, str], base: str, is_same: Callable[[str, Tensor], bool]) -> None:
    """Refuse a copy of a base weight that is not that of `base`, by a comparison of a module's weight with it.

    Raises:
        AdapterError: naming the copy; the vocabulary was resized, or the adapter is of another model.
    """
    path = directory / WEIGHTS_NAME
    with safe_open(path, "pt") as file:
        for key, module in copies.items():
            if not is_same(module, file.get_tensor(key)):
                raise AdapterError(
                    f"{path} holds `{key}`, a copy of the weight that it was trained beside, and it is not that of "
                    f"{base}: another model, or a resized vocabulary. Give the model that the adapter was trained on."
                )


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
        raise AdapterError(f"{path} gives the method {method!r:.100}; only LORA adapters can be read. {_WITHOUT_IT}")
    try:
        config = AdapterConfig.model_validate(content)
        alone = [names for names in (config.target_modules, config.exclude_modules) if isinstance(names, str)]
        for pattern in [*(config.rank_pattern or {}), *(config.alpha_pattern or {}), *alone]:
            compile_pattern(pattern)
    except ValidationError as error:
        raise AdapterError(f"In {path}, {first_fault(error)}. Save the adapter again.") from error
    except ValueError as error:
        raise AdapterError(
            f"{path} has the pattern `{pattern:.100}`, which cannot be run in time linear in a name ({error}). Write "
            "it without look-ahead, look-behind and back references, or as the names of the layers, "
            "model.layers.0.self_attn.q_proj and so on."
        ) from error
    if config.init_lora_weights not in _KEEPS_BASE:
        raise AdapterError(
            f"{path} has `init_lora_weights` {config.init_lora_weights!r}: it began by taking something out of the "
            "base weights, so its factors do not belong to the original model. Save it again with "
            "`save_pretrained(..., path_initial_model_for_weight_conversion=...)`, which makes plain LoRA of it."
        )
    if option := next(filter(content.get, _UNSUPPORTED), None):
        raise AdapterError(
            f"{path} sets `{option}`, which is not plain LoRA: its factors alone do not give the change. {_WITHOUT_IT}"
        )
    return config


def _paired(file: Path, keys: list[str]) -> Iterator[AdaptedWeight]:
    pairs: dict[tuple[str, int], dict[str, str]] = {}
    for key in sorted(keys):
        match = _KEY.fullmatch(key)
        if match is None:
            raise AdapterError(
                f"{file} holds `{key}`, which is no LoRA factor of a linear layer or of experts: the adapter trained "
                f"biases or embeddings too. {_WITHOUT_IT}"
            )
        depth = match["depth"].count(".base_layer")
        pairs.setdefault((match["path"], depth), {})[match["factor"]] = key
    for (path, depth), factors in pairs.items():
        if len(factors) != 2:
            raise AdapterError(f"{file} holds only one of the two factors of `{path}`. It is damaged; save it again.")
        yield AdaptedWeight(path, depth, factors["A"], factors["B"])
    if not pairs:
        raise AdapterError(f"{file} holds no tensors. Save the adapter again.")
