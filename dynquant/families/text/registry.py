"""Hugging Face checkpoints as GGUF: which families are known, and how one is opened.

A family is two functions: one writes its GGUF keys, one names its tensors. Facts (names, layouts, key types) follow
llama.cpp's converter and graphs; where those fix what a configuration leaves open, the checkpoint is refused instead of
converted wrongly.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

import gguf

from dynquant.checkpoints.safetensors_source import INDEX_NAME, SafetensorsSource
from dynquant.checkpoints.tensor_source import TensorSource
from dynquant.errors import CheckpointError
from dynquant.families.common.config import Config, read_config, read_json
from dynquant.families.common.conversion import ConvertedSource
from dynquant.families.common.conversion_book import ConversionBook
from dynquant.families.common.metadata import recorded_fields, write_general_keys
from dynquant.families.text.deepseek import add_deepseek_tensors, write_deepseek_keys
from dynquant.families.text.gemma import add_gemma3_tensors, write_gemma3_keys
from dynquant.families.text.llama import add_llama_tensors, write_llama_keys
from dynquant.families.text.llama4 import add_llama4_tensors, write_llama4_keys
from dynquant.families.text.qwen import add_qwen_tensors, write_qwen_keys
from dynquant.families.tokenizers.tokenizer import write_tokenizer

if TYPE_CHECKING:
    from dynquant.checkpoints.model import Model


@dataclass(frozen=True)
class Family:
    """One architecture of llama.cpp and how to fill it."""

    arch: str
    write_keys: Callable[[Config, gguf.GGUFWriter], None]
    add_tensors: Callable[[ConversionBook], None]


FAMILIES: dict[str, Family] = {
    "llama": Family("llama", write_llama_keys, add_llama_tensors),
    "mistral": Family("llama", write_llama_keys, add_llama_tensors),
    "mixtral": Family("llama", write_llama_keys, add_llama_tensors),
    "qwen2": Family("qwen2", write_qwen_keys, add_qwen_tensors),
    "qwen3": Family("qwen3", write_qwen_keys, add_qwen_tensors),
    "qwen2_moe": Family("qwen2moe", write_qwen_keys, add_qwen_tensors),
    "qwen3_moe": Family("qwen3moe", write_qwen_keys, add_qwen_tensors),
    "gemma3_text": Family("gemma3", write_gemma3_keys, add_gemma3_tensors),
    "deepseek_v2": Family("deepseek2", write_deepseek_keys, add_deepseek_tensors),
    "deepseek_v3": Family("deepseek2", write_deepseek_keys, add_deepseek_tensors),
}
"""Families by `model_type` of config.json."""

_LLAMA4 = Family("llama4", write_llama4_keys, add_llama4_tensors)
_SIZED_FAMILIES = FAMILIES | {"llama4": _LLAMA4, "llama4_text": _LLAMA4, "kimi_k2": FAMILIES["deepseek_v3"]}
"""Families whose configuration is enough: what `open_config` knows."""
_SAME_CONFIG = {"kimi_k2": "deepseek_v3"}
"""Types that transformers does not have -> the type that has the same configuration and tensors."""


def open_hf(directory: Path) -> "Model":
    """Open a Hugging Face checkpoint; nothing but headers, configuration and tokenizer is read.

    Raises:
        CheckpointError: missing or damaged files, missing or unknown tensors, or something that llama.cpp cannot run.
    """
    config = read_config(directory, FAMILIES)
    quantization = config.raw.get("quantization_config")
    method = quantization.get("quant_method") if isinstance(quantization, dict) else quantization
    source = SafetensorsSource(directory) if method in (None, "fp8") else None
    if source is None or (method == "fp8" and not source.has_fp8):
        config.refuse(
            "its weights are already quantized (`quantization_config`), and not as FP8 matrices with block scales; "
            "start from the BF16, F16 or FP8 checkpoint"
        )
    return _build(directory, ConversionBook(config, source), source)


def open_config(directory: Path, *, whole_kv_b: bool = False) -> "Model":
    """Open only a configuration: names, shapes and keys without weights, all stored as BF16.

    For planning sizes. The tokenizer is taken along when it is there, and the names in model.safetensors.index.json are
    checked against those that the configuration calls for. Loading a tensor raises CheckpointError. `whole_kv_b` keeps
    MLA's `attn_kv_b` in one piece, as published files have it; such a model can only be sized.

    Raises:
        CheckpointError: missing or damaged files, an unknown architecture, or an index of another model.
    """
    config = read_config(directory, _SIZED_FAMILIES, same_as=_SAME_CONFIG)
    book = ConversionBook(config, None, names=_indexed_names(directory), whole_kv_b=whole_kv_b)
    book.drop(lambda name: name.endswith("_scale_inv"), "they scale weights that are stored as FP8.")
    return _build(directory, book, None)


def _indexed_names(directory: Path) -> list[str] | None:
    index = directory / INDEX_NAME
    if not index.is_file():
        return None
    names = read_json(index).get("weight_map")
    if not isinstance(names, dict):
        raise CheckpointError(f"{index} has no `weight_map`, so it is not a safetensors index. Fetch it again.")
    return [name.removeprefix("language_model.") for name in names]


def _build(directory: Path, book: ConversionBook, checkpoint: TensorSource | None) -> "Model":
    from dynquant.checkpoints.model import Model

    config = book.config
    family = _SIZED_FAMILIES[config.model_type]
    writer = gguf.GGUFWriter(None, family.arch)
    family.add_tensors(book)
    source = ConvertedSource(checkpoint or _NoWeights(directory), book.finish())
    write_general_keys(writer, directory, source)
    family.write_keys(config, writer)
    if checkpoint is not None or any((directory / name).is_file() for name in ("tokenizer.json", "tokenizer.model")):
        write_tokenizer(writer, directory, config.integer("vocab_size"))
    return Model(directory, source, recorded_fields(writer), source.checkpoint_names, hf_directory=directory)


class _NoWeights:
    """Stands in for the weights of `open_config`."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory

    @property
    def fingerprint(self) -> str:
        return "config-only"

    def names(self) -> list[str]:
        return []

    def info(self, name: str) -> NoReturn:
        self.load(name)

    def load(self, name: str, index: int | None = None) -> NoReturn:
        raise CheckpointError(f"{self._directory} was opened for its configuration only; `{name}` cannot be read.")
