"""DeepSeek V2 and V3: multi-head latent attention and mixture of experts (llama.cpp's `deepseek2` graph).

llama.cpp runs MLA absorbed, as multi-query attention over the latent vector. `kv_b_proj` is therefore split per head
into k_b, transposed to map a query into the latent space, and v_b:

    kv_b_proj [heads * (nope + v), rank]  ->  attn_k_b [heads, rank, nope],  attn_v_b [heads, v, rank]

Multi-token prediction layers (V3's layer 61) are left out with a warning, as llama.cpp's converter does.
"""

import re
import warnings

import gguf
import torch

from dynquant.families.common import decoder
from dynquant.families.common.config import Config
from dynquant.families.common.conversion_book import ConversionBook
from dynquant.families.common.metadata import write_keys
from dynquant.families.common.rope import rope_parameters, write_rope

# transformers' model classes fix the router's scoring function and do not save it.
_SCORING = {"deepseek_v2": "softmax", "deepseek_v3": "sigmoid"}
_GATING = {"softmax": gguf.ExpertGatingFuncType.SOFTMAX, "sigmoid": gguf.ExpertGatingFuncType.SIGMOID}
# llama.cpp takes these layer counts for a lite model without a query latent (src/models/deepseek2.cpp).
_LITE_LAYER_COUNTS = (26, 27)
_LITE_LAYERS_AND_VOCAB = (48, 128256)
_LAYER = re.compile(r"model\.layers\.\d+\.")


def write_deepseek_keys(config: Config, writer: gguf.GGUFWriter) -> None:
    """Write the GGUF keys of DeepSeek V2 and V3."""
    _check(config)
    write_keys(config, writer, "decoder", num_key_value_heads=1)  # absorbed MLA is multi-query
    _write_attention_keys(config, writer)
    write_keys(config, writer, "deepseek experts")
    if config.get("norm_topk_prob", False):
        writer.add_expert_weights_norm(True)
    writer.add_expert_gating_func(_GATING[_SCORING[config.model_type]])
    groups, used = _expert_groups(config)
    write_keys(config, writer, "deepseek groups", n_group=groups, topk_group=used)
    parameters = rope_parameters(config)
    write_rope(config, writer, parameters)
    if parameters.get("rope_type") == "yarn":
        # 0.1 is llama.cpp's convention for this architecture alone; its loader divides it out again.
        writer.add_rope_scaling_yarn_log_mul(0.1 * _yarn_mscale(config, parameters))


def add_deepseek_tensors(book: ConversionBook) -> None:
    """Add the tensors of DeepSeek V2 and V3."""
    decoder.add_decoder(book, _add_attention, _add_feed_forward)
    # Layers beyond the configuration's count are left out only if they are what they should be.
    book.drop(
        lambda name: bool(match := _LAYER.match(name)) and book.holds(f"{match[0]}eh_proj.weight"),
        "they belong to multi-token prediction layers, which llama.cpp does not run for this architecture. "
        "Ordinary generation does not use them.",
    )


def _write_attention_keys(config: Config, writer: gguf.GGUFWriter) -> None:
    rank, rope = config.integer("kv_lora_rank"), config.integer("qk_rope_head_dim")
    write_keys(config, writer, "latent attention")
    writer.add_key_length(rank + rope)
    writer.add_value_length(rank)
    writer.add_key_length_mla(config.integer("qk_nope_head_dim") + rope)
    writer.add_value_length_mla(config.integer("v_head_dim"))
    writer.add_rope_dimension_count(rope)


def _add_attention(book: ConversionBook, layer: int) -> None:
    config, stored, name = book.config, f"model.layers.{layer}.self_attn", f"blk.{layer}.attn"
    hidden, heads, rank = (config.integer(key) for key in ("hidden_size", "num_attention_heads", "kv_lora_rank"))
    nope, rope, value = (config.integer(key) for key in ("qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim"))
    num_q = heads * (nope + rope)
    if config.get("q_lora_rank") is None:
        book.add(f"{name}_q.weight", f"{stored}.q_proj.weight", (num_q, hidden))
    else:
        q_rank = config.integer("q_lora_rank")
        book.add(f"{name}_q_a.weight", f"{stored}.q_a_proj.weight", (q_rank, hidden))
        decoder.add_norm(book, f"{name}_q_a_norm.weight", f"{stored}.q_a_layernorm.weight", q_rank)
        book.add(f"{name}_q_b.weight", f"{stored}.q_b_proj.weight", (num_q, q_rank))
    book.add(f"{name}_kv_a_mqa.weight", f"{stored}.kv_a_proj_with_mqa.weight", (rank + rope, hidden))
    decoder.add_norm(book, f"{name}_kv_a_norm.weight", f"{stored}.kv_a_layernorm.weight", rank)
    _add_kv_b(book, name, f"{stored}.kv_b_proj.weight")
    book.add(f"{name}_output.weight", f"{stored}.o_proj.weight", (hidden, heads * value))


