"""Adapters as files of llama.cpp: the same logits as PEFT with the same base, and what llama.cpp cannot apply."""

import ctypes
import itertools
import json
import shutil
from dataclasses import replace
from pathlib import Path

import gguf
import pytest
import torch
from safetensors.torch import load_file, save_file

import dynquant
from dynquant.checkpoints.gguf_source import GGUFSource
from dynquant.encoding.stream import load_encoder
from dynquant.errors import AdapterError
from dynquant.exporters.adapter_gguf import export_adapter
from dynquant.families.open import open_hf
from dynquant.running.load import load_hf
from tests.families.converter.test_converted import ARCHITECTURES, COMMON, saved
from tests.helpers.commands import refused, succeed
from tests.helpers.exports import export_gguf
from tests.helpers.gguf_writing import finish
from tests.helpers.packed_models import plan_of
from tests.helpers.representatives import represented_by
from tests.helpers.tiny_models import mean_kl, write_f32

peft = pytest.importorskip("peft", reason="peft is not installed")
llama_cpp = pytest.importorskip("llama_cpp", reason="llama-cpp-python is not installed")
from dynquant.lora import add_adapter, load_adapter, merge  # noqa: E402
from dynquant.lora.places import takes_adapter  # noqa: E402

TOKENS = torch.randint(1, 8000, (48,), generator=torch.Generator().manual_seed(5)).tolist()
QUICK = ("llama", "qwen2-moe", "deepseek-v3")
FAMILIES = ("llama", "llama-tied", "mistral", "mixtral", "qwen2", "qwen3", "qwen2-moe", "qwen3-moe", "gemma3",
            "deepseek-v2-lite", "deepseek-v3")  # fmt: skip
TYPES = ("Q8_0", "Q4_0", "IQ4_NL", "Q5_1", "MXFP4")


def packed_gguf(checkpoint: Path, folder: Path) -> Path:
    """A tiny checkpoint with its matrices in five types."""
    model = open_hf(checkpoint)
    types = itertools.cycle(TYPES)
    plan = plan_of(model, lambda _: next(types))
    (file,) = export_gguf(model, plan, None, folder / f"{checkpoint.name}.gguf", encoder=load_encoder("ggml"))
    return file


def decoded(file: Path, checkpoint: Path, path: Path) -> Path:
    """The same weights as F32, so that llama.cpp multiplies in float32: packed types round activations to 8 bits."""
    return write_f32(replace(open_hf(checkpoint), source=GGUFSource(file)), path)


def adapter_of(file: Path, directory: Path, base: Path | None = None, **options) -> tuple[torch.Tensor, torch.Tensor]:
    """Save a random adapter for the model in `file`; logits without and with it."""
    adapted = add_adapter(dynquant.load(file, base=base), **{"rank": 4, "alpha": 6, "llama_cpp": True} | options)
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "lora_B" in name:
                parameter.copy_(0.05 * torch.randn(parameter.shape, generator=generator))
    adapted.save_pretrained(directory)
    with torch.inference_mode():
        on = adapted(torch.tensor([TOKENS])).logits[0]
        with adapted.disable_adapter():
            return adapted(torch.tensor([TOKENS])).logits[0], on


def llama_logits(file: Path, adapter: Path | None = None) -> torch.Tensor:
    llama = llama_cpp.Llama(
        str(file), lora_path=adapter and str(adapter), n_ctx=64, n_batch=64, logits_all=True, verbose=False,
        type_k=llama_cpp.GGML_TYPE_F32, type_v=llama_cpp.GGML_TYPE_F32, flash_attn=False, 
    )  # fmt: skip
    llama.eval(TOKENS)
    logits = torch.from_numpy(llama.scores[: len(TOKENS)].copy())
    llama.close()
    return logits


@pytest.fixture(scope="module")
def deepseek(tiny_text, tmp_path_factory) -> Path:
    return packed_gguf(tiny_text("deepseek-v3"), tmp_path_factory.mktemp("deepseek"))


