"""The way back: `config.json` and tokenizer of a GGUF file of the known families, as transformers would write them.

Each value is read from the metadata, or where the metadata leaves it open, from tensor shapes, or from what llama.cpp's
graph always does. A key that may change what the model computes and is not understood here is refused.

`check_complete` is the check of every GGUF model that is opened, of whatever architecture.
"""

import re
import sys
from collections import Counter
from collections.abc import Callable
from math import prod
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NoReturn

import gguf
import torch

from dynquant.checkpoints.gguf_source import GGUFSource
from dynquant.checkpoints.tensor_roles import layer_of
from dynquant.errors import CheckpointError
from dynquant.families.common.config import Config
from dynquant.families.common.conversion_book import ConversionBook, some_of
from dynquant.families.common.metadata import KEYS
from dynquant.families.common.rope import llama3_factors, yarn_magnitude
from dynquant.families.text.registry import FAMILIES

_GATING_SOFTMAX, _GATING_SIGMOID = 1, 2
_TOKEN_IDS = {"bos": "bos_token_id", "eos": "eos_token_id", "padding": "pad_token_id"}
_MAX_NUMBER, _MAX_LAYERS = 1 << 31, 512
_POSITIVE = ("attention.head_count", "attention.sliding_window_pattern")
"""Numbers that others are divided by."""
_LAYER = re.compile(r"^blk\.\d+\.")
_OLD_EXPERT = re.compile(r"blk\.\d+\.ffn_(gate|up|down)\.\d+\.weight")
_ARCHS = {name: arch for arch, name in gguf.MODEL_ARCH_NAMES.items()}
_MAX_EXPERTS = 512
_ROPE_SCALINGS = ("none", "linear", "yarn", "longrope")
_IGNORED_KEYS = frozenset({
    "tensor_data_layout", "attention.causal", "pooling_type", "tokenizer", "leading_dense_block_count",
    "rope.scaling.finetuned", "nextn_predict_layers", "attention.sliding_window", "attention.sliding_window_pattern",
    "rope.freq_base_swa", "rope.scale_linear",
})  # fmt: skip
"""Display only, or read from where they apply."""


class NotUnderstoodError(CheckpointError):
    """A file may be whole, but is of a kind that transformers or this module does not have."""


class _Keys:
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

    keys = _Keys(source)
    token_ids = {name: keys.values.get(f"tokenizer.ggml.{key}_token_id") for key, name in _TOKEN_IDS.items()}
    raw = _stated(keys) | {name: i for name, i in token_ids.items() if i is not None}
    understood = {f"{keys.arch}.{key}" for key in keys.used | _IGNORED_KEYS}
    unknown = [key for key in keys.values if key.startswith(f"{keys.arch}.") and key not in understood]
    if unknown:
        keys.refuse(f"the key `{unknown[0]}` ({keys.values[unknown[0]]!r}) is not understood")
    defaults = AutoConfig.for_model(**raw).to_dict()
    return Config(source.path, {**raw, **defaults}, raw)


def check_complete(source: GGUFSource) -> None:
    """Refuse a GGUF model that llama.cpp would not load, or would load without some of its tensors.

    For the known families the tensors are those that the keys call for; for others, the layers are compared.

    Raises:
        CheckpointError: a key or tensors are missing, or tensors are there that no model of the architecture has.
    """
    keys = _Keys(source)
    kind = keys.values.get("general.type", "model")
    if kind in ("adapter", "imatrix") or not keys.names:
        what = f"is of the type {kind!r}" if keys.names else "holds no tensors"
        raise CheckpointError(f"{source.path} {what}: it is no model. Give the GGUF file of a model.")
    if keys.arch == "clip":
        return
    old = [name for name in keys.names if _OLD_EXPERT.fullmatch(name)]
    if old:
        raise CheckpointError(
            f"{source.path} stores every expert as tensors of its own ({some_of(old)}), as llama.cpp did until April "
            "2024 and no longer reads. Convert the original checkpoint again."
        )
    for key in ("block_count", "embedding_length", "context_length"):
        keys.integer(key)
    check_loads(source)
    try:
        lost, foreign = _against_family(keys)
    except NotUnderstoodError:
        lost, foreign = _against_each_other(keys)
    # Layers that predict tokens ahead are counted, but llama.cpp does without them.
    num_run = keys.integer("block_count") - keys.integer("nextn_predict_layers", 0)
    lost = {name for name in lost if (layer_of(f"{name}.") or 0) < num_run or num_run < 1}
    problems = []
    if lost:
        problems.append(f"lacks {len(lost)} tensors that it must have, or has them in another shape ({some_of(lost)})")
    if foreign:
        problems.append(f"holds {len(foreign)} tensors that have no place in it ({some_of(foreign)})")
    if problems:
        raise CheckpointError(
            f"{source.path} ({keys.arch}) {' and '.join(problems)}. llama.cpp would not load it. Fetch the file again, "
            "or convert the checkpoint again."
        )


