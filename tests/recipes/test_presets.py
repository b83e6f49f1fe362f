"""Presets by role on the small model, and the sizes of the published DeepSeek-R1 files."""

import json

import pytest

from dynquant.checkpoints.tensor_roles import Role, layer_of
from dynquant.errors import CheckpointError, PlanError
from dynquant.families.open import open_config, open_model
from dynquant.formats.quant_types import QUANT_TYPES
from dynquant.planning.stage import plan_from_config
from dynquant.planning.target import Target
from dynquant.recipes.build_plan import plan_from_types
from dynquant.recipes.llama_mixtures import LLAMA_FTYPES
from dynquant.recipes.presets import R1_RECIPES, preset_types
from dynquant.session import Session

GIB = 1 << 30
PUBLISHED_GIB = {"r1-iq1_s": 130.6, "r1-iq1_m": 158, "r1-iq2_xxs": 183.9, "r1-q2_k_xl": 212}
DEEPSEEK_R1 = {
    "architectures": ["DeepseekV3ForCausalLM"], "model_type": "deepseek_v3", "vocab_size": 129280,
    "hidden_size": 7168, "intermediate_size": 18432, "moe_intermediate_size": 2048, "num_hidden_layers": 61,
    "num_attention_heads": 128, "num_key_value_heads": 128, "n_shared_experts": 1, "n_routed_experts": 256,
    "routed_scaling_factor": 2.5, "kv_lora_rank": 512, "q_lora_rank": 1536, "qk_rope_head_dim": 64,
    "v_head_dim": 128, "qk_nope_head_dim": 128, "n_group": 8, "topk_group": 4, "num_experts_per_tok": 8,
    "first_k_dense_replace": 3, "norm_topk_prob": True, "scoring_func": "sigmoid", "hidden_act": "silu",
    "max_position_embeddings": 163840, "rms_norm_eps": 1e-6, "tie_word_embeddings": False, "rope_theta": 10000,
    "rope_scaling": {
        "type": "yarn", "factor": 40, "original_max_position_embeddings": 4096, "beta_fast": 32, "beta_slow": 1,
        "mscale": 1.0, "mscale_all_dim": 1.0,
    },
    "bos_token_id": 0, "eos_token_id": 1,
}  # fmt: skip
QWEN3_235B = {
    "architectures": ["Qwen3MoeForCausalLM"], "model_type": "qwen3_moe", "vocab_size": 151936, "hidden_size": 4096,
    "intermediate_size": 12288, "moe_intermediate_size": 1536, "num_hidden_layers": 94, "num_attention_heads": 64,
    "num_key_value_heads": 4, "head_dim": 128, "num_experts": 128, "num_experts_per_tok": 8, "norm_topk_prob": True,
    "decoder_sparse_step": 1, "mlp_only_layers": [], "max_position_embeddings": 40960, "rms_norm_eps": 1e-6,
    "rope_theta": 1000000.0, "tie_word_embeddings": False, "hidden_act": "silu", "attention_bias": False,
}  # fmt: skip
KIMI_K2 = {
    **DEEPSEEK_R1, "model_type": "kimi_k2", "auto_map": {"AutoConfig": "configuration_deepseek.DeepseekV3Config"},
    "vocab_size": 163840, "num_attention_heads": 64, "num_key_value_heads": 64, "n_routed_experts": 384,
    "first_k_dense_replace": 1, "n_group": 1, "topk_group": 1, "routed_scaling_factor": 2.827,
}  # fmt: skip
LLAMA4_SCOUT_TEXT = {
    "model_type": "llama4_text", "vocab_size": 202048, "hidden_size": 5120, "intermediate_size": 8192,
    "intermediate_size_mlp": 16384, "num_hidden_layers": 48, "num_attention_heads": 40, "num_key_value_heads": 8,
    "head_dim": 128, "num_local_experts": 16, "num_experts_per_tok": 1, "interleave_moe_layer_step": 1,
    "max_position_embeddings": 10485760, "rms_norm_eps": 1e-5, "rope_theta": 500000.0, "hidden_act": "silu",
    "rope_scaling": {
        "rope_type": "llama3", "factor": 16.0, "low_freq_factor": 1.0, "high_freq_factor": 1.0,
        "original_max_position_embeddings": 8192,
    },
}  # fmt: skip
LLAMA4_SCOUT = {
    "architectures": ["Llama4ForConditionalGeneration"], "model_type": "llama4", "text_config": LLAMA4_SCOUT_TEXT,
    "vision_config": {"model_type": "llama4_vision_model"},
}  # fmt: skip
LLAMA4_MAVERICK = {
    **LLAMA4_SCOUT, "text_config": LLAMA4_SCOUT_TEXT | {"num_local_experts": 128, "interleave_moe_layer_step": 2},
}  # fmt: skip
LLAMA3_8B = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "vocab_size": 128256, "hidden_size": 4096,
    "intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 8,
    "max_position_embeddings": 8192, "rms_norm_eps": 1e-5, "rope_theta": 500000.0, "hidden_act": "silu",
    "tie_word_embeddings": False,
}  # fmt: skip


