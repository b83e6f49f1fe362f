"""`decode` against three independent truths: gguf-py, the ggml C library, and blocks worked out by hand."""

import ctypes
import struct
import sys
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from safetensors import safe_open

from dynquant.errors import PlanError
from dynquant.formats import decode, tables
from dynquant.formats.quant_types import QUANT_TYPES, QuantType
from dynquant.llama_library import library_path
from tests.helpers.representatives import SLOW_GGML_TABLES, represented_by

ALL_TYPES = sorted(QUANT_TYPES)
BLOCK_TYPES = [name for name in ALL_TYPES if not QUANT_TYPES[name].is_float]
GGUF_ENCODABLE = ["F32", "F16", "BF16", "MXFP4", "Q8_0", "Q5_1", "Q5_0", "Q4_1", "Q4_0", "TQ2_0", "TQ1_0"]
"""gguf-py 0.19 can write these; the others are encoded by ggml below."""
IN_GGUF = [name for name in ALL_TYPES if name not in ("Q2_0", "Q1_0")]
"""gguf-py 0.19 can read these; the others are compared with ggml alone."""

HALF_OFFSETS = {
    **dict.fromkeys(("Q4_0", "Q5_0", "Q8_0", "IQ1_S", "IQ2_S", "IQ2_XS", "IQ2_XXS"), (0,)),
    **dict.fromkeys(("IQ3_S", "IQ3_XXS", "IQ4_NL", "IQ4_XS", "Q2_0", "Q1_0"), (0,)),
    **dict.fromkeys(("Q4_1", "Q5_1", "Q4_K", "Q5_K"), (0, 2)),
    **{"Q2_K": (80, 82), "Q3_K": (108,), "Q6_K": (208,), "TQ1_0": (52,), "TQ2_0": (64,)},
}
"""Where a block keeps its fp16 numbers. IQ1_M scatters its scale over nibbles; MXFP4 and NVFP4 have none."""


def random_bytes(layout: QuantType, rows: int, blocks_per_row: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (rows, blocks_per_row * layout.block_bytes), dtype=torch.uint8, generator=generator)


def with_halves(packed: torch.Tensor, layout: QuantType, halves: torch.Tensor) -> torch.Tensor:
    """The same bytes with every fp16 number of every block drawn from `halves`."""
    blocks = packed.reshape(-1, layout.block_bytes).clone()
    generator = torch.Generator().manual_seed(1)
    for offset in HALF_OFFSETS[layout.name]:
        chosen = halves[torch.randint(0, len(halves), (len(blocks),), generator=generator)]
        blocks[:, offset : offset + 2] = chosen.to(torch.float16).view(torch.uint8).reshape(-1, 2)
    return blocks.reshape(packed.shape)


def gguf_weights(name: str, packed: torch.Tensor) -> np.ndarray:
    with np.errstate(all="ignore"):
        return gguf.quants.dequantize(packed.numpy(), gguf.GGMLQuantizationType[name])


def assert_bit_equal(actual: torch.Tensor, expected: np.ndarray) -> None:
    """Same shape and same float32 bits, except that any NaN equals any other."""
    assert actual.dtype == torch.float32 and tuple(actual.shape) == expected.shape
    ours = actual.cpu().numpy()
    same = (ours.view(np.uint32) == expected.view(np.uint32)) | (np.isnan(ours) & np.isnan(expected))
    assert same.all(), f"{(~same).sum()} of {same.size} weights differ, first at {np.argwhere(~same)[0]}"


@pytest.mark.parametrize("name", IN_GGUF)
def test_random_bytes_equal_gguf(name: str) -> None:
    layout = QUANT_TYPES[name]
    packed = random_bytes(layout, 5, 61 if layout.block_size > 1 else 4099)
    assert_bit_equal(decode(layout, packed), gguf_weights(name, packed))


@pytest.mark.parametrize("name", sorted(set(HALF_OFFSETS) & set(IN_GGUF)))
@pytest.mark.parametrize(
    "halves",
    [
        torch.linspace(-0.1, 0.1, 999),
        torch.arange(-1023, 1024) * 2.0**-24,
        torch.tensor([0.0, -0.0, 65504.0, -65504.0]),
    ],
    ids=["usual", "subnormal", "extreme"],
)
def test_finite_scales_equal_gguf(name: str, halves: torch.Tensor) -> None:
    layout = QUANT_TYPES[name]
    packed = with_halves(random_bytes(layout, 3, 200), layout, halves)
    weights = decode(layout, packed)
    assert weights.isfinite().all()
    assert_bit_equal(weights, gguf_weights(name, packed))


@pytest.mark.parametrize(("name", "scale_bytes"), [("MXFP4", 1), ("NVFP4", 4)])
def test_every_scale_byte_of_the_four_bit_floats(name: str, scale_bytes: int) -> None:
    layout = QUANT_TYPES[name]
    blocks = random_bytes(layout, 256, 1)
    blocks[:, :scale_bytes] = torch.arange(256, dtype=torch.uint8)[:, None]
    weights = decode(layout, blocks)
    assert_bit_equal(weights, gguf_weights(name, blocks))
    if name == "MXFP4":
        assert weights[0].abs().max() == pytest.approx(12 * 2.0**-128, rel=0), "scales below 2^-126 were flushed"


