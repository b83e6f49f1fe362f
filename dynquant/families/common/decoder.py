"""Common parts of decoder families: GGUF keys, tensors of embeddings, grouped-query attention, dense and expert FFNs.

Keys and their value types follow llama.cpp's converter; gguf-py's writer supplies the types.
"""

from collections.abc import Callable

import gguf

from dynquant.families.common.config import Config
from dynquant.families.common.conversion import Transform, unchanged
from dynquant.families.common.conversion_book import ConversionBook
from dynquant.families.common.metadata import write_keys
from dynquant.families.common.rope import llama3_factors, rope_parameters

_GATED_NAMES = ("gate_proj", "up_proj", "down_proj")


def head_dim(config: Config) -> int:
    """Return the width of one attention head."""
    return config.integer("head_dim", config.integer("hidden_size") // max(config.integer("num_attention_heads"), 1))


def num_kv_heads(config: Config) -> int:
    return config.integer("num_key_value_heads", config.integer("num_attention_heads"))


def write_decoder_keys(config: Config, writer: gguf.GGUFWriter) -> None:
    """Write the sizes of a decoder with grouped-query attention, and the width of its heads where it is stated."""
    write_keys(config, writer, "decoder", num_key_value_heads=num_kv_heads(config))
    if config.get("head_dim") is not None:
        writer.add_key_length(head_dim(config))
        writer.add_value_length(head_dim(config))


def add_rope_factors(book: ConversionBook) -> None:
    """Add `rope_freqs.weight`, for Llama 3.1's way to longer contexts alone."""
    parameters = rope_parameters(book.config)
    if parameters.get("rope_type") == "llama3":
        book.add_computed("rope_freqs.weight", llama3_factors(book.config, parameters, head_dim(book.config)))


def add_decoder(
    book: ConversionBook,
    add_attention: Callable[[ConversionBook, int], None],
    add_feed_forward: Callable[[ConversionBook, int], None],
    *,
    always_output: bool = False,
) -> None:
    """Add embeddings, and for each layer a norm, its attention, a norm, and its feed-forward block; the last norm."""
    add_embeddings(book, always_output=always_output)
    for layer in range(book.config.integer("num_hidden_layers")):
        add_norm(book, f"blk.{layer}.attn_norm.weight", f"model.layers.{layer}.input_layernorm.weight")
        add_attention(book, layer)
        add_norm(book, f"blk.{layer}.ffn_norm.weight", f"model.layers.{layer}.post_attention_layernorm.weight")
        add_feed_forward(book, layer)
    add_norm(book, "output_norm.weight", "model.norm.weight")


def add_embeddings(book: ConversionBook, *, always_output: bool = False) -> None:
    """Add token embedding and output matrix; tied models get no `output.weight` unless `always_output`.

    Like transformers, a configuration that ties them is not believed where the checkpoint stores two matrices.
    """
    config, embedding, head = book.config, "model.embed_tokens.weight", "lm_head.weight"
    shape = (config.integer("vocab_size"), config.integer("hidden_size"))
    book.add("token_embd.weight", embedding, shape)
    if not config.get("tie_word_embeddings", False) or book.holds_another(head, embedding):
        book.add("output.weight", head, shape)
        return
    book.ignore(head)  # a copy; from names alone nobody can tell
    if always_output:
        book.add("output.weight", embedding, shape)


def add_norm(book: ConversionBook, name: str, checkpoint_name: str, width: int | None = None) -> None:
    book.add(name, checkpoint_name, (width or book.config.integer("hidden_size"),))


def add_attention(
    book: ConversionBook,
    layer: int,
    *,
    bias: str = "",
    permute_q: Transform = unchanged,
    permute_k: Transform = unchanged,
) -> None:
    """Add query, key, value and output projections; `bias` holds the letters of those that have one, at most "qkvo"."""
    config, prefix = book.config, f"model.layers.{layer}.self_attn"
    hidden, width = config.integer("hidden_size"), head_dim(config)
    num_q, num_kv = config.integer("num_attention_heads") * width, num_kv_heads(config) * width
    for letter, rows, transform in (("q", num_q, permute_q), ("k", num_kv, permute_k), ("v", num_kv, unchanged)):
        name, stored = f"blk.{layer}.attn_{letter}", f"{prefix}.{letter}_proj"
        book.add(f"{name}.weight", f"{stored}.weight", (rows, hidden), transform=transform)
        if letter in bias:
            book.add(f"{name}.bias", f"{stored}.bias", (rows,), transform=transform)
    book.add(f"blk.{layer}.attn_output.weight", f"{prefix}.o_proj.weight", (hidden, num_q))
    if "o" in bias:
        book.add(f"blk.{layer}.attn_output.bias", f"{prefix}.o_proj.bias", (hidden,))


def add_gated_ffn(book: ConversionBook, layer: int, module: str, width: int, suffix: str = "") -> None:
    """Add a gated feed-forward block; `suffix` is `_shexp` for shared experts."""
    hidden = book.config.integer("hidden_size")
    for kind, stored, shape in zip(("gate", "up", "down"), _GATED_NAMES, _ffn_shapes(width, hidden), strict=True):
        book.add(f"blk.{layer}.ffn_{kind}{suffix}.weight", f"{module}.{stored}.weight", shape)


def add_experts(
    book: ConversionBook, layer: int, module: str, *, count: int, width: int, names: tuple[str, str, str] = _GATED_NAMES
) -> None:
    """Add routed experts, stored one by one (`experts.N.gate_proj.weight`) or fused (`experts.gate_up_proj`)."""
    hidden = book.config.integer("hidden_size")
    shapes = [(count, *shape) for shape in _ffn_shapes(width, hidden)]
    targets = [f"blk.{layer}.ffn_{kind}_exps.weight" for kind in ("gate", "up", "down")]
    for suffix in ("", ".weight"):
        fused = f"{module}.experts.gate_up_proj{suffix}"
        if book.holds(fused):
            book.add_rows(targets[0], fused, shapes[0], 0, 2 * width)
            book.add_rows(targets[1], fused, shapes[1], width, 2 * width)
            book.add_rows(targets[2], f"{module}.experts.down_proj{suffix}", shapes[2], 0, hidden)
            return
    for target, stored, shape in zip(targets, names, shapes, strict=True):
        book.add_stack(target, tuple(f"{module}.experts.{e}.{stored}.weight" for e in range(count)), shape)


def add_router(book: ConversionBook, layer: int, module: str, count: int) -> None:
    book.add(f"blk.{layer}.ffn_gate_inp.weight", f"{module}.gate.weight", (count, book.config.integer("hidden_size")))


def _ffn_shapes(width: int, hidden: int) -> tuple[tuple[int, int], ...]:
    """Shapes [rows, columns] of gate, up and down."""
    return (width, hidden), (width, hidden), (hidden, width)