@pytest.mark.parametrize("name", represented_by(QUICK, FAMILIES))
def test_llama_cpp_adds_what_peft_adds(name, tmp_path, tiny_text):
    file = packed_gguf(tiny_text(name), tmp_path)
    off, on = adapter_of(file, tmp_path / "adapter", rslora="qwen" in name)
    exported = export_adapter(tmp_path / "adapter", tmp_path / "adapter.gguf")
    base = decoded(file, tiny_text(name), tmp_path / "decoded.gguf")
    limit = 1e-6 if "gemma" in name else 1e-9  # as without an adapter
    assert mean_kl(off, on) > 0.01
    assert mean_kl(off, llama_logits(base)) < limit
    assert mean_kl(on, llama_logits(base, exported)) < limit
    # With packed weights llama.cpp rounds activations to 8 bits, with or without an adapter; a random router then sends
    # some tokens to other experts.
    assert mean_kl(on, llama_logits(file, exported)) < (1e-1 if name == "mixtral" else 2e-2)


@pytest.mark.nightly
@pytest.mark.parametrize("name", ["olmoe", "glm4_moe", "granitemoe", "qwen3_next", "gemma2"])
def test_an_architecture_without_a_family(name, tmp_path, small_moe, llama_cpp_tree, monkeypatch):
    monkeypatch.setenv("LLAMA_CPP_DIR", str(llama_cpp_tree))
    settings = COMMON | ARCHITECTURES[name] | {"num_key_value_heads": 4}  # as llama.cpp's OLMoE has them
    original = saved(name, settings, tmp_path, small_moe)
    file, adapter = packed_gguf(original, tmp_path), tmp_path / "adapter"
    off, on = adapter_of(file, adapter, original)
    with pytest.raises(AdapterError, match=r"dynquant knows the architectures .*--base"):
        export_adapter(adapter, tmp_path / "adapter.gguf")
    exported = export_adapter(adapter, tmp_path / "adapter.gguf", base=original)
    base = decoded(file, original, tmp_path / "decoded.gguf")
    limit = 1e-6 if "gemma" in name else 1e-9  # as without an adapter
    assert mean_kl(off, on) > 20 * limit
    assert mean_kl(off, llama_logits(base)) < limit
    assert mean_kl(on, llama_logits(base, exported)) < limit
    merged = merge(load_adapter(dynquant.load(file, base=original), adapter), encoder="ggml")
    with torch.inference_mode():
        assert mean_kl(on, merged(torch.tensor([TOKENS])).logits[0]) < 0.6 * mean_kl(off, on)


def test_the_small_moe_and_its_base_from_a_directory(packed_moe, tmp_path):
    """textbook-moe-16m, an adapter of the safetensors export, and the original directory named as base."""
    from transformers import AutoModelForCausalLM

    adapted = add_adapter(AutoModelForCausalLM.from_pretrained(packed_moe.directory), rank=4, llama_cpp=True)
    torch.manual_seed(0)
    for name, parameter in adapted.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.02)
    adapted.save_pretrained(tmp_path / "adapter")
    succeed("export-adapter", tmp_path / "adapter", "-o", tmp_path / "a.gguf", "--base", packed_moe.model.path)
    assert export_adapter(tmp_path / "adapter", tmp_path / "b.gguf").read_bytes() == (tmp_path / "a.gguf").read_bytes()
    reader = gguf.GGUFReader(tmp_path / "a.gguf")
    assert {key: reader.fields[key].contents() for key in ("general.type", "adapter.type", "adapter.lora.alpha")} == {
        "general.type": "adapter", "adapter.type": "lora", "adapter.lora.alpha": 32.0,
    }  # fmt: skip
    shapes = {tensor.name: list(tensor.shape) for tensor in reader.tensors}
    assert shapes["blk.1.ffn_gate_exps.weight.lora_a"] == [256, 4, 8]
    assert shapes["blk.1.ffn_down_exps.weight.lora_b"] == [4, 256, 8]
    with torch.inference_mode():
        on = adapted(torch.tensor([TOKENS])).logits[0].float()
    assert mean_kl(on, llama_logits(packed_moe.gguf, tmp_path / "a.gguf")) < 5e-2


