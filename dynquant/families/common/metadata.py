"""GGUF metadata of a converted checkpoint, and the table of numbers that config.json and GGUF both state.

`write_keys` goes from config.json to GGUF by the table, `from_gguf` the other way. gguf-py's writer is used as the
recorder of keys and value types.
"""

from dataclasses import dataclass
from pathlib import Path

import gguf
from gguf import GGUFValueType

from dynquant.checkpoints.gguf_source import MetadataField
from dynquant.checkpoints.tensor_source import TensorSource
from dynquant.errors import CheckpointError
from dynquant.families.common.config import Config
from dynquant.families.tokenizers.files import checked_generation


@dataclass(frozen=True)
class Key:
    """A number under its name in config.json and under its name in GGUF, after the architecture's."""

    config: str
    gguf: str
    default: int | float | None = None  # stands for a missing value, on either side
    is_float: bool = False
    is_read: bool = True  # False where the way back takes the number from tensors, or derives it


KEYS: dict[str, tuple[Key, ...]] = {
    "decoder": (
        Key("num_hidden_layers", "block_count"),
        Key("max_position_embeddings", "context_length"),
        Key("hidden_size", "embedding_length"),
        Key("intermediate_size", "feed_forward_length", is_read=False),
        Key("num_attention_heads", "attention.head_count"),
        Key("num_key_value_heads", "attention.head_count_kv", is_read=False),
        Key("rms_norm_eps", "attention.layer_norm_rms_epsilon", is_float=True),
        Key("vocab_size", "vocab_size", is_read=False),
    ),
    "mixtral": (Key("num_local_experts", "expert_count"), Key("num_experts_per_tok", "expert_used_count")),
    "qwen experts": (
        Key("num_experts", "expert_count"),
        Key("num_experts_per_tok", "expert_used_count"),
        Key("moe_intermediate_size", "expert_feed_forward_length", is_read=False),
    ),
    "qwen shared expert": (Key("shared_expert_intermediate_size", "expert_shared_feed_forward_length", is_read=False),),
    "latent attention": (
        # llama.cpp requires the key but for the layer counts of the lite models; zero is a plain query projection.
        Key("q_lora_rank", "attention.q_lora_rank", 0, is_read=False),
        Key("kv_lora_rank", "attention.kv_lora_rank"),
    ),
    "deepseek experts": (
        Key("first_k_dense_replace", "leading_dense_block_count", 0),
        Key("moe_intermediate_size", "expert_feed_forward_length", is_read=False),
        Key("n_routed_experts", "expert_count"),
        Key("num_experts_per_tok", "expert_used_count"),
        Key("n_shared_experts", "expert_shared_count", 0),
        Key("routed_scaling_factor", "expert_weights_scale", 1.0, is_float=True),
    ),
    "deepseek groups": (Key("n_group", "expert_group_count", 1), Key("topk_group", "expert_group_used_count", 1)),
}


def write_keys(config: Config, writer: gguf.GGUFWriter, table: str, **values: int) -> None:
    """Write a table of `KEYS` in its order; `values` are those that are not what the configuration says, by its names.
    Raises CheckpointError: a number that is missing without a default, or is none."""
    for key in KEYS[table]:
        name = f"{writer.arch}.{key.gguf}"
        if key.is_float:
            writer.add_float32(name, config.number(key.config, key.default))
        else:
            default = None if key.default is None else int(key.default)
            writer.add_uint32(name, values[key.config] if key.config in values else config.integer(key.config, default))


def write_general_keys(
    writer: gguf.GGUFWriter, directory: Path, source: TensorSource, kind: str = gguf.GGUFType.MODEL
) -> None:
    """`general.*` keys: type, and what the directory name and model card tell (name, size label, license, …)."""
    total, shared, expert, count = _parameter_counts(source)
    generation = checked_generation(directory)  # gguf-py takes it for what it should be
    try:
        metadata = gguf.Metadata.load(None, directory.resolve(), None, total)
        if metadata.sampling_penalty_repeat is None:  # gguf-py 0.19 looks for llama.cpp's name alone
            metadata.sampling_penalty_repeat = generation.repetition_penalty  # type: ignore[attr-defined]
        metadata.name = metadata.name or directory.resolve().name
        metadata.size_label = metadata.size_label or gguf.size_label(total, shared, expert, count)
        writer.add_type(kind)
        metadata.set_gguf_meta_model(writer)
        for entry in writer.kv_data[0].values():
            writer._pack_val(entry.value, entry.type, add_vtype=True, sub_type=entry.sub_type)
    except Exception as error:  # the card is YAML by anyone, and gguf-py checks nothing of it
        raise CheckpointError(
            f"The model card {directory / 'README.md'} cannot be read ({type(error).__name__}: {error}). Repair or "
            "remove it."
        ) from error


def recorded_fields(writer: gguf.GGUFWriter) -> tuple[MetadataField, ...]:
    """All keys that a writer was given, in order, with the types under which it would store them."""
    fields = []
    for key, entry in writer.kv_data[0].items():
        item_type = None
        if entry.type == GGUFValueType.ARRAY:
            item_type = entry.sub_type or GGUFValueType.get_type(entry.value[0])
        fields.append(MetadataField(key, entry.value, entry.type, item_type))
    return tuple(fields)


def _parameter_counts(source: TensorSource) -> tuple[int, int, int, int]:
    """Parameters in all, outside routed experts, in one expert of each stack; and the number of experts."""
    total = shared = expert = count = 0
    for info in map(source.info, source.names()):
        total += info.numel
        if "_exps." in info.name:
            count = info.shape[0]
            expert += info.numel // count
        else:
            shared += info.numel
    return total, shared, expert, count