@pytest.mark.parametrize("name", ["F16", "BF16"])
def test_every_sixteen_bit_pattern(name: str) -> None:
    packed = torch.arange(1 << 16).to(torch.uint16).view(torch.uint8)
    assert_bit_equal(decode(name, packed), gguf_weights(name, packed))


def test_blocks_worked_out_by_hand() -> None:
    nibble_row = bytes(range(16))  # weight j has nibble j, weight j + 16 has 0
    ramp = torch.arange(16.0)
    q4_0 = decode("Q4_0", _bytes(struct.pack("<e", 0.5) + nibble_row))
    torch.testing.assert_close(q4_0, torch.cat((0.5 * (ramp - 8), torch.full((16,), -4.0))), rtol=0, atol=0)
    q4_1 = decode("Q4_1", _bytes(struct.pack("<ee", 2.0, -1.0) + nibble_row))
    torch.testing.assert_close(q4_1, torch.cat((2 * ramp - 1, torch.full((16,), -1.0))), rtol=0, atol=0)
    q8_0 = decode("Q8_0", _bytes(struct.pack("<e32b", 0.25, *range(-16, 16))))
    torch.testing.assert_close(q8_0, 0.25 * torch.arange(-16.0, 16.0), rtol=0, atol=0)
    e2m1 = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6])
    mxfp4 = decode("MXFP4", _bytes(bytes([128]) + nibble_row))  # E8M0 128 is a scale of 2
    torch.testing.assert_close(mxfp4[:16], 2 * torch.cat((e2m1, -e2m1)), rtol=0, atol=0)
    q2_0 = decode("Q2_0", _bytes(struct.pack("<e", 0.5) + bytes([0b11100100] * 16)))  # crumbs 0, 1, 2, 3
    torch.testing.assert_close(q2_0, 0.5 * torch.tensor([-1.0, 0.0, 1.0, 2.0]).repeat(16), rtol=0, atol=0)
    q1_0 = decode("Q1_0", _bytes(struct.pack("<e", -0.5) + bytes([0b00000101] * 16)))
    signs = torch.tensor([1.0, -1, 1, -1, -1, -1, -1, -1])
    torch.testing.assert_close(q1_0, -0.5 * signs.repeat(16), rtol=0, atol=0)


def _bytes(raw: bytes) -> torch.Tensor:
    return torch.frombuffer(bytearray(raw), dtype=torch.uint8)


@pytest.fixture(scope="module")
def real_rows(small_moe: Path) -> np.ndarray:
    """Rows of a trained down-projection, float32 [16, 768]."""
    with safe_open(small_moe / "model.safetensors", "pt") as checkpoint:
        return checkpoint.get_tensor("model.layers.0.mlp.down_proj.weight")[:16].float().numpy()


@pytest.mark.parametrize("name", GGUF_ENCODABLE)
def test_real_rows_encoded_by_gguf(name: str, real_rows: np.ndarray) -> None:
    encoded = gguf.quants.quantize(real_rows, gguf.GGMLQuantizationType[name])
    packed = torch.from_numpy(encoded.view(np.uint8))
    assert_bit_equal(decode(name, packed), gguf_weights(name, packed))


@pytest.fixture(scope="module")
def ggml() -> ctypes.CDLL:
    """The ggml library with which the encoder has built its search tables; its file is there more than once."""
    pytest.importorskip("llama_cpp", reason="llama-cpp-python is not installed")
    library = ctypes.CDLL(str(library_path("ggml-base")))
    library.ggml_quantize_chunk.restype = ctypes.c_size_t
    library.ggml_quantize_chunk.argtypes = (
        [ctypes.c_int, ctypes.c_void_p, ctypes.c_void_p] + [ctypes.c_int64] * 3 + [ctypes.c_void_p]
    )
    return library


@pytest.mark.parametrize("name", represented_by(set(BLOCK_TYPES) - set(SLOW_GGML_TABLES), BLOCK_TYPES))
def test_real_rows_encoded_and_decoded_by_ggml(name: str, real_rows: np.ndarray, ggml: ctypes.CDLL) -> None:
    layout = QUANT_TYPES[name]
    rows, row_length = real_rows.shape
    packed = torch.empty(rows, layout.row_bytes(row_length), dtype=torch.uint8)
    importance = np.ones(row_length, dtype=np.float32)
    written = ggml.ggml_quantize_chunk(
        layout.ggml_id, real_rows.ctypes.data, packed.data_ptr(), 0, rows, row_length, importance.ctypes.data
    )
    assert written == packed.numel()
    weights = decode(layout, packed)
    if name in IN_GGUF:
        assert_bit_equal(weights, gguf_weights(name, packed))
    assert_bit_equal(weights, ggml_weights(ggml, name, packed, real_rows.shape))
    relative_error = (weights - torch.from_numpy(real_rows)).square().sum() / np.square(real_rows).sum()
    assert relative_error < (0.75 if name in ("TQ1_0", "TQ2_0", "Q2_0", "Q1_0") else 0.3)


