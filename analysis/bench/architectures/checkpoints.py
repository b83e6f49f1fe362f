"""Tiny random checkpoints of many architectures, as `architectures` judges them.

Weights are bfloat16 values, a few million, drawn large enough that a permuted head or a wrong rope shows in the
logits. Sizes are multiples of 256 where real models have such. The tokenizer is that of the bundled model. config.json
gets what published checkpoints say and transformers' own configuration leaves out.
"""

import json
import shutil
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import dynquant

Settings = dict[str, Any]
_COMMON: Settings = {
    "vocab_size": 8192,
    "hidden_size": 256,
    "intermediate_size": 512,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 1024,
    "tie_word_embeddings": False,
    "bos_token_id": 0,
    "eos_token_id": 0,
    "pad_token_id": 0,
}
_HEADS: Settings = {"head_dim": 64}
_TIED: Settings = {"tie_word_embeddings": True}
_FOUR: Settings = {"num_hidden_layers": 4}
_ALL_KV: Settings = {"num_key_value_heads": 4}
_NARROW: Settings = {"intermediate_size": 256}
_TOP_2: Settings = {"num_experts_per_tok": 2}
_EXPERTS: Settings = {"num_experts": 8, **_TOP_2, "moe_intermediate_size": 256}
_LOCAL: Settings = {**_NARROW, "num_local_experts": 8, **_TOP_2}
_ROUTED: Settings = {"n_routed_experts": 8, **_TOP_2, "moe_intermediate_size": 256}
_ONE_GROUP: Settings = {"n_group": 1, "topk_group": 1}
_SHARED: Settings = {**_ROUTED, **_ONE_GROUP, "n_shared_experts": 1, "first_k_dense_replace": 1}
_LATENT: Settings = {
    **_SHARED,
    **_ALL_KV,
    "q_lora_rank": 256,
    "kv_lora_rank": 256,
    "qk_rope_head_dim": 32,
    "qk_nope_head_dim": 32,
    "v_head_dim": 64,
    "norm_topk_prob": True,
    "routed_scaling_factor": 1.5,
}
_LINEAR: Settings = {
    **_FOUR,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 64,
    "linear_value_head_dim": 64,
    "linear_conv_kernel_dim": 4,
    "full_attention_interval": 2,
}
_ONE_SHARED: Settings = {"shared_expert_intermediate_size": 256}
_MULTIPLIERS: Settings = {
    "embedding_multiplier": 12.0,
    "logits_scaling": 6.0,
    "residual_multiplier": 0.22,
    "attention_multiplier": 0.015625,
}
_MAMBA: Settings = {"mamba_n_heads": 8, "mamba_d_head": 64, "mamba_d_state": 64, "mamba_n_groups": 1, "mamba_expand": 2}
_GEMMA: Settings = {
    **_HEADS,
    **_FOUR,
    **_TIED,
    "final_logit_softcapping": 30.0,
    "sliding_window": 128,
    "hidden_size_per_layer_input": 256,
    "vocab_size_per_layer_input": 8192,
    "num_kv_shared_layers": 0,
    "layer_types": ["sliding_attention", "full_attention"] * 2,
}
_SLIDING: Settings = {"sliding_window": 128}
_SIGMOID: Settings = {"scoring_func": "sigmoid"}

