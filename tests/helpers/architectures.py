"""Tiny random checkpoints of architectures that dynquant has no family for, as models whose GGUF tensors are theirs."""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from gguf import GGUFValueType

from dynquant.checkpoints.gguf_source import MetadataField
from dynquant.checkpoints.model import Model
from dynquant.checkpoints.safetensors_source import SafetensorsSource
from dynquant.families.common.conversion import Conversion, ConvertedSource
from tests.helpers.tiny_models import randomize

COMMON = {
    "vocab_size": 512, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 16, "pad_token_id": 0, "bos_token_id": 0, "eos_token_id": 0,
}  # fmt: skip
SIZES: dict[str, dict[str, Any]] = {
    "mixtral": {"num_local_experts": 3},
    "gpt_oss": {"num_local_experts": 4},
    "llama4_text": {"num_local_experts": 4, "intermediate_size_mlp": 96, "interleave_moe_layer_step": 2},
    "granitemoe": {"num_local_experts": 4, "num_experts_per_tok": 2},
    "qwen3_5_text": {
        "linear_num_key_heads": 2, "linear_num_value_heads": 4, "linear_key_head_dim": 16, "linear_value_head_dim": 16,
        "full_attention_interval": 2, "tie_word_embeddings": True,
    },
    "phi3": {},
    "nemotron_h": {
        "hybrid_override_pattern": "M*ME", "num_hidden_layers": 4, "mamba_num_heads": 4,
        "mamba_head_dim": 16, "ssm_state_size": 16, "n_groups": 1, "n_routed_experts": 4, "num_experts_per_tok": 2,
        "moe_intermediate_size": 32, "moe_shared_expert_intermediate_size": 32, "n_shared_experts": 1, "n_group": 1,
        "topk_group": 1,
    },
}  # fmt: skip


def save_architecture(model_type: str, directory: Path) -> None:
    """Write a random checkpoint, in float32."""
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.for_model(model_type, **COMMON | SIZES[model_type])
    made = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    randomize(made)
    made.save_pretrained(directory)


def converted_model(directory: Path, conversions: Iterable[Conversion], *, arch: str = "llama") -> Model:
    """Return a checkpoint with GGUF tensors that a test has made up."""
    source = ConvertedSource(SafetensorsSource(directory), list(conversions))
    keys = {"block_count": 2, "embedding_length": 64, "attention.head_count": 4}
    fields = [MetadataField(f"{arch}.{key}", value, GGUFValueType.UINT32) for key, value in keys.items()]
    fields.append(MetadataField("general.architecture", arch, GGUFValueType.STRING))
    return Model(directory, source, tuple(fields), source.checkpoint_names, hf_directory=directory)