@pytest.mark.parametrize("name", BLOCK_TYPES)
def test_random_bytes_equal_ggml(name: str, ggml: ctypes.CDLL) -> None:
    layout = QUANT_TYPES[name]
    packed = random_bytes(layout, 2, 100, seed=2)
    assert_bit_equal(decode(layout, packed), ggml_weights(ggml, name, packed, (2, 100 * layout.block_size)))


def ggml_weights(ggml: ctypes.CDLL, name: str, packed: torch.Tensor, shape: tuple[int, ...]) -> np.ndarray:
    weights = np.empty(shape, dtype=np.float32)
    symbol = "dequantize_row_" + name.lower().replace("_k", "_K")
    getattr(ggml, symbol)(
        ctypes.c_void_p(packed.data_ptr()), ctypes.c_void_p(weights.ctypes.data), ctypes.c_int64(weights.size)
    )
    return weights


@pytest.mark.parametrize("name", ALL_TYPES)
def test_chunks_and_alignment_do_not_matter(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    layout = QUANT_TYPES[name]
    packed = random_bytes(layout, 7, 3)
    whole = decode(layout, packed).numpy()
    odd_address = torch.empty(packed.numel() + 1, dtype=torch.uint8)[1:].reshape(packed.shape).copy_(packed)
    assert_bit_equal(decode(layout, odd_address), whole)
    strided = packed.repeat(1, 2)[:, : packed.shape[1]]
    assert_bit_equal(decode(layout, strided), whole)
    one_block = odd_address.flatten()[: layout.block_bytes]
    assert_bit_equal(decode(layout, one_block), whole.flatten()[: layout.block_size])
    module = sys.modules["dynquant.formats.decode"]
    monkeypatch.setattr(module, "_CPU_CHUNK_WEIGHTS", -(-4 * layout.block_size // torch.get_num_threads()))
    assert_bit_equal(decode(layout, packed), whole)


def test_shapes() -> None:
    packed = random_bytes(QUANT_TYPES["Q4_K"], 6, 2)
    weights = decode("q4_k", packed)
    assert weights.shape == (6, 512)
    experts = decode("Q4_K", packed.reshape(2, 3, -1))
    assert experts.shape == (2, 3, 512)
    flat = decode("Q4_K", packed.flatten(), (6, 512))
    assert_bit_equal(flat, weights.numpy())
    assert decode("Q4_K", packed[:0]).shape == (0, 512)


@pytest.mark.parametrize("name", ["IQ1_S", "IQ2_XXS", "IQ3_S", "IQ4_NL", "MXFP4", "NVFP4"])
def test_tables_first_made_under_the_meta_device_hold_numbers(name: str) -> None:
    """transformers builds models under `torch.device("meta")`, others decode in inference mode first."""
    packed = random_bytes(QUANT_TYPES[name], 2, 3)
    for table in vars(tables).values():
        if hasattr(table, "cache_clear"):
            table.cache_clear()
    with torch.device("meta"), torch.inference_mode():
        decode(name, packed)
    assert_bit_equal(decode(name, packed), gguf_weights(name, packed))


@pytest.mark.parametrize("name", ALL_TYPES)
def test_wrong_byte_count_is_refused(name: str) -> None:
    layout = QUANT_TYPES[name]
    packed = torch.zeros(2, layout.block_bytes + 1, dtype=torch.uint8)
    with pytest.raises(ValueError, match=rf"{name} .*{layout.block_bytes} bytes, got {layout.block_bytes + 1}"):
        decode(layout, packed)


def test_other_bad_arguments_are_refused() -> None:
    packed = random_bytes(QUANT_TYPES["Q8_0"], 4, 2)
    with pytest.raises(ValueError, match=r"uint8, got torch\.int8"):
        decode("Q8_0", packed.view(torch.int8))
    with pytest.raises(ValueError, match="a scalar"):
        decode("Q8_0", torch.tensor(0, dtype=torch.uint8))
    with pytest.raises(ValueError, match=r"\(4, 32\).*256 weights"):
        decode("Q8_0", packed, (4, 32))
    with pytest.raises(ValueError, match="blocks of 32"):
        decode("Q8_0", packed, (16, 16))
    with pytest.raises(PlanError, match="Q8_0"):
        decode("Q8_1x", packed)


@pytest.mark.gpu
@pytest.mark.parametrize("name", ALL_TYPES)
def test_cuda_equals_cpu(name: str, cuda: torch.device) -> None:
    layout = QUANT_TYPES[name]
    packed = random_bytes(layout, 5, 61 if layout.block_size > 1 else 4099)
    assert_bit_equal(decode(layout, packed.to(cuda)), decode(layout, packed).numpy())
