"""The mmproj file of llama.cpp: vision tower and projector of a vision-language checkpoint, its keys and tensors.

Keys and names are those that clip.cpp of llama.cpp reads, and checks hold the configuration to what its graphs compute.
Checkpoint tensors come under the names of `vision_names`, so that each takes its type from the tensor of that name in a
plan.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import gguf

from dynquant.errors import CheckpointError
from dynquant.families.common.config import Config
from dynquant.families.common.conversion_book import ConversionBook
from dynquant.families.text.llama import interleave_halves

ARCH = "clip"
IMG_BREAK = "v.token_embd.img_break"
_QWEN_EPS = 1e-6
_PIXTRAL_EPS = 1e-5
_QWEN25_WINDOW = 112
_QWEN_IMAGE_SIZE = 560  # size of the pictures that llama.cpp warms up with; those of Qwen have any size


@dataclass(frozen=True)
class Projector:
    """Rules for filling the mmproj file of one kind of checkpoint. `config` is that of the whole model."""

    type: str
    write_keys: Callable[[Config, gguf.GGUFWriter], None]
    add_tensors: Callable[[ConversionBook], None]


def projector_of(config: Config) -> Projector:
    """The kind of projector of a checkpoint. Raises CheckpointError: one that llama.cpp does not have."""
    tower = _tower(config).model_type
    projector = _PROJECTORS.get((config.model_type, tower)) or _PROJECTORS.get((config.model_type, "*"))
    if projector is None:
        raise CheckpointError(
            f"llama.cpp has no mmproj for a {config.model_type} model with a vision tower of type {tower!r}."
        )
    return projector


def write_projector_keys(config: Config, writer: gguf.GGUFWriter, mean: list[float], std: list[float]) -> None:
    """All keys of `clip.*`; `mean` and `std` are those of the image processor."""
    projector = projector_of(config)
    writer.add_clip_has_vision_encoder(True)
    writer.add_clip_projector_type(projector.type)
    writer.add_vision_projection_dim(_hidden_size(config))
    writer.add_vision_image_mean(mean)
    writer.add_vision_image_std(std)
    projector.write_keys(config, writer)


def _tower(config: Config) -> Config:
    return config.part("vision_config")


def _hidden_size(config: Config) -> int:
    """Width of the language model."""
    return config.part("text_config").integer("hidden_size")


class _Sizes(NamedTuple):
    """Numbers of a vision tower: width, width of its feed-forward blocks, blocks, heads, and side of a patch."""

    width: int
    ffn: int
    blocks: int
    heads: int
    patch: int


def _sizes(config: Config) -> _Sizes:
    tower, is_qwen = _tower(config), config.model_type.startswith("qwen")
    blocks, heads = ("depth", "num_heads") if is_qwen else ("num_hidden_layers", "num_attention_heads")
    if config.model_type == "qwen2_vl":
        width = tower.integer("embed_dim")
        ffn = int(width * tower.number("mlp_ratio"))
    else:
        width, ffn = tower.integer("hidden_size"), tower.integer("intermediate_size")
    return _Sizes(width, ffn, tower.integer(blocks), tower.integer(heads), tower.integer("patch_size"))


def _write_sizes(config: Config, writer: gguf.GGUFWriter) -> None:
    sizes = _sizes(config)
    if sizes.width == sizes.ffn:
        config.refuse("its tower's feed-forward blocks are as wide as the tower, which llama.cpp takes for swapped")
    writer.add_vision_embedding_length(sizes.width)
    writer.add_vision_feed_forward_length(sizes.ffn)
    writer.add_vision_block_count(sizes.blocks)
    writer.add_vision_head_count(sizes.heads)
    writer.add_vision_patch_size(sizes.patch)


def _add_weight(book: ConversionBook, name: str, *shape: int) -> None:
    book.add(f"{name}.weight", f"{name}.weight", shape)


def _add_pair(book: ConversionBook, name: str, *shape: int) -> None:
    """Weight and bias of a linear layer [rows, columns], or of a norm [width]."""
    _add_weight(book, name, *shape)
    book.add(f"{name}.bias", f"{name}.bias", shape[:1])


# Qwen2-VL and Qwen2.5-VL


def _write_qwen_keys(config: Config, writer: gguf.GGUFWriter) -> None:
    tower = _tower(config)
    tower.expect("temporal_patch_size", 2)
    tower.expect("spatial_merge_size", 2)
    tower.expect("in_channels", 3, absent=3)
    _write_sizes(config, writer)
    writer.add_vision_image_size(_QWEN_IMAGE_SIZE)
    writer.add_vision_spatial_merge_size(tower.integer("spatial_merge_size"))
    writer.add_vision_attention_layernorm_eps(_QWEN_EPS)
    if config.model_type == "qwen2_vl":
        tower.expect("hidden_act", "quick_gelu")
        return
    tower.expect("hidden_act", "silu")
    tower.expect("window_size", _QWEN25_WINDOW)
    writer.add_vision_use_silu(True)
    writer.add_vision_n_wa_pattern(_full_attention_period(tower))


def _full_attention_period(tower: Config) -> int:
    """Every how many blocks one attends to the whole picture."""
    indexes, depth = tower.get("fullatt_block_indexes"), tower.integer("depth")
    if isinstance(indexes, list) and indexes and isinstance(indexes[0], int) and indexes[0] >= 0:
        period = indexes[0] + 1
        if indexes == list(range(indexes[0], depth, period)):
            return period
    tower.refuse(f"`fullatt_block_indexes` is {indexes!r}, but llama.cpp needs every n-th of the {depth} blocks")


def _add_qwen_tensors(book: ConversionBook) -> None:
    is_first = book.config.model_type == "qwen2_vl"
    width, ffn, blocks, _, patch = _sizes(book.config)
    for frame, name in enumerate(("v.patch_embd.weight", "v.patch_embd.weight.1")):
        book.add(
            name, "v.patch_embd.weight", (width, 3, patch, patch), stored_shape=(width, 3, 2, patch, patch),
            transform=lambda values, frame=frame: values[:, :, frame],
        )  # fmt: skip
    add_norm = _add_pair if is_first else _add_weight
    for block in range(blocks):
        prefix = f"v.blk.{block}"
        add_norm(book, f"{prefix}.ln1", width)
        add_norm(book, f"{prefix}.ln2", width)
        for third, letter in enumerate("qkv"):
            for suffix, shape in (("weight", (width, width)), ("bias", (width,))):
                book.add(
                    f"{prefix}.attn_{letter}.{suffix}", f"{prefix}.attn_qkv.{suffix}", shape,
                    stored_shape=(3 * width, *shape[1:]),
                    transform=lambda values, start=third * width: values[start : start + width],
                )  # fmt: skip
        _add_pair(book, f"{prefix}.attn_out", width, width)
        for name in ("ffn_up",) if is_first else ("ffn_gate", "ffn_up"):
            _add_pair(book, f"{prefix}.{name}", ffn, width)
        _add_pair(book, f"{prefix}.ffn_down", width, ffn)
    add_norm(book, "v.post_ln", width)
    merged = width * _tower(book.config).integer("spatial_merge_size") ** 2
    _add_pair(book, "mm.0", merged, merged)
    _add_pair(book, "mm.2", _hidden_size(book.config), merged)


# Towers with learned positions: SigLIP in Gemma 3, CLIP in LLaVA


def _write_tower_keys(config: Config, writer: gguf.GGUFWriter) -> None:
    tower = _tower(config)
    _write_sizes(config, writer)
    writer.add_vision_image_size(tower.integer("image_size"))
    eps = _PIXTRAL_EPS if tower.model_type == "pixtral" else tower.number("layer_norm_eps")
    writer.add_vision_attention_layernorm_eps(eps)


def _add_tower_blocks(book: ConversionBook) -> None:
    width, ffn, blocks, *_ = _sizes(book.config)
    for block in range(blocks):
        prefix = f"v.blk.{block}"
        _add_pair(book, f"{prefix}.ln1", width)
        for part in ("attn_q", "attn_k", "attn_v", "attn_out"):
            _add_pair(book, f"{prefix}.{part}", width, width)
        _add_pair(book, f"{prefix}.ln2", width)
        _add_pair(book, f"{prefix}.ffn_up", ffn, width)
        _add_pair(book, f"{prefix}.ffn_down", width, ffn)


def _patches_per_side(config: Config) -> int:
    tower = _tower(config)
    if tower.integer("patch_size") == 0:
        config.refuse("the patches of its tower have no size")
    return tower.integer("image_size") // tower.integer("patch_size")


def _add_patches(book: ConversionBook) -> int:
    """Patch embedding; returns the number of patches of a picture of the configured size."""
    width, *_, patch = _sizes(book.config)
    _add_weight(book, "v.patch_embd", width, _tower(book.config).integer("num_channels"), patch, patch)
    return _patches_per_side(book.config) ** 2


def _write_gemma3_keys(config: Config, writer: gguf.GGUFWriter) -> None:
    tower = _tower(config)
    tower.expect("hidden_act", "gelu_pytorch_tanh")
    _write_tower_keys(config, writer)
    writer.add_vision_use_gelu(True)
    per_side = _patches_per_side(config)
    tokens = round(config.integer("mm_tokens_per_image") ** 0.5)
    if tokens < 1 or per_side % tokens or tokens**2 != config.integer("mm_tokens_per_image"):
        config.refuse(f"{per_side} patches a side cannot be pooled to {config.get('mm_tokens_per_image')} tokens")
    writer.add_vision_projector_scale_factor(per_side // tokens)


def _add_gemma3_tensors(book: ConversionBook) -> None:
    width = _sizes(book.config).width
    patches = _add_patches(book)
    book.add("v.patch_embd.bias", "v.patch_embd.bias", (width,))
    _add_weight(book, "v.position_embd", patches, width)
    _add_tower_blocks(book)
    _add_pair(book, "v.post_ln", width)
    _add_weight(book, "mm.input_projection", width, _hidden_size(book.config))
    norm = "mm.soft_emb_norm.weight"
    book.add(norm, norm, (width,), transform=lambda values: values + 1, dtype="F32")  # w + 1 does not fit bfloat16
    book.drop(lambda name: name.startswith("v.head."), "Gemma 3 does not use the pooling head of its tower.")


def _write_llava_keys(config: Config, writer: gguf.GGUFWriter) -> None:
    tower = _tower(config)
    tower.expect("hidden_act", "quick_gelu", "gelu")
    config.expect("projector_hidden_act", "gelu")
    config.expect("vision_feature_select_strategy", "default")
    _write_tower_keys(config, writer)
    writer.add_vision_use_gelu(tower.get("hidden_act") == "gelu")
    writer.add_array("clip.vision.feature_layer", [_feature_layer(config)])


def _feature_layer(config: Config) -> int:
    """Return the number of blocks of the tower that run before the projector."""
    layer, blocks = config.get("vision_feature_layer"), _tower(config).integer("num_hidden_layers")
    if isinstance(layer, list) and len(layer) == 1:
        (layer,) = layer
    if not isinstance(layer, int) or not -blocks <= layer <= blocks or layer == 0:
        config.refuse(f"`vision_feature_layer` is {layer!r}; one of its {blocks} blocks is needed")
    return layer if layer > 0 else blocks + 1 + layer


def _add_llava_tensors(book: ConversionBook) -> None:
    width = _sizes(book.config).width
    patches = _add_patches(book)
    book.add("v.class_embd", "v.class_embd", (width,))
    _add_weight(book, "v.position_embd", patches + 1, width)
    _add_pair(book, "v.pre_ln", width)
    _add_tower_blocks(book)
    _add_llava_projector(book, ("mm.0", "mm.2"))
    for name in ("v.post_ln.weight", "v.post_ln.bias"):
        book.ignore(name)


def _add_llava_projector(book: ConversionBook, names: tuple[str, str]) -> None:
    """The two linear layers, whose bias is optional."""
    hidden = _hidden_size(book.config)
    for name, stored, columns in zip(names, ("mm.1", "mm.2"), (_sizes(book.config).width, hidden), strict=True):
        book.add(f"{name}.weight", f"{stored}.weight", (hidden, columns))
        book.add(f"{name}.bias", f"{stored}.bias", (hidden,), optional=True)


# Pixtral, in LLaVA and in Mistral 3


def _write_pixtral_keys(config: Config, writer: gguf.GGUFWriter) -> None:
    tower = _tower(config)
    tower.expect("hidden_act", "silu", "gelu")
    config.expect("projector_hidden_act", "gelu")
    parameters = tower.get("rope_parameters", {})
    theta = parameters.get("rope_theta") if isinstance(parameters, dict) else None
    if theta != 10000.0:
        config.refuse(f"its tower's `rope_theta` is {theta!r}, but llama.cpp always computes 10000.0")
    if _feature_layer(config) != tower.integer("num_hidden_layers"):
        config.refuse("`vision_feature_layer` is not the last, which llama.cpp's Pixtral graph takes")
    _write_tower_keys(config, writer)
    if tower.get("hidden_act") == "silu":
        writer.add_vision_use_silu(True)
    else:
        writer.add_vision_use_gelu(True)
    if config.model_type == "mistral3":
        writer.add_vision_spatial_merge_size(config.integer("spatial_merge_size"))


def _add_pixtral_tensors(book: ConversionBook) -> None:
    width, ffn, blocks, heads, _ = _sizes(book.config)
    _add_patches(book)
    _add_weight(book, "v.pre_ln", width)
    pairs = interleave_halves(heads)
    shapes = {"attn_v": (width, width), "attn_out": (width, width), "ffn_gate": (ffn, width), "ffn_up": (ffn, width),
              "ffn_down": (width, ffn)}  # fmt: skip
    for block in range(blocks):
        prefix = f"v.blk.{block}"
        _add_weight(book, f"{prefix}.ln1", width)
        for name in (f"{prefix}.attn_q.weight", f"{prefix}.attn_k.weight"):
            book.add(name, name, (width, width), transform=pairs)
        for part, shape in shapes.items():
            _add_weight(book, f"{prefix}.{part}", *shape)
        _add_weight(book, f"{prefix}.ln2", width)
    _add_llava_projector(book, ("mm.1", "mm.2"))
    book.add(IMG_BREAK, IMG_BREAK, (_hidden_size(book.config),))
    if book.config.model_type == "mistral3":
        _add_weight(book, "mm.input_norm", width)
        _add_weight(book, "mm.patch_merger", width, width * book.config.integer("spatial_merge_size") ** 2)


_PROJECTORS = {
    ("qwen2_vl", "*"): Projector("qwen2vl_merger", _write_qwen_keys, _add_qwen_tensors),
    ("qwen2_5_vl", "*"): Projector("qwen2.5vl_merger", _write_qwen_keys, _add_qwen_tensors),
    ("gemma3", "siglip_vision_model"): Projector("gemma3", _write_gemma3_keys, _add_gemma3_tensors),
    ("llava", "clip_vision_model"): Projector("mlp", _write_llava_keys, _add_llava_tensors),
    ("llava", "pixtral"): Projector("pixtral", _write_pixtral_keys, _add_pixtral_tensors),
    ("mistral3", "pixtral"): Projector("pixtral", _write_pixtral_keys, _add_pixtral_tensors),
}
"""By `model_type` of the whole model and of its tower."""
