"""Gemma 3, text models.

Norm weights are stored as the difference from one, so one is added. Whether a layer attends globally or in a sliding
window follows a period that is written only where it is not llama.cpp's own, six.
"""

import gguf

from dynquant.families.common.config import Config, finite
from dynquant.families.common.conversion_book import ConversionBook
from dynquant.families.common.decoder import add_attention, add_embeddings, add_gated_ffn, head_dim
from dynquant.families.common.metadata import write_keys
from dynquant.families.common.rope import rope_parameters, write_rope

_NORMS = {
    "attn_norm": "input_layernorm",
    "post_attention_norm": "post_attention_layernorm",
    "ffn_norm": "pre_feedforward_layernorm",
    "post_ffw_norm": "post_feedforward_layernorm",
}
_DEFAULT_PERIOD = 6
_LAYERS_OF_27B = 62


def write_gemma3_keys(config: Config, writer: gguf.GGUFWriter) -> None:
    """Write the GGUF keys of Gemma 3 text models."""
    _check(config)
    write_keys(config, writer, "decoder")
    writer.add_key_length(head_dim(config))
    writer.add_value_length(head_dim(config))
    full = rope_parameters(config, "full_attention")
    if full.get("rope_type", "default") not in ("default", "linear"):
        config.refuse(f"rope scaling `{full['rope_type']}` is not supported for Gemma 3 (known: default, linear)")
    write_rope(config, writer, full)
    if (period := _window_period(config)) is not None:
        sliding = rope_parameters(config, "sliding_attention")
        if sliding.get("rope_type", "default") != "default":
            config.refuse("rope scaling in sliding-window layers is not supported")
        writer.add_rope_freq_base_swa(finite(sliding["rope_theta"], "rope_parameters.rope_theta", config.path))
        writer.add_sliding_window(config.integer("sliding_window"))
        if period != _DEFAULT_PERIOD:
            writer.add_sliding_window_pattern(period)
    if config.get("final_logit_softcapping") is not None:
        writer.add_final_logit_softcapping(config.number("final_logit_softcapping"))


def add_gemma3_tensors(book: ConversionBook) -> None:
    """Add the tensors of Gemma 3 text models."""
    config = book.config
    add_embeddings(book)
    for layer in range(config.integer("num_hidden_layers")):
        prefix = f"model.layers.{layer}"
        for name, stored in _NORMS.items():
            _add_shifted_norm(book, f"blk.{layer}.{name}.weight", f"{prefix}.{stored}.weight")
        add_attention(book, layer)
        for letter in "qk":
            stored = f"{prefix}.self_attn.{letter}_norm.weight"
            _add_shifted_norm(book, f"blk.{layer}.attn_{letter}_norm.weight", stored, head_dim(config))
        add_gated_ffn(book, layer, f"{prefix}.mlp", config.integer("intermediate_size"))
    _add_shifted_norm(book, "output_norm.weight", "model.norm.weight")


def _add_shifted_norm(book: ConversionBook, name: str, stored: str, width: int | None = None) -> None:
    shape = (width or book.config.integer("hidden_size"),)
    # F32 whatever the checkpoint stores: w + 1 does not fit bfloat16 without rounding.
    book.add(name, stored, shape, transform=lambda weight: weight + 1, dtype="F32")


def _window_period(config: Config) -> int | None:
    """Every how many layers one attends globally; None when all do."""
    types = config.get("layer_types")
    if not isinstance(types, list) or len(types) != config.integer("num_hidden_layers"):
        config.refuse(f"`layer_types` does not name the attention of each layer: {types!r}")
    if "sliding_attention" not in types:
        return None
    # Without a global layer, any period beyond the number of layers says so.
    period = types.index("full_attention") + 1 if "full_attention" in types else max(len(types) + 1, _DEFAULT_PERIOD)
    expected = ["full_attention" if (i + 1) % period == 0 else "sliding_attention" for i in range(len(types))]
    if types != expected:
        config.refuse(f"`layer_types` has no fixed period: {types!r}")
    return period


def _check(config: Config) -> None:
    config.expect("hidden_activation", "gelu_pytorch_tanh")
    config.expect("attention_bias", False, absent=False)
    config.expect("attn_logit_softcapping", None)
    config.expect("use_bidirectional_attention", False, absent=False)
    scale = head_dim(config)
    if config.integer("num_hidden_layers") == _LAYERS_OF_27B:
        scale = config.integer("hidden_size") // config.integer("num_attention_heads")
    config.expect("query_pre_attn_scalar", scale)
