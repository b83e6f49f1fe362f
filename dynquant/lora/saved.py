"""A saved LoRA adapter read without PEFT or a model: what was adapted, and the factors of each weight.

Tensors are named as PEFT names them. A layer's factors are `PATH.lora_A.weight` [r, C] and `PATH.lora_B.weight`
[N, r]; those of routed experts [r E, C] and [N, r E] (`lora.layers`), where the parameter that was wrapped first has
one `.base_layer` more in its name.
"""

import math
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import Tensor

from dynquant.errors import AdapterError
from dynquant.storage.strict_json import parse_json

CONFIG_NAME, WEIGHTS_NAME = "adapter_config.json", "adapter_model.safetensors"
_KEY = re.compile(r"base_model\.model\.(?P<path>.+?)(?P<depth>(\.base_layer)*)\.lora_(?P<factor>[AB])\.weight")
_UNSUPPORTED = (
    "use_dora", "use_qalora", "use_bdlora", "lora_bias", "alora_invocation_tokens", "layer_replication",
    "trainable_token_indices", "arrow_config", "kasa_config", "monteclora_config", "velora_config",
)  # fmt: skip


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
        self.config = _read_config(self.directory)
        self._path = self.directory / WEIGHTS_NAME
        if not self._path.is_file():
            raise AdapterError(f"{self.directory} holds no {WEIGHTS_NAME}. Save the adapter with `save_pretrained`.")
        try:
            self._file = safe_open(self._path, "pt")
        except SafetensorError as error:
            raise AdapterError(f"{self._path} cannot be read ({error}): it is damaged. Save it again.") from error
        self.weights = list(_paired(self._path, list(self._file.keys())))

    @property
    def alpha(self) -> float:
        return float(self.config["lora_alpha"])

    @property
    def base_model(self) -> str | None:
        """The place where PEFT says that the base model was loaded from."""
        return self.config.get("base_model_name_or_path")

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
        patterns = self.config.get("alpha_pattern") or {}  # matched as PEFT does: whole last parts of the name
        alpha = next((patterns[p] for p in patterns if re.match(rf"(.*\.)?({p})$", name)), self.config["lora_alpha"])
        return alpha / (math.sqrt(rank) if self.config.get("use_rslora") else rank)


def _read_config(directory: Path) -> dict[str, Any]:
    path = directory / CONFIG_NAME
    try:
        config = parse_json(path.read_bytes())
    except FileNotFoundError as error:
        raise AdapterError(
            f"{directory} holds no {CONFIG_NAME}. Give the directory that `save_pretrained` wrote."
        ) from error
    except (OSError, ValueError) as error:
        raise AdapterError(f"{path} is not valid JSON ({error}). It is cut short or damaged; save it again.") from error
    if not isinstance(config, dict) or config.get("peft_type") != "LORA":
        method = config.get("peft_type") if isinstance(config, dict) else None
        raise AdapterError(f"{path} gives the method {method!r}; only LORA adapters can be read.")
    if not isinstance(config.get("lora_alpha"), int | float) or config["lora_alpha"] <= 0:
        raise AdapterError(f"{path} gives `lora_alpha` as {config.get('lora_alpha')!r}; a positive number is needed.")
    if option := next(filter(config.get, _UNSUPPORTED), None):
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
