"""The way back: `config.json` and tokenizer of a GGUF file of the known families, as transformers would write them.

Each value is read from the metadata, or where the metadata leaves it open, from tensor shapes, or from what llama.cpp's
graph always does. A key that may change what the model computes and is not understood here is refused.
"""

import sys
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NoReturn

import torch

from dynquant.checkpoints.gguf_source import GGUFSource
from dynquant.errors import CheckpointError
from dynquant.families.common.config import Config
from dynquant.families.common.metadata import KEYS
from dynquant.families.common.rope import llama3_factors, yarn_magnitude

_GATING_SOFTMAX, _GATING_SIGMOID = 1, 2
_TOKEN_IDS = {"bos": "bos_token_id", "eos": "eos_token_id", "padding": "pad_token_id"}
_MAX_NUMBER, _MAX_LAYERS = 1 << 31, 512
_POSITIVE = ("attention.head_count", "attention.sliding_window_pattern")
"""Numbers that others are divided by."""
_IGNORED_KEYS = frozenset({
    "tensor_data_layout", "attention.causal", "pooling_type", "tokenizer", "leading_dense_block_count",
    "rope.scaling.finetuned", "nextn_predict_layers", "attention.sliding_window", "attention.sliding_window_pattern",
    "rope.freq_base_swa", "rope.scale_linear",
})  # fmt: skip
"""Display only, or read from where they apply."""


class NotUnderstoodError(CheckpointError):
    """A file may be whole, but is of a kind that transformers or this module does not have."""


class Keys:
    """Metadata and tensors of one file. `used` collects the architecture's keys that were read."""

    def __init__(self, source: GGUFSource) -> None:
        self.source = source
        self.values: dict[str, Any] = {field.key: field.value for field in source.metadata}
        self.arch = str(self.values.get("general.architecture", ""))
        self.names = set(source.names())
        self.used: set[str] = set()

    def get(self, key: str, default: Any = None) -> Any:
        self.used.add(key)
        return self.values.get(f"{self.arch}.{key}", default)

    def integer(self, key: str, default: int | None = None) -> int:
        """A whole number. Raises CheckpointError when it is absent without a default, or differs by layer."""
        value = self.get(key, default)
        if isinstance(value, list | tuple) and len(set(value)) == 1:
            value = value[0]
        largest = _MAX_LAYERS if key == "block_count" else _MAX_NUMBER
        if isinstance(value, list | tuple):
            self.refuse(f"`{self.arch}.{key}` differs by layer")
        smallest = int(key in _POSITIVE)
        if not isinstance(value, int) or isinstance(value, bool) or not smallest <= value <= largest:
            raise self.wrong(key, f"one whole number from {smallest} to {largest:,}")
        return value

    def number(self, key: str, default: float | None = None) -> float:
        """A finite number, rounded to what its float32 stands for."""
        value = self.get(key, default)
        if not isinstance(value, int | float) or isinstance(value, bool) or not abs(value) <= sys.float_info.max:
            raise self.wrong(key, "a finite number")
        return float(f"{value:.8g}")

    def table(self, *names: str) -> dict[str, Any]:
        """Return the numbers of tables by their names in config.json; those that tensors decide are left out."""
        keys = [key for name in names for key in KEYS[name]]
        self.used.update(key.gguf for key in keys)
        read = [(key, self.number if key.is_float else self.integer) for key in keys if key.is_read]
        return {key.config: number(key.gguf, key.default) for key, number in read}  # type: ignore[operator]

    def rows(self, name: str, dimension: int = 0) -> int:
        """One dimension of a tensor."""
        if name not in self.names:
            raise CheckpointError(f"{self.source.path} lacks the tensor `{name}`. Fetch it again, or convert it again.")
        return self.source.info(name).shape[dimension]

    def first(self, suffix: str) -> str | None:
        """The first layer's tensor of this name, whichever layer that is."""
        return next(
            (f"blk.{i}.{suffix}" for i in range(self.integer("block_count")) if f"blk.{i}.{suffix}" in self.names), None
        )

    def wrong(self, key: str, needed: str) -> CheckpointError:
        """Return the refusal of a number that is missing or cannot be."""
        name, value = f"{self.arch}.{key}", self.get(key)
        said = f"lacks the key `{name}`" if value is None else f"gives `{name}` as {value!r:.80}"
        return CheckpointError(f"{self.source.path} {said}; {needed} is needed. Fetch it again, or convert it again.")

    def refuse(self, reason: str) -> NoReturn:
        raise NotUnderstoodError(
            f"{self.source.path} ({self.arch or 'no architecture'}) cannot be loaded in transformers: {reason}. Run it "
            "in llama.cpp, or start from the Hugging Face checkpoint that it was made of."
        )