def check_loads(source: GGUFSource) -> None:
    """Refuse keys at which llama.cpp ends the whole process instead of refusing the file, or takes another EOS.

    Raises:
        CheckpointError: numbers of experts that do not fit together, an unknown rope scaling, lists of a tokenizer that
            are not of one length or kind, or an EOS that is no token.
    """
    keys = _Keys(source)
    experts, used, groups, groups_used = (
        keys.integer(f"expert_{name}count", 0) for name in ("", "used_", "group_", "group_used_")
    )
    if not (0 < used <= experts <= _MAX_EXPERTS if experts else used == 0):
        raise keys.wrong("expert_used_count", f"a number from 1 to {experts}" if experts else "none, without experts")
    if not (groups < experts if experts else groups == 0):
        raise keys.wrong("expert_group_count", f"fewer groups than experts, of which there are {experts},")
    if groups > 1 and (experts % groups or not 0 < groups_used < groups):
        raise keys.wrong("expert_group_used_count", f"a part of {groups} equal groups of {experts} experts")
    if keys.get("rope.scaling.type", "none") not in _ROPE_SCALINGS:
        raise keys.wrong("rope.scaling.type", f"one of {', '.join(_ROPE_SCALINGS)}")
    num_tokens = len(keys.values.get("tokenizer.ggml.tokens") or ())
    eos = keys.values.get("tokenizer.ggml.eos_token_id", 0)
    if num_tokens and not (isinstance(eos, int) and 0 <= eos < num_tokens):
        raise CheckpointError(
            f"{source.path} gives `tokenizer.ggml.eos_token_id` as {eos!r:.80}, but has {num_tokens:,} tokens: "
            "generation would not stop. Correct the key with llama.cpp's `gguf-set-metadata`, or convert it again."
        )
    for name, kind in (("tokens", str), ("token_type", int), ("scores", float), ("merges", str)):
        values = keys.values.get(f"tokenizer.ggml.{name}", [])
        of_kind = isinstance(values, list) and all(type(value) is kind for value in values)
        if not of_kind or (values and name != "merges" and len(values) != num_tokens):
            raise CheckpointError(
                f"{source.path} has a list `tokenizer.ggml.{name}` that is not one {kind.__name__} for each of "
                f"{num_tokens:,} tokens. Fetch it again, or convert it again."
            )


def _against_family(keys: _Keys) -> tuple[set[str], set[str]]:
    """Return the tensors that are missing or of another shape, and those that nothing calls for."""
    raw, names = _stated(keys), keys.names
    if keys.integer("block_count") > len(names):
        return {f"blk.{keys.integer('block_count') - 1}"}, set()
    config = Config(keys.source.path, raw, raw)
    book = ConversionBook(config, None, whole_kv_b="blk.0.attn_kv_b.weight" in names)
    FAMILIES[config.model_type].add_tensors(book)
    shapes = {conversion.name: conversion.shape for conversion in book.finish()}
    stored = {name: keys.source.info(name).shape for name in shapes.keys() & names}
    lost = {name for name, shape in stored.items() if _size(shape) != _size(shapes[name])}
    kinds = Counter(_LAYER.sub("blk.{bid}.", name) for name in names)
    # Biases may be left out of all layers, and optional tensors are in all of them.
    lost |= {n for n in shapes.keys() - names if not n.endswith(".bias") or _LAYER.sub("blk.{bid}.", n) in kinds}
    allowed = {gguf.TENSOR_NAMES[tensor] for tensor in gguf.MODEL_TENSORS[_ARCHS[keys.arch]]}
    foreign = set()
    for name in names - shapes.keys():
        kind = _LAYER.sub("blk.{bid}.", name)
        is_everywhere = kinds[kind] == (keys.integer("block_count") if kind != name else not kind.endswith(".bias"))
        is_optional = kind.rpartition(".")[0] in allowed and is_everywhere
        if not is_optional and not kind.startswith(("blk.{bid}.nextn.", "cls.", "rope_factors_")):
            foreign.add(name)
    return lost, foreign


