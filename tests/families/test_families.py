"""Every family against transformers: logits of the F32 GGUF in llama.cpp, and refusals of what would differ."""

import json
import warnings
from pathlib import Path

import pytest
import torch
from gguf import ExpertGatingFuncType, GGUFValueType
from safetensors.torch import load_file

from dynquant.checkpoints.model import Model
from dynquant.checkpoints.safetensors_source import SafetensorsSource
from dynquant.errors import CheckpointError
from dynquant.families.open import open_config, open_hf
from dynquant.running.load import load_directory
from dynquant.running.streaming.layer_stream import LayerStream
from tests.helpers.edited_checkpoints import edited_config, edited_weights
from tests.helpers.exports import export_gguf, export_safetensors
from tests.helpers.packed_models import plan_of
from tests.helpers.representatives import represented_by
from tests.helpers.tiny_gguf import GGML
from tests.helpers.tiny_models import TINY, hf_logits, llama_logits, mean_kl, save_tiny, write_f32

NUM_TOKENS = 400
QUICK = ("llama-tied", "mixtral", "qwen3-moe", "gemma3-period-3", "deepseek-v3")


def random_tokens() -> list[int]:
    return torch.randint(1, 8000, (NUM_TOKENS,), generator=torch.Generator().manual_seed(3)).tolist()


@pytest.fixture(scope="module")
def deepseek_v3(tiny_text) -> Path:
    return tiny_text("deepseek-v3")


def metadata(model: Model) -> dict[str, object]:
    return {field.key: field.value for field in model.metadata}


@pytest.mark.parametrize("name", represented_by(QUICK, TINY))
def test_logits_equal_transformers(name: str, tmp_path: Path, tiny_text) -> None:
    pytest.importorskip("llama_cpp", reason="llama-cpp-python is not installed")
    directory = tiny_text(name)
    file = write_f32(open_hf(directory), tmp_path / "model.gguf")
    tokens = random_tokens()
    reference = hf_logits(directory, tokens)
    assert reference.std() > 1  # flat logits would hide differences
    assert mean_kl(reference, llama_logits(file, tokens)) < (1e-6 if name.startswith("gemma") else 1e-9)


def test_trained_moe_logits_equal_transformers(tmp_path: Path, small_moe: Path) -> None:
    pytest.importorskip("llama_cpp", reason="llama-cpp-python is not installed")
    from tokenizers import Tokenizer

    text = "The heart pumps blood through the arteries. " + Path(__file__).read_text()
    tokens = Tokenizer.from_file(str(small_moe / "tokenizer.json")).encode(text).ids[:NUM_TOKENS]
    file = write_f32(open_hf(small_moe), tmp_path / "model.gguf")
    assert len(tokens) == NUM_TOKENS
    assert mean_kl(hf_logits(small_moe, tokens), llama_logits(file, tokens)) < 1e-9


def test_keys_have_the_converters_types(deepseek_v3: Path) -> None:
    fields = {field.key: field for field in open_hf(deepseek_v3).metadata}
    assert fields["deepseek2.attention.head_count_kv"].value == 1
    assert fields["deepseek2.block_count"].value_type == GGUFValueType.UINT32
    assert fields["deepseek2.expert_weights_scale"].value_type == GGUFValueType.FLOAT32
    assert fields["deepseek2.expert_weights_norm"].value_type == GGUFValueType.BOOL
    assert fields["tokenizer.ggml.token_type"].item_type == GGUFValueType.INT32
    assert fields["tokenizer.ggml.merges"].item_type == GGUFValueType.STRING


def test_mla_is_split_per_head(deepseek_v3: Path) -> None:
    source = open_hf(deepseek_v3).source
    assert source.info("blk.0.attn_k_b.weight").shape == (4, 64, 32)
    assert source.info("blk.0.attn_v_b.weight").shape == (4, 48, 64)
    assert torch.equal(source.load("blk.0.attn_k_b.weight", 2), source.load("blk.0.attn_k_b.weight")[2])