@pytest.mark.parametrize(
    "name",
    represented_by(
        ("llama", "qwen2-moe", "gemma3", "deepseek-v3"),
        ("llama", "mixtral", "qwen2", "qwen3", "qwen2-moe", "qwen3-moe", "gemma3", "deepseek-v3", "deepseek-v2-lite"),
    ),
)
def test_the_graph_applies_adapters_where_we_say(name, tmp_path, tiny_text):
    from dynquant.evaluation.llama_cpp import LlamaCppRunner

    model = open_hf(tiny_text(name))
    runner = LlamaCppRunner(write_f32(model, tmp_path / "base.gguf"))
    runner.reserve(64)
    before = runner.window_logits(TOKENS)
    generator = torch.Generator().manual_seed(0)
    seen = set()
    for tensor in model.source.names():
        shape, kind = tuple(model.source.info(tensor).shape), tensor.split(".")[-2]
        if len(shape) < 2 or tensor == "token_embd.weight" or kind in seen:
            continue
        seen.add(kind)
        writer = gguf.GGUFWriter(tmp_path / "one.gguf", model.arch)
        writer.add_type("adapter")
        writer.add_string("adapter.type", "lora")
        writer.add_float32("adapter.lora.alpha", 4.0)
        writer.add_tensor(f"{tensor}.lora_a", torch.randn(*shape[:-2], 4, shape[-1], generator=generator).numpy())
        writer.add_tensor(f"{tensor}.lora_b", torch.randn(*shape[:-1], 4, generator=generator).numpy())
        finish(writer)
        adapter = llama_cpp.llama_adapter_lora_init(runner._model, str(tmp_path / "one.gguf").encode())
        assert adapter, tensor
        pointers, scales = (llama_cpp.llama_adapter_lora_p_ctypes * 1)(adapter), (ctypes.c_float * 1)(1.0)
        assert llama_cpp.llama_set_adapters_lora(runner._context, pointers, 1, scales) == 0
        assert torch.equal(runner.window_logits(TOKENS), before) != takes_adapter(model.arch, tensor), tensor
        llama_cpp.llama_set_adapters_lora(runner._context, pointers, 0, scales)
        llama_cpp.llama_adapter_lora_free(adapter)
    runner.close()
    assert len(seen) > 6


def test_what_llama_cpp_would_leave_out_is_refused(deepseek, tmp_path):
    adapter_of(deepseek, tmp_path / "adapter", llama_cpp=False)
    with pytest.raises(
        AdapterError, match=r"kv_a_proj_with_mqa, kv_b_proj, q_a_proj, q_b_proj .*deepseek2.*--for-llama-cpp"
    ):
        export_adapter(tmp_path / "adapter", tmp_path / "a.gguf")
    assert not list(tmp_path.glob("*.gguf*"))


def test_whole_weights_and_other_methods_are_refused(deepseek, tmp_path):
    adapter_of(deepseek, tmp_path / "norms", train_norms=True)
    with pytest.raises(AdapterError, match=r"layernorm.*no LoRA factor, which was trained"):
        export_adapter(tmp_path / "norms", tmp_path / "a.gguf")
    with pytest.raises(AdapterError, match=r"no adapter_config\.json"):
        export_adapter(tmp_path, tmp_path / "a.gguf")
    for edit in ({"peft_type": "IA3"}, {"use_dora": True}, {"lora_alpha": 0}):
        config = json.loads((tmp_path / "norms" / "adapter_config.json").read_text()) | edit
        (tmp_path / "other").mkdir(exist_ok=True)
        (tmp_path / "other" / "adapter_config.json").write_text(json.dumps(config))
        with pytest.raises(AdapterError, match=r"IA3|use_dora|lora_alpha"):
            export_adapter(tmp_path / "other", tmp_path / "a.gguf")


def test_a_rank_that_is_not_that_of_the_factors_is_refused(deepseek, tmp_path):
    adapter_of(deepseek, tmp_path)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    (tmp_path / "adapter_config.json").write_text(json.dumps(config | {"r": 16}))
    with pytest.raises(AdapterError, match=r"have rank 4, and adapter_config\.json says 16"):
        export_adapter(tmp_path, tmp_path / "a.gguf", base=deepseek)


