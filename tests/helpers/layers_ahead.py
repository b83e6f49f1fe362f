"""Tiny random checkpoints with a layer that predicts a token ahead, which transformers does not save.

They are made of a model with one decoder layer more, which is kept to compute with: its last layer is the one ahead.
"""

import json
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from tests.helpers.architectures import COMMON
from tests.helpers.tiny_models import INIT_SCALE, randomize

NUM_LAYERS = 2
EXPERTS = {"moe_intermediate_size": 32, "num_experts_per_tok": 2}
SHARED = {"n_routed_experts": 4, "n_shared_experts": 1, "first_k_dense_replace": 1, "n_group": 1, "topk_group": 1}
LATENT = {
    "num_key_value_heads": 4, "q_lora_rank": 32, "kv_lora_rank": 32, "qk_nope_head_dim": 16, "qk_rope_head_dim": 16,
    "v_head_dim": 16, "head_dim": 16,
}  # fmt: skip
LINEAR = {
    "linear_num_key_heads": 2, "linear_num_value_heads": 4, "linear_key_head_dim": 16, "linear_value_head_dim": 16,
    "layer_types": ["linear_attention", "full_attention", "full_attention"],
}  # fmt: skip
SIZES: dict[str, dict[str, Any]] = {
    "glm4_moe": EXPERTS | SHARED,
    "glm4_moe_lite": EXPERTS | SHARED | LATENT | {"mlp_layer_types": ["dense", "sparse", "sparse"]},
    "deepseek_v3": EXPERTS | SHARED | LATENT,
    "deepseek_v32": EXPERTS | SHARED | LATENT | {
        "mlp_layer_types": ["dense", "sparse", "sparse"], "layer_types": ["indexed_attention"] * 3,
        "index_head_dim": 32, "index_n_heads": 2, "index_topk": 64,
    },
    "glm_moe_dsa": EXPERTS
    | SHARED
    | LATENT
    | {
        "mlp_layer_types": ["dense", "sparse", "sparse"], "indexer_types": ["full"] * 3, "index_head_dim": 32,
        "index_n_heads": 2, "index_topk": 64,
    },
    "qwen3_next": EXPERTS | LINEAR | {"num_experts": 4, "shared_expert_intermediate_size": 32},
    "qwen3_5_text": LINEAR,
    "qwen3_5_moe_text": EXPERTS | LINEAR | {"num_experts": 4, "shared_expert_intermediate_size": 32},
}  # fmt: skip


@torch.no_grad()
def save_with_layer_ahead(model_type: str, directory: Path, small_moe: Path) -> Any:
    """Write a checkpoint in float32 with the bundled model's tokenizer; return the larger model that it is made of."""
    from transformers import AutoConfig, AutoModelForCausalLM

    sizes = COMMON | {"vocab_size": 8192} | SIZES[model_type]
    torch.manual_seed(0)
    larger = AutoModelForCausalLM.from_config(
        AutoConfig.for_model(model_type, **sizes | {"num_hidden_layers": NUM_LAYERS + 1}), dtype=torch.float32
    )
    randomize(larger)
    larger.save_pretrained(directory)
    weights, layer = load_file(directory / "model.safetensors"), f"model.layers.{NUM_LAYERS}."
    is_apart = "qwen" in model_type
    if is_apart:
        weights = {name.replace(layer, "mtp.layers.0."): tensor for name, tensor in weights.items()}
        path, names = "mtp.", ("fc", "pre_fc_norm_embedding", "pre_fc_norm_hidden", "norm")
    else:
        path, names = layer, ("eh_proj", "enorm", "hnorm", "shared_head.norm")
        weights[f"{layer}shared_head.head.weight"] = weights["lm_head.weight"].clone()
        weights[f"{layer}embed_tokens.weight"] = weights["model.embed_tokens.weight"].clone()
    weights[f"{path}{names[0]}.weight"] = INIT_SCALE * torch.randn(64, 128)
    for name in names[1:]:
        weights[f"{path}{name}.weight"] = 0.2 * torch.randn(64) + (not is_apart)
    save_file(weights, directory / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((directory / "config.json").read_text()) | {"num_hidden_layers": NUM_LAYERS}
    config |= {
        name: config[name][:NUM_LAYERS]
        for name in ("layer_types", "mlp_layer_types", "indexer_types")
        if name in config
    }
    config["mtp_num_hidden_layers" if is_apart else "num_nextn_predict_layers"] = 1
    (directory / "config.json").write_text(json.dumps(config))
    for file in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(small_moe / file, directory / file)
    return larger
