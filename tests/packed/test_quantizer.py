"""Packed checkpoints in transformers: loading, saving, generating, compiling, adapters, and what is refused."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import dynquant
from dynquant.analysis.bench.random_models import random_packed
from dynquant.encoding.stream import load_encoder
from dynquant.errors import CheckpointError
from dynquant.packed.layers import PackedModule, set_layout
from tests.helpers.edited_checkpoints import edited_config, edited_weights
from tests.helpers.exports import export_safetensors

TOKENS = torch.randint(1, 8000, (1, 64), generator=torch.Generator().manual_seed(0))


def from_pretrained(directory: Path, **options):
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(directory, **{"dtype": torch.float32} | options)


@pytest.fixture(scope="module")
def tiny(packed_tiny) -> Path:
    return packed_tiny.directory


@pytest.fixture(scope="module")
def model(tiny):
    return from_pretrained(tiny)


@pytest.fixture(scope="module")
def logits(model):
    with torch.inference_mode():
        return model(TOKENS).logits


@pytest.mark.nightly
@pytest.mark.parametrize("first", ["dynquant", "transformers.quantizers.auto", "peft"])
def test_either_import_order_registers_the_method(first):
    code = (
        f"import {first}, sys\n"
        "import dynquant\n"
        "import peft\n"
        "from transformers.quantizers.auto import AUTO_QUANTIZER_MAPPING, AUTO_QUANTIZATION_CONFIG_MAPPING\n"
        "print('dynquant' in AUTO_QUANTIZER_MAPPING, 'dynquant' in AUTO_QUANTIZATION_CONFIG_MAPPING)\n"
        "print(peft.PEFT_TYPE_TO_TUNER_MAPPING[peft.PeftType.LORA].__name__)\n"
        "print([f for f in sys.meta_path if type(f).__module__ == 'dynquant.registration'])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd="/")
    assert done.stdout.split("\n")[:3] == ["True True", "PackedLoraModel", "[]"]


def test_memory_is_the_packed_bytes_and_small_buffers(packed_moe):
    model = from_pretrained(packed_moe.directory)
    with torch.inference_mode():
        model(TOKENS[:, :8])  # nothing decoded may stay
    tensors = [*model.parameters(), *model.buffers()]
    resident = sum({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}.values())
    stored = load_file(packed_moe.directory / "model.safetensors").values()
    packed = sum(t.nbytes for t in stored if t.dtype == torch.uint8)
    floats = 4 * sum(t.numel() for t in stored if t.dtype != torch.uint8)  # the model runs in float32
    assert packed + floats <= resident < packed + floats + 1024
    assert all(p.dtype == torch.uint8 for n, p in model.named_parameters() if "q_a_proj" in n or "experts.gate" in n)


def test_saving_gives_back_every_byte(packed_moe, tmp_path):
    model = from_pretrained(packed_moe.directory)
    model.save_pretrained(tmp_path / "again", max_shard_size="4MB")
    shards = sorted((tmp_path / "again").glob("*.safetensors"))
    assert len(shards) > 1
    saved = {name: tensor for shard in shards for name, tensor in load_file(shard).items()}
    stored = load_file(packed_moe.directory / "model.safetensors")
    assert saved.keys() == stored.keys()
    for name, tensor in stored.items():
        if tensor.dtype == torch.uint8:
            assert torch.equal(saved[name], tensor), name
        else:
            assert torch.equal(saved[name].float(), tensor.float()), name
    first, second = (
        json.loads((folder / "config.json").read_text())["quantization_config"]
        for folder in (packed_moe.directory, tmp_path / "again")
    )
    assert first == second


def test_a_saved_model_loads_with_the_same_logits(model, logits, tmp_path):
    model.save_pretrained(tmp_path)
    again = from_pretrained(tmp_path, device_map="cpu")
    with torch.inference_mode():
        assert torch.equal(again(TOKENS).logits, logits)
    assert dict(again.named_parameters())["lm_head.weight"].dtype == torch.uint8


def test_a_device_map_may_leave_layers_on_the_disk(tiny, logits, tmp_path):
    pytest.importorskip("accelerate", reason="accelerate is not installed")
    places = {"model.embed_tokens": "cpu", "model.norm": "cpu", "model.rotary_emb": "cpu", "lm_head": "disk"}
    layers = {f"model.layers.{i}": "disk" if i == 1 else "cpu" for i in range(3)}
    model = from_pretrained(tiny, device_map=places | layers, offload_folder=tmp_path)
    with torch.inference_mode():
        assert torch.equal(model(TOKENS).logits, logits)


def test_bfloat16_is_for_activations_only(tiny, model):
    half = from_pretrained(tiny, dtype=torch.bfloat16)
    assert half.dtype == torch.bfloat16
    for name, parameter in model.named_parameters():
        if parameter.dtype == torch.uint8:
            assert torch.equal(half.get_parameter(name), parameter), name
    with torch.inference_mode():
        assert half(TOKENS).logits.dtype == torch.bfloat16


def test_generate_continues_text_as_the_whole_forward_pass_does(tiny, model):
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(tiny)
    prompt = tokenizer("The heart pumps blood", return_tensors="pt")
    ids = model.generate(**prompt, max_new_tokens=8, do_sample=False)
    start = prompt["input_ids"].shape[1]
    with torch.inference_mode():
        greedy = model(ids).logits[0, start - 1 : -1].argmax(-1)
    assert torch.equal(ids[0, start:], greedy)


@pytest.mark.nightly
def test_compiles_without_a_graph_break(model, logits):
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    with torch.inference_mode():
        torch.testing.assert_close(compiled(TOKENS, use_cache=False).logits, logits, atol=1e-3, rtol=1e-3)


@pytest.mark.nightly
@pytest.mark.parametrize("shape", ["llama", "qwen3_moe", "deepseek_v3"])
def test_generate_with_a_static_cache_compiles_one_graph(shape, model):
    from torch._dynamo.utils import counters
    from transformers import AutoConfig, CompileConfig

    if shape != "deepseek_v3":
        sizes = {"vocab_size": 128, "hidden_size": 256, "intermediate_size": 256, "num_hidden_layers": 2}
        sizes |= {"num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 256} if "moe" in shape else {}
        config = AutoConfig.for_model(shape, num_attention_heads=4, num_key_value_heads=2, **sizes)
        torch.manual_seed(0)
        model = random_packed(config, "experts=IQ2_XXS,rest=Q4_K", device="cpu")
    torch._dynamo.reset()
    counters.clear()
    compiled = CompileConfig(fullgraph=True, backend="aot_eager", mode=None)
    compiled._compile_all_devices = True  # transformers compiles on GPUs only
    ids = torch.arange(20).view(2, 10)
    call = {"attention_mask": torch.ones_like(ids), "max_new_tokens": 6, "do_sample": False, "pad_token_id": 0}
    expected = model.generate(ids, **call)
    for _ in range(2):  # a second cache compiles nothing
        tokens = model.generate(ids, cache_implementation="static", compile_config=compiled, **call)
        assert torch.equal(tokens, expected)
    assert counters["stats"]["unique_graphs"] == 1 and not counters["graph_break"]


def test_lora_trains_on_packed_weights(tiny):
    peft = pytest.importorskip("peft", reason="peft is not installed")
    model = from_pretrained(tiny)
    frozen = {name: tensor.clone() for name, tensor in model.state_dict().items() if tensor.dtype == torch.uint8}
    torch.manual_seed(0)
    config = peft.LoraConfig(r=4, target_modules=["q_b_proj", "o_proj", "kv_b_proj", "lm_head", "down_proj"])
    adapted = peft.get_peft_model(model, config)
    optimizer = torch.optim.Adam([p for p in adapted.parameters() if p.requires_grad], lr=5e-3)
    losses = []
    for _ in range(5):
        loss = adapted(TOKENS, labels=TOKENS).loss
        losses.append(loss.item())
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert losses[-1] < losses[0] - 0.3
    state = adapted.base_model.model.state_dict()
    for name, tensor in frozen.items():
        stem, _, part = name.rpartition(".")
        assert torch.equal(state.get(name, state.get(f"{stem}.base_layer.{part}")), tensor), name


@pytest.mark.parametrize(
    ("types", "more", "message"),
    [
        ({"model.layers.0.mlp.up_proj.weight": "Q9_K"}, {}, r"model\.layers\.0\.mlp\.up_proj\.weight.*'Q9_K'"),
        ({"model.x.weight": "Q4_K"}, {}, r"model\.x\.weight.*DeepseekV3ForCausalLM"),
        ({}, {"version": 2}, "version 2"),
    ],
    ids=["unknown type", "no such place", "later format"],
)
def test_what_a_configuration_may_not_say_is_named(packed_moe, tmp_path, types, more, message):
    def edit(config):
        config["quantization_config"].update(more)
        config["quantization_config"]["types"].update(types)

    with pytest.raises(CheckpointError, match=message):
        from_pretrained(edited_config(packed_moe.directory, tmp_path / "bad", edit))


def test_a_file_that_is_cut_short_names_the_tensor(packed_moe, tmp_path):
    path = shutil.copytree(packed_moe.directory, tmp_path / "cut")
    file = path / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(CheckpointError, match=r"truncated: `(model|lm_head)\S+`"):
        from_pretrained(path)


@pytest.mark.parametrize("kind", ["missing", "short", "float"])
def test_a_damaged_tensor_is_named(packed_moe, tmp_path, kind):
    key = "model.layers.3.mlp.experts.up_proj"

    def damage(tensors):
        if kind == "missing":
            del tensors[key]
        else:
            tensors[key] = tensors[key][:, :, :-18].clone() if kind == "short" else torch.zeros(tensors[key].shape)

    path = edited_weights(packed_moe.directory, tmp_path / kind, damage)
    with pytest.raises(CheckpointError, match=r"model\.layers\.3\.mlp\.experts\.up_proj"):
        from_pretrained(path)


def test_transformers_cannot_quantize_with_it_while_loading(small_moe):
    from dynquant.packed.quantizer import DynquantConfig

    with pytest.raises(CheckpointError, match="dynquant export"):
        DynquantConfig()
    with pytest.raises((ValueError, CheckpointError)):
        from_pretrained(small_moe, quantization_config=DynquantConfig(types={}))


def test_shards_load_and_tied_heads_share_their_bytes(tiny_text, tmp_path):
    from dynquant.families.open import open_model
    from dynquant.recipes.build_plan import plan_from_types

    opened = open_model(tiny_text("llama-tied"))
    types = {name: ("Q8_0", "test") for name in opened.source.names() if len(opened.source.info(name).shape) == 2}
    plan = plan_from_types(opened, types, recipe="test")
    out = tmp_path / "out"
    export_safetensors(opened, plan, None, out, encoder=load_encoder("ggml"), shard_max_bytes=2_500_000)
    assert len(list(out.glob("model-*.safetensors"))) == 2
    model = from_pretrained(out)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert (
        isinstance(model.lm_head, PackedModule)
        and "lm_head.weight" not in json.loads((out / "model.safetensors.index.json").read_text())["weight_map"]
    )
    set_layout(model, "planes")  # as on a GPU: files hold blocks all the same
    model.save_pretrained(tmp_path / "again")
    set_layout(model, "blocks")
    again = from_pretrained(tmp_path / "again")
    with torch.inference_mode():
        assert torch.equal(again(TOKENS).logits, model(TOKENS).logits)


def test_load_is_found_lazily():
    assert callable(dynquant.load)
    with pytest.raises(AttributeError, match="nothing"):
        _ = dynquant.nothing
