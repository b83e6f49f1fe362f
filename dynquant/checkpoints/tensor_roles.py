"""The role of every tensor and its GGUF name, for every architecture in gguf-py's tensor map.

Roles are what planners and reports speak of. They are read from the GGUF name alone, so that a Hugging Face directory,
an F16 GGUF and a published quantized GGUF of one model get the same roles.
"""

import re
from enum import StrEnum
from functools import cache

import gguf

from dynquant.checkpoints.vision_names import cross_attention_name, language_name, vision_name
from dynquant.errors import CheckpointError


class Role(StrEnum):
    """The part that a tensor plays in the model."""

    EMBEDDING = "embedding"
    OUTPUT = "output"
    NORM = "norm"
    ROUTER = "router"
    ATTN_Q = "attn_q"
    ATTN_K = "attn_k"
    ATTN_V = "attn_v"
    ATTN_QKV = "attn_qkv"
    ATTN_OUT = "attn_out"
    MLA_Q_A = "mla_q_a"
    MLA_Q_B = "mla_q_b"
    MLA_KV_A = "mla_kv_a"
    MLA_KV_B = "mla_kv_b"
    MLA_K_B = "mla_k_b"
    MLA_V_B = "mla_v_b"
    FFN_GATE = "ffn_gate"
    FFN_UP = "ffn_up"
    FFN_DOWN = "ffn_down"
    SHARED_GATE = "shared_gate"
    SHARED_UP = "shared_up"
    SHARED_DOWN = "shared_down"
    EXPERT_GATE = "expert_gate"
    EXPERT_UP = "expert_up"
    EXPERT_DOWN = "expert_down"
    CROSS_ATTN = "cross_attn"
    VISION_PATCH = "vision_patch"
    VISION_ATTN = "vision_attn"
    VISION_FFN = "vision_ffn"
    PROJECTOR = "projector"
    OTHER = "other"

    @property
    def is_attention(self) -> bool:
        return self.value.startswith(("attn_", "mla_"))

    @property
    def is_routed_expert(self) -> bool:
        return self.value.startswith("expert_")

    @property
    def is_shared_expert(self) -> bool:
        return self.value.startswith("shared_")

    @property
    def is_dense_ffn(self) -> bool:
        return self.value.startswith("ffn_")

    @property
    def is_vision(self) -> bool:
        """True for the vision tower and the projector, which see only image tokens."""
        return self.value.startswith("vision_") or self is Role.PROJECTOR

    @property
    def is_down_projection(self) -> bool:
        return self.value.endswith("_down")


_ROLE_OF_TENSOR = {
    **{role.name: role for role in Role},  # attention and dense FFNs are called alike in gguf-py
    "TOKEN_EMBD": Role.EMBEDDING,
    **dict.fromkeys(("FFN_GATE_INP", "FFN_GATE_INP_SHEXP", "FFN_EXP_PROBS_B"), Role.ROUTER),
    **{f"ATTN_{part}": Role[f"MLA_{part}"] for part in ("Q_A", "Q_B", "KV_B", "K_B", "V_B")},
    "ATTN_KV_A_MQA": Role.MLA_KV_A,
    **{f"FFN_{part}_SHEXP": Role[f"SHARED_{part}"] for part in ("GATE", "UP", "DOWN")},
    **{f"FFN_{part}_{kind}": Role[f"EXPERT_{part}"] for part in ("GATE", "UP", "DOWN") for kind in ("CHEXP", "EXP")},
    "FFN_GATE_UP_EXP": Role.EXPERT_GATE,
}
"""By gguf-py's name of the tensor; all others are norms by their names, or `OTHER`."""
_LAYER = re.compile(r"^((?:dec\.|enc\.|v\.|v\.global\.|a\.)?blk)\.(\d+)\.")
_VISION_ROLES = (
    (re.compile(r"v\.patch_embd\.weight(\.1)?"), Role.VISION_PATCH),
    (re.compile(r"v\.(global\.)?blk\.\d+\.attn_(q|k|v|qkv|out)\.weight"), Role.VISION_ATTN),
    (re.compile(r"v\.(global\.)?blk\.\d+\.ffn_(gate|up|down)\.weight"), Role.VISION_FFN),
    (re.compile(r"mm\.(\d+|patch_merger|input_projection)\.weight"), Role.PROJECTOR),
    (re.compile(r"blk\.\d+\.cross_attn_(q|k|v|output)\.weight"), Role.CROSS_ATTN),
)
_SUFFIX = re.compile(r"\.(weight|bias)$")


@cache
def _roles_by_template() -> dict[str, Role]:
    return {
        template: _ROLE_OF_TENSOR.get(tensor.name) or (Role.NORM if "norm" in template else Role.OTHER)
        for tensor, template in reversed(gguf.TENSOR_NAMES.items())  # of tensors that share a name, the first counts
    }


def role_of(name: str) -> Role:
    """The role of a GGUF tensor. Biases and anything outside gguf-py's map are `OTHER`; both stay precise."""
    if name.endswith(".bias") and not name.endswith("exp_probs_b.bias"):
        return Role.OTHER
    for pattern, role in _VISION_ROLES:
        if pattern.fullmatch(name):
            return role
    template = _LAYER.sub(r"\1.{bid}.", _SUFFIX.sub("", name))
    return _roles_by_template().get(template, Role.OTHER)


def layer_of(name: str) -> int | None:
    """The layer index in `blk.N.…`, or None for tensors outside the layers."""
    match = _LAYER.match(name)
    return int(match.group(2)) if match else None


@cache
def _tensor_name_map(arch: str, n_layer: int) -> gguf.TensorNameMap:
    by_name = {value: key for key, value in gguf.MODEL_ARCH_NAMES.items()}
    if arch not in by_name:
        raise CheckpointError(f"gguf-py knows no architecture `{arch}`; give `--base-gguf` a GGUF made by llama.cpp.")
    return gguf.get_tensor_name_map(by_name[arch], n_layer)


_ONE_EXPERT = re.compile(r"\.experts\.\d+\.(\w+?)(\.weight)?$")


def gguf_name_of(checkpoint_name: str, arch: str, n_layer: int) -> str | None:
    """The GGUF name of a Hugging Face parameter or module, or None when gguf-py's map does not hold it.

    Per-expert names map to the stacked tensor: `model.layers.3.mlp.experts.7.down_proj.weight` and the fused
    `model.layers.3.mlp.experts.down_proj` both give `blk.3.ffn_down_exps.weight`. Parts of vision-language models get
    the names of `vision_names`, whatever the architecture of the language model.
    """
    of_vision = vision_name(checkpoint_name) or cross_attention_name(checkpoint_name)
    if of_vision is not None:
        return of_vision
    stacked = _ONE_EXPERT.sub(r".experts.\1", language_name(checkpoint_name))
    is_expert = ".experts." in stacked
    gguf_name = _tensor_name_map(arch, n_layer).get_name(stacked, try_suffixes=(".weight", ".bias"))
    if gguf_name is None:
        return None
    return f"{gguf_name}.weight" if is_expert and not gguf_name.endswith((".weight", ".bias")) else gguf_name