def test_the_copy_of_the_head_that_peft_saves_is_no_part_of_the_adapter(tiny_text, tmp_path):
    base = tiny_text("llama")
    adapted = peft.get_peft_model(load_hf(open_hf(base)), peft.LoraConfig(target_modules=["lm_head"], r=4))
    adapted.save_pretrained(tmp_path)
    export_adapter(tmp_path, tmp_path / "a.gguf", base=base)
    assert set(GGUFSource(tmp_path / "a.gguf").names()) == {"output.weight.lora_a", "output.weight.lora_b"}
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    tensors["base_model.model.lm_head.base_layer.weight"][0, 0] += 1
    save_file(tensors, tmp_path / "adapter_model.safetensors")
    with pytest.raises(AdapterError, match="a copy of the weight that it was trained beside"):
        export_adapter(tmp_path, tmp_path / "b.gguf", base=base)
    assert not (tmp_path / "b.gguf").exists()


def test_damage_and_another_base_are_refused(deepseek, small_moe, tmp_path):
    adapter_of(deepseek, tmp_path / "good")
    good, target = tmp_path / "good", tmp_path / "a.gguf"
    with pytest.raises(AdapterError, match=r"base model has no such weight.*--base"):
        export_adapter(good, target, base=small_moe)
    with pytest.raises(AdapterError, match=r"neither a directory.*--base"):
        export_adapter(good, target, base=tmp_path / "none")
    for kind, message in (("nan", "NaN"), ("half", "one of the two factors"), ("cut", "cut short")):
        bad = shutil.copytree(good, tmp_path / kind)
        file = bad / "adapter_model.safetensors"
        tensors = load_file(file)
        name = next(name for name in tensors if "lora_B" in name)
        if kind == "half":
            del tensors[name]
        else:
            tensors[name][0, 0] = float("nan")
        save_file(tensors, file)
        if kind == "cut":
            file.write_bytes(file.read_bytes()[:-10])
        with pytest.raises(AdapterError, match=message):
            export_adapter(bad, target)
    assert not list(tmp_path.glob("*.gguf*")) and not list(tmp_path.glob(".*partial"))


def test_the_command_refuses_in_one_paragraph(tmp_path):
    assert "adapter_config.json" in refused("export-adapter", tmp_path, "-o", tmp_path / "a.gguf")


def test_a_head_that_is_the_embedding_is_named_as_the_reason(tiny_text, tmp_path):
    base = tiny_text("llama-tied")
    peft.get_peft_model(load_hf(open_hf(base)), peft.LoraConfig(target_modules=["lm_head"])).save_pretrained(
        tmp_path / "a"
    )
    with pytest.raises(AdapterError, match=r"changes `lm_head`, which .* ties to the token embedding"):
        export_adapter(tmp_path / "a", tmp_path / "a.gguf", base=base)
    whole = peft.LoraConfig(target_modules=["q_proj"], modules_to_save=["lm_head"])
    peft.get_peft_model(load_hf(open_hf(base)), whole).save_pretrained(tmp_path / "b")
    export_adapter(tmp_path / "b", tmp_path / "b.gguf", base=base)


def test_whole_weights_that_are_those_of_the_base_are_no_part_of_the_adapter(tiny_text, tmp_path):
    base, key = tiny_text("llama"), "base_model.model.lm_head.weight"
    config = peft.LoraConfig(target_modules=["o_proj"], r=4, modules_to_save=["lm_head"])
    peft.get_peft_model(load_hf(open_hf(base)), config).save_pretrained(tmp_path)
    export_adapter(tmp_path, tmp_path / "a.gguf", base=base)
    assert len(GGUFSource(tmp_path / "a.gguf").names()) == 4
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    save_file(tensors | {key: tensors[key].to(torch.float16)}, tmp_path / "adapter_model.safetensors")
    export_adapter(tmp_path, tmp_path / "a.gguf", base=base)
    tensors[key][0, 0] += 1
    save_file(tensors, tmp_path / "adapter_model.safetensors")
    with pytest.raises(AdapterError, match=r"lm_head\.weight`, a whole weight .* was trained unless"):
        export_adapter(tmp_path, tmp_path / "b.gguf", base=base)
