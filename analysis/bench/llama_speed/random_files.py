"""GGUF files of random weights in the shape of a configuration."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import gguf
import torch

from dynquant.analysis.bench.random_models import fill_blocks
from dynquant.formats.quant_types import quant_type

_DRAWN_BLOCKS = 1 << 16


def write_random_gguf(config: Any, types: str, path: Path) -> None:
    """Write random weights in the shape of a Llama or Qwen3-MoE configuration; types as "experts=IQ2_XXS,rest=Q4_K"."""
    is_moe = hasattr(config, "num_experts")
    writer = gguf.GGUFWriter(path, "qwen3moe" if is_moe else "llama")
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(10_000.0)
    for add in (writer.add_rope_dimension_count, writer.add_key_length, writer.add_value_length):
        add(config.head_dim)
    writer.add_vocab_size(config.vocab_size)
    writer.add_tokenizer_model("none")
    if is_moe:
        writer.add_expert_count(config.num_experts)
        writer.add_expert_used_count(config.num_experts_per_tok)
        writer.add_expert_feed_forward_length(config.moe_intermediate_size)
    type_by_part = dict(part.split("=") for part in types.split(","))
    drawn = {name: _random_blocks(name) for name in {*type_by_part.values(), "F32"}}
    for name, shape in _tensors(config, is_moe):
        is_plain = len(shape) == 1 or name.endswith("gate_inp.weight")
        stored = "F32" if is_plain else type_by_part["experts" if "exps" in name else "rest"]
        layout = quant_type(stored)
        num_bytes = layout.row_bytes(shape[-1])
        count = num_bytes * torch.Size(shape[:-1]).numel()
        if len(drawn[stored]) < count:
            drawn[stored] = drawn[stored].repeat(-(-count // len(drawn[stored])))
        data = drawn[stored][:count].view(*shape[:-1], num_bytes).numpy()
        if stored == "F32":
            writer.add_tensor(name, data.view("float32"))
        else:
            writer.add_tensor(name, data, raw_dtype=gguf.GGMLQuantizationType(layout.ggml_id))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _random_blocks(name: str) -> torch.Tensor:
    if name == "F32":
        return (torch.rand(_DRAWN_BLOCKS) + 0.5).view(torch.uint8)
    blocks = torch.empty(_DRAWN_BLOCKS, quant_type(name).block_bytes, dtype=torch.uint8)
    fill_blocks(blocks, name)
    return blocks.flatten()


def _tensors(config: Any, is_moe: bool) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Yield names and shapes in the order of a file."""
    hidden, width = config.hidden_size, config.moe_intermediate_size if is_moe else config.intermediate_size
    queries, keys = (heads * config.head_dim for heads in (config.num_attention_heads, config.num_key_value_heads))
    yield "token_embd.weight", (config.vocab_size, hidden)
    for layer in range(config.num_hidden_layers):
        block = {
            "attn_norm": (hidden,), "attn_q": (queries, hidden), "attn_k": (keys, hidden), "attn_v": (keys, hidden),
            "attn_output": (hidden, queries), "ffn_norm": (hidden,),
        }  # fmt: skip
        experts = ()
        if is_moe:
            block |= {"attn_q_norm": (config.head_dim,), "attn_k_norm": (config.head_dim,)}
            block["ffn_gate_inp"], experts = (config.num_experts, hidden), (config.num_experts,)
        for part, shape in (("gate", (width, hidden)), ("up", (width, hidden)), ("down", (hidden, width))):
            block[f"ffn_{part}{'_exps' if is_moe else ''}"] = (*experts, *shape)
        yield from ((f"blk.{layer}.{name}.weight", shape) for name, shape in block.items())
    yield "output_norm.weight", (hidden,)
    yield "output.weight", (config.vocab_size, hidden)
