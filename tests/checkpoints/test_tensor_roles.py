"""Roles from GGUF names, and GGUF names from the names of Hugging Face checkpoints."""

import gguf
import pytest

from dynquant.checkpoints.model import HyperParams
from dynquant.checkpoints.tensor_roles import Role, gguf_name_of, layer_of, mtp_layers, role_of, roles_of
from dynquant.errors import CheckpointError

ROLES = {
    Role.EMBEDDING: "token_embd.weight",
    Role.PER_LAYER_EMBEDDING: "per_layer_token_embd.weight",
    Role.PER_LAYER_PROJ: "blk.0.inp_gate.weight blk.0.proj.weight",
    Role.MIXING: "altup_proj.weight blk.0.laurel_l.weight per_layer_model_proj.weight blk.0.hc_attn_fn.weight "
    "blk.0.time_mix_w1.weight output_hc_fn.weight blk.0.ssm_a blk.0.ssm_d",
    Role.MTP: "blk.3.nextn.eh_proj.weight blk.3.nextn.embed_tokens.weight nextn.pre_projection.weight",
    Role.OUTPUT: "output.weight",
    Role.NORM: "output_norm.weight blk.0.attn_norm.weight blk.10.attn_q_a_norm.weight blk.0.ssm_norm.weight "
    "blk.3.nextn.enorm.weight blk.3.nextn.shared_head_norm.weight blk.0.indexer.k_norm.weight",
    Role.ATTN_Q: "blk.0.attn_q.weight",
    Role.ATTN_K: "blk.0.attn_k.weight",
    Role.ATTN_V: "blk.0.attn_v.weight",
    Role.ATTN_QKV: "blk.0.attn_qkv.weight",
    Role.ATTN_OUT: "blk.0.attn_output.weight dec.blk.0.attn_o.weight blk.0.attn_output_b.weight",
    Role.ATTN_GATE: "blk.0.attn_gate.weight",
    Role.INDEXER: "blk.0.indexer.proj.weight blk.0.indexer.attn_k.weight blk.0.indexer.q_proj.weight",
    Role.SSM_IN: "blk.0.ssm_in.weight",
    Role.SSM_X: "blk.0.ssm_x.weight",
    Role.SSM_DT: "blk.0.ssm_dt.weight",
    Role.SSM_STATE: "blk.0.ssm_alpha.weight blk.0.ssm_beta.weight blk.0.ssm_ba.weight blk.0.ssm_f_a.weight",
    Role.SSM_GATE: "blk.0.ssm_g.weight blk.0.ssm_g_b.weight",
    Role.SSM_OUT: "blk.0.ssm_out.weight",
    Role.SHORTCONV_IN: "blk.0.shortconv.in_proj.weight",
    Role.SHORTCONV_OUT: "blk.0.shortconv.out_proj.weight",
    Role.TIME_MIX: "blk.0.time_mix_key.weight",
    Role.CHANNEL_MIX: "blk.0.channel_mix_value.weight",
    Role.CONV: "blk.0.ssm_conv1d.weight blk.0.shortconv.conv.weight blk.0.ssm_conv1d_q.weight",
    Role.MLA_Q_A: "blk.3.attn_q_a.weight",
    Role.MLA_Q_B: "blk.3.attn_q_b.weight",
    Role.MLA_KV_A: "blk.3.attn_kv_a_mqa.weight",
    Role.MLA_KV_B: "blk.3.attn_kv_b.weight",
    Role.MLA_K_B: "blk.3.attn_k_b.weight",
    Role.MLA_V_B: "blk.3.attn_v_b.weight",
    Role.FFN_GATE: "blk.0.ffn_gate.weight",
    Role.FFN_UP: "blk.0.ffn_up.weight",
    Role.FFN_DOWN: "blk.0.ffn_down.weight",
    Role.ROUTER: "blk.3.ffn_gate_inp.weight blk.3.exp_probs_b.bias blk.3.ffn_gate_inp_shexp.weight",
    Role.SHARED_GATE: "blk.3.ffn_gate_shexp.weight",
    Role.SHARED_UP: "blk.3.ffn_up_shexp.weight",
    Role.SHARED_DOWN: "blk.3.ffn_down_shexp.weight",
    Role.EXPERT_GATE: "blk.3.ffn_gate_exps.weight",
    Role.EXPERT_UP: "blk.3.ffn_up_exps.weight",
    Role.EXPERT_DOWN: "blk.60.ffn_down_exps.weight",
    Role.EXPERT_LATENT: "blk.0.ffn_latent_down.weight blk.0.ffn_latent_up.weight",
    Role.OTHER: "blk.3.ffn_down_exps.bias blk.3.ffn_gate_inp.bias blk.3.attn_sinks.weight blk.3.attn_q.bias "
    "rope_freqs.weight made.up.weight blk.0.layer_output_scale.weight v.blk.0.ssm_in.weight",
}
"""Names by role. Others are biases of experts and router and attention sinks of GPT-OSS."""


