"""GGUF-like names for the parts of vision-language models: vision tower, projector, cross-attention, language model.

Covers Qwen2-VL and Qwen2.5-VL, Mllama, LLaVA, Pixtral and Mistral 3, and Gemma 3 of transformers, by the names of their
checkpoints and by those of their modules, which differ in prefixes. Vision towers get `v.`, projectors `mm.`, as in
llama.cpp's mmproj files. What llama.cpp has no name for (Mllama's global vision layers and cross-attention) gets one in
the same style.
"""

import re
from collections.abc import Iterable

LANGUAGE, VISION, PROJECTOR = "language", "vision", "projector"
TRANSPOSED = "mm.input_projection.weight"
"""Gemma 3's projection: llama.cpp stores it transposed and turns it when it runs, which only float types allow."""

_TOWER = re.compile(r"^(?:visual|vision_tower(?:\.vision_model)?|vision_model)\.(.+)$")
_BLOCK = re.compile(
    r"^(?:(global)_)?(?:blocks|transformer\.layers|encoder\.layers|transformer)(?:\.layers)?\.(\d+)\.(.+)$"
)
_BLOCK_PARTS = (
    (r"attn\.qkv", "attn_qkv"), (r"attn\.proj|(?:self_attn|attention)\.(?:o|out)_proj", "attn_out"),
    (r"(?:self_attn|attention)\.([qkv])_proj", r"attn_\1"), (r"mlp\.fc1", "ffn_up"), (r"mlp\.fc2", "ffn_down"),
    (r"(?:mlp|feed_forward)\.(gate|up|down)_proj", r"ffn_\1"),
    (r"norm1|layer_norm1|input_layernorm|attention_norm", "ln1"),
    (r"norm2|layer_norm2|post_attention_layernorm|ffn_norm", "ln2"),
)  # fmt: skip
_TOWER_PARTS = (
    (r"patch_embed\.proj|(?:embeddings\.)?patch_embedding|patch_conv", "v.patch_embd"),
    (r"embeddings\.position_embedding", "v.position_embd"), (r"(?:embeddings\.)?class_embedding", "v.class_embd"),
    (r"pre_layrnorm|ln_pre|layernorm_pre", "v.pre_ln"), (r"post_layernorm|layernorm_post|merger\.ln_q", "v.post_ln"),
    (r"merger\.mlp\.(\d+)", r"mm.\1"),
)  # fmt: skip
_PROJECTOR_PARTS = (
    (r"linear_(\d+)", r"mm.\1"), (r"patch_merger\.merging_layer", "mm.patch_merger"),
    (r"mm_soft_emb_norm", "mm.soft_emb_norm"), (r"norm", "mm.input_norm"),
)  # fmt: skip
_CROSS_ATTENTION = re.compile(r"^(?:model\.)?layers\.(\d+)\.cross_attn(?:\.([qkvo])_proj|\.([qk])_norm|_(\w+_gate))$")
_SUFFIX = re.compile(r"\.(weight|bias)$")


def vision_name(name: str) -> str | None:
    """`v.…` or `mm.…` for a parameter or module of a vision tower or projector, None for all others."""
    stem, suffix = _split(name.removeprefix("model."))
    if stem == "multi_modal_projector":
        return f"mm.0{suffix}"
    if stem.startswith("multi_modal_projector."):
        part = stem.removeprefix("multi_modal_projector.")
        if part == "mm_input_projection_weight":
            return "mm.input_projection.weight"
        return (_replaced(part, _PROJECTOR_PARTS) or f"mm.{part}") + suffix
    match = _TOWER.match(stem)
    if match is None:
        return None
    part = match[1]
    block = _BLOCK.match(part)
    if block is not None:
        prefix = "v.global.blk" if block[1] else "v.blk"
        return f"{prefix}.{block[2]}.{_replaced(block[3], _BLOCK_PARTS) or block[3]}{suffix}"
    return (_replaced(part, _TOWER_PARTS) or f"v.{part}") + suffix


def cross_attention_name(name: str) -> str | None:
    """`blk.N.cross_attn_…` for a part of Mllama's cross-attention layers, None for all others."""
    stem, suffix = _split(language_name(name))
    match = _CROSS_ATTENTION.match(stem)
    if match is None:
        return None
    layer, projection, norm, gate = match.groups()
    part = projection or gate or f"{norm}_norm"
    return f"blk.{layer}.cross_attn_{'output' if part == 'o' else part}{suffix}"


def language_name(name: str) -> str:
    """A language model's name without the prefixes that wrap it: `language_model.model.norm` -> `model.norm`."""
    for prefix in ("model.language_model.", "language_model.model."):
        if name.startswith(prefix):
            return f"model.{name.removeprefix(prefix)}"
    return name.removeprefix("language_model.")


def keys_of(names: Iterable[str], keys: Iterable[str]) -> dict[str, str]:
    """Name in a file -> the one of `keys`, a model's parameters, that it stands for; names without one are left out.

    transformers wraps a checkpoint's `visual.…` and `model.…` as `model.visual.…` and `model.language_model.…`.
    """
    exact = set(keys)
    by_bare_name = {_bare(key): key for key in exact}
    pairs = ((name, name if name in exact else by_bare_name.get(_bare(name))) for name in names)
    return {name: key for name, key in pairs if key is not None}


def _bare(name: str) -> str:
    return vision_name(name) or language_name(name)


def part_of(name: str) -> str:
    """LANGUAGE, VISION or PROJECTOR, from the name that `vision_name` gives."""
    return VISION if name.startswith("v.") else PROJECTOR if name.startswith("mm.") else LANGUAGE


def _split(name: str) -> tuple[str, str]:
    suffix = _SUFFIX.search(name)
    return (name[: suffix.start()], suffix[0]) if suffix else (name, "")


def _replaced(part: str, rules: tuple[tuple[str, str], ...]) -> str | None:
    for pattern, replacement in rules:
        match = re.fullmatch(pattern, part)
        if match is not None:
            return match.expand(replacement)
    return None
