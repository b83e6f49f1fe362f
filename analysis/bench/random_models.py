"""Random weights in the shape of real models, as checkpoints or in memory: time and memory do not depend on values.

    python -m dynquant.analysis.bench.random_models 7b-a1b -o DIR

writes a checkpoint to measure with, without a download. Weights are bfloat16, drawn as transformers initializes them,
so that hidden states stay finite and routers spread their tokens. Tensors have the names of published checkpoints
(experts one by one) and lie in shards. They are drawn and written one at a time; a run that was killed goes on where it
stopped. The tokenizer is that of the bundled model: rows of the embedding beyond its 8,192 tokens are never used.
"""

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import dynquant
from dynquant.checkpoints import checkpoint_directory as directory
from dynquant.checkpoints.safetensors_format import StoredTensor, lay_out
from dynquant.errors import DynquantError, ExportError
from dynquant.formats.quant_types import quant_type
from dynquant.formats.scale_fields import num_scales, with_scales
from dynquant.kernels.bench.harness import options
from dynquant.packed.layers import EXPERT_PARTS, PackedModule, choose_layout
from dynquant.packed.places import pack_modules
from dynquant.storage.resumable_output import ResumableOutput

SHAPES: dict[str, tuple[str, dict[str, Any]]] = {
    "tiny": ("deepseek_v3", {
        "vocab_size": 8192, "hidden_size": 256, "num_hidden_layers": 3, "num_attention_heads": 4,
        "num_key_value_heads": 4, "q_lora_rank": 96, "kv_lora_rank": 64, "qk_nope_head_dim": 32, "qk_rope_head_dim": 16,
        "v_head_dim": 32, "intermediate_size": 512, "moe_intermediate_size": 256, "n_routed_experts": 8,
        "num_experts_per_tok": 2, "n_shared_experts": 1, "n_group": 4, "topk_group": 2, "first_k_dense_replace": 1,
        "max_position_embeddings": 4096,
    }),
    "89m": ("deepseek_v3", {
        "vocab_size": 8192, "hidden_size": 512, "num_hidden_layers": 11, "num_attention_heads": 8,
        "num_key_value_heads": 8, "q_lora_rank": 256, "kv_lora_rank": 256, "qk_nope_head_dim": 64,
        "qk_rope_head_dim": 32, "v_head_dim": 64, "intermediate_size": 1536, "moe_intermediate_size": 256,
        "n_routed_experts": 16, "num_experts_per_tok": 4, "n_shared_experts": 1, "n_group": 1, "topk_group": 1,
        "first_k_dense_replace": 1, "max_position_embeddings": 1024,
    }),
    "7b-a1b": ("deepseek_v3", {
        "vocab_size": 50_304, "hidden_size": 2048, "num_hidden_layers": 17, "num_attention_heads": 16,
        "num_key_value_heads": 16, "q_lora_rank": 768, "kv_lora_rank": 512, "qk_nope_head_dim": 128,
        "qk_rope_head_dim": 64, "v_head_dim": 128, "intermediate_size": 8192, "moe_intermediate_size": 1024,
        "n_routed_experts": 64, "num_experts_per_tok": 8, "n_shared_experts": 1, "n_group": 8, "topk_group": 4,
        "first_k_dense_replace": 1, "max_position_embeddings": 4096,
    }),
    "30b-a3b": ("qwen3_moe", {
        "vocab_size": 151_936, "hidden_size": 2048, "num_hidden_layers": 48, "num_attention_heads": 32,
        "num_key_value_heads": 4, "head_dim": 128, "intermediate_size": 6144, "moe_intermediate_size": 768,
        "num_experts": 128, "num_experts_per_tok": 8, "norm_topk_prob": True, "max_position_embeddings": 40_960,
    }),
    "8b": ("qwen3", {
        "vocab_size": 151_936, "hidden_size": 4096, "num_hidden_layers": 36, "num_attention_heads": 32,
        "num_key_value_heads": 8, "head_dim": 128, "intermediate_size": 12_288, "max_position_embeddings": 40_960,
    }),
    "1.5b": ("qwen2", {
        "vocab_size": 151_936, "hidden_size": 1536, "num_hidden_layers": 28, "num_attention_heads": 12,
        "num_key_value_heads": 2, "intermediate_size": 8960, "max_position_embeddings": 32_768,
        "tie_word_embeddings": True,
    }),
}  # fmt: skip
"""Name -> model type and configuration: a test bed, mixtures of experts, Qwen3-30B-A3B, Qwen3-8B, Qwen2.5-1.5B."""