@pytest.mark.parametrize("role, name", [(role, name) for role, names in ROLES.items() for name in names.split()])
def test_role_of(role, name):
    assert role_of(name) is role


NAMELESS = {
    "dense_2", "dense_3", "rope_freqs", "rope_factors_long", "rope_factors_short", "cls", "cls.output",
    *(f"blk.0.{part}" for part in ("attn_rot_embd", "attn_sinks", "ffn", "layer_output_scale", "altup_correct_scale")),
    *(f"blk.0.{part}" for part in ("channel_mix_lerp_k", "channel_mix_lerp_r")),
}  # fmt: skip
"""Vectors, what no model computes with, and heads of embedding models."""
OF_PICTURES_OR_SOUND = ("v.", "a.", "mm.", "s.", "resampler.", "posnet.", "convnext.")


def test_every_matrix_of_a_language_model_in_gguf_py_has_a_role():
    names = {name.format(bid=0) for name in gguf.TENSOR_NAMES.values() if not name.startswith(OF_PICTURES_OR_SOUND)}
    unknown = {name for name in names if role_of(f"{name}.weight") is Role.OTHER}
    assert unknown <= NAMELESS


def test_all_matrices_of_a_layer_that_predicts_tokens_ahead_have_one_role():
    names = ["blk.2.ffn_gate_exps.weight", "blk.3.ffn_gate_exps.weight", "blk.3.attn_norm.weight"]
    names += ["blk.3.ffn_gate_inp.weight", "blk.3.attn_q.bias", "blk.3.nextn.eh_proj.weight", "blk.3.attn_q.weight"]
    roles = roles_of(names)
    assert mtp_layers(names) == {3}
    assert [name for name, role in roles.items() if role is Role.MTP] == [names[1], *names[5:]]
    assert {name: role for name, role in roles.items() if role is not Role.MTP}.items() <= {
        name: role_of(name) for name in names
    }.items()


def test_groups_of_roles_do_not_overlap():
    groups = ("is_attention", "is_recurrent", "is_embedding", "is_routed_expert", "is_shared_expert", "is_dense_ffn")
    for role in Role:
        assert sum(getattr(role, group) for group in groups) <= 1
    assert {role for role in Role if role.is_down_projection} == {Role.FFN_DOWN, Role.SHARED_DOWN, Role.EXPERT_DOWN}
    assert Role.MLA_KV_B.is_attention and not Role.ROUTER.is_attention


@pytest.mark.parametrize("name, layer", [("blk.12.ffn_up.weight", 12), ("output.weight", None), ("blk.x.a", None)])
def test_layer_of(name, layer):
    assert layer_of(name) == layer


