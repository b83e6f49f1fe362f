"""Types equal llama-quantize's, tensor by tensor, on models that reach every rule."""

import dataclasses
import random
from pathlib import Path

import pytest

from dynquant.errors import PlanError
from dynquant.families.open import open_model
from dynquant.formats.quant_types import QUANT_TYPES
from dynquant.recipes.llama_mixtures import LLAMA_FTYPES, llama_tensor_types
from tests.helpers.llama_quantize import TinyModel, deepseek_model, llama_model, llama_quantize_types
from tests.helpers.representatives import represented_by

SQUARE = ["0.ssm_conv1d", "0.attn_kv_b", "1.attn_rel_b", "1.attn_qkv", "1.time_mix_w1", "10.attn_sub_norm"]
ODD_TENSORS = {f"blk.{name}.weight": (256, 256) for name in SQUARE}
ODD_TENSORS |= {"blk.0.ffn_gate_inp_shexp.weight": (1, 256), "blk.0.ffn_down_exps.bias": (8, 256)}
ODD_TENSORS |= dict.fromkeys(("blk.1.nextn.eh_proj.weight", "per_layer_token_embd.weight"), (256, 512))
ODD_TENSORS |= {"position_embd.weight": (64, 256)}


def odd_model() -> TinyModel:
    """A Llama with tensors of other architectures, in an order unlike llama.cpp's."""
    model = llama_model(layers=12)
    shapes = list((model.shapes | ODD_TENSORS).items())
    random.Random(0).shuffle(shapes)
    return dataclasses.replace(model, shapes=dict(shapes))


MODELS = {
    "llama": llama_model(layers=16),
    "tied": llama_model(layers=3, tied=True),
    "grouped-query": llama_model(layers=32, heads=8, kv_heads=2),
    "experts-2": llama_model(layers=16, experts=2),
    "experts-8": llama_model(layers=16, experts=8),
    "experts-16": llama_model(layers=16, experts=16, heads=8, kv_heads=2),
    "tied-experts-8": llama_model(arch="qwen3moe", layers=9, experts=8, tied=True),
    "llama-70b": llama_model(layers=80, heads=8, kv_heads=1),
    "llama-65b": llama_model(layers=80),
    "qwen2-72b": llama_model(arch="qwen2", layers=80),
    "deepseek-8": deepseek_model(layers=17, experts=8),
    "deepseek-16": deepseek_model(layers=9, experts=16),
    "rows-576": llama_model(layers=8, hidden=576, heads=9, kv_heads=3, ffn=1536, tied=True),
    "rows-320": llama_model(layers=8, hidden=320, heads=5, kv_heads=5),
    "rows-48": llama_model(hidden=48, heads=3, kv_heads=3, head_dim=16, ffn=80),
    "falcon": llama_model(arch="falcon", layers=32, fused_qkv=True),
    "odd-tensors": odd_model(),
}


QUICK = ("tied", "experts-8", "llama-70b", "deepseek-8", "rows-576", "rows-48", "odd-tensors")


@pytest.mark.parametrize("name", represented_by(QUICK, MODELS))
def test_types_equal_llama_quantize(name: str, tmp_path: Path):
    model = MODELS[name]
    check_types(model, tmp_path)


def test_types_equal_llama_quantize_on_the_bundled_model(small_moe: Path, tmp_path: Path):
    model = open_model(small_moe)
    shapes = {name: model.source.info(name).shape for name in model.source.names()}
    check_types(TinyModel(model.hyper, shapes, deepseek_model().metadata), tmp_path)


def check_types(model: TinyModel, tmp_path: Path) -> None:
    source = model.write_hollow(tmp_path / "model.gguf")
    fits_q1_0 = all(shape[-1] % 128 == 0 for shape in model.shapes.values())
    for file_type, (number, _) in LLAMA_FTYPES.items():
        if file_type == "q1_0" and not fits_q1_0:
            with pytest.raises(RuntimeError, match="no tensor type fallback is defined"):
                llama_quantize_types(source, number)
            continue
        ours = {n: c.type for n, c in llama_tensor_types(file_type, model.shapes.items(), model.hyper).items()}
        theirs = llama_quantize_types(source, number)
        assert set(ours) == set(theirs)
        wrong = {name: (ours[name], theirs[name]) for name in ours if ours[name] != theirs[name]}
        assert not wrong, f"{file_type}: (ours, llama-quantize) {wrong}"


def test_order_of_tensors_changes_only_the_order_of_the_answer():
    model = llama_model(layers=16)
    shapes = list(model.shapes.items())
    forward = llama_tensor_types("q4_k_s", shapes, model.hyper)
    backward = llama_tensor_types("q4_k_s", shapes[::-1], model.hyper)
    assert forward == backward
    assert list(backward) == [name for name, _ in shapes[::-1]]


def test_every_choice_is_a_registered_type_that_fits_and_has_a_reason():
    model = llama_model(hidden=320, heads=5, kv_heads=5, ffn=512)
    for file_type in LLAMA_FTYPES:
        for name, (type_name, reason) in llama_tensor_types(file_type, model.shapes.items(), model.hyper).items():
            assert model.shapes[name][-1] % QUANT_TYPES[type_name].block_size == 0
            assert reason.startswith(f"llama.cpp {file_type}: ")


def test_fallback_is_in_the_reason():
    model = llama_model(hidden=320, heads=5, kv_heads=5)
    chosen = llama_tensor_types("iq1_s", model.shapes.items(), model.hyper)["blk.0.attn_q.weight"]
    assert chosen.type == "IQ4_NL"
    assert "rows of 320" in chosen.reason


def test_alias_and_case():
    model = llama_model()
    assert llama_tensor_types("Q4_K", model.shapes.items(), model.hyper) == llama_tensor_types(
        "q4_k_m", model.shapes.items(), model.hyper
    )


def test_unknown_file_type_is_refused_with_near_names():
    model = llama_model()
    with pytest.raises(PlanError, match=r"`q4_k_x`.*q4_k_m"):
        llama_tensor_types("q4_k_x", model.shapes.items(), model.hyper)
