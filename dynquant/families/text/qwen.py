"""Qwen2, Qwen3, Qwen2-MoE and Qwen3-MoE.

llama.cpp's graphs fix what the configurations leave open: Qwen2-MoE never normalizes the chosen experts' weights,
Qwen3-MoE always does. transformers' default for Qwen3-MoE is the opposite, so a checkpoint that says so is refused.
"""

import gguf

from dynquant.families.common import decoder
from dynquant.families.common.config import Config
from dynquant.families.common.conversion_book import ConversionBook
from dynquant.families.common.metadata import write_keys
from dynquant.families.common.rope import rope_parameters, write_attention_factor, write_rope

_MOE_TYPES = ("qwen2_moe", "qwen3_moe")
_QWEN2_TYPES = ("qwen2", "qwen2_moe")


def write_qwen_keys(config: Config, writer: gguf.GGUFWriter) -> None:
    """Write the GGUF keys of the four Qwen families."""
    _check(config)
    decoder.write_decoder_keys(config, writer)
    parameters = rope_parameters(config)
    write_rope(config, writer, parameters)
    write_attention_factor(config, writer, parameters)
    if config.model_type in _MOE_TYPES:
        write_keys(config, writer, "qwen experts", num_experts=_num_experts(config))
    if config.model_type == "qwen2_moe":
        write_keys(config, writer, "qwen shared expert")


def add_qwen_tensors(book: ConversionBook) -> None:
    """Add the tensors of the four Qwen families."""
    is_qwen2_moe = book.config.model_type == "qwen2_moe"
    decoder.add_decoder(book, _add_attention, _add_feed_forward, always_output=is_qwen2_moe)


def _add_attention(book: ConversionBook, layer: int) -> None:
    config = book.config
    is_qwen2 = config.model_type in _QWEN2_TYPES
    has_bias = is_qwen2 and (config.model_type == "qwen2" or config.get("qkv_bias", True))
    decoder.add_attention(book, layer, bias="qkv" if has_bias else "")
    for letter in "" if is_qwen2 else "qk":
        name = f"model.layers.{layer}.self_attn.{letter}_norm.weight"
        decoder.add_norm(book, f"blk.{layer}.attn_{letter}_norm.weight", name, decoder.head_dim(config))


def _add_feed_forward(book: ConversionBook, layer: int) -> None:
    config, module = book.config, f"model.layers.{layer}.mlp"
    if config.model_type not in _MOE_TYPES:
        decoder.add_gated_ffn(book, layer, module, config.integer("intermediate_size"))
        return
    count = _num_experts(config)
    decoder.add_router(book, layer, module, count)
    decoder.add_experts(book, layer, module, count=count, width=config.integer("moe_intermediate_size"))
    if config.model_type == "qwen2_moe":
        width = config.integer("shared_expert_intermediate_size")
        decoder.add_gated_ffn(book, layer, f"{module}.shared_expert", width, "_shexp")
        gate_shape = (1, config.integer("hidden_size"))
        book.add(f"blk.{layer}.ffn_gate_inp_shexp.weight", f"{module}.shared_expert_gate.weight", gate_shape)


def _num_experts(config: Config) -> int:
    return config.integer("num_local_experts" if config.get("num_experts") is None else "num_experts")


def _check(config: Config) -> None:
    config.expect("hidden_act", "silu")
    config.expect("use_sliding_window", False, absent=False)
    if config.model_type not in _QWEN2_TYPES:
        config.expect("attention_bias", False, absent=False)
    elif decoder.head_dim(config) * config.integer("num_attention_heads") != config.integer("hidden_size"):
        config.refuse("`head_dim` times heads is not `hidden_size`, which llama.cpp's Qwen2 graphs take for granted")
    if config.model_type in _MOE_TYPES:
        config.expect("decoder_sparse_step", 1, absent=1)
        config.expect("mlp_only_layers", [], absent=[])
        config.expect("norm_topk_prob", config.model_type == "qwen3_moe")