def _add_kv_b(book: ConversionBook, name: str, stored: str) -> None:
    config = book.config
    heads, rank = config.integer("num_attention_heads"), config.integer("kv_lora_rank")
    nope, value = config.integer("qk_nope_head_dim"), config.integer("v_head_dim")
    stored_shape = (heads * (nope + value), rank)
    if book.whole_kv_b:
        book.add(f"{name}_kv_b.weight", stored, stored_shape)
        return

    def per_head(rows: torch.Tensor) -> torch.Tensor:
        return rows.reshape(heads, nope + value, rank)

    for letter, shape, transform in (
        ("k", (heads, rank, nope), lambda rows: per_head(rows)[:, :nope].transpose(1, 2)),
        ("v", (heads, value, rank), lambda rows: per_head(rows)[:, nope:]),
    ):
        book.add(f"{name}_{letter}_b.weight", stored, shape, transform=transform, stored_shape=stored_shape)


def _add_feed_forward(book: ConversionBook, layer: int) -> None:
    config, module = book.config, f"model.layers.{layer}.mlp"
    if layer < config.integer("first_k_dense_replace", 0):
        decoder.add_gated_ffn(book, layer, module, config.integer("intermediate_size"))
        return
    count, width = config.integer("n_routed_experts"), config.integer("moe_intermediate_size")
    decoder.add_router(book, layer, module, count)
    if config.model_type == "deepseek_v3":
        book.add(f"blk.{layer}.exp_probs_b.bias", f"{module}.gate.e_score_correction_bias", (count,))
    decoder.add_experts(book, layer, module, count=count, width=width)
    decoder.add_gated_ffn(book, layer, f"{module}.shared_experts", width * config.integer("n_shared_experts"), "_shexp")


def _expert_groups(config: Config) -> tuple[int, int]:
    """Expert groups and how many are used; (1, 1) when every expert competes with every other."""
    groups, used = config.integer("n_group", 1), config.integer("topk_group", 1)
    if config.model_type == "deepseek_v2" and config.get("topk_method", "greedy") == "greedy":
        return 1, 1
    if groups <= 1 or used >= groups:
        return 1, 1
    if config.model_type == "deepseek_v2":
        warnings.warn(
            f"{config.path}: DeepSeek V2 ranks expert groups by their best expert, llama.cpp by the sum of the best "
            "two. The GGUF routes some tokens differently than transformers does.",
            stacklevel=4,
        )
    return groups, used


def _yarn_mscale(config: Config, parameters: dict[str, object]) -> float:
    mscale, mscale_all = parameters.get("mscale"), parameters.get("mscale_all_dim")
    if not mscale_all or mscale != mscale_all or parameters.get("attention_factor") is not None:
        config.refuse(
            f"yarn with `mscale` {mscale!r} and `mscale_all_dim` {mscale_all!r}, but llama.cpp's deepseek2 graph takes "
            "them for equal and not zero, and knows no `attention_factor`"
        )
    return float(mscale_all)  # type: ignore[arg-type]


def _check(config: Config) -> None:
    scoring = _SCORING[config.model_type]
    if config.raw.get("scoring_func", scoring) != scoring:
        config.refuse(
            f"`scoring_func` is {config.raw['scoring_func']!r}, but transformers' {config.model_type} always computes "
            f"{scoring!r}; correct config.json if the model was trained with {scoring!r}"
        )
    config.expect("hidden_act", "silu")
    config.expect("attention_bias", False, absent=False)
    config.expect("mlp_bias", False, absent=False)
    config.expect("moe_layer_freq", 1, absent=1)
    if config.model_type == "deepseek_v2":
        config.expect("topk_method", "greedy", "group_limited_greedy", absent="greedy")
        config.expect("norm_topk_prob", False, absent=False)
    else:
        config.expect("topk_method", "noaux_tc", absent="noaux_tc")
        config.expect("rope_interleave", True, absent=True)
    layers, vocab_size = config.integer("num_hidden_layers"), config.integer("vocab_size")
    is_lite = layers in _LITE_LAYER_COUNTS or (layers, vocab_size) == _LITE_LAYERS_AND_VOCAB
    if is_lite and config.get("q_lora_rank") is not None:
        config.refuse(f"llama.cpp takes {layers} layers for a lite model and ignores `q_lora_rank`")
