"""The text families that can be converted to GGUF, by `model_type` of config.json.

A family here is two functions: one writes its GGUF keys, one names its tensors; the docstring of `dynquant.families`
says what else belongs to it, as the way back from a GGUF file. Facts (names, layouts, key types) follow llama.cpp's
converter and graphs; where those fix what a configuration leaves open, the checkpoint is refused instead of converted
wrongly.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import gguf

from dynquant.families.common.config import Config
from dynquant.families.common.conversion import Conversion
from dynquant.families.common.conversion_book import ConversionBook
from dynquant.families.text.deepseek import add_deepseek_tensors, write_deepseek_keys
from dynquant.families.text.gemma import add_gemma3_tensors, write_gemma3_keys
from dynquant.families.text.llama import add_llama_tensors, write_llama_keys
from dynquant.families.text.llama4 import add_llama4_tensors, write_llama4_keys
from dynquant.families.text.qwen import add_qwen_tensors, write_qwen_keys


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


def conversions_of(config: Config, names: Iterable[str], *, whole_kv_b: bool = False) -> list[Conversion]:
    """Return the conversions of a configuration's family for a model that has tensors of these names."""
    book = ConversionBook(config, None, names=list(names), whole_kv_b=whole_kv_b)
    FAMILIES[config.model_type].add_tensors(book)
    return book.finish()


_LLAMA4 = Family("llama4", write_llama4_keys, add_llama4_tensors)
SIZED_FAMILIES = FAMILIES | {"llama4": _LLAMA4, "llama4_text": _LLAMA4, "kimi_k2": FAMILIES["deepseek_v3"]}
"""Families whose configuration is enough: what `open_config` knows."""
SAME_CONFIG = {"kimi_k2": "deepseek_v3"}
"""Types that transformers does not have -> the type that has the same configuration and tensors."""