def _size(shape: tuple[int, ...]) -> tuple[int, int]:
    return prod(shape), shape[-1]


def _against_each_other(keys: _Keys) -> tuple[set[str], set[str]]:
    """Return what sets a layer apart from all others but is more or less of what several of them have.

    The first layer may differ, and the layers of a hybrid do, in several ways that are there more than once.
    """
    layers: dict[int, set[str]] = {}
    for name in keys.names:
        if match := re.fullmatch(r"blk\.(\d+)\.(?!nextn\.)(.+)", name):
            layers.setdefault(int(match[1]), set()).add(match[2])
    count = keys.values[f"{keys.arch}.block_count"]
    kinds = Counter(map(frozenset, layers.values()))
    shared = [kind for kind, layers_of_kind in kinds.items() if layers_of_kind > 1]
    lost, foreign = set(), set()
    for number, kind in layers.items():
        nearest = min(shared, key=lambda other: len(other ^ kind), default=kind)
        if number >= count:
            foreign |= {f"blk.{number}.{name}" for name in kind}
        elif number and kind < nearest:
            lost |= {f"blk.{number}.{name}" for name in nearest - kind}
        elif number and kind > nearest:
            foreign |= {f"blk.{number}.{name}" for name in kind - nearest}
    if layers and not isinstance(keys.get("attention.head_count"), list):  # a list may leave layers out
        lost |= {f"blk.{number}" for number in range(count) if number not in layers}
    return lost, foreign


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


def _stated(keys: _Keys) -> dict[str, Any]:
    """Return what the file says of its configuration."""
    family = _FAMILIES.get(keys.arch)
    if family is None:
        keys.refuse(f"dynquant knows the architectures {', '.join(sorted(_FAMILIES))}")
    return {**_common(keys), **family(keys)}


def _common(keys: _Keys) -> dict[str, Any]:
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


def _head_dim(keys: _Keys) -> int:
    default = keys.integer("embedding_length") // keys.integer("attention.head_count")
    width = keys.integer("attention.key_length", default)
    if keys.integer("attention.value_length", width) != width:
        keys.refuse("keys and values have different widths")
    if keys.integer("rope.dimension_count", width) != width:
        keys.refuse(f"only {keys.integer('rope.dimension_count')} of {width} dimensions of a head are rotated")
    return width


def _llama(keys: _Keys) -> dict[str, Any]:
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


def _qwen(keys: _Keys) -> dict[str, Any]:
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


def _gemma3(keys: _Keys) -> dict[str, Any]:
    head_dim, layers = _head_dim(keys), keys.integer("block_count")
    period = keys.integer("attention.sliding_window_pattern", 6)
    window = keys.integer("attention.sliding_window", 0)
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


def _deepseek(keys: _Keys) -> dict[str, Any]:
    rope = keys.integer("rope.dimension_count")
    # Files from before llama.cpp absorbed MLA (April 2025) give the widths of heads under the plain keys.
    key_width = keys.integer("attention.key_length_mla", keys.integer("attention.key_length", 0))
    value_width = keys.integer("attention.value_length_mla", keys.integer("attention.value_length", 0))
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


_FAMILIES: dict[str, Callable[[_Keys], dict[str, Any]]] = {
    "llama": _llama,
    **dict.fromkeys(("qwen2", "qwen3", "qwen2moe", "qwen3moe"), _qwen),
    "gemma3": _gemma3,
    "deepseek2": _deepseek,
}


def _expert_width(keys: _Keys) -> int:
    stack = keys.first("ffn_gate_exps.weight")
    if stack is None:
        keys.refuse("it names experts, but has no stacked expert tensors (`ffn_gate_exps`)")
    return keys.rows(stack, 1)


def _rope(keys: _Keys, *, default_base: float = 10000.0) -> dict[str, Any]:
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


def _llama3(keys: _Keys, theta: float) -> dict[str, Any]:
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
