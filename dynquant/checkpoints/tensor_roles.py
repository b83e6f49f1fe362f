"""The role of every tensor and its GGUF name.

Roles are what planners and reports speak of. They are read from GGUF names alone, so that a Hugging Face directory, an
F16 GGUF and a published quantized GGUF of one model get the same roles, be its architecture in gguf-py's map or not.
"""

import re
from collections.abc import Iterable, Mapping
from enum import StrEnum
from functools import cache

import gguf

from dynquant.checkpoints.vision_names import cross_attention_name, language_name, vision_name


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
    ATTN_GATE = "attn_gate"
    MLA_Q_A = "mla_q_a"
    MLA_Q_B = "mla_q_b"
    MLA_KV_A = "mla_kv_a"
    MLA_KV_B = "mla_kv_b"
    MLA_K_B = "mla_k_b"
    MLA_V_B = "mla_v_b"
    INDEXER = "indexer"
    SSM_IN = "ssm_in"
    SSM_X = "ssm_x"
    SSM_DT = "ssm_dt"
    SSM_STATE = "ssm_state"
    SSM_GATE = "ssm_gate"
    SSM_OUT = "ssm_out"
    SHORTCONV_IN = "shortconv_in"
    SHORTCONV_OUT = "shortconv_out"
    TIME_MIX = "time_mix"
    CHANNEL_MIX = "channel_mix"
    CONV = "conv"
    FFN_GATE = "ffn_gate"
    FFN_UP = "ffn_up"
    FFN_DOWN = "ffn_down"
    SHARED_GATE = "shared_gate"
    SHARED_UP = "shared_up"
    SHARED_DOWN = "shared_down"
    EXPERT_GATE = "expert_gate"
    EXPERT_UP = "expert_up"
    EXPERT_DOWN = "expert_down"
    EXPERT_LATENT = "latent_of_experts"
    PER_LAYER_EMBEDDING = "per_layer_embedding"
    PER_LAYER_PROJ = "per_layer_proj"
    MIXING = "mixing"
    MTP = "mtp"
    CROSS_ATTN = "cross_attn"
    VISION_PATCH = "vision_patch"
    VISION_ATTN = "vision_attn"
    VISION_FFN = "vision_ffn"
    PROJECTOR = "projector"
    OTHER = "other"

    @property
    def is_attention(self) -> bool:
        return self.value.startswith(("attn_", "mla_")) or self is Role.INDEXER

    @property
    def is_recurrent(self) -> bool:
        """True for what takes the place of attention in layers with a state: Mamba, delta rules, short convolutions."""
        return self.value.startswith(("ssm_", "shortconv_")) or self is Role.TIME_MIX

    @property
    def is_embedding(self) -> bool:
        """True for tables whose rows are looked up, so that no input weighs their columns."""
        return self in (Role.EMBEDDING, Role.PER_LAYER_EMBEDDING)

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


_SMALL_MIXERS = (
    "altup_proj altup_unembd_proj altup_router altup_correct_coef altup_predict_coef laurel_l laurel_r "
    "per_layer_model_proj attn_compressor_ape indexer_compressor_ape attn_res_score ffn_res_score output_res_score "
    "position_embd token_types attn_rel_b cross_attn_rel_b ssm_a ssm_d"
)
_PARTS: Mapping[Role, str] = {
    Role.EMBEDDING: "token_embd",
    Role.OUTPUT: "output",
    Role.ROUTER: "ffn_gate_inp ffn_gate_inp_shexp exp_probs_b exp_probs_b_vl ffn_gate_tid2eid",
    Role.ATTN_Q: "attn_q",
    Role.ATTN_K: "attn_k",
    Role.ATTN_V: "attn_v",
    Role.ATTN_QKV: "attn_qkv vis_attn_qkv",
    Role.ATTN_OUT: "attn_output attn_o attn_output_a attn_output_b vis_attn_output",
    Role.ATTN_GATE: "attn_gate",
    Role.MLA_Q_A: "attn_q_a",
    Role.MLA_Q_B: "attn_q_b",
    Role.MLA_KV_A: "attn_kv_a_mqa attn_kv attn_compressor_kv attn_compressor_gate",
    Role.MLA_KV_B: "attn_kv_b",
    Role.MLA_K_B: "attn_k_b",
    Role.MLA_V_B: "attn_v_b",
    Role.INDEXER: "indexer.proj indexer.attn_k indexer.attn_q_b indexer.q_proj indexer.k_proj indexer_compressor_kv "
    "indexer_compressor_gate",
    Role.SSM_IN: "ssm_in",
    Role.SSM_X: "ssm_x",
    Role.SSM_DT: "ssm_dt",
    Role.SSM_STATE: "ssm_alpha ssm_beta ssm_ba ssm_f_a ssm_f_b",
    Role.SSM_GATE: "ssm_g_a ssm_g_b ssm_g",
    Role.SSM_OUT: "ssm_out",
    Role.SHORTCONV_IN: "shortconv.in_proj",
    Role.SHORTCONV_OUT: "shortconv.out_proj",
    Role.TIME_MIX: "time_mix_key time_mix_value time_mix_receptance time_mix_gate time_mix_output",
    Role.CHANNEL_MIX: "channel_mix_key channel_mix_value channel_mix_receptance",
    Role.CONV: "ssm_conv1d ssm_conv1d_q ssm_conv1d_k ssm_conv1d_v shortconv.conv ple_conv1d conv1d",
    Role.CROSS_ATTN: "cross_attn_q cross_attn_k cross_attn_v cross_attn_o cross_attn_output",
    **{Role[f"FFN_{part}"]: f"ffn_{part.lower()} vis_{part.lower()}" for part in ("GATE", "UP", "DOWN")},
    **{Role[f"SHARED_{part}"]: f"ffn_{part.lower()}_shexp" for part in ("GATE", "UP", "DOWN")},
    Role.EXPERT_GATE: "ffn_gate_exps ffn_gate_chexps ffn_gate_up_exps",
    Role.EXPERT_UP: "ffn_up_exps ffn_up_chexps",
    Role.EXPERT_DOWN: "ffn_down_exps ffn_down_chexps",
    Role.EXPERT_LATENT: "ffn_latent_down ffn_latent_up ffn_routed_down ffn_routed_up",
    Role.PER_LAYER_EMBEDDING: "per_layer_token_embd",
    Role.PER_LAYER_PROJ: "inp_gate proj ple_key ple_value",
    Role.MIXING: _SMALL_MIXERS,
}
_ROLE_OF_PART = {part: role for role, parts in _PARTS.items() for part in parts.split()}
"""By what remains of a name without layer and suffix; all others are norms by their names, or `OTHER`."""
_MIXING_PREFIXES = ("hc_", "output_hc_", "time_mix_")
_NORM = re.compile(r"norm|nextn\.(enorm|hnorm)")
_LAYER = re.compile(r"^((?:dec\.|enc\.|v\.|v\.global\.|a\.)?blk)\.(\d+)\.")
_VISION_ROLES = (
    (re.compile(r"v\.patch_embd\.weight(\.1)?"), Role.VISION_PATCH),
    (re.compile(r"v\.(global\.)?blk\.\d+\.attn_(q|k|v|qkv|out)\.weight"), Role.VISION_ATTN),
    (re.compile(r"v\.(global\.)?blk\.\d+\.ffn_(gate|up|down)\.weight"), Role.VISION_FFN),
    (re.compile(r"mm\.(\d+|patch_merger|input_projection)\.weight"), Role.PROJECTOR),
)
_SUFFIX = re.compile(r"\.(weight|bias)$")
_NEXTN_LAYER = re.compile(r"blk\.(\d+)\.nextn\.")
_NEVER_MTP = (Role.NORM, Role.ROUTER, Role.CONV, Role.MIXING, Role.OTHER)


