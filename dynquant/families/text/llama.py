"""Llama, Mistral and Mixtral: llama.cpp's `llama` graph, with or without experts.

llama.cpp rotates neighbouring pairs where transformers rotates halves, so the rows of q and k are interleaved per head.
"""

import warnings
from functools import partial

import gguf
import torch

from dynquant.families.common import decoder
from dynquant.families.common.config import Config
from dynquant.families.common.conversion import Transform
from dynquant.families.common.conversion_book import ConversionBook
from dynquant.families.common.metadata import write_keys
from dynquant.families.common.rope import rope_parameters, write_attention_factor, write_rope


def write_llama_keys(config: Config, writer: gguf.GGUFWriter) -> None:
    """Write the GGUF keys of Llama, Mistral and Mixtral."""
    config.expect("hidden_act", "silu")
    window = config.get("sliding_window")
    if window is not None and config.integer("sliding_window") < config.integer("max_position_embeddings"):
        warnings.warn(
            f"{config.path}: attention is limited to the last {window} tokens, which llama.cpp's llama graph does not "
            f"do. The GGUF equals the checkpoint up to {window} tokens of context and differs beyond.",
            stacklevel=3,
        )
    decoder.write_decoder_keys(config, writer)
    writer.add_rope_dimension_count(decoder.head_dim(config))
    parameters = rope_parameters(config)
    write_rope(config, writer, parameters)
    write_attention_factor(config, writer, parameters)
    if config.model_type == "mixtral":
        write_keys(config, writer, "mixtral")


def add_llama_tensors(book: ConversionBook) -> None:
    """Add the tensors of Llama, Mistral and Mixtral."""
    config = book.config
    decoder.add_rope_factors(book)
    attention = partial(
        decoder.add_attention,
        bias="qkvo" if config.get("attention_bias", False) else "",
        permute_q=interleave_halves(config.integer("num_attention_heads")),
        permute_k=interleave_halves(decoder.num_kv_heads(config)),
    )
    decoder.add_decoder(book, attention, _add_feed_forward)


def interleave_halves(num_heads: int) -> Transform:
    """Reorder the rows of each head from (first half, second half) to alternating pairs."""

    def reorder(rows: torch.Tensor) -> torch.Tensor:
        halves = rows.reshape(num_heads, 2, -1, *rows.shape[1:])
        return halves.transpose(1, 2).reshape(rows.shape)

    return reorder


def _add_feed_forward(book: ConversionBook, layer: int) -> None:
    config, module = book.config, f"model.layers.{layer}.mlp"
    width = config.integer("intermediate_size")
    if config.model_type != "mixtral":
        decoder.add_gated_ffn(book, layer, module, width)
        if config.get("mlp_bias", False):
            for kind, rows in (("gate", width), ("up", width), ("down", config.integer("hidden_size"))):
                book.add(f"blk.{layer}.ffn_{kind}.bias", f"{module}.{kind}_proj.bias", (rows,))
        return
    count = config.integer("num_local_experts")
    if not book.holds(f"{module}.gate.weight"):
        module = f"model.layers.{layer}.block_sparse_moe"
    decoder.add_router(book, layer, module, count)
    decoder.add_experts(book, layer, module, count=count, width=width, names=("w1", "w3", "w2"))