LISTED: dict[str, tuple[str, Settings, Settings]] = {
    "qwen3_next": ("qwen3_next", {**_HEADS, **_EXPERTS, **_LINEAR, **_ONE_SHARED}, {}),
    "qwen3_5_moe": ("qwen3_5_moe_text", {**_HEADS, **_EXPERTS, **_LINEAR, **_ONE_SHARED}, {}),
    "qwen3_5": ("qwen3_5_text", {**_HEADS, **_LINEAR}, {}),
    "gpt_oss": ("gpt_oss", {**_HEADS, **_LOCAL, **_FOUR, **_SLIDING}, {}),
    "glm4_moe": ("glm4_moe", {**_HEADS, **_SHARED, "use_qk_norm": True, "attention_bias": True}, {}),
    "llama4": (
        "llama4_text",
        {
            **_HEADS,
            **_LOCAL,
            **_FOUR,
            "num_experts_per_tok": 1,
            "intermediate_size_mlp": 512,
            "interleave_moe_layer_step": 2,
            "attention_chunk_size": 512,
        },
        {},
    ),
    "minimax_m2": ("minimax_m2", {**_HEADS, **_LOCAL, "rotary_dim": 32}, _SIGMOID),
    "deepseek_v32": (
        "deepseek_v32",
        {**_LATENT, "index_n_heads": 4, "index_head_dim": 128, "index_topk": 2048},
        _SIGMOID,
    ),
    "granitemoe": ("granitemoe", {**_LOCAL, **_MULTIPLIERS}, {}),
    "granitemoehybrid": (
        "granitemoehybrid",
        {
            **_LOCAL,
            **_MULTIPLIERS,
            **_FOUR,
            **_MAMBA,
            "shared_intermediate_size": 256,
            "position_embedding_type": "nope",
            "layer_types": ["mamba", "attention", "mamba", "mamba"],
        },
        {},
    ),
    "olmoe": ("olmoe", {**_NARROW, **_ALL_KV, "num_experts": 8, **_TOP_2}, {}),
    "ernie4_5_moe": (
        "ernie4_5_moe",
        {
            **_HEADS,
            "moe_intermediate_size": 256,
            "moe_num_experts": 8,
            "moe_k": 2,
            "moe_num_shared_experts": 1,
            "moe_layer_start_index": 1,
            "moe_layer_end_index": 2,
            "moe_layer_interval": 1,
            "use_bias": False,
        },
        {},
    ),
    "gemma2": ("gemma2", {**_HEADS, **_TIED, **_SLIDING, "query_pre_attn_scalar": 64}, {}),
    "gemma4": ("gemma4_text", {**_GEMMA, "global_head_dim": 128}, {}),
    "phi3": ("phi3", {}, {}),
    "smollm3": ("smollm3", _FOUR, {}),
    "phimoe": ("phimoe", {**_LOCAL, **_ALL_KV, "attention_bias": True, "lm_head_bias": True}, {}),
    "glm4_moe_lite": ("glm4_moe_lite", _LATENT, _SIGMOID),
    "glm4": ("glm4", _HEADS, {}),
    "deepseek_v3": ("deepseek_v3", _LATENT, _SIGMOID),
    "gemma3n": ("gemma3n_text", {**_GEMMA, "activation_sparsity_pattern": [0.95] * 4}, {}),
    "olmo2": ("olmo2", {}, {}),
    "olmo3": ("olmo3", {**_FOUR, **_SLIDING}, {}),
    "starcoder2": ("starcoder2", {}, {}),
    "nemotron": ("nemotron", {}, {}),
    "ministral3": ("ministral3", _HEADS, {}),
    "nemotron_h": (
        "nemotron_h",
        {
            **_HEADS,
            **_FOUR,
            **_ROUTED,
            **_ONE_GROUP,
            "hybrid_override_pattern": "M*ME",
            "mamba_num_heads": 8,
            "mamba_head_dim": 64,
            "ssm_state_size": 64,
            "n_groups": 1,
            "moe_shared_expert_intermediate_size": 256,
            "n_shared_experts": 1,
        },
        {"norm_eps": 1e-5},
    ),
    "granite": ("granite", {}, {}),
    "mixtral": ("mixtral", _LOCAL, {}),
    "qwen3_moe": ("qwen3_moe", {**_HEADS, **_EXPERTS, "norm_topk_prob": True}, {}),
}
"""Name -> model type, what differs from the common sizes, and what published checkpoints add to config.json."""