def config_from_gguf(source: GGUFSource) -> Config:
    """The configuration of a GGUF file, with transformers' defaults filled in as `read_config` does.

    Raises:
        NotUnderstoodError: an architecture outside the families, or a key that is not understood.
        CheckpointError: a missing value.
    """
    from transformers import AutoConfig

    keys = Keys(source)
    token_ids = {name: keys.values.get(f"tokenizer.ggml.{key}_token_id") for key, name in _TOKEN_IDS.items()}
    raw = stated(keys) | {name: i for name, i in token_ids.items() if i is not None}
    understood = {f"{keys.arch}.{key}" for key in keys.used | _IGNORED_KEYS}
    unknown = [key for key in keys.values if key.startswith(f"{keys.arch}.") and key not in understood]
    if unknown:
        keys.refuse(f"the key `{unknown[0]}` ({keys.values[unknown[0]]!r}) is not understood")
    defaults = AutoConfig.for_model(**raw).to_dict()
    return Config(source.path, {**raw, **defaults}, raw)


def tokenizer_files(gguf_file: Path) -> dict[str, bytes]:
    """Tokenizer files by name, made by transformers from a GGUF file; none when it cannot convert this tokenizer."""
    import warnings

    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(gguf_file.parent, gguf_file=gguf_file.name, local_files_only=True)
        with TemporaryDirectory() as folder:
            tokenizer.save_pretrained(folder)
            return {path.name: path.read_bytes() for path in sorted(Path(folder).iterdir())}
    except Exception as error:  # transformers raises many types for what it cannot convert
        warnings.warn(
            f"{gguf_file}: transformers cannot convert the tokenizer ({error}); copy the original's tokenizer files.",
            stacklevel=2,
        )
        return {}


def stated(keys: Keys) -> dict[str, Any]:
    """Return what the file says of its configuration."""
    reader = _READERS.get(keys.arch)
    if reader is None:
        keys.refuse(f"dynquant knows the architectures {', '.join(sorted(_READERS))}")
    return {**_common(keys), **reader(keys)}


def _common(keys: Keys) -> dict[str, Any]:
    dense = keys.first("ffn_gate.weight")
    return {
        **keys.table("decoder"),
        "vocab_size": keys.rows("token_embd.weight"),
        "intermediate_size": keys.rows(dense) if dense else keys.integer("feed_forward_length", 0),
        "num_key_value_heads": keys.integer("attention.head_count_kv", keys.integer("attention.head_count")),
        "attention_bias": "blk.0.attn_q.bias" in keys.names,
        "tie_word_embeddings": "output.weight" not in keys.names,
        "dtype": "bfloat16",
    }


def _head_dim(keys: Keys) -> int:
    default = keys.integer("embedding_length") // keys.integer("attention.head_count")
    width = keys.integer("attention.key_length", default)
    heads = keys.integer("attention.head_count_kv", keys.integer("attention.head_count"))
    for name in ("key", "value"):
        rows = keys.rows(f"blk.0.attn_{name[0]}.weight")
        if rows != heads * keys.integer(f"attention.{name}_length", default):
            raise keys.wrong(f"attention.{name}_length", f"{rows / max(heads, 1):g}, as its tensors have,")
    if keys.integer("attention.value_length", width) != width:
        keys.refuse("keys and values have different widths")
    if keys.arch == "llama" and keys.integer("rope.dimension_count", width) != width:
        raise keys.wrong("rope.dimension_count", f"the width of a head, {width},")  # llama.cpp loads no other
    if keys.integer("rope.dimension_count", width) != width:
        keys.refuse(f"only {keys.integer('rope.dimension_count')} of {width} dimensions of a head are rotated")
    return width


