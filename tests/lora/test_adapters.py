"""LoRA on packed models: against stock PEFT on the decoded weights, through training and files."""

import copy
import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

import dynquant
from dynquant.errors import AdapterError
from dynquant.lora.saved import SavedAdapter
from dynquant.packed.layers import choose_layout
from tests.helpers.adapters import TOKENS, bytes_of, logits, randomized, train, trainable
from tests.helpers.representatives import represented_by
from tests.helpers.tiny_models import mean_kl

peft = pytest.importorskip("peft", reason="peft is not installed")
from dynquant.lora import add_adapter, load_adapter  # noqa: E402


def test_gradients_are_those_of_a_dense_float64_model(model, dense, saved):
    ours = load_adapter(copy.deepcopy(model), saved, is_trainable=True)
    theirs = peft.PeftModel.from_pretrained(copy.deepcopy(dense).double(), saved, is_trainable=True).double()
    losses = []
    for one in (ours, theirs):
        losses.append(one(TOKENS, labels=TOKENS).loss)
        losses[-1].backward()
    assert losses[0].item() == pytest.approx(losses[1].item(), rel=1e-5)
    expected = trainable(theirs)
    kinds = set()
    for name, parameter in trainable(ours).items():
        want = expected[name].grad
        error = (parameter.grad.double() - want).norm() / want.norm()
        assert error < 1e-4, name
        kinds.add(name.split(".lora_")[0].split("layers.")[1].partition(".")[2])
    assert trainable(ours).keys() == expected.keys()
    assert kinds >= {"mlp.experts", "mlp.experts.base_layer", "mlp.shared_experts.up_proj", "mlp.down_proj",
                     "self_attn.kv_b_proj", "self_attn.q_a_proj"}  # fmt: skip


def test_an_adapter_made_here_works_on_the_original_model_and_back(model, dense, saved, tmp_path):
    ours = load_adapter(copy.deepcopy(model), saved)
    theirs = peft.PeftModel.from_pretrained(copy.deepcopy(dense), saved)
    torch.testing.assert_close(logits(ours), logits(theirs), atol=2e-4, rtol=1e-4)
    assert mean_kl(logits(model)[0], logits(ours)[0]) > 1e-3
    half = peft.PeftModel.from_pretrained(copy.deepcopy(dense).bfloat16(), saved)
    assert mean_kl(logits(ours)[0], logits(half)[0]) < 5e-3
    half.save_pretrained(tmp_path / "again")
    again = load_adapter(copy.deepcopy(model), tmp_path / "again")
    first, second = (peft.get_peft_model_state_dict(one) for one in (ours, again))
    assert all(torch.equal(first[name].bfloat16(), second[name].bfloat16()) for name in first)
    assert first.keys() == second.keys()


def test_targets_of_stock_peft_work_both_ways(model, dense, tmp_path):
    """Rank-stabilised, another rank for the fused gate and up, and only some targets; made on the dense model."""
    config = peft.LoraConfig(
        r=4, lora_alpha=6, use_rslora=True, target_modules=["o_proj"], rank_pattern={"experts.gate_up_proj": 8},
        target_parameters=["experts.gate_up_proj"], init_lora_weights="gaussian",
    )  # fmt: skip
    made = randomized(peft.get_peft_model(copy.deepcopy(dense), config))
    made.save_pretrained(tmp_path)
    ours = peft.PeftModel.from_pretrained(copy.deepcopy(model), tmp_path)
    torch.testing.assert_close(logits(ours), logits(made), atol=2e-4, rtol=1e-4)
    again = peft.get_peft_model(copy.deepcopy(model), copy.deepcopy(config))
    assert trainable(again).keys() == trainable(made).keys()


@pytest.mark.parametrize("name", represented_by(("packed_tiny",), ("packed_tiny", "packed_moe")))
def test_training_lowers_the_loss_and_leaves_the_base_as_it_is(name, tmp_path, request):
    torch.manual_seed(0)
    model = dynquant.load(request.getfixturevalue(name).gguf)
    base = copy.deepcopy(model)
    before = bytes_of(base)
    adapted = add_adapter(base, rank=4, alpha=8)
    assert all("lora_" in name for name in trainable(adapted))
    torch.testing.assert_close(logits(adapted), logits(model))  # B is zero
    losses = train(adapted, 20)
    assert losses[-1] < losses[0] - 2
    assert bytes_of(base) == before
    expected = logits(adapted)
    adapted.save_pretrained(tmp_path)
    assert torch.equal(logits(load_adapter(copy.deepcopy(model), tmp_path)), expected)
    with adapted.disable_adapter():
        torch.testing.assert_close(logits(adapted), logits(model))


