"""Packed models of architectures without a family: logits of the GGUF's values, whatever transformers' modules are.

The conversions stand for llama.cpp's converter: they move rows and columns as it does for such models.
"""

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from gguf import GGUFValueType
from peft import PeftModel
from peft.tuners.lora import LoraLayer
from torch import Tensor

import dynquant.lora
from dynquant.checkpoints.gguf_source import GGUFSource, MetadataField
from dynquant.checkpoints.model import Model
from dynquant.checkpoints.safetensors_source import SafetensorsSource
from dynquant.encoding.stream import load_encoder
from dynquant.errors import AdapterError, CheckpointError
from dynquant.evaluation.options import TRANSFORMERS
from dynquant.evaluation.runners import describe_model, load_model
from dynquant.exporters import adapter_gguf
from dynquant.exporters.gguf import write_patched
from dynquant.families.common.conversion import Conversion, ConvertedSource, unchanged
from dynquant.lora.places import bare_path
from dynquant.packed import load_gguf
from dynquant.packed.joined_rows import PackedRows
from dynquant.packed.layers import PackedLinear, PackedSortedExperts
from dynquant.running.live_weights import LiveWeights
from dynquant.running.load import load_directory, load_hf
from tests.helpers.adapters import randomized
from tests.helpers.exports import export_safetensors
from tests.helpers.tiny_models import randomize
from tests.helpers.traced_models import mixed_plan, packed_and_decoded

TOKENS = torch.arange(5, 45)[None]
_SIZES = {
    "vocab_size": 128, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 2,
    "num_key_value_heads": 1, "head_dim": 32, "max_position_embeddings": 128, "tie_word_embeddings": False,
    "bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0,
}  # fmt: skip
_MOE = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32, "shared_expert_intermediate_size": 32}
_LINEAR = {
    "linear_num_key_heads": 1, "linear_num_value_heads": 2, "linear_key_head_dim": 32, "linear_value_head_dim": 32,
    "linear_conv_kernel_dim": 4, "layer_types": ["linear_attention", "full_attention"],
}  # fmt: skip
_GPT_OSS = {
    "num_local_experts": 4, "num_experts_per_tok": 2, "layer_types": ["sliding_attention", "full_attention"],
    "sliding_window": 16, "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
}  # fmt: skip
_LLAMA4 = {
    "num_local_experts": 4, "num_experts_per_tok": 1, "interleave_moe_layer_step": 1, "intermediate_size_mlp": 96,
    "attention_chunk_size": 64,
}  # fmt: skip
CONFIGS = {"gpt_oss": _GPT_OSS, "qwen3_next": _MOE | _LINEAR, "llama4_text": _LLAMA4}
ARCHS = {"gpt_oss": "gpt-oss", "qwen3_next": "qwen3next", "llama4_text": "llama4"}


@dataclass(frozen=True)
class Exported:
    """A model, the folder of its exports, logits of the packed model and of the GGUF's values."""

    model: Model
    folder: Path
    logits: Tensor
    expected: Tensor

    def packed(self) -> Any:
        return load_directory(self.folder / "packed", torch.float32)


@pytest.fixture(scope="module", params=CONFIGS)
def exported(request, tmp_path_factory: pytest.TempPathFactory) -> Exported:
    folder = tmp_path_factory.mktemp(request.param)
    model = opened(request.param, folder / "original")
    _, logits, expected = packed_and_decoded(model, folder, TOKENS)
    return Exported(model, folder, logits, expected)


def opened(model_type: str, directory: Path) -> Model:
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.for_model(model_type, **{**_SIZES, **CONFIGS[model_type]})
    torch.manual_seed(0)
    hf_model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    randomize(hf_model)
    hf_model.save_pretrained(directory)
    checkpoint = SafetensorsSource(directory)
    source = ConvertedSource(checkpoint, list(conversions(checkpoint)))
    fields = {"general.architecture": ARCHS[model_type], f"{ARCHS[model_type]}.block_count": 2}
    fields |= {f"{ARCHS[model_type]}.{key}": 64 for key in ("embedding_length", "context_length")}
    metadata = tuple(
        MetadataField(key, value, GGUFValueType.STRING if isinstance(value, str) else GGUFValueType.UINT32)
        for key, value in fields.items()
    )
    return Model(directory, source, metadata, source.checkpoint_names, hf_directory=directory, has_family=False)