def test_checkpoint_names_list_every_expert(deepseek_v3: Path) -> None:
    model = open_hf(deepseek_v3)
    expected = tuple(f"model.layers.1.mlp.experts.{e}.down_proj.weight" for e in range(8))
    assert model.checkpoint_names("blk.1.ffn_down_exps.weight") == expected
    assert model.checkpoint_names("blk.0.attn_k_b.weight") == ("model.layers.0.self_attn.kv_b_proj.weight",)


def test_one_expert_is_read_alone(deepseek_v3: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = open_hf(deepseek_v3).source
    whole, read = source.load("blk.1.ffn_up_exps.weight"), []
    load = SafetensorsSource.load
    monkeypatch.setattr(SafetensorsSource, "load", lambda self, *args: read.append(args[0]) or load(self, *args))
    assert torch.equal(source.load("blk.1.ffn_up_exps.weight", 5), whole[5])
    assert read == ["model.layers.1.mlp.experts.5.up_proj.weight"]


@pytest.mark.parametrize("name", ["qwen3-moe", "mixtral"])
def test_one_expert_is_a_stack_too(name: str, tmp_path: Path, small_moe: Path) -> None:
    counts = {"num_experts": 1, "num_local_experts": 1, "num_experts_per_tok": 1}
    model = open_hf(save_tiny(name, tmp_path / name, small_moe, **counts))
    for stack in (name for name in model.source.names() if "_exps" in name):
        whole = model.source.load(stack)
        assert whole.shape == model.source.info(stack).shape and whole.dim() == 3
        assert torch.equal(model.source.load(stack, 0), whole[0])
    plan = plan_of(model, "Q8_0")
    export_gguf(model, plan, None, tmp_path / "model.gguf", encoder=GGML)
    tokens = random_tokens()[:40]
    reference = hf_logits(model.path, tokens)
    assert mean_kl(reference, llama_logits(tmp_path / "model.gguf", tokens)) < 5e-3
    export_safetensors(model, plan, None, tmp_path / "packed", encoder=GGML)
    packed = load_directory(tmp_path / "packed", torch.float32)
    assert mean_kl(reference, packed(torch.tensor([tokens])).logits[0].detach()) < 5e-3
    layers = LayerStream(model)
    with layers.running(), torch.inference_mode():
        assert mean_kl(reference, layers.hf_model(torch.tensor([tokens])).logits[0]) < 1e-9


def test_fused_experts_give_the_same_tensors(deepseek_v3: Path, tmp_path: Path) -> None:
    def fuse(tensors: dict[str, torch.Tensor]) -> None:
        for layer in (1, 2):
            prefix = f"model.layers.{layer}.mlp.experts"
            gate, up, down = (
                torch.stack([tensors.pop(f"{prefix}.{e}.{kind}_proj.weight") for e in range(8)])
                for kind in ("gate", "up", "down")
            )
            tensors[f"{prefix}.gate_up_proj"], tensors[f"{prefix}.down_proj"] = torch.cat([gate, up], 1), down

    single = open_hf(deepseek_v3).source
    fused = open_hf(edited_weights(deepseek_v3, tmp_path / "fused", fuse)).source
    assert fused.names() == single.names()
    for kind in ("gate", "up", "down"):
        name = f"blk.2.ffn_{kind}_exps.weight"
        assert fused.info(name) == single.info(name)
        assert torch.equal(fused.load(name), single.load(name))
        assert torch.equal(fused.load(name, 3), single.load(name, 3))


def test_scoring_function_follows_the_model_class(deepseek_v3: Path, tmp_path: Path) -> None:
    assert "scoring_func" not in json.loads((deepseek_v3 / "config.json").read_text())
    assert metadata(open_hf(deepseek_v3))["deepseek2.expert_gating_func"] == ExpertGatingFuncType.SIGMOID
    with pytest.raises(CheckpointError, match=r"scoring_func.*softmax.*--base-gguf"):
        open_hf(edited_config(deepseek_v3, tmp_path / "softmax", lambda config: config.update(scoring_func="softmax")))


def test_prediction_layers_are_left_out_with_a_warning(deepseek_v3: Path, tmp_path: Path) -> None:
    def add_layer(tensors: dict[str, torch.Tensor]) -> None:
        tensors["model.layers.3.eh_proj.weight"] = torch.ones(4, 4)

    with pytest.warns(UserWarning, match="1 tensors are left out .*eh_proj.*multi-token prediction"):
        model = open_hf(edited_weights(deepseek_v3, tmp_path / "mtp", add_layer))
    assert model.hyper.n_layer == 3
    assert not any(name.startswith("blk.3.") for name in model.source.names())


def test_layers_beyond_the_configuration_that_predict_nothing_are_refused(deepseek_v3: Path, tmp_path: Path) -> None:
    fewer = edited_config(deepseek_v3, tmp_path / "fewer", lambda config: config.update(num_hidden_layers=2))
    with pytest.raises(CheckpointError, match=r"holds \d+ tensors that its architecture has no place for.*layers\.2\."):
        open_hf(fewer)


def test_configuration_alone_gives_the_same_plan_input(deepseek_v3: Path) -> None:
    full, alone = open_hf(deepseek_v3), open_config(deepseek_v3)
    assert alone.source.names() == full.source.names()
    assert [alone.source.info(n).shape for n in full.source.names()] == [
        full.source.info(n).shape for n in full.source.names()
    ]
    assert alone.metadata == full.metadata
    with pytest.raises(CheckpointError, match="configuration only"):
        alone.source.load("token_embd.weight")


def test_tied_lm_head_is_not_stored(tiny_text) -> None:
    assert "output.weight" not in open_hf(tiny_text("llama-tied")).source.names()


def test_shifted_norms_keep_float32(tiny_text) -> None:
    directory = tiny_text("gemma3-period-3")
    source = open_hf(directory).source
    stored = load_file(directory / "model.safetensors")["model.norm.weight"]
    assert source.info("output_norm.weight").dtype == "F32"
    assert torch.equal(source.load("output_norm.weight"), stored + 1)


def test_missing_tensor_is_named(deepseek_v3: Path, tmp_path: Path) -> None:
    name = "model.layers.2.mlp.experts.6.up_proj.weight"
    with pytest.raises(CheckpointError, match=r"lacks 1 tensors.*experts\.6\.up_proj"):
        open_hf(edited_weights(deepseek_v3, tmp_path / "missing", lambda tensors: tensors.pop(name)))


def test_unknown_tensor_is_refused(deepseek_v3: Path, tmp_path: Path) -> None:
    def add_bias(tensors: dict[str, torch.Tensor]) -> None:
        tensors["model.layers.0.self_attn.o_proj.bias"] = torch.ones(256)

    with pytest.raises(CheckpointError, match=r"o_proj\.bias.*--base-gguf"):
        open_hf(edited_weights(deepseek_v3, tmp_path / "unknown", add_bias))


def test_nan_names_the_tensor(deepseek_v3: Path, tmp_path: Path) -> None:
    def poison(tensors: dict[str, torch.Tensor]) -> None:
        tensors["model.layers.1.mlp.experts.2.down_proj.weight"][0, 0] = torch.nan

    source = open_hf(edited_weights(deepseek_v3, tmp_path / "nan", poison)).source
    source.load("blk.1.ffn_down_exps.weight", 1)
    with pytest.raises(CheckpointError, match=r"experts\.2\.down_proj.*NaN"):
        source.load("blk.1.ffn_down_exps.weight")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"hidden_size": 128}, "shape .* calls for"),
        ({"rms_norm_eps": float("nan")}, "rms_norm_eps"),
        ({"vocab_size": "many"}, "vocab_size"),
        ({"hidden_act": "gelu"}, "hidden_act.*silu"),
        ({"rope_interleave": False}, "rope_interleave"),
        ({"quantization_config": {"quant_method": "fp8"}}, "stored as floats.*take `quantization_config` out"),
        ({"rope_parameters": {"rope_type": "proportional", "rope_theta": 10000.0}}, "rope scaling `proportional`"),
        (
            {
                "rope_parameters": {
                    "rope_type": "yarn",
                    "factor": 4.0,
                    "rope_theta": 10000.0,
                    "original_max_position_embeddings": 256,
                }
            },
            "mscale_all_dim",
        ),
    ],
    ids=["shape", "nan", "type", "activation", "rope-layout", "quantized", "other-rope", "yarn-mscale"],
)
def test_configurations_that_would_differ_are_refused(
    deepseek_v3: Path, tmp_path: Path, changes: dict[str, object], message: str
) -> None:
    with pytest.raises(CheckpointError, match=message):
        open_hf(edited_config(deepseek_v3, tmp_path / "edited", lambda config: config.update(changes)))