@pytest.fixture(scope="module")
def deepseek_r1(tmp_path_factory):
    directory = tmp_path_factory.mktemp("r1")
    (directory / "config.json").write_text(json.dumps(DEEPSEEK_R1))
    return open_config(directory)


def planned(model, preset):
    return plan_from_types(model, preset_types(preset, model), recipe=f"preset {preset}")


def types_by_role(plan) -> dict[Role, set[str]]:
    found = {}
    for entry in plan.entries:
        found.setdefault(entry.role, set()).add(entry.type)
    return found


@pytest.mark.parametrize(
    "preset, gate_up, down",
    [
        ("r1-iq1_s", "IQ1_S", "IQ2_XXS"), ("r1-iq1_m", "IQ1_M", "IQ2_XS"),
        ("r1-iq2_xxs", "IQ2_XXS", "Q3_K"), ("r1-q2_k_xl", "Q2_K", "Q3_K"),
    ],
)  # fmt: skip
def test_r1_recipes_by_role(moe_model, preset, gate_up, down):
    roles = types_by_role(planned(moe_model, preset))
    assert roles[Role.EXPERT_GATE] == roles[Role.EXPERT_UP] == {gate_up}
    assert roles[Role.EXPERT_DOWN] == {down}  # five MoE layers: all are among the first six
    assert roles[Role.NORM] == roles[Role.ROUTER] == {"F32"}
    for role in (Role.EMBEDDING, Role.ATTN_OUT, Role.MLA_Q_A, Role.MLA_Q_B, Role.FFN_GATE, Role.FFN_UP):
        assert roles[role] == {"Q4_K"}, role
    assert roles[Role.SHARED_GATE] == roles[Role.SHARED_UP] == {"Q5_K"}
    for role in (Role.SHARED_DOWN, Role.FFN_DOWN, Role.OUTPUT, Role.MLA_KV_A, Role.MLA_V_B):
        assert roles[role] == {"Q6_K"}, role
    assert roles[Role.MLA_K_B] == {"Q8_0"}  # rows of 32


def test_the_original_r1_file_is_reproduced(deepseek_r1):
    plan = planned(deepseek_r1, "r1-iq1_s")
    # The published file stores attn_kv_b whole; llama.cpp now splits it, and attn_k_b has rows of 128.
    assert plan.histogram() == {
        "F32": 361, "Q8_0": 61, "Q6_K": 184, "Q5_K": 116, "Q4_K": 190, "IQ2_XXS": 6, "IQ1_S": 168,
    }  # fmt: skip
    assert f"{plan.predicted_bytes / GIB:.2f}" == "130.71"
    early = [entry for entry in plan.entries if entry.type == "IQ2_XXS"]
    assert [(layer_of(entry.name), entry.role) for entry in early] == [(n, Role.EXPERT_DOWN) for n in range(3, 9)]
    assert {entry.wanted_type for entry in plan.entries if entry.type == "Q8_0"} == {"Q6_K"}


def test_the_published_r1_file_from_its_config_alone(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({**DEEPSEEK_R1, "quantization_config": {"quant_method": "fp8"}}))
    notes = []
    plan = plan_from_config(tmp_path, Target(preset="r1-iq1_s"), Session(note=notes.append))
    assert plan.histogram() == {"F32": 361, "Q6_K": 184, "Q5_K": 116, "Q4_K": 190, "IQ2_XXS": 6, "IQ1_S": 168}
    assert len(plan.entries) == 1025
    assert f"{plan.predicted_bytes / GIB:.2f}" == "130.60"
    assert any("1,086 tensors, 130.71 GiB" in note for note in notes)