def conversions(checkpoint: SafetensorsSource) -> Iterator[Conversion]:
    names, stacks = checkpoint.names(), {}
    for name in names:
        info = checkpoint.info(name)
        plain = re.sub(r"^model\.(layers\.(\d+)\.)?", lambda match: f"blk.{match[2]}." if match[2] else "", name)
        layer = plain.split(".")[1]
        if match := re.search(r"experts\.\d+\.(gate|up|down)_proj\.weight$", plain):
            stacks.setdefault(f"blk.{layer}.ffn_{match[1]}_exps.weight", []).append(name)
        elif plain.endswith("experts.gate_up_proj"):
            alternates = "gate_up_proj_bias" in "".join(names)
            for number, kind in enumerate(("gate", "up")):
                width = info.shape[2] // 2
                rows = slice(number, None, 2) if alternates else slice(number * width, (number + 1) * width)
                shape = (info.shape[0], width, info.shape[1])
                yield stack_of(f"blk.{layer}.ffn_{kind}_exps.weight", name, shape, turned(rows))
        elif plain.endswith("experts.down_proj"):
            shape = (info.shape[0], info.shape[2], info.shape[1])
            yield stack_of(f"blk.{layer}.ffn_down_exps.weight", name, shape, turned(slice(None)))
        elif plain.endswith("in_proj_qkvz.weight"):  # two matrices, the second of which has its halves swapped
            yield Conversion(f"blk.{layer}.attn_qkv.weight", (name,), (128, 64), "F32", lambda t: t[:128])
            yield Conversion(
                f"blk.{layer}.attn_gate.weight", (name,), (64, 64), "F32", lambda t: halves_swapped(t[128:])
            )
        elif plain.endswith("linear_attn.out_proj.weight"):
            yield Conversion(f"blk.{layer}.ssm_out.weight", (name,), info.shape, "F32", lambda t: halves_swapped(t.T).T)
        elif ".q_norm." in plain or ".k_norm." in plain:  # as Gemma's are, from 0 in the checkpoint and from 1 in GGUF
            yield Conversion(plain, (name,), info.shape, "F32", lambda t: t + 1)
        else:
            yield Conversion(plain, (name,), info.shape, "F32", unchanged)
    for name, parts in stacks.items():
        parts.sort(key=lambda part: int(part.split(".experts.")[1].split(".")[0]))
        yield Conversion(name, tuple(parts), (len(parts), *checkpoint.info(parts[0]).shape), "F32")


def stack_of(name: str, part: str, shape: tuple[int, ...], transform: Callable[[Tensor], Tensor]) -> Conversion:
    return Conversion(name, (part,), shape, "F32", transform)


def turned(rows: slice) -> Callable[[Tensor], Tensor]:
    return lambda experts: experts.transpose(-1, -2)[..., rows, :]


def halves_swapped(rows: Tensor) -> Tensor:
    return rows.unflatten(0, (2, -1)).flip(0).flatten(0, 1)


def test_packed_logits_are_those_of_the_gguf(exported):
    assert (exported.logits - exported.expected).abs().max() < 1e-5 * exported.expected.std()
    stored = {name: tensor for name, tensor in exported.packed().state_dict().items() if tensor.dtype == torch.uint8}
    file = GGUFSource(exported.folder / "model.gguf")
    in_gguf = {bytes(row) for name in file.names() for row in rows_of(file.load_packed(name))}
    assert len(stored) > 8
    assert all(bytes(row) in in_gguf for tensor in stored.values() for row in rows_of(tensor))