def role_of(name: str) -> Role:
    """The role of a GGUF tensor. Biases and names that say nothing are `OTHER`; both stay precise.

    The name alone does not say that a layer predicts tokens ahead: see `roles_of`.
    """
    if name.endswith(".bias") and not name.endswith("exp_probs_b.bias"):
        return Role.OTHER
    for pattern, role in _VISION_ROLES:
        if pattern.fullmatch(name):
            return role
    layer = _LAYER.match(name)
    if layer is not None and layer[1].startswith(("v", "a")):
        return Role.NORM if "norm" in name else Role.OTHER
    part = _SUFFIX.sub("", name[layer.end() :] if layer else name)
    if part in _ROLE_OF_PART:
        return _ROLE_OF_PART[part]
    if _NORM.search(part):
        return Role.NORM
    if part.startswith("nextn."):
        return Role.MTP
    return Role.MIXING if part.startswith(_MIXING_PREFIXES) else Role.OTHER


def mtp_layers(names: Iterable[str]) -> frozenset[int]:
    """The layers that predict tokens ahead (multi-token prediction): those with a tensor `blk.N.nextn.…`."""
    return frozenset(int(match[1]) for match in map(_NEXTN_LAYER.match, names) if match)


def stored_ahead(name: str, config: Mapping[str, object]) -> bool:
    """Return whether a checkpoint's tensor is of a layer that predicts tokens ahead: under `mtp`, or after the last."""
    if re.match(r"(.*\.)?mtp\.", name):
        return True
    text = config.get("text_config")
    count = (text if isinstance(text, Mapping) else config).get("num_hidden_layers")
    match = re.match(r"(?:model\.)?(?:language_model\.)?(?:model\.)?layers\.(\d+)\.", name)
    return match is not None and isinstance(count, int) and int(match[1]) >= count


def roles_of(names: Iterable[str]) -> dict[str, Role]:
    """The role of every tensor of a model; all matrices of layers that predict tokens ahead are `MTP`."""
    names = list(names)
    ahead = mtp_layers(names)
    roles = {name: role_of(name) for name in names}
    return {name: role_ahead(role) if layer_of(name) in ahead else role for name, role in roles.items()}


def role_ahead(role: Role) -> Role:
    """The role, in a layer that predicts tokens ahead, of what has the role `role` in another layer."""
    return role if role in _NEVER_MTP else Role.MTP


def layer_of(name: str) -> int | None:
    """The layer index in `blk.N.…`, or None for tensors outside the layers."""
    match = _LAYER.match(name)
    return int(match.group(2)) if match else None


@cache
def _tensor_name_map(arch: str, n_layer: int) -> gguf.TensorNameMap:
    by_name = {value: key for key, value in gguf.MODEL_ARCH_NAMES.items()}
    if arch in by_name:
        return gguf.get_tensor_name_map(by_name[arch], n_layer)
    # gguf-py on the package index is older than llama.cpp's: an architecture that it lacks is read by what all others
    # call their tensors, of whom `llama` is the most usual.
    every = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, n_layer)
    for tensor, names in gguf.TensorNameMap.mappings_cfg.items():
        for name in names:
            every.mapping.setdefault(name, (tensor, gguf.TENSOR_NAMES[tensor]))
    for layer in range(n_layer):
        for tensor, names in gguf.TensorNameMap.block_mappings_cfg.items():
            for name in names:
                gguf_name = gguf.TENSOR_NAMES[tensor].format(bid=layer)
                every.mapping.setdefault(name.format(bid=layer), (tensor, gguf_name))
    return every


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