def index_of(directory, names):
    weight_map = dict.fromkeys(names, "model-00001-of-00163.safetensors")
    (directory / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


def test_names_of_an_index_are_held_to_the_configuration(tmp_path):
    config = {**DEEPSEEK_R1, "num_hidden_layers": 4, "n_routed_experts": 8, "n_group": 1, "topk_group": 1}
    (tmp_path / "config.json").write_text(json.dumps(config))
    alone = open_config(tmp_path)
    names = {part for name in alone.source.names() for part in alone.source.checkpoint_names(name)}
    prediction = {"model.layers.4.eh_proj.weight", "model.layers.4.embed_tokens.weight"}
    scales = {"model.layers.0.mlp.down_proj.weight_scale_inv"}
    index_of(tmp_path, names | prediction | scales)
    with pytest.warns(UserWarning) as caught:
        indexed = open_config(tmp_path)
    said = " ".join(str(warning.message) for warning in caught)
    assert "2 tensors are left out" in said and "layers.4.eh_proj" in said and "multi-token prediction" in said
    assert "down_proj.weight_scale_inv" in said and "FP8" in said
    assert indexed.source.names() == alone.source.names()

    index_of(tmp_path, names - {"model.layers.2.self_attn.o_proj.weight"})
    with pytest.raises(CheckpointError, match=r"lacks 1 tensors .*layers\.2\.self_attn\.o_proj"):
        open_config(tmp_path)
    index_of(tmp_path, names | {"model.layers.2.self_attn.sinks"})
    with pytest.raises(CheckpointError, match=r"no place for: `model\.layers\.2\.self_attn\.sinks`"):
        open_config(tmp_path)
    (tmp_path / "model.safetensors.index.json").write_text("{}")
    with pytest.raises(CheckpointError, match="no `weight_map`"):
        open_config(tmp_path)


@pytest.mark.parametrize(
    "config, preset, weights, types",
    [
        (QWEN3_235B, "r1-iq1_s", 235_093_634_560, {"IQ1_S": 276, "IQ2_XXS": 6}),
        (KIMI_K2, "r1-iq1_s", 1_026_408_232_448, {"IQ1_S": 174, "IQ2_XXS": 6}),
        (LLAMA4_SCOUT, "r1-iq1_s", 107_769_861_184, {"IQ1_S": 138, "IQ2_XXS": 6, "Q5_K": 96}),
        (LLAMA4_SCOUT_TEXT, "r1-iq1_s", 107_769_861_184, {"IQ1_S": 138, "IQ2_XXS": 6, "Q5_K": 96}),
        (LLAMA4_MAVERICK, "r1-iq1_s", 400_711_849_024, {"IQ1_S": 66, "IQ2_XXS": 6, "Q5_K": 48}),
        (LLAMA3_8B, "uniform-q4_k", 8_030_261_248, {"Q4_K": 226}),
        (LLAMA3_8B, "llama-q4_k_m", 8_030_261_248, {"Q4_K": 193, "Q6_K": 33}),
    ],
    ids=[
        "qwen3-235b-r1",
        "kimi-k2-r1",
        "llama-4-scout-r1",
        "llama-4-scout-text-r1",
        "llama-4-maverick-r1",
        "llama3-8b-uniform",
        "llama3-8b-q4_k_m",
    ],
)
def test_other_families_are_sized_from_their_configuration(tmp_path, config, preset, weights, types):
    (tmp_path / "config.json").write_text(json.dumps(config))
    plan = plan_from_config(tmp_path, Target(preset=preset))
    assert plan.num_weights == weights
    assert types.items() <= plan.histogram().items()


def test_llama_4_is_its_language_model(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(LLAMA4_MAVERICK))
    model = open_config(tmp_path)
    assert (model.arch, model.hyper.n_expert, model.hyper.n_expert_used) == ("llama4", 128, 1)
    shapes = {name: model.source.info(name).shape for name in model.source.names()}
    assert shapes["blk.0.ffn_up.weight"] == (16384, 5120) and "blk.0.ffn_up_exps.weight" not in shapes
    assert shapes["blk.1.ffn_up_exps.weight"] == (128, 8192, 5120) and "blk.1.ffn_up.weight" not in shapes
    assert shapes["blk.1.ffn_down_shexp.weight"] == (5120, 8192)
    names = {f"language_model.{part}" for name in shapes for part in model.source.checkpoint_names(name)}
    index_of(tmp_path, names | {"vision_model.class_embedding"})
    with pytest.warns(UserWarning, match="1 tensors are left out .*vision tower"):
        assert open_config(tmp_path).source.names() == model.source.names()


@pytest.mark.parametrize("config", [LLAMA4_SCOUT_TEXT, KIMI_K2], ids=["llama4_text", "kimi_k2"])
def test_what_is_only_sized_is_not_converted(tmp_path, config):
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match=f"model_type '{config['model_type']}', which dynquant cannot convert"):
        open_model(tmp_path)