def rows_of(blocks: Tensor) -> list:
    return list(blocks.reshape(-1, blocks.shape[-1])[:4].numpy())


def test_an_adapter_learns(exported):
    adapted = dynquant.lora.add_adapter(exported.packed(), rank=4)
    before = adapted(input_ids=TOKENS, labels=TOKENS).loss
    before.backward()
    with torch.no_grad():
        for parameter in adapted.parameters():
            if parameter.grad is not None:
                parameter.sub_(0.5 * parameter.grad)
    assert adapted(input_ids=TOKENS, labels=TOKENS).loss < before
    assert all(parameter.grad is not None for name, parameter in adapted.named_parameters() if "lora_B" in name)


def test_an_adapter_starts_from_what_quantization_took(exported):
    adapted = dynquant.lora.add_adapter(exported.packed(), rank=48)
    dynquant.lora.start_from_residual(adapted, exported.model)
    original = dict(load_hf(exported.model, dtype=torch.float32).named_modules())
    for path, layer in layers_of(adapted).items():
        expected, before, after = (
            products(module, layer) for module in (original[path], layer.get_base_layer(), layer)
        )
        assert (after - expected).norm() < 0.4 * (before - expected).norm(), path


def test_a_merged_adapter_is_in_the_packed_weights(exported):
    adapted = randomized(dynquant.lora.add_adapter(exported.packed(), rank=4), std=0.2)
    layers = layers_of(adapted)
    expected = {path: (products(of, of), products(of.get_base_layer(), of)) for path, of in layers.items()}
    merged = dict(dynquant.lora.merge(adapted, encoder="ggml").named_modules())
    for path, (wanted, before) in expected.items():
        assert (products(merged[path], layers[path]) - wanted).norm() < 0.2 * (before - wanted).norm(), path


def test_factors_for_llama_cpp_have_rows_and_columns_of_the_gguf(exported, tmp_path, monkeypatch):
    model, is_llama4 = exported.model, "llama4" in exported.folder.name  # PEFT takes its experts' sides for each other
    adapted = dynquant.lora.add_adapter(exported.packed(), rank=4, alpha=6, experts=not is_llama4)
    randomized(adapted).save_pretrained(tmp_path)
    monkeypatch.setattr(adapter_gguf, "open_model", lambda _: model)
    with pytest.raises(AdapterError, match=r"is packed, and of its type .* only the original .*--base"):
        adapter_gguf.export_adapter(tmp_path, tmp_path / "adapter.gguf")
    file = GGUFSource(adapter_gguf.export_adapter(tmp_path, tmp_path / "adapter.gguf", base=model.path))
    merged = PeftModel.from_pretrained(load_hf(model, dtype=torch.float32), tmp_path).merge_and_unload()
    live, changed = LiveWeights(model, merged), {name.rpartition(".")[0] for name in file.names()}
    for name in live.names():
        added = live.read(name) - model.source.load(name)
        if name in changed:
            a, b = (file.load(f"{name}.{factor}") for factor in ("lora_a", "lora_b"))
            added = added - 6 / 4 * b @ a
        assert added.abs().max() < 1e-5, name
    assert len(changed) > 8


def layers_of(adapted: Any) -> dict[str, LoraLayer]:
    named = reversed(list(adapted.named_modules()))  # of two layers around experts, the outer one last
    layers = {bare_path(path): layer for path, layer in named if isinstance(layer, LoraLayer)}
    assert len(layers) > 8
    return layers


def products(module: Any, layer: LoraLayer) -> Tensor:
    """Return the products of a module in the place of `layer` with some rows."""
    base, inputs = layer.get_base_layer(), [torch.eye(64)]
    if isinstance(base, PackedRows | PackedLinear):
        inputs = [torch.eye(base.in_features)]
    elif not isinstance(base, PackedSortedExperts):
        inputs += [torch.arange(64)[:, None] % 4, torch.ones(64, 1)]
    with torch.inference_mode():
        return module(*inputs)