@pytest.mark.parametrize(
    ("name", "changes", "message"),
    [
        ("qwen3-moe", {"norm_topk_prob": False}, "norm_topk_prob.*True"),
        ("qwen2-moe", {"mlp_only_layers": [0]}, "mlp_only_layers"),
        ("qwen2", {"use_sliding_window": True}, "use_sliding_window"),
        ("gemma3-period-3", {"query_pre_attn_scalar": 100}, "query_pre_attn_scalar"),
        ("gemma3-period-3", {"layer_types": ["full_attention", "sliding_attention"] * 2}, "no fixed period"),
    ],
)
def test_variants_outside_llama_cpps_graphs_are_refused(
    name: str, changes: dict[str, object], message: str, tmp_path: Path
) -> None:
    from transformers import AutoConfig

    model_type, differences = TINY[name]
    AutoConfig.for_model(model_type, **{"vocab_size": 256, **differences}).save_pretrained(tmp_path)
    open_config(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, **changes}))
    with pytest.raises(CheckpointError, match=message):
        open_config(tmp_path)


def test_sliding_window_of_mistral_is_reported(tmp_path: Path) -> None:
    from transformers import AutoConfig

    AutoConfig.for_model("mistral", sliding_window=4096).save_pretrained(tmp_path)
    with pytest.warns(UserWarning, match="up to 4096 tokens"):
        open_config(tmp_path)