LAYER = "model.layers.3"
NAMES = [
    ("deepseek2", "model.embed_tokens.weight", "token_embd.weight"),
    ("deepseek2", "lm_head.weight", "output.weight"),
    ("deepseek2", "model.norm.weight", "output_norm.weight"),
    ("deepseek2", f"{LAYER}.self_attn.q_a_proj.weight", "blk.3.attn_q_a.weight"),
    ("deepseek2", f"{LAYER}.self_attn.q_a_proj", "blk.3.attn_q_a"),
    ("deepseek2", f"{LAYER}.self_attn.kv_a_proj_with_mqa.weight", "blk.3.attn_kv_a_mqa.weight"),
    ("deepseek2", f"{LAYER}.self_attn.kv_b_proj.weight", "blk.3.attn_kv_b.weight"),
    ("deepseek2", f"{LAYER}.mlp.gate.weight", "blk.3.ffn_gate_inp.weight"),
    ("deepseek2", f"{LAYER}.mlp.shared_experts.down_proj.weight", "blk.3.ffn_down_shexp.weight"),
    ("deepseek2", f"{LAYER}.mlp.experts.7.gate_proj.weight", "blk.3.ffn_gate_exps.weight"),
    ("deepseek2", f"{LAYER}.mlp.experts.255.down_proj.weight", "blk.3.ffn_down_exps.weight"),
    ("deepseek2", f"{LAYER}.mlp.experts.down_proj", "blk.3.ffn_down_exps.weight"),
    ("deepseek2", "model.layers.61.mlp.down_proj.weight", None),
    ("llama", f"{LAYER}.self_attn.q_proj.weight", "blk.3.attn_q.weight"),
    ("llama", f"{LAYER}.self_attn.q_proj.bias", "blk.3.attn_q.bias"),
    ("llama", f"{LAYER}.mlp.down_proj.weight", "blk.3.ffn_down.weight"),
    ("llama", f"{LAYER}.block_sparse_moe.gate.weight", "blk.3.ffn_gate_inp.weight"),
    ("llama", f"{LAYER}.block_sparse_moe.experts.5.w1.weight", "blk.3.ffn_gate_exps.weight"),
    ("llama", f"{LAYER}.block_sparse_moe.experts.5.w2.weight", "blk.3.ffn_down_exps.weight"),
    ("llama", f"{LAYER}.block_sparse_moe.experts.5.w3.weight", "blk.3.ffn_up_exps.weight"),
    ("qwen2moe", f"{LAYER}.mlp.shared_expert.up_proj.weight", "blk.3.ffn_up_shexp.weight"),
    ("qwen2moe", f"{LAYER}.mlp.shared_expert_gate.weight", "blk.3.ffn_gate_inp_shexp.weight"),
    ("gpt-oss", f"{LAYER}.mlp.experts.down_proj", "blk.3.ffn_down_exps.weight"),
    ("gpt-oss", f"{LAYER}.mlp.router.weight", "blk.3.ffn_gate_inp.weight"),
    ("mamba", "backbone.layers.3.mixer.in_proj.weight", "blk.3.ssm_in.weight"),
    ("llama", "made.up.weight", None),
]


@pytest.mark.parametrize("arch, checkpoint_name, expected", NAMES)
def test_gguf_name_of(arch, checkpoint_name, expected):
    assert gguf_name_of(checkpoint_name, arch, 61) == expected


@pytest.mark.parametrize("checkpoint_name, expected", [names[1:] for names in NAMES if names[0] == "deepseek2"])
def test_an_architecture_that_gguf_py_lacks_is_read_by_what_others_call_their_tensors(checkpoint_name, expected):
    assert gguf_name_of(checkpoint_name, "nonesuch", 61) == expected


def test_hyper_params_take_the_largest_of_per_layer_values():
    values = {
        "general.architecture": "llama", "llama.block_count": 2, "llama.embedding_length": 64,
        "llama.attention.head_count": 4, "llama.attention.head_count_kv": [1, 2],
        "tokenizer.ggml.tokens": ["a", "b", "c"],
    }  # fmt: skip
    assert HyperParams.from_metadata(values) == HyperParams("llama", 2, 64, 4, 2, 3)


@pytest.mark.parametrize("value", [None, "two", [], [[1]]])
def test_hyper_params_refuse_a_missing_or_senseless_number(value):
    values = {"general.architecture": "llama", "llama.block_count": value, "llama.embedding_length": 64}
    with pytest.raises(CheckpointError, match=r"llama\.block_count"):
        HyperParams.from_metadata(values)