OTHERS: dict[str, tuple[str, Settings, Settings]] = {
    "afmoe": (
        "afmoe",
        {
            **_HEADS,
            **_FOUR,
            **_EXPERTS,
            **_ONE_GROUP,
            **_SLIDING,
            "num_shared_experts": 1,
            "num_dense_layers": 1,
            "mup_enabled": True,
        },
        {"score_func": "sigmoid", "route_norm": True},
    ),
    "apertus": ("apertus", {}, {}),
    "arcee": ("arcee", _HEADS, {}),
    "cohere2": ("cohere2", {**_HEADS, **_FOUR, **_TIED, **_SLIDING, "logit_scale": 1.0}, {}),
    "dots1": ("dots1", {**_HEADS, **_SHARED, **_ALL_KV, "routed_scaling_factor": 1.5}, _SIGMOID),
    "ernie4_5": ("ernie4_5", {**_HEADS, "use_bias": False}, {}),
    "exaone4": (  # like the 1.2B: of windows llama.cpp knows at 64 layers alone
        "exaone4",
        {
            **_FOUR,
            **_TIED,
            "layer_types": ["full_attention"] * 4,
            "sliding_window": None,
            "sliding_window_pattern": None,
            "rope_parameters": {
                "rope_type": "llama3",
                "rope_theta": 1e6,
                "factor": 16.0,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": 8192,
            },
        },
        {},
    ),
    "exaone_moe": (
        "exaone_moe",
        {
            **_HEADS,
            **_FOUR,
            **_EXPERTS,
            **_ONE_GROUP,
            **_SLIDING,
            "num_shared_experts": 1,
            "first_k_dense_replace": 1,
            "sliding_window_pattern": 2,
        },
        _SIGMOID,
    ),
    "falcon_h1": (
        "falcon_h1",
        {
            **_HEADS,
            "mamba_d_ssm": 512,
            "mamba_n_heads": 8,
            "mamba_d_head": 64,
            "mamba_d_state": 64,
            "mamba_n_groups": 1,
        },
        {},
    ),
    "glm_moe_dsa": (
        "glm_moe_dsa",
        {**_LATENT, "index_n_heads": 4, "index_head_dim": 128, "index_topk": 2048},
        _SIGMOID,
    ),
    "gpt_neox": ("gpt_neox", {}, {}),
    "granitemoeshared": ("granitemoeshared", {**_LOCAL, **_MULTIPLIERS, "shared_intermediate_size": 256}, {}),
    "hunyuan_v1_dense": ("hunyuan_v1_dense", _HEADS, {}),
    "hunyuan_v1_moe": (
        "hunyuan_v1_moe",
        {**_HEADS, **_NARROW, "num_experts": 8, "moe_topk": [2] * 3, "num_shared_expert": [1] * 3},
        {"moe_intermediate_size": [256] * 3},
    ),
    "jamba": (
        "jamba",
        {
            **_LOCAL,
            **_FOUR,
            "num_experts": 8,
            "attn_layer_period": 2,
            "attn_layer_offset": 1,
            "expert_layer_period": 2,
            "expert_layer_offset": 1,
            "mamba_dt_rank": 16,
            "mamba_d_state": 16,
        },
        {},
    ),
    "lfm2": (
        "lfm2",
        {**_FOUR, "layer_types": ["conv", "full_attention"] * 2, "block_auto_adjust_ff_dim": False, "conv_L_cache": 3},
        {},
    ),
    "lfm2_moe": (
        "lfm2_moe",
        {
            **_EXPERTS,
            **_FOUR,
            **_TIED,
            "layer_types": ["conv", "full_attention"] * 2,
            "num_dense_layers": 1,
            "conv_L_cache": 3,
        },
        {},
    ),
    "mamba": ("mamba", {**_TIED, "state_size": 16, "time_step_rank": 16}, {}),
    "mamba2": ("mamba2", {**_TIED, "num_heads": 8, "head_dim": 64, "state_size": 64, "n_groups": 1}, {}),
    "minicpm3": (
        "minicpm3",
        {
            **_ALL_KV,
            "q_lora_rank": 256,
            "kv_lora_rank": 256,
            "qk_rope_head_dim": 32,
            "qk_nope_head_dim": 32,
            "v_head_dim": 64,
        },
        {},
    ),
    "olmo": ("olmo", {}, {}),
    "seed_oss": ("seed_oss", _HEADS, {}),
    "solar_open": ("solar_open", {**_HEADS, **_SHARED, "first_k_dense_replace": 0}, {}),
    "stablelm": ("stablelm", {}, {}),
}
"""Architectures on which nothing was tried before."""

ARCHITECTURES = LISTED | OTHERS


def write_tiny(name: str, directory: Path) -> Path:
    """Write the checkpoint of an architecture, which is always the same; return `directory`.

    What transformers raises for an architecture that it does not know passes.
    """
    from transformers import AutoConfig, AutoModelForCausalLM

    model_type, settings, published = ARCHITECTURES[name]
    config = AutoConfig.for_model(model_type, **(_COMMON | settings))
    torch.manual_seed(0)  # transformers draws the time steps of Mamba layers, to which _draw adds
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    _draw(model)
    shutil.rmtree(directory, ignore_errors=True)
    model.to(torch.bfloat16).save_pretrained(directory)
    bundled = Path(dynquant.__file__).parent / "data" / "textbook-moe-16m"
    for file in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(bundled / file, directory / file)
    path = directory / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | published, indent=1))
    return directory


@torch.no_grad()
def _draw(model: nn.Module) -> None:
    """Give every weight and stored buffer values of a plausible size."""
    generator, is_tied = torch.Generator().manual_seed(0), bool(model.config.tie_word_embeddings)
    stored, drawn = model.state_dict(keep_vars=True), set()
    for name, tensor in stored.items():
        if id(tensor) in drawn or not tensor.is_floating_point():
            continue
        drawn.add(id(tensor))
        noise = torch.randn(tensor.shape, generator=generator)
        tensor.copy_(_values(name, tensor, noise, is_tied).to(torch.bfloat16))


def _values(name: str, tensor: Tensor, noise: Tensor, is_tied: bool) -> Tensor:
    if tensor.ndim == 0:
        return torch.ones(())
    if name.endswith(("A_log", "dt_bias", ".D")):
        return tensor + 0.05 * noise
    if tensor.ndim == 1:
        return tensor + 0.1 * noise
    if "conv" in name and tensor.ndim == 3:
        return 0.5 * noise
    if "embed" in name or name.endswith(("wte.weight", "embeddings.weight")):
        return noise * (0.06 if is_tied else 0.5)
    if "altup" in name and "coef" in name:
        return 0.1 * noise
    return noise / tensor.shape[-1] ** 0.5
