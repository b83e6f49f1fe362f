"""The ggml encoder's bytes are llama-quantize's, chunking does not change them, and bad input is refused."""

import ctypes
from pathlib import Path

import pytest
import torch

from dynquant.encoding import ggml as ggml_encoder
from dynquant.encoding.ggml import GgmlEncoder, encode
from dynquant.encoding.interface import Encoder
from dynquant.errors import EncodeError
from dynquant.formats import decode
from dynquant.formats.quant_types import QUANT_TYPES
from dynquant.llama_library import library_path
from dynquant.recipes.llama_mixtures import LLAMA_FTYPES
from tests.helpers.llama_quantize import deepseek_model, llama_model, llama_quantize
from tests.helpers.representatives import SLOW_GGML_TABLES, represented_by

QUANTIZED = [t for t in QUANT_TYPES.values() if not t.is_float]
QUANTIZED = represented_by([t for t in QUANTIZED if t.name not in SLOW_GGML_TABLES], QUANTIZED)
# Every codec once on experts, and what differs between architectures (tied output, 3-D attention, short rows) on three.
EVERY_CODEC = [
    "iq2_xxs", "iq3_xs", "q2_k", "q3_k_l", "q4_k_m", "iq4_nl", "iq4_xs", "q4_0",
    "q4_1", "q5_0", "q5_1", "q6_k", "q8_0", "tq1_0", "tq2_0", "q2_0", "q1_0", "mxfp4_moe", "f16", "bf16",
]  # fmt: skip
THREE = ["iq2_xxs", "q2_k", "q4_k_m"]
EXPERTS = llama_model(arch="qwen3moe", layers=1, head_dim=32, ffn=256, vocab=32, experts=2)
CASES = {
    "qwen3moe": (EXPERTS, EVERY_CODEC),
    "llama": (llama_model(layers=1, head_dim=32, ffn=256, vocab=32), THREE),
    "tied-rows-320": (llama_model(layers=1, hidden=320, heads=5, kv_heads=5, ffn=256, vocab=32, tied=True), THREE),
    "deepseek2": (deepseek_model(layers=2, experts=2), THREE),
    "slow tables": (EXPERTS, ["iq1_s", "iq1_m", "iq2_s", "iq2_m", "iq3_xxs"]),
}


def noise(*shape: int, seed: int = 0) -> torch.Tensor:
    return 0.02 * torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def lognormal(*shape: int, seed: int = 1) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).exp()


def ggml() -> ctypes.CDLL:
    return ctypes.CDLL(str(library_path("ggml-base")))


@pytest.mark.parametrize("case", represented_by(CASES.keys() - {"slow tables", "qwen3moe"}, CASES))
def test_bytes_equal_llama_quantize(case: str, tmp_path: Path):
    model, mixtures = CASES[case]
    source, target = model.write(tmp_path / "f32.gguf"), tmp_path / "quantized.gguf"
    weights, importance = model.weights(), model.importance()
    for mixture in mixtures:
        for name, (type_name, packed) in llama_quantize(source, target, LLAMA_FTYPES[mixture].id, importance).items():
            if weights[name].dim() > 1:
                ours = encode(QUANT_TYPES[type_name], weights[name], importance[name], name=name)
                assert torch.equal(ours, torch.from_numpy(packed)), f"{mixture}: {name} as {type_name}"


@pytest.mark.parametrize("quant_type", QUANTIZED, ids=lambda t: t.name)
def test_chunks_threads_and_experts_do_not_change_bytes(quant_type, monkeypatch):
    weights, importance = noise(3, 20, 512), lognormal(3, 512)
    whole = encode(quant_type, weights, importance, threads=1)
    monkeypatch.setattr(ggml_encoder, "CHUNK_WEIGHTS", 3 * 512)
    assert torch.equal(encode(quant_type, weights, importance, threads=4), whole)
    for expert in range(3):
        assert torch.equal(encode(quant_type, weights[expert], importance[expert]), whole[expert])


@pytest.mark.parametrize("quant_type", QUANTIZED, ids=lambda t: t.name)
def test_registry_agrees_with_ggml_on_importance(quant_type):
    requires = ggml().ggml_quantize_requires_imatrix
    requires.restype = ctypes.c_bool
    assert requires(quant_type.ggml_id) == quant_type.needs_imatrix
    weights, flat = noise(8, 512), torch.ones(512)
    weighted = encode(quant_type, weights, lognormal(512))
    assert quant_type.uses_imatrix != torch.equal(weighted, encode(quant_type, weights, flat))


@pytest.mark.parametrize("quant_type", QUANTIZED, ids=lambda t: t.name)
def test_decoded_weights_are_near(quant_type):
    weights = noise(16, 512)
    decoded = decode(quant_type.name, encode(quant_type, weights, torch.ones(512)), weights.shape)
    relative = ((decoded - weights).square().sum() / weights.square().sum()).item()
    # These scale by the largest weight and lose most of a Gaussian; the rest follows 6 dB per bit.
    limit = 0.8 if quant_type.name in ("TQ1_0", "TQ2_0", "Q2_0") else 8 * 4.0**-quant_type.bits_per_weight
    assert relative < limit