def test_checkpointing_gives_the_same_gradients(model, saved):
    plain, checkpointed = (load_adapter(copy.deepcopy(model), saved, is_trainable=True).train() for _ in range(2))
    checkpointed.gradient_checkpointing_enable()
    checkpointed.enable_input_require_grads()
    for one in (plain, checkpointed):
        one(TOKENS, labels=TOKENS, use_cache=False).loss.backward()
    for name, parameter in trainable(plain).items():
        torch.testing.assert_close(trainable(checkpointed)[name].grad, parameter.grad, atol=1e-6, rtol=1e-4)


def test_half_precision_adapters_on_a_half_precision_model(packed_tiny):
    half = dynquant.load(packed_tiny.gguf, dtype=torch.bfloat16)
    adapted = add_adapter(half, rank=4, dtype=torch.bfloat16)
    assert {p.dtype for p in trainable(adapted).values()} == {torch.bfloat16}
    randomized(adapted)
    with_float32 = randomized(add_adapter(dynquant.load(packed_tiny.gguf, dtype=torch.bfloat16), rank=4))
    assert {p.dtype for p in trainable(with_float32).values()} == {torch.float32}
    for one in (adapted, with_float32):
        loss = one(TOKENS, labels=TOKENS).loss
        loss.backward()
        assert all(p.grad.isfinite().all() for p in trainable(one).values())
    with torch.autocast("cpu", torch.bfloat16):
        train(with_float32, 1)
    assert logits(adapted).isfinite().all()


def planar(packed_tiny, dtype: torch.dtype):
    """The packed model on the GPU, its bytes in the layout of the kernels."""
    base = dynquant.load(packed_tiny.gguf, dtype=dtype).cuda()
    choose_layout(base)
    return base


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("dtype", "bound"),
    [(torch.float32, 1e-3), (torch.bfloat16, 0.3)],  # these random weights amplify rounding: 0.1 on a CPU in bfloat16
)
def test_gradients_on_a_gpu_are_those_of_the_cpu(packed_tiny, model, saved, cuda, dtype, bound):
    exact = load_adapter(copy.deepcopy(model), saved, is_trainable=True)
    exact(TOKENS, labels=TOKENS).loss.backward()
    adapted = load_adapter(planar(packed_tiny, dtype), saved, is_trainable=True)
    tokens = TOKENS.cuda()
    with torch.autocast("cuda", torch.bfloat16, enabled=dtype is torch.bfloat16):
        adapted(tokens, labels=tokens).loss.backward()
    for name, parameter in trainable(exact).items():
        error = (trainable(adapted)[name].grad.cpu() - parameter.grad).norm() / parameter.grad.norm()
        assert error < bound, name


@pytest.mark.gpu
def test_training_on_a_gpu(packed_tiny, saved, cuda, tmp_path):
    """bfloat16 products with the packed planes, float32 adapters."""
    base = planar(packed_tiny, torch.bfloat16)
    before = bytes_of(base)
    adapted = load_adapter(base, saved, is_trainable=True)
    tokens = TOKENS.cuda()
    with torch.autocast("cuda", torch.bfloat16):
        losses = train(adapted, 20, tokens=tokens)
    assert losses[-1] < losses[0] - 2
    assert bytes_of(base) == before
    adapted.save_pretrained(tmp_path)
    again = load_adapter(planar(packed_tiny, torch.bfloat16), tmp_path)
    assert torch.equal(logits(again, tokens), logits(adapted, tokens))


def test_norms_and_routers_are_trained_and_saved_on_request(model, tmp_path):
    adapted = add_adapter(copy.deepcopy(model), rank=2, train_norms=True, train_router=True)
    moved = {name for name in trainable(adapted) if "lora_" not in name}
    assert any("mlp.gate." in name for name in moved) and any("input_layernorm" in name for name in moved)
    assert all("norm" in name or ".gate." in name for name in moved)
    before = {name: trainable(adapted)[name].detach().clone() for name in moved}
    train(adapted, 2)
    assert all(not torch.equal(trainable(adapted)[name], before[name]) for name in moved)
    expected = logits(adapted)
    adapted.save_pretrained(tmp_path)
    assert torch.equal(logits(load_adapter(copy.deepcopy(model), tmp_path)), expected)


def test_two_adapters_live_beside_each_other(model, saved, tmp_path):
    randomized(add_adapter(copy.deepcopy(model), rank=2), std=0.03).save_pretrained(tmp_path)
    alone = [logits(load_adapter(copy.deepcopy(model), directory)) for directory in (saved, tmp_path)]
    both = load_adapter(copy.deepcopy(model), saved)
    both.load_adapter(tmp_path, "second")
    torch.testing.assert_close(logits(both), alone[0])
    both.set_adapter("second")
    torch.testing.assert_close(logits(both), alone[1])


