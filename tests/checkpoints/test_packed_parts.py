"""Checkpoints whose weights are published in integers: read as what they stand for, run as a reference."""

from pathlib import Path

import gguf
import pytest
import torch
from safetensors.torch import load_file

from dynquant.checkpoints.model import Model
from dynquant.checkpoints.published.packed_parts import ggml_blocks
from dynquant.checkpoints.safetensors_source import SafetensorsSource
from dynquant.encoding.parts import TensorPart
from dynquant.encoding.stream import Guidance, TensorEncoder, holds_blocks, load_encoder
from dynquant.errors import CheckpointError
from dynquant.families.common.conversion import Conversion, ConvertedSource
from dynquant.families.common.selection import selection_of_strides
from dynquant.families.open import open_model
from dynquant.formats.quant_types import QUANT_TYPES
from dynquant.running.load import load_directory
from tests.helpers.edited_checkpoints import edited_config, edited_weights
from tests.helpers.evaluating import evaluated
from tests.helpers.published_checkpoints import save_integers, save_mxfp4, save_tiny_gpt_oss
from tests.helpers.tiny_models import save_tiny

EXPERTS = "model.layers.0.mlp.experts.gate_up_proj"
MATRIX = "model.layers.0.mlp.up_proj"


@pytest.fixture(scope="module")
def gpt_oss(small_moe: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Directory with `packed`, MXFP4, and `floats`."""
    directory = tmp_path_factory.mktemp("gpt_oss")
    save_mxfp4(save_tiny_gpt_oss(directory / "source", small_moe), directory / "packed", directory / "floats")
    return directory


@pytest.fixture(scope="module", params=["gptq", "gptq of 8 bits in another order", "awq"])
def integers(request, small_moe: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory, (method, *order) = tmp_path_factory.mktemp("integers"), request.param.split()
    source = save_tiny("llama", directory / "source", small_moe)
    bits = 8 if order else 4
    save_integers(source, directory / "packed", directory / "floats", method, bits=bits, order=bool(order))
    return directory


def same_weights(directory: Path, dtype: torch.dtype = torch.float32) -> None:
    packed, floats = (load_directory(directory / name, dtype) for name in ("packed", "floats"))
    expected = floats.state_dict()
    assert packed.state_dict().keys() == expected.keys()
    assert all(torch.equal(values, expected[name]) for name, values in packed.state_dict().items())


def test_experts_of_mxfp4_are_read_as_their_values(gpt_oss):
    source, plain = SafetensorsSource(gpt_oss / "packed"), load_file(gpt_oss / "floats" / "model.safetensors")
    assert source.is_quantized and source.names() == sorted(plain)
    assert source.info(EXPERTS).shape == (4, 64, 192) and source.info(EXPERTS).dtype == "BF16"
    assert all(torch.equal(source.load(name), plain[name].float()) for name in source.names())
    assert torch.equal(source.load(EXPERTS, 2), plain[EXPERTS][2].float())
    assert torch.equal(source.load(EXPERTS, slice(1, 3)), plain[EXPERTS][1:3].float())


def test_codes_of_mxfp4_make_ggmls_blocks_without_rounding(gpt_oss):
    blocks = ggml_blocks(*SafetensorsSource(gpt_oss / "packed").mxfp4_codes(EXPERTS))
    decoded = gguf.quants.dequantize(blocks.numpy(), gguf.GGMLQuantizationType.MXFP4)
    plain = load_file(gpt_oss / "floats" / "model.safetensors")[EXPERTS]
    assert torch.equal(torch.from_numpy(decoded), plain.float().transpose(1, 2))


def test_mxfp4_runs_with_the_weights_that_transformers_finds(gpt_oss):
    same_weights(gpt_oss)
    from transformers import AutoModelForCausalLM

    theirs = AutoModelForCausalLM.from_pretrained(gpt_oss / "packed", dtype=torch.bfloat16).state_dict()
    ours = load_directory(gpt_oss / "packed", torch.bfloat16).state_dict()
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], values) for name, values in theirs.items())


def test_parts_of_mxfp4_that_do_not_fit_are_refused(gpt_oss, tmp_path):
    def cut(tensors):
        tensors[f"{EXPERTS}_scales"] = tensors[f"{EXPERTS}_scales"][:, 1:].contiguous()

    with pytest.raises(CheckpointError, match=rf"`{EXPERTS}` as MXFP4 blocks \[4, 192, 2, 16\].*U8 \[4, 191, 2\]"):
        SafetensorsSource(edited_weights(gpt_oss / "packed", tmp_path / "bad", cut))


def test_integers_are_a_reference_and_no_input(integers, small_moe):
    same_weights(integers)
    text = (small_moe.parent / "demo_text.txt",)
    report = evaluated(integers / "floats", integers / "packed", tasks=("kl",), text=text, window=64, max_tokens=128)
    assert report.texts[0].kl.mean.value < 1e-9
    with pytest.raises(CheckpointError, match=r"already quantized.*Start from the BF16.*`dynquant eval` takes this"):
        open_model(integers / "packed")


def test_integers_in_a_layout_that_is_not_known_are_refused(integers, tmp_path):
    bad = edited_config(integers / "packed", tmp_path / "bad", lambda c: c["quantization_config"].update(bits=3))
    with pytest.raises(CheckpointError, match=r"of 3 bits.*does not read.*Take the BF16"):
        load_directory(bad, torch.float32)

    def cut(tensors):
        tensors[f"{MATRIX}.scales"] = tensors[f"{MATRIX}.scales"][:-1].contiguous()

    with pytest.raises(CheckpointError, match=rf"`{MATRIX}` is stored as .* a layout that dynquant does not read"):
        SafetensorsSource(edited_weights(integers / "packed", tmp_path / "cut", cut))


def test_blocks_are_copied_where_the_plan_says_mxfp4(gpt_oss):
    packed = SafetensorsSource(gpt_oss / "packed")
    layouts = {"ffn_gate_exps": slice(0, None, 2), "ffn_up_exps": slice(1, None, 2)}
    experts = torch.empty(packed.info(EXPERTS).shape, device="meta")
    conversions = [
        Conversion(name, (EXPERTS,), (4, 96, 64), "BF16", selection_of_strides(rows_of(experts, rows), experts.shape))
        for name, rows in layouts.items()
    ]
    conversions.append(Conversion("turned", (EXPERTS,), (4, 64, 192), "BF16"))
    source = ConvertedSource(packed, conversions)
    model = Model(gpt_oss, source, (), source.checkpoint_names)
    parts = load_file(gpt_oss / "packed" / "model.safetensors")
    encoder = TensorEncoder(model, Guidance(), load_encoder("ggml"))
    assert not holds_blocks(model, "turned", QUANT_TYPES["MXFP4"])
    for name, rows in layouts.items():
        assert holds_blocks(model, name, QUANT_TYPES["MXFP4"]) and not holds_blocks(model, name, QUANT_TYPES["Q4_0"])
        blocks = encoder.tensor(name, QUANT_TYPES["MXFP4"]).view(4, 96, 2, 17)
        codes = torch.stack((blocks[..., 1:] & 15, blocks[..., 1:] >> 4), dim=-2).flatten(-2)
        stored = parts[f"{EXPERTS}_blocks"][:, rows]
        assert torch.equal(blocks[..., 0], parts[f"{EXPERTS}_scales"][:, rows])
        assert torch.equal(codes[..., 0::2], stored & 15) and torch.equal(codes[..., 1::2], stored >> 4)
        some = TensorPart(name, (4, 96, 64), QUANT_TYPES["MXFP4"], range(1, 3), range(96))
        assert torch.equal(encoder.part(some), blocks[1:3].flatten(-2))


def rows_of(experts: torch.Tensor, rows: slice) -> torch.Tensor:
    return experts.transpose(-1, -2)[..., rows, :]