def test_unknown_families_are_refused_with_the_way_out(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "novel"}))
    with pytest.raises(CheckpointError, match=r"model_type 'novel'.*it can: .*qwen3_moe.*--base-gguf"):
        plan_from_config(tmp_path, Target(preset="r1-iq1_s"))


@pytest.mark.parametrize("preset", R1_RECIPES)
def test_r1_sizes_are_the_published_ones(deepseek_r1, preset):
    size = planned(deepseek_r1, preset).predicted_bytes / GIB
    assert size == pytest.approx(PUBLISHED_GIB[preset], rel=0.005)


def test_a_scheme_of_compressed_tensors_is_no_preset_of_types(moe_model):
    with pytest.raises(PlanError, match=r"W2A16 is a scheme of compressed-tensors, no GGUF type"):
        preset_types("uniform-w2a16", moe_model)


def test_r1_recipes_need_routed_experts(tmp_path):
    config = {
        "model_type": "llama", "vocab_size": 256, "hidden_size": 256, "intermediate_size": 256,
        "num_hidden_layers": 1, "num_attention_heads": 4, "num_key_value_heads": 2,
    }  # fmt: skip
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(PlanError, match="this model has none"):
        preset_types("r1-iq1_s", open_config(tmp_path))


@pytest.mark.parametrize(
    "preset, ends", [("uniform-iq1_s", "Q2_K"), ("uniform-q2_k", "Q2_K"), ("UNIFORM-Q4_K", "Q4_K")]
)
def test_uniform_presets(moe_model, preset, ends):
    wanted = preset.split("-")[1].upper()
    for name, (chosen, reason) in preset_types(preset, moe_model).items():
        assert chosen == (ends if name in ("token_embd.weight", "output.weight") else wanted)
        assert wanted in reason


@pytest.mark.parametrize("preset", ["f32", "f16", "bf16"])
def test_float_presets_leave_vectors_and_routers_in_f32(moe_model, preset):
    for entry in planned(moe_model, preset).entries:
        keeps = len(entry.shape) == 1 or entry.role in (Role.NORM, Role.ROUTER)
        assert entry.type == ("F32" if keeps else preset.upper())


def test_every_preset_makes_a_plan_of_the_small_model(moe_model):
    floats = ["f32", "f16", "bf16"]
    types = [name.lower() for name in QUANT_TYPES if name.lower() not in floats]
    of_type = [f"{kind}-{name}" for kind in ("uniform", "experts") for name in types]
    for preset in [*floats, *R1_RECIPES, *of_type, *(f"llama-{name}" for name in LLAMA_FTYPES)]:
        assert planned(moe_model, preset).predicted_bytes > 0


@pytest.mark.parametrize("preset", ["r1-iq9", "", "q4_k_m"])
def test_an_unknown_preset_lists_the_names(moe_model, preset):
    with pytest.raises(PlanError, match=rf"`{preset}`.*f32.*r1-iq1_s.*r1-q2_k_xl.*uniform-TYPE.*llama-FTYPE"):
        preset_types(preset, moe_model)


def test_unknown_types_of_uniform_and_llama_are_refused(moe_model):
    with pytest.raises(PlanError, match="IQ1_S"):
        preset_types("uniform-iq1", moe_model)
    with pytest.raises(PlanError, match="q4_k_m"):
        preset_types("llama-q4km", moe_model)
