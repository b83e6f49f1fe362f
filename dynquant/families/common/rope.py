"""Rotary position embeddings: transformers' `rope_parameters` to GGUF keys, and llama3's frequency factors.

Supported: default, linear, yarn, llama3, and dynamic up to the context of the checkpoint. The checks hold each to what
llama.cpp's rope computes; `longrope` and partial rotation are refused.
"""

import math
import warnings

import gguf
import torch

from dynquant.families.common.config import Config, finite


def rope_parameters(config: Config, layer_type: str | None = None) -> dict[str, object]:
    """The rope parameters of the model, or of one attention layer type where they differ by type."""
    parameters = config.get("rope_parameters", {})
    if layer_type is not None and isinstance(parameters, dict):
        parameters = parameters.get(layer_type)
    if not isinstance(parameters, dict) or "rope_theta" not in parameters:
        config.refuse(f"its rope parameters are not understood: {parameters!r}")
    if parameters.get("partial_rotary_factor", 1.0) not in (1.0, None):
        config.refuse(
            f"`partial_rotary_factor` is {parameters['partial_rotary_factor']!r}, but whole heads are rotated"
        )
    return parameters


def write_rope(config: Config, writer: gguf.GGUFWriter, parameters: dict[str, object]) -> None:
    """Base frequency and scaling keys. Raises CheckpointError for a scaling that llama.cpp does not compute."""
    writer.add_rope_freq_base(_number(config, parameters, "rope_theta"))
    kind = parameters.get("rope_type", "default")
    if kind == "linear":
        writer.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(_number(config, parameters, "factor"))
    elif kind == "yarn":
        _write_yarn(config, writer, parameters)
    elif kind == "dynamic":
        context = config.integer("max_position_embeddings")
        warnings.warn(
            f"{config.path}: rope scaling `dynamic` changes the angles of texts beyond {context} tokens, which "
            f"llama.cpp does not do. The GGUF equals the checkpoint up to {context} tokens of context and differs "
            "beyond.",
            stacklevel=4,
        )
    elif kind not in ("default", "llama3"):
        config.refuse(f"rope scaling `{kind}` is not supported (known: default, linear, yarn, llama3, dynamic)")


def yarn_factor(config: Config, parameters: dict[str, object]) -> float:
    """The context extension factor of yarn; transformers derives it from the context lengths when it is not given."""
    if parameters.get("factor") is not None:
        return _number(config, parameters, "factor")
    return config.integer("max_position_embeddings") / _original_context(config, parameters)


def yarn_magnitude(factor: float, mscale: float = 1.0) -> float:
    """Yarn's attention magnitude 1 + 0.1 mscale ln(factor)."""
    return 1.0 if factor <= 1 else 1.0 + 0.1 * mscale * math.log(factor)


def llama3_factors(config: Config, parameters: dict[str, object], head_dim: int) -> torch.Tensor:
    """Divisors of the base frequencies, float32 [head_dim / 2], for `rope_freqs.weight`.

    Wavelengths below original / high_freq_factor are kept, above original / low_freq_factor divided by `factor`, and
    blended between (Llama 3.1); Llama 4 has one bound for both.
    """
    factor, low, high = (_number(config, parameters, key) for key in ("factor", "low_freq_factor", "high_freq_factor"))
    original = _number(config, parameters, "original_max_position_embeddings")
    theta = _number(config, parameters, "rope_theta")
    exponents = torch.arange(0, head_dim, 2, dtype=torch.float64) / head_dim
    turns = original / (2 * math.pi * theta**exponents)  # rotations within the original context
    blend = ((turns - low) / (high - low)).clamp(0, 1) if high > low else (turns > low).double()
    return (1 / (blend + (1 - blend) / factor)).to(torch.float32)


def _write_yarn(config: Config, writer: gguf.GGUFWriter, parameters: dict[str, object]) -> None:
    if parameters.get("truncate", True) is False:
        config.refuse("yarn with `truncate: false` differs from llama.cpp, which always truncates the correction range")
    factor = yarn_factor(config, parameters)
    writer.add_rope_scaling_type(gguf.RopeScalingType.YARN)
    writer.add_rope_scaling_factor(factor)
    writer.add_rope_scaling_orig_ctx_len(_original_context(config, parameters))
    if parameters.get("beta_fast") is not None:
        writer.add_rope_scaling_yarn_beta_fast(_number(config, parameters, "beta_fast"))
    if parameters.get("beta_slow") is not None:
        writer.add_rope_scaling_yarn_beta_slow(_number(config, parameters, "beta_slow"))


def write_attention_factor(config: Config, writer: gguf.GGUFWriter, parameters: dict[str, object]) -> None:
    """Yarn's magnitude on queries and keys, where a checkpoint sets its own.

    llama.cpp multiplies its default magnitude by `rope.scaling.attn_factor` (llama-context.cpp): the ratio is stored.
    """
    if parameters.get("rope_type") != "yarn":
        return
    factor = yarn_factor(config, parameters)
    mscale, mscale_all = parameters.get("mscale"), parameters.get("mscale_all_dim")
    magnitude = yarn_magnitude(factor)
    if parameters.get("attention_factor") is not None:
        magnitude = _number(config, parameters, "attention_factor")
    elif mscale and mscale_all:
        magnitude = yarn_magnitude(factor, mscale) / yarn_magnitude(factor, mscale_all)  # type: ignore[arg-type]
    if magnitude != yarn_magnitude(factor):
        writer.add_rope_scaling_attn_factors(magnitude / yarn_magnitude(factor))


def _original_context(config: Config, parameters: dict[str, object]) -> int:
    if parameters.get("original_max_position_embeddings") is None:
        return config.integer("max_position_embeddings")
    return int(_number(config, parameters, "original_max_position_embeddings"))


def _number(config: Config, parameters: dict[str, object], key: str) -> float:
    return finite(parameters.get(key), f"rope_parameters.{key}", config.path)