def test_dynamic_scaling_is_told_and_is_none_within_the_context(deepseek_v3: Path, tmp_path: Path) -> None:
    dynamic = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10000.0}
    edited = edited_config(deepseek_v3, tmp_path / "dynamic", lambda config: config.update(rope_parameters=dynamic))
    with pytest.warns(UserWarning, match="`dynamic` changes the angles of texts beyond 1024 tokens"):
        model = open_config(edited)
    keys, expected = metadata(model), metadata(open_config(deepseek_v3))
    assert {key: keys[key] for key in expected if "rope" in key} == {k: v for k, v in expected.items() if "rope" in k}
    tokens = random_tokens()[:40]
    assert torch.equal(hf_logits(edited, tokens), hf_logits(deepseek_v3, tokens))


@pytest.mark.parametrize("method", ["greedy", "group_limited_greedy"])
def test_expert_groups_of_v2(method: str, tmp_path: Path) -> None:
    from transformers import AutoConfig

    sizes = {"n_group": 8, "topk_group": 3, "num_experts_per_tok": 6, "topk_method": method}
    AutoConfig.for_model("deepseek_v2", **sizes).save_pretrained(tmp_path)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        keys = metadata(open_config(tmp_path))
    assert keys["deepseek2.expert_group_count"] == (1 if method == "greedy" else 8)
    assert any("ranks expert groups" in str(warning.message) for warning in caught) == (method != "greedy")


@pytest.mark.parametrize(
    ("content", "message"),
    [(None, "There is no"), ('{"model_type": "lla', "not valid JSON"), ("{}", "no `model_type`"), ("[]", "JSON list")],
    ids=["missing", "truncated", "empty", "list"],
)
def test_damaged_configuration(content: str | None, message: str, tmp_path: Path) -> None:
    if content is not None:
        (tmp_path / "config.json").write_text(content)
    with pytest.raises(CheckpointError, match=message):
        open_hf(tmp_path)


def test_unknown_architecture_names_the_way_out(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "gpt2"}')
    with pytest.raises(CheckpointError, match=r"gpt2.*--llama-cpp DIR.*fetch-llama-cpp.*--base-gguf"):
        open_hf(tmp_path)