_CLASSES = {
    "deepseek_v3": "DeepseekV3ForCausalLM", "qwen3_moe": "Qwen3MoeForCausalLM", "qwen3": "Qwen3ForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
}  # fmt: skip
_TOKENS = {"bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0, "tie_word_embeddings": False}
_DRAWN_AT_ONCE = 1 << 22  # float32 values: 16 MB
_SHARD_BYTES = 2_000_000_000
MODEL_SHAPES: dict[str, tuple[str, dict[str, Any]]] = {
    "8b": ("llama", {
        "vocab_size": 128_256, "hidden_size": 4096, "num_hidden_layers": 32, "num_attention_heads": 32,
        "num_key_value_heads": 8, "head_dim": 128, "intermediate_size": 14_336, "max_position_embeddings": 8192,
    }),
    "7b-a1b": ("qwen3_moe", {
        "vocab_size": 50_304, "hidden_size": 2048, "num_hidden_layers": 16, "num_attention_heads": 16,
        "num_key_value_heads": 16, "head_dim": 128, "intermediate_size": 4096, "num_experts": 64,
        "num_experts_per_tok": 8, "moe_intermediate_size": 1024, "max_position_embeddings": 4096,
    }),
}  # fmt: skip
"""A dense model in the shape of Llama 3.1 8B, and a mixture of 64 experts with one billion active weights of seven."""


def main() -> None:
    """Parse, write, say where."""
    fewer = (int, "decoder layers, where fewer than the model's will do")
    asked = options(__doc__, "shape", SHAPES, output=Path, seed=0, layers=fewer, device="cpu")
    drawn = {"seed": asked.seed, "layers": asked.layers, "device": asked.device}
    try:
        files = write_random_checkpoint(asked.shape, asked.output, **drawn)
    except DynquantError as error:
        sys.exit(f"error: {error}")
    size = sum(file.stat().st_size for file in files)
    print(f"{asked.output}: {asked.shape}, {len(files)} files, {size:,} bytes")


def write_random_checkpoint(
    shape: str, output: Path, *, seed: int = 0, layers: int | None = None, device: str = "cpu"
) -> list[Path]:
    """Write the checkpoint of a shape in `SHAPES`, with `layers` decoder layers, into `output` and return its files.

    A GPU draws other numbers, and a hundred times as fast. Raises ExportError: `output` is a file or holds a
    checkpoint, or there is too little space.
    """
    config = _config(shape, {} if layers is None else {"num_hidden_layers": layers})
    if output.is_file() or (output / "config.json").exists():
        raise ExportError(f"{output} is there already. Give another directory, or remove it first.")
    tensors = _tensors(config)
    shards = directory.shards_of(tensors, _SHARD_BYTES)
    documents = _documents(config) | directory.index_of(shards)
    identity = {"seed": str(seed), "device": device, "files": directory.files_hash(documents, shards)}
    with ResumableOutput(*directory.places_of(output, documents, shards), identity) as target:
        directory.write_small_files(target, documents, shards)
        for number, tensor in enumerate(tensors):
            if tensor.key not in target.finished:
                generator = torch.Generator(device).manual_seed(seed * len(tensors) + number)
                target.write(tensor.key, directory.tensor_bytes(_drawn(tensor, config.initializer_range, generator)))
        return target.commit()


def write_headers(shape: str, output: Path, **changed: Any) -> None:
    """Write the checkpoint of a shape in `SHAPES` with holes for weights, which take no space and read as zeros.

    `changed` are values of its configuration.
    """
    config = _config(shape, changed)
    layout = lay_out(_tensors(config), {"format": "pt"})
    output.mkdir()
    for name, content in _documents(config).items():
        (output / name).write_bytes(content)
    with open(output / "model.safetensors", "wb") as file:
        file.write(layout.header)
        file.truncate(layout.total_bytes)


def _config(shape: str, changed: dict[str, Any]) -> Any:
    from transformers import AutoConfig

    model_type, values = SHAPES[shape]
    config = AutoConfig.for_model(model_type, **_TOKENS | values | changed)
    config.architectures = [_CLASSES[model_type]]
    config.dtype = torch.bfloat16
    return config


def _documents(config: Any) -> dict[str, bytes]:
    tokenizer = directory.copied_files(Path(dynquant.__file__).parent / "data" / "textbook-moe-16m")
    return {"config.json": directory.as_json(config.to_dict()), **tokenizer}


def _tensors(config: Any) -> list[StoredTensor]:
    """Return the tensors of a published checkpoint of `config`, in the order of the model."""
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        entries = AutoModelForCausalLM.from_config(config).state_dict()
    if config.tie_word_embeddings:
        del entries["lm_head.weight"]
    return [stored for name, tensor in entries.items() for stored in _stored(name, tuple(tensor.shape))]


def _stored(name: str, shape: tuple[int, ...]) -> Iterator[StoredTensor]:
    """Yield one entry of transformers' model as published; fused experts [E, rows, columns] are many."""
    module, _, part = name.rpartition(".")
    if not module.endswith(".experts"):
        yield StoredTensor(name, "F32" if name.endswith("e_score_correction_bias") else "BF16", shape)
        return
    count, rows, columns = shape
    parts = ("gate_proj", "up_proj") if part == "gate_up_proj" else (part,)
    for expert in range(count):
        for name in parts:
            yield StoredTensor(f"{module}.{expert}.{name}.weight", "BF16", (rows // len(parts), columns))


def _drawn(tensor: StoredTensor, std: float, generator: torch.Generator) -> torch.Tensor:
    if tensor.key.endswith("norm.weight"):
        return torch.ones(tensor.shape, dtype=torch.bfloat16)
    dtype = torch.float32 if tensor.dtype == "F32" else torch.bfloat16
    values = torch.empty(tensor.shape, dtype=dtype)
    for part in values.view(-1).split(_DRAWN_AT_ONCE):
        part.copy_(torch.randn(part.shape, generator=generator, device=generator.device) * std)
    return values


def shape_config(name: str) -> Any:
    """Return the transformers configuration of one of `MODEL_SHAPES`."""
    from transformers import AutoConfig

    model_type, values = MODEL_SHAPES[name]
    return AutoConfig.for_model(model_type, **values, tie_word_embeddings=False)


def random_model(config: Any, device: str = "cuda") -> nn.Module:
    """Return a model with bfloat16 weights."""
    return _filled(_empty(config), device)


def random_packed(config: Any, types: str, device: str = "cuda") -> nn.Module:
    """Return a model with packed weights, routed experts and other matrices in `types`, "experts=IQ2_XXS,rest=Q4_K".

    Routers stay in bfloat16, and so does MLA's latent projection: packed, it is two tensors that a file has to make
    of it.
    """
    model = _empty(config)
    type_by_part = dict(part.split("=") for part in types.split(","))
    type_of: dict[str, str] = {}
    for path, module in model.named_modules():
        if isinstance(module, nn.Linear | nn.Embedding) and not path.endswith(("mlp.gate", "kv_b_proj")):
            type_of[f"{path}.weight"] = type_by_part["rest"]
        elif hasattr(module, "gate_up_proj"):
            type_of |= {f"{path}.{part}": type_by_part["experts"] for part in EXPERT_PARTS}
    pack_modules(model, type_of, dtype=torch.bfloat16)
    return _filled(model, device)


def _empty(config: Any) -> nn.Module:
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)


def _filled(model: Any, device: str) -> nn.Module:
    """Fill a model with random weights of a plausible size; the rotary tables are computed anew."""
    rotary = type(model.model.rotary_emb)
    model.to_empty(device=device)
    for buffer in model.buffers():
        buffer.zero_()
    model.model.rotary_emb = rotary(config=model.config).to(device)
    packed = {
        id(getattr(module, name)): module.types[name]  # tensors compare by value and are no keys
        for module in model.modules()
        if isinstance(module, PackedModule)
        for name in module.packed_names
    }
    with torch.no_grad():
        for parameter in model.parameters():
            if id(parameter) in packed:
                fill_blocks(parameter.data, packed[id(parameter)])
            else:
                parameter.normal_(1.0 if parameter.dim() == 1 else 0.0, 0.0 if parameter.dim() == 1 else 0.02)
    choose_layout(model)
    return model.eval()


def fill_blocks(weight: Tensor, type_name: str) -> None:
    """Write random blocks whose scales are small, in place."""
    stored = quant_type(type_name)
    for part in weight.reshape(-1, stored.block_bytes).split(1 << 20):
        part.random_(0, 256)
        if num_scales(type_name):
            scales = torch.full((len(part), num_scales(type_name)), 1e-3, device=part.device)
            part.copy_(with_scales(type_name, part, scales))


if __name__ == "__main__":
    main()