def test_what_cannot_be_adapted_is_refused(model, dense, saved, tmp_path):
    with pytest.raises(AdapterError, match="no packed weights"):
        add_adapter(copy.deepcopy(dense))
    with pytest.raises(AdapterError, match="no linear layer `query_proj`"):
        add_adapter(copy.deepcopy(model), targets=("query_proj", "o_proj"))
    with pytest.raises(AdapterError, match="`rank` is 0"):
        add_adapter(copy.deepcopy(model), rank=0)
    with pytest.raises(AdapterError, match="use_dora"):
        peft.get_peft_model(copy.deepcopy(model), peft.LoraConfig(target_modules=["o_proj"], use_dora=True))
    with pytest.raises(AdapterError, match="pissa"):
        config = peft.LoraConfig(target_modules=["o_proj"], init_lora_weights="pissa")
        peft.get_peft_model(copy.deepcopy(model), config)
    with pytest.raises(AdapterError, match="holds no adapter_config"):
        load_adapter(copy.deepcopy(model), tmp_path)


@pytest.mark.parametrize("damage", ["missing", "extra", "shape", "cut"])
def test_a_damaged_adapter_is_refused(model, saved, tmp_path, damage):
    shutil.copy(saved / "adapter_config.json", tmp_path)
    tensors = load_file(saved / "adapter_model.safetensors")
    name = next(name for name in tensors if "experts.lora_A" in name)
    if damage == "missing":
        del tensors[name]
    elif damage == "extra":
        tensors[name.replace("layers.1.", "layers.99.")] = tensors[name].clone()
    elif damage == "shape":
        tensors[name] = tensors[name][:, :-1].clone()
    file = tmp_path / "adapter_model.safetensors"
    save_file(tensors, file)
    if damage == "cut":
        file.write_bytes(file.read_bytes()[:-10])
    with pytest.raises(AdapterError, match="damaged" if damage == "cut" else "another model"):
        load_adapter(copy.deepcopy(model), tmp_path)


def test_a_pickle_is_never_opened(model, saved, tmp_path, monkeypatch):
    shutil.copy(saved / "adapter_config.json", tmp_path)
    (tmp_path / "adapter_model.bin").write_bytes(b"a pickle")
    monkeypatch.setattr(torch, "load", lambda *_, **__: pytest.fail("torch.load was called"))
    with pytest.raises(AdapterError, match=r"adapter_model\.bin is there, which may be a pickle"):
        load_adapter(copy.deepcopy(model), tmp_path)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("r", "16"), ("r", -1), ("r", 0), ("r", 10**9), ("r", None), ("lora_alpha", "x"), ("lora_alpha", float("inf")),
        ("lora_alpha", -2), ("target_modules", 5), ("target_modules", [1]), ("rank_pattern", {"q": "x"}),
        ("alpha_pattern", []), ("alpha_pattern", {"(": 3}), ("bias", "some"), ("peft_type", "IA3"), ("use_rslora", 7),
        ("modules_to_save", "lm_head"), ("init_lora_weights", "pissa_niter_4"),
    ],
)  # fmt: skip
def test_a_configuration_of_a_wrong_kind_is_refused_by_field(model, saved, tmp_path, field, value):
    shutil.copytree(saved, tmp_path, dirs_exist_ok=True)
    path = tmp_path / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), field: value}))
    named = {
        "alpha_pattern": r"alpha_pattern|the pattern `\(`",
        "peft_type": "method 'IA3'",
        "lora_alpha": "lora_alpha|JSON",
    }
    for read in (lambda: load_adapter(copy.deepcopy(model), tmp_path), lambda: SavedAdapter(tmp_path)):
        with pytest.raises(AdapterError, match=named.get(field, field)):
            read()


@pytest.mark.parametrize("field", ["target_modules", "alpha_pattern", "rank_pattern"])
def test_a_pattern_that_keeps_pythons_matcher_busy_for_years_is_followed_at_once(model, dense, tmp_path, field):
    """The adapter is one of stock PEFT with names in place of patterns; both give the same logits."""
    config = peft.LoraConfig(
        r=4,
        lora_alpha=6,
        target_modules=["o_proj"],
        **({} if field == "target_modules" else {field: {"layers.1.self_attn.o_proj": 8}}),
    )
    adapted = randomized(peft.get_peft_model(copy.deepcopy(dense), config))
    adapted.save_pretrained(tmp_path)
    path, slow = tmp_path / "adapter_config.json", "(.?){60}"
    content = json.loads(path.read_text())
    content[field] = f"{slow}.*o_proj" if field == "target_modules" else {f"{slow}layers.1.{slow}self_attn.o_proj": 8}
    path.write_text(json.dumps(content))
    ours = load_adapter(copy.deepcopy(model), tmp_path)
    torch.testing.assert_close(logits(ours), logits(adapted), atol=2e-4, rtol=1e-4)
    if field == "alpha_pattern":
        assert SavedAdapter(tmp_path).scaling("model.layers.1.self_attn.o_proj", 4) == 2


