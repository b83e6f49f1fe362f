"""Llama 4 from its configuration alone: sizes, types and costs of llama.cpp's `llama4` graph.

Every `interleave_moe_layer_step`-th layer routes each token to one of its experts, beside a shared expert; the others
are dense and wider. Heads are rotated as transformers does it, so nothing is permuted. Its experts are stored [E, in,
out] and cannot be converted or run layer by layer here.
"""

from dataclasses import replace
from functools import partial

import gguf

from dynquant.families.common import decoder
from dynquant.families.common.config import Config
from dynquant.families.common.conversion_book import ConversionBook
from dynquant.families.common.metadata import write_keys
from dynquant.families.common.rope import rope_parameters, write_rope


def write_llama4_keys(config: Config, writer: gguf.GGUFWriter) -> None:
    """Write the GGUF keys of Llama 4."""
    config.expect("hidden_act", "silu")
    dense = {"intermediate_size": config.integer("intermediate_size_mlp")}
    decoder.write_decoder_keys(replace(config, values=config.values | dense), writer)
    writer.add_rope_dimension_count(decoder.head_dim(config))
    write_rope(config, writer, rope_parameters(config))
    write_keys(config, writer, "mixtral")
    writer.add_interleave_moe_layer_step(config.integer("interleave_moe_layer_step"))
    writer.add_expert_feed_forward_length(config.integer("intermediate_size"))


def add_llama4_tensors(book: ConversionBook) -> None:
    """Add the tensors of Llama 4's language model."""
    decoder.add_rope_factors(book)
    bias = "qkvo" if book.config.get("attention_bias", False) else ""
    decoder.add_decoder(book, partial(decoder.add_attention, bias=bias), _add_feed_forward)
    book.drop(
        lambda name: name.startswith(("vision_model.", "multi_modal_projector.")),
        "they belong to the vision tower, which llama.cpp keeps in a file of its own.",
    )


def _add_feed_forward(book: ConversionBook, layer: int) -> None:
    config, module = book.config, f"model.layers.{layer}.feed_forward"
    routed = config.get("moe_layers", [])
    if not isinstance(routed, list) or layer not in routed:
        decoder.add_gated_ffn(book, layer, module, config.integer("intermediate_size_mlp"))
        return
    count, width = config.integer("num_local_experts"), config.integer("intermediate_size")
    hidden = config.integer("hidden_size")
    book.add(f"blk.{layer}.ffn_gate_inp.weight", f"{module}.router.weight", (count, hidden))
    for kind in ("gate", "up"):
        book.add(f"blk.{layer}.ffn_{kind}_exps.weight", f"{module}.experts.gate_up_proj", (count, width, hidden))
    book.add(f"blk.{layer}.ffn_down_exps.weight", f"{module}.experts.down_proj", (count, hidden, width))
    decoder.add_gated_ffn(book, layer, f"{module}.shared_expert", width, "_shexp")