def test_a_gguf_file_loads_by_its_checkpoint(exported):
    with pytest.raises(CheckpointError, match=r"knows the architectures .*base=DIRECTORY"):
        dynquant.load(exported.folder / "model.gguf")
    loaded = dynquant.load(exported.folder / "model.gguf", base=exported.model)
    expected, state = exported.packed().state_dict(), loaded.state_dict()
    assert expected.keys() == state.keys()
    for key, values in state.items():  # norms were stored as 1 more, in float32
        torch.testing.assert_close(values, expected[key], rtol=0, atol=1e-6 if values.is_floating_point() else 0)


def test_commands_load_a_gguf_file_by_its_original(exported, monkeypatch):
    file, original = exported.folder / "model.gguf", exported.folder / "original"
    with pytest.raises(CheckpointError, match=r"as --reference to eval and heal, as --base to finetune"):
        describe_model(file, runner=TRANSFORMERS)
    assert describe_model(file, runner=TRANSFORMERS, base=original).vocab_size == _SIZES["vocab_size"]
    monkeypatch.setattr(load_gguf, "open_model", lambda _: exported.model)
    loaded = load_model(file, base=original)
    with torch.inference_mode():
        assert torch.allclose(loaded(input_ids=TOKENS).logits, exported.logits, atol=1e-5)


def test_tuned_norms_are_exported_packed(exported, tmp_path):
    model, file = exported.model, GGUFSource(exported.folder / "model.gguf")
    norms = {name: file.load(name) for name in file.names() if "norm" in name}
    tuned = {name: values * torch.linspace(0.9, 1.2, values.numel()) for name, values in norms.items()}
    write_patched(file, tmp_path / "tuned.gguf", tuned, encoder="ggml")
    stored, encoder = GGUFSource(tmp_path / "tuned.gguf"), load_encoder("ggml")
    export_safetensors(model, mixed_plan(model), None, tmp_path / "packed", stored=stored, encoder=encoder)
    packed = load_directory(tmp_path / "packed", torch.float32)
    state, before = packed.state_dict(), exported.packed().state_dict()
    for name, values in tuned.items():
        (key,) = model.checkpoint_names(name)
        assert torch.allclose(state[key] - before[key], values - norms[name], atol=1e-6), name
    assert len(tuned) > 4 and all(torch.equal(state[key], before[key]) for key in state if "norm" not in key)


@pytest.mark.parametrize("model_type", ["llama4_text", "gpt_oss"])
def test_experts_in_another_order_than_the_packed_modules_are_refused(model_type, tmp_path):
    model = opened(model_type, tmp_path / "model")
    source = model.source
    names = [f"blk.0.ffn_{part}_exps.weight" for part in ("gate", "up")]
    gate, up = (source._conversions[name] for name in names)
    source._conversions |= {gate.name: replace(up, name=gate.name), up.name: replace(gate, name=up.name)}
    with pytest.raises(CheckpointError, match=r"`blk\.0\.ffn_(gate|up)_exps\.weight` of .* in another order than"):
        packed_and_decoded(model, tmp_path, TOKENS)
    source._conversions |= {gate.name: gate, up.name: replace(up, transform=lambda t: up.transform(t).flip(0))}
    with pytest.raises(CheckpointError, match=r"`blk\.0\.ffn_up_exps\.weight` of .* in another order than"):
        packed_and_decoded(model, tmp_path, TOKENS)


def test_a_matrix_that_is_no_rows_of_its_layer_is_refused(tmp_path):
    model = opened("llama4_text", tmp_path / "model")
    source = model.source
    name = "blk.0.self_attn.o_proj.weight"
    bad = Conversion(name, source.checkpoint_names(name), (64, 64), "F32", torch.t)
    source._conversions[name] = bad
    with pytest.raises(CheckpointError, match=rf"`{re.escape(name)}` of .* no rows of its parameter.*Export the plan"):
        packed_and_decoded(model, tmp_path, TOKENS)