def test_an_adapted_head_comes_with_a_copy_of_its_base_which_is_ignored(model, dense, tmp_path):
    adapted = randomized(peft.get_peft_model(copy.deepcopy(dense), peft.LoraConfig(target_modules=["lm_head"], r=4)))
    adapted.save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    assert "base_model.model.lm_head.base_layer.weight" in tensors
    ours = load_adapter(copy.deepcopy(model), tmp_path)
    torch.testing.assert_close(logits(ours), logits(adapted), atol=2e-4, rtol=1e-4)
    randomized(ours).save_pretrained(tmp_path / "packed")
    again = load_adapter(copy.deepcopy(model), tmp_path / "packed")
    torch.testing.assert_close(logits(again), logits(ours))
    tensors["base_model.model.lm_head.base_layer.weight"] *= -1
    save_file(tensors, tmp_path / "adapter_model.safetensors")
    with pytest.raises(AdapterError, match="another model, or a resized vocabulary"):
        load_adapter(copy.deepcopy(model), tmp_path)


def test_whole_weights_take_the_place_of_packed_ones(model, dense, tmp_path):
    """`modules_to_save` as PEFT does it: also where nothing was changed, and where the base is packed."""
    config = peft.LoraConfig(target_modules=["o_proj"], r=4, modules_to_save=["lm_head", "embed_tokens"])
    adapted = randomized(peft.get_peft_model(copy.deepcopy(dense), config))
    with torch.no_grad():
        trainable(adapted)["base_model.model.lm_head.modules_to_save.default.weight"].mul_(-1)
    adapted.save_pretrained(tmp_path)
    base = copy.deepcopy(model)
    with pytest.warns(UserWarning, match=r"holds all of `lm_head`, which runs in torch\.float32 in place of Q8_0"):
        ours = load_adapter(base, tmp_path)
    torch.testing.assert_close(logits(ours), logits(adapted), atol=2e-4, rtol=1e-4)
    with ours.disable_adapter():
        torch.testing.assert_close(logits(ours), logits(model), atol=2e-4, rtol=1e-4)
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    tensors["base_model.model.lm_head.weight"] = tensors["base_model.model.lm_head.weight"][:-8].contiguous()
    save_file(tensors, tmp_path / "adapter_model.safetensors")
    with pytest.raises(
        AdapterError, match=r"whole weight `.*lm_head\.weight` \[8184, 256\].*merge it into the original"
    ):
        load_adapter(copy.deepcopy(model), tmp_path)


def test_an_embedding_that_was_saved_unasked_is_a_copy(model, dense, tmp_path):
    adapted = randomized(peft.get_peft_model(copy.deepcopy(dense), peft.LoraConfig(target_modules=["o_proj"], r=4)))
    adapted.save_pretrained(tmp_path, save_embedding_layers=True)
    assert "base_model.model.model.embed_tokens.weight" in load_file(tmp_path / "adapter_model.safetensors")
    ours = load_adapter(copy.deepcopy(model), tmp_path)
    torch.testing.assert_close(logits(ours), logits(adapted), atol=2e-4, rtol=1e-4)


@pytest.mark.parametrize("kind", ["int8", "nan"])
def test_factors_that_are_no_finite_floats_are_refused(kind, model, saved, tmp_path):
    shutil.copytree(saved, tmp_path, dirs_exist_ok=True)
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    key = next(key for key in tensors if "o_proj.lora_A" in key)
    tensors[key] = (100 * tensors[key]).to(torch.int8) if kind == "int8" else tensors[key] * float("nan")
    save_file(tensors, tmp_path / "adapter_model.safetensors")
    words = "as I8, and the scales" if kind == "int8" else "NaN or infinite"
    for read in (lambda: load_adapter(copy.deepcopy(model), tmp_path), lambda: SavedAdapter(tmp_path).load(key)):
        with pytest.raises(AdapterError, match=words):
            read()


@pytest.mark.parametrize(
    ("change", "way_out"),
    [
        ({"alpha_pattern": {"(?!lm_head).*o_proj": 3}}, "without look-ahead, look-behind and back references"),
        ({"target_modules": r".*(?<=self_attn)\.o_proj"}, "without look-ahead, look-behind and back references"),
        ({"use_dora": True}, "`merge_and_unload` of PEFT"),
        ({"peft_type": "LOHA"}, "`merge_and_unload` of PEFT"),
    ],
)
def test_what_cannot_be_read_is_refused_with_a_way_out(change, way_out, model, saved, tmp_path):
    path = shutil.copytree(saved, tmp_path, dirs_exist_ok=True) / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    for read in (lambda: load_adapter(copy.deepcopy(model), tmp_path), lambda: SavedAdapter(tmp_path)):
        with pytest.raises(AdapterError, match=way_out):
            read()
