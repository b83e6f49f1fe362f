"""LoRA on packed models: against stock PEFT on the decoded weights, through training, files and merging."""

import copy
import hashlib

import pytest
import torch

import dynquant
from dynquant.checkpoints.gguf_source import GGUFSource
from dynquant.errors import AdapterError, StatsError
from dynquant.packed.layers import PackedExperts, PackedModule, choose_layout, set_layout
from dynquant.running.live_weights import LiveWeights
from dynquant.running.load import load_hf
from tests.helpers.packed_models import export_both
from tests.helpers.tiny_models import mean_kl, save_tiny

peft = pytest.importorskip("peft", reason="peft is not installed")
from dynquant.lora import add_adapter, load_adapter, merge, start_from_residual  # noqa: E402
from dynquant.lora.layers import PackedLoraExperts, grouped_low_rank  # noqa: E402

TOKENS = torch.randint(1, 8000, (2, 24), generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def tiny(small_moe, tmp_path_factory):
    """A packed DeepSeek-V3 of three layers: MLA, a dense layer, routed and shared experts; many quant types."""
    folder = tmp_path_factory.mktemp("tiny")
    return export_both(save_tiny("deepseek-v3", folder / "float", small_moe), folder)


@pytest.fixture(scope="module")
def model(tiny):
    """Tests take copies."""
    return dynquant.load(tiny.gguf)


@pytest.fixture(scope="module")
def dense(tiny):
    """The original architecture with the decoded weights, in transformers' fused experts."""
    reference, source = load_hf(tiny.model), GGUFSource(tiny.gguf)
    reference.set_experts_implementation("eager")  # the others do not take float64
    live = LiveWeights(tiny.model, reference)
    for name in live.names():
        live.write(name, source.load(name))
    return reference


@pytest.fixture(scope="module")
def saved(model, tmp_path_factory):
    """A saved adapter on everything, no longer zero."""
    directory = tmp_path_factory.mktemp("adapter")
    randomized(add_adapter(copy.deepcopy(model), rank=4, alpha=8)).save_pretrained(directory)
    return directory


def randomized(adapted, std: float = 0.02):
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "lora_B" in name:
                parameter.copy_(std * torch.randn(parameter.shape, generator=generator))
    return adapted


def logits(model, tokens=TOKENS) -> torch.Tensor:
    with torch.no_grad():
        return model(tokens).logits.float()


def trainable(model) -> dict[str, torch.nn.Parameter]:
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


def bytes_of(model) -> str:
    digest = hashlib.sha256()
    for module in model.modules():
        if isinstance(module, PackedModule):
            for name in module.types:
                digest.update(getattr(module, name).detach().cpu().reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def train(adapted, steps: int, lr: float = 3e-3, tokens=TOKENS) -> list[float]:
    optimizer = torch.optim.AdamW(list(trainable(adapted).values()), lr=lr)
    losses = []
    for _ in range(steps):
        loss = adapted(tokens, labels=tokens).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


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


@pytest.mark.parametrize("name", ["tiny", "packed_moe"])
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


def test_half_precision_adapters_on_a_half_precision_model(tiny):
    half = dynquant.load(tiny.gguf, dtype=torch.bfloat16)
    adapted = add_adapter(half, rank=4, dtype=torch.bfloat16)
    assert {p.dtype for p in trainable(adapted).values()} == {torch.bfloat16}
    randomized(adapted)
    with_float32 = randomized(add_adapter(dynquant.load(tiny.gguf, dtype=torch.bfloat16), rank=4))
    assert {p.dtype for p in trainable(with_float32).values()} == {torch.float32}
    for one in (adapted, with_float32):
        loss = one(TOKENS, labels=TOKENS).loss
        loss.backward()
        assert all(p.grad.isfinite().all() for p in trainable(one).values())
    with torch.autocast("cpu", torch.bfloat16):
        train(with_float32, 1)
    assert logits(adapted).isfinite().all()


@pytest.mark.parametrize("family", ["deepseek-v3", "llama"])
def test_an_adapter_of_full_rank_starts_at_the_original(family, small_moe, tmp_path):
    """MLA's joined projection, stacked experts, rows that llama.cpp interleaves; what has no adapter stays as it is."""
    made = export_both(save_tiny(family, tmp_path / "float", small_moe), tmp_path)
    original, source = load_hf(made.model), GGUFSource(made.gguf)
    live = LiveWeights(made.model, original)
    for name in ("token_embd.weight", "output.weight"):
        live.write(name, source.load(name))
    adapted = add_adapter(dynquant.load(made.gguf), rank=512)
    packed = mean_kl(logits(original), logits(adapted))
    start_from_residual(adapted, made.model)
    assert mean_kl(logits(original), logits(adapted)) < 1e-5 and packed > 1e-3


def test_the_residual_start_is_the_best_of_its_rank(tiny, model):
    adapted = add_adapter(copy.deepcopy(model), rank=4)
    start_from_residual(adapted, tiny.model)
    layer = next(layer for layer in adapted.modules() if isinstance(layer, PackedLoraExperts))
    name = "gate_proj" if layer.parameter_name == "gate_up_proj" else "down_proj"
    experts = layer.experts
    original = tiny.model.source.load(f"blk.1.ffn_{name.removesuffix('_proj')}_exps.weight")
    a, b = layer.factors("default")
    delta = (layer.scaling["default"] * b @ a)[:, : original.shape[1]]
    residual = original - experts.dense(name, torch.float32)
    best = torch.linalg.svdvals(residual.double())[:, 4:].square().sum().sqrt()
    assert float((residual - delta).double().norm()) < 1.02 * float(best)


def test_another_model_is_no_original(tiny, model, small_moe):
    from dynquant.families.open import open_model

    with pytest.raises(AdapterError, match="Give the model that was quantized"):
        start_from_residual(add_adapter(copy.deepcopy(model), rank=4), open_model(small_moe))


def planar(tiny, dtype: torch.dtype):
    """The packed model on the GPU, its bytes in the layout of the kernels."""
    base = dynquant.load(tiny.gguf, dtype=dtype).cuda()
    choose_layout(base)
    return base


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("dtype", "bound"),
    [(torch.float32, 1e-3), (torch.bfloat16, 0.3)],  # these random weights amplify rounding: 0.1 on a CPU in bfloat16
)
def test_gradients_on_a_gpu_are_those_of_the_cpu(tiny, model, saved, cuda, dtype, bound):
    exact = load_adapter(copy.deepcopy(model), saved, is_trainable=True)
    exact(TOKENS, labels=TOKENS).loss.backward()
    adapted = load_adapter(planar(tiny, dtype), saved, is_trainable=True)
    tokens = TOKENS.cuda()
    with torch.autocast("cuda", torch.bfloat16, enabled=dtype is torch.bfloat16):
        adapted(tokens, labels=tokens).loss.backward()
    for name, parameter in trainable(exact).items():
        error = (trainable(adapted)[name].grad.cpu() - parameter.grad).norm() / parameter.grad.norm()
        assert error < bound, name


@pytest.mark.gpu
def test_training_on_a_gpu(tiny, saved, cuda, tmp_path):
    """bfloat16 products with the packed planes, float32 adapters."""
    base = planar(tiny, torch.bfloat16)
    before = bytes_of(base)
    adapted = load_adapter(base, saved, is_trainable=True)
    tokens = TOKENS.cuda()
    with torch.autocast("cuda", torch.bfloat16):
        losses = train(adapted, 20, tokens=tokens)
    assert losses[-1] < losses[0] - 2
    assert bytes_of(base) == before
    adapted.save_pretrained(tmp_path)
    again = load_adapter(planar(tiny, torch.bfloat16), tmp_path)
    assert torch.equal(logits(again, tokens), logits(adapted, tokens))


def test_no_weight_of_the_experts_is_ever_made(model, saved):
    """PEFT's own way adds B A to the stack in every pass."""
    from torch.utils._python_dispatch import TorchDispatchMode

    class Largest(TorchDispatchMode):
        numel = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            made = func(*args, **(kwargs or {}))
            for one in made if isinstance(made, tuple | list) else [made]:
                if isinstance(one, torch.Tensor) and one.is_floating_point():
                    self.numel = max(self.numel, one.numel())
            return made

    adapted = load_adapter(copy.deepcopy(model), saved, is_trainable=True)
    experts = next(module for module in adapted.modules() if isinstance(module, PackedExperts))
    decoder = adapted.get_base_model().model  # logits are larger than a stack of this small model
    with Largest() as seen:
        decoder(TOKENS[:1, :16]).last_hidden_state.sum().backward()
    assert all(parameter.grad is not None for parameter in trainable(decoder).values())
    stack = experts.num_experts * experts.hidden_dim * experts.intermediate_dim
    assert 0 < seen.numel < stack


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


@pytest.mark.parametrize("layout", ["blocks", "planes"])
def test_merging_encodes_again(model, saved, tmp_path, layout):
    from transformers import AutoModelForCausalLM

    base = copy.deepcopy(model)
    assert base.config.quantization_config.provenance["stats_hash"] == ""  # made without statistics
    set_layout(base, layout)
    adapted = load_adapter(base, saved)
    wanted, before = logits(adapted), logits(model)
    merged = merge(adapted, encoder="ggml")
    found = logits(merged)
    assert not any("lora" in name for name, _ in merged.named_modules())
    # What is left is rounding: of the same size as that of the base, of which the adapter knows nothing.
    assert mean_kl(wanted[0], found[0]) < 0.5 * mean_kl(wanted[0], before[0])
    merged.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    torch.testing.assert_close(logits(again), found)
    assert "merged_adapter" in again.config.quantization_config.provenance


def test_merging_encodes_under_the_statistics_of_the_export(small_moe, tmp_path):
    from transformers import AutoModelForCausalLM

    from dynquant.calibration.options import CalibrationOptions
    from dynquant.exporters.options import ExportOptions
    from dynquant.exporters.stage import export

    source = save_tiny("deepseek-v3", tmp_path / "float", small_moe)
    export(
        ExportOptions(
            model=str(source),
            output=tmp_path / "out",
            format="safetensors",
            preset="uniform-q4_k",
            encoder="ggml",
            tune=0,
            calibration=CalibrationOptions(tokens=2048, hessians="activations"),
        )
    )
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32)
    assert "Q4_K" in base.config.quantization_config.types.values()
    base_logits = logits(base)
    adapted = randomized(add_adapter(base, rank=4), std=0.2)
    before = {
        name: parameter.clone() for name, parameter in adapted.named_parameters() if parameter.dtype == torch.uint8
    }
    wanted = logits(adapted)
    merged = merge(adapted, stats=tmp_path / "out.stats.safetensors", encoder="dynquant")
    assert mean_kl(wanted[0], logits(merged)[0]) < 0.5 * mean_kl(wanted[0], base_logits[0])
    after = dict(merged.named_parameters())
    changed = set()
    for name, old in before.items():
        bare = name.removeprefix("base_model.model.").replace(".base_layer", "")
        assert after[bare].shape == old.shape
        if not torch.equal(after[bare], old):
            changed.add(bare.rpartition(".")[2] if "experts" in bare else bare.split(".")[-2])
    assert changed >= {"gate_proj", "up_proj", "down_proj", "o_proj", "kv_b_proj", "q_b_proj"}
    assert not changed & {"embed_tokens", "lm_head"}