def test_weights_of_any_float_dtype_and_stride_are_read_as_float32():
    weights, importance = noise(512, 64).bfloat16().T, lognormal(512)
    quant_type = QUANT_TYPES["Q4_K"]
    assert torch.equal(encode(quant_type, weights, importance), encode(quant_type, weights.float(), importance))


def test_one_importance_serves_all_experts():
    weights, importance, quant_type = noise(3, 8, 256), lognormal(256), QUANT_TYPES["Q2_K"]
    assert torch.equal(encode(quant_type, weights, importance), encode(quant_type, weights, importance.expand(3, 256)))


@pytest.mark.parametrize("type_name", ["F16", "BF16"])
def test_half_precision_rounds_as_ggml_does(type_name):
    """Every bit pattern whose value survives in the type, including ties and subnormals."""
    generator = torch.Generator().manual_seed(0)
    bits = torch.randint(-(2**31), 2**31, (1 << 20,), generator=generator).to(torch.int32)
    ties = (torch.arange(1 << 16, dtype=torch.int64) << 16 | 0x8000).to(torch.int32)
    values = torch.cat([bits, ties, ties >> 3]).view(torch.float32)
    values = torch.cat([values, torch.randn(1 << 16, generator=generator) * 1e-6])
    values = values[values.abs() < (65504 if type_name == "F16" else 3.38e38)][None]
    expected = torch.empty(1, values.shape[1], dtype=torch.int16)
    quantize = ggml().ggml_quantize_chunk
    quantize.argtypes = [ctypes.c_int, *[ctypes.c_void_p] * 2, *[ctypes.c_int64] * 3, ctypes.c_void_p]
    quant_type = QUANT_TYPES[type_name]
    quantize(quant_type.ggml_id, values.data_ptr(), expected.data_ptr(), 0, 1, values.shape[1], None)
    assert torch.equal(encode(quant_type, values), expected.view(torch.uint8))


def test_f32_keeps_every_bit():
    weights = noise(3, 5)
    assert torch.equal(encode(QUANT_TYPES["F32"], weights).view(torch.float32), weights)


def test_empty_tensor_gives_no_bytes():
    assert encode(QUANT_TYPES["Q4_K"], torch.zeros(0, 256)).shape == (0, 144)


def test_module_function_and_class_satisfy_the_protocol():
    encoder: Encoder = GgmlEncoder()
    assert encoder.name == "ggml"
    weights = noise(2, 32)
    assert torch.equal(encoder.encode(QUANT_TYPES["Q8_0"], weights), encode(QUANT_TYPES["Q8_0"], weights))


def with_value(value: float) -> torch.Tensor:
    weights = noise(4, 256)
    weights[2, 7] = value
    return weights


@pytest.mark.parametrize("type_name", ["Q4_K", "Q8_0", "F16", "F32"])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_non_finite_weights_are_refused_by_name(type_name, value):
    with pytest.raises(EncodeError, match=r"`blk\.0\.ffn_up\.weight`.*NaN or Inf"):
        encode(QUANT_TYPES[type_name], with_value(value), name="blk.0.ffn_up.weight")


def test_weight_beyond_float16_is_refused():
    with pytest.raises(EncodeError, match="F16"):
        encode(QUANT_TYPES["F16"], with_value(1e6))
    with pytest.raises(EncodeError, match="beyond float16"):
        encode(QUANT_TYPES["Q4_0"], with_value(1e7))


@pytest.mark.parametrize("type_name", represented_by(("IQ3_XXS", "IQ3_S"), ["IQ2_XS", "IQ2_S", "IQ3_XXS", "IQ3_S"]))
def test_weights_on_which_ggml_would_abort_are_refused(type_name):
    with pytest.raises(EncodeError, match="overflows float32"):
        encode(QUANT_TYPES[type_name], noise(4, 256) * 1e30, torch.ones(256))


def test_missing_importance_is_refused():
    with pytest.raises(EncodeError, match="without an importance matrix"):
        encode(QUANT_TYPES["IQ1_S"], noise(4, 256))


@pytest.mark.parametrize("shape", [(128,), (2, 256), (1, 1, 256)], ids=str)
def test_importance_of_another_shape_is_refused(shape):
    with pytest.raises(EncodeError, match="importance matrix of `x` has shape"):
        encode(QUANT_TYPES["Q4_K"], noise(4, 256), torch.ones(shape), name="x")


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -1.0])
def test_importance_that_is_no_mean_of_squares_is_refused(value):
    importance = torch.ones(256)
    importance[3] = value
    with pytest.raises(EncodeError, match="NaN, Inf or negative"):
        encode(QUANT_TYPES["Q4_K"], noise(4, 256), importance)


def test_row_length_is_refused_with_the_fallback():
    with pytest.raises(EncodeError, match=r"rows of 320.*Q5_0"):
        encode(QUANT_TYPES["Q4_K"], noise(4, 320))


@pytest.mark.parametrize("weights", [torch.zeros(256), torch.zeros(2, 256, dtype=torch.int32)], ids=["1-D", "int"])
def test_other_tensors_are_refused(weights):
    with pytest.raises(EncodeError, match="can be encoded"):
        encode(QUANT_TYPES["Q8_0"], weights)