def _llama(keys: Keys) -> dict[str, Any]:
    raw = {
        "model_type": "llama",
        "architectures": ["LlamaForCausalLM"],
        "hidden_act": "silu",
        "head_dim": _head_dim(keys),
        "mlp_bias": "blk.0.ffn_gate.bias" in keys.names,
        "rope_parameters": _rope(keys),
    }
    if not keys.integer("expert_count", 0):
        keys.integer("expert_used_count", 0)
        return raw
    return raw | {
        "model_type": "mixtral",
        "architectures": ["MixtralForCausalLM"],
        **keys.table("mixtral"),
        "sliding_window": None,
        "intermediate_size": _expert_width(keys),
    }


def _qwen(keys: Keys) -> dict[str, Any]:
    names = {"qwen2": "Qwen2", "qwen3": "Qwen3", "qwen2moe": "Qwen2Moe", "qwen3moe": "Qwen3Moe"}
    raw = {
        "model_type": keys.arch.replace("moe", "_moe"),
        "architectures": [f"{names[keys.arch]}ForCausalLM"],
        "hidden_act": "silu",
        "head_dim": _head_dim(keys),
        "attention_bias": False,
        "use_sliding_window": False,
        "rope_parameters": _rope(keys),
    }
    if not keys.arch.endswith("moe"):
        return raw
    raw |= {
        **keys.table("qwen experts", "qwen shared expert"),
        "moe_intermediate_size": _expert_width(keys),
        "norm_topk_prob": keys.arch == "qwen3moe",
        "decoder_sparse_step": 1,
        "mlp_only_layers": [],
    }
    if keys.arch == "qwen2moe":
        raw["shared_expert_intermediate_size"] = keys.rows("blk.0.ffn_gate_shexp.weight")
        raw["qkv_bias"] = "blk.0.attn_q.bias" in keys.names
    return raw


def _gemma3(keys: Keys) -> dict[str, Any]:
    head_dim, layers = _head_dim(keys), keys.integer("block_count")
    period = keys.integer("attention.sliding_window_pattern", 6)
    window = keys.integer("attention.sliding_window", 0)
    if window and period < 2:
        raise keys.wrong("attention.sliding_window_pattern", "a period of two layers or more")
    sliding, full = "sliding_attention", "full_attention"
    types = [full if not window or (i + 1) % period == 0 else sliding for i in range(layers)]
    scale = keys.integer("embedding_length") // keys.integer("attention.head_count") if layers == 62 else head_dim
    local = {"rope_type": "default", "rope_theta": keys.number("rope.freq_base_swa", 10000.0)}
    cap = keys.get("final_logit_softcapping")
    return {
        "model_type": "gemma3_text",
        "architectures": ["Gemma3ForCausalLM"],
        "hidden_activation": "gelu_pytorch_tanh",
        "head_dim": head_dim,
        "query_pre_attn_scalar": scale,
        "sliding_window": window or keys.integer("context_length"),
        "layer_types": types,
        "rope_parameters": {full: _rope(keys, default_base=1e6), sliding: local},
        "final_logit_softcapping": None if cap is None else keys.number("final_logit_softcapping"),
        "attn_logit_softcapping": None,
    }


def _deepseek(keys: Keys) -> dict[str, Any]:
    if keys.get("expert_count") is None and keys.first("ffn_gate_exps.weight") is None:
        keys.refuse("it has no experts, as Youtu has none")
    rope = keys.integer("rope.dimension_count")
    # Files from before llama.cpp absorbed MLA (April 2025) give the widths of heads under the plain keys.
    key_width = keys.integer("attention.key_length_mla", keys.integer("attention.key_length", 0))
    value_width = keys.integer("attention.value_length_mla", keys.integer("attention.value_length", 0))
    if "blk.0.attn_k_b.weight" in keys.names:
        rank = keys.integer("attention.kv_lora_rank")
        for key, width in (("head_count_kv", 1), ("key_length", rank + rope), ("value_length", rank)):
            if keys.integer(f"attention.{key}", width) != width:
                raise keys.wrong(f"attention.{key}", f"{width}, as its tensors have,")
    is_v3 = "exp_probs_b.bias" in {name.split(".", 2)[-1] for name in keys.names}
    gating = keys.integer("expert_gating_func", _GATING_SIGMOID if is_v3 else _GATING_SOFTMAX)
    if gating != (_GATING_SIGMOID if is_v3 else _GATING_SOFTMAX):
        keys.refuse(
            f"`{keys.arch}.expert_gating_func` is {gating} {'with' if is_v3 else 'without'} router corrections, which "
            "is neither DeepSeek V2 nor V3"
        )
    parameters, log_mul = _rope(keys), keys.number("rope.scaling.yarn_log_multiplier", 0.0)
    if parameters["rope_type"] == "yarn" and log_mul:
        parameters["mscale"] = parameters["mscale_all_dim"] = float(f"{10 * log_mul:.6g}")
    raw = {
        "model_type": "deepseek_v3" if is_v3 else "deepseek_v2",
        "architectures": ["DeepseekV3ForCausalLM" if is_v3 else "DeepseekV2ForCausalLM"],
        "hidden_act": "silu",
        "num_key_value_heads": keys.integer("attention.head_count"),
        **keys.table("latent attention", "deepseek experts", "deepseek groups"),
        "q_lora_rank": keys.integer("attention.q_lora_rank", 0) if keys.first("attn_q_a.weight") else None,
        "qk_rope_head_dim": rope,
        "qk_nope_head_dim": key_width - rope,
        "v_head_dim": value_width,
        "moe_intermediate_size": _expert_width(keys),
        "norm_topk_prob": bool(keys.get("expert_weights_norm", False)),
        "rope_parameters": parameters,
    }
    if not is_v3:
        raw["topk_method"] = "greedy" if raw["n_group"] <= 1 else "group_limited_greedy"
        if raw["norm_topk_prob"]:
            keys.refuse("its router normalizes weights, which transformers' DeepSeek V2 does not")
    return raw