def test_merging_asks_for_the_statistics_and_checks_them(model, saved, tmp_path):
    adapted = load_adapter(copy.deepcopy(model), saved)
    adapted.get_base_model().config.quantization_config.provenance = {}  # as of a file that others made
    before = bytes_of(adapted)
    with pytest.raises(AdapterError, match=r"dynquant\.lora\.merge"):
        adapted.merge_and_unload()
    with pytest.raises(StatsError, match=r"encoded under statistics.*stats\.safetensors"):
        merge(adapted)
    other = tmp_path / "stats.safetensors"
    other.write_bytes(b"other")
    adapted.get_base_model().config.quantization_config.provenance = {"stats_hash": "0" * 64}
    with pytest.raises(StatsError, match="hash"):
        merge(adapted, stats=other)
    with pytest.raises(StatsError, match="no "):
        merge(adapted, stats=tmp_path / "none.safetensors")
    assert bytes_of(adapted) == before


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
    import shutil

    from safetensors.torch import load_file, save_file

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
    with pytest.raises(AdapterError, match="another model"):
        load_adapter(copy.deepcopy(model), tmp_path)


@pytest.mark.parametrize("per_slot", [False, True], ids=["token", "slot"])
def test_grouped_products_equal_a_loop(per_slot):
    """Experts without slots, and ids of experts that other ranks hold."""
    generator = torch.Generator().manual_seed(0)
    a, b = torch.randn(5, 3, 16, generator=generator), torch.randn(5, 8, 3, generator=generator)
    ids = torch.tensor([[0, 4], [5, 0], [4, 2], [-1, 4], [2, 0], [0, 2], [4, 5]])
    x = torch.randn(7, 2, 16, generator=generator) if per_slot else torch.randn(7, 16, generator=generator)
    expected = torch.zeros(7, 2, 8)
    for token in range(7):
        for slot in range(2):
            expert = int(ids[token, slot])
            if 0 <= expert < 5:
                expected[token, slot] = b[expert] @ a[expert] @ (x[token, slot] if per_slot else x[token])
    torch.testing.assert_close(grouped_low_rank(x, ids, a, b), expected, atol=1e-5, rtol=1e-5)


def test_the_wrapper_of_an_experts_module_knows_its_dimensions(model):
    adapted = add_adapter(copy.deepcopy(model), rank=3, targets=())
    wrappers = [module for module in adapted.modules() if isinstance(module, PackedLoraExperts)]
    experts = wrappers[0].experts
    outer, inner = wrappers[:2]
    assert (outer.parameter_name, inner.parameter_name) == ("down_proj", "gate_up_proj")
    count, hidden, width = experts.num_experts, experts.hidden_dim, experts.intermediate_dim
    assert inner.lora_A["default"].weight.shape == (3 * count, hidden)
    assert inner.lora_B["default"].weight.shape == (2 * width, 3 * count)
    assert outer.lora_A["default"].weight.shape == (3 * count, width)
    assert outer.lora_B["default"].weight.shape == (hidden, 3 * count)