_READERS: dict[str, Callable[[Keys], dict[str, Any]]] = {
    "llama": _llama,
    **dict.fromkeys(("qwen2", "qwen3", "qwen2moe", "qwen3moe"), _qwen),
    "gemma3": _gemma3,
    "deepseek2": _deepseek,
}
"""By llama.cpp's name of the architecture; `text.registry.FAMILIES` is the way there."""


def _expert_width(keys: Keys) -> int:
    stack = keys.first("ffn_gate_exps.weight")
    if stack is None:
        keys.refuse("it names experts, but has no stacked expert tensors (`ffn_gate_exps`)")
    return keys.rows(stack, 1)


def _rope(keys: Keys, *, default_base: float = 10000.0) -> dict[str, Any]:
    parameters: dict[str, Any] = {"rope_type": "default", "rope_theta": keys.number("rope.freq_base", default_base)}
    kind = keys.get("rope.scaling.type", "none")
    attention = keys.number("rope.scaling.attn_factor", 1.0)
    if "rope_freqs.weight" in keys.names:
        return parameters | _llama3(keys, parameters["rope_theta"])
    factor = keys.number("rope.scaling.factor", keys.number("rope.scale_linear", 1.0))
    if kind == "linear" or (kind == "none" and factor != 1.0 and "rope.scaling.type" not in keys.values):
        return parameters | ({"rope_type": "linear", "factor": factor} if factor != 1.0 else {})
    if kind == "yarn":
        context = keys.integer("rope.scaling.original_context_length", keys.integer("context_length"))
        parameters |= {"rope_type": "yarn", "factor": factor, "original_max_position_embeddings": context}
        for name in ("beta_fast", "beta_slow"):
            if keys.get(f"rope.scaling.yarn_{name}") is not None:
                parameters[name] = keys.number(f"rope.scaling.yarn_{name}")
        if attention != 1.0:
            parameters["attention_factor"] = attention * yarn_magnitude(factor)
        return parameters
    if kind != "none":
        keys.refuse(f"rope scaling `{kind}` is not supported (known: none, linear, yarn, llama3)")
    return parameters


def _llama3(keys: Keys, theta: float) -> dict[str, Any]:
    """Parameters whose frequency factors are the file's: the tensor holds factors, transformers wants their causes."""
    stored = keys.source.load("rope_freqs.weight").flatten()
    keys.get("rope.scaling.factor")
    keys.get("rope.scaling.original_context_length")
    config = Config(keys.source.path, {}, {})
    for original in (1 << power for power in range(5, 21)):
        parameters = {
            "rope_type": "llama3",
            "rope_theta": theta,
            "factor": round(float(stored.max()), 4),
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": original,
        }
        if torch.allclose(llama3_factors(config, parameters, 2 * len(stored)), stored, rtol=1e-5):
            return parameters
    keys.refuse("`rope_freqs.weight` is not Llama 3's scaling, which transformers would compute otherwise")
