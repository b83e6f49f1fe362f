"""FP8 checkpoints with block scales: read as floats, calibrated, planned and exported; damaged ones are refused."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForCausalLM

from dynquant.calibration.run import provenance_of, text_inputs
from dynquant.calibration.streamed import calibrate_streamed
from dynquant.checkpoints.gguf_source import GGUFSource
from dynquant.checkpoints.safetensors_source import SafetensorsSource, StoredValues
from dynquant.errors import CheckpointError
from dynquant.families.open import open_model
from dynquant.running.load import load_directory, load_hf
from tests.helpers.calibrating import calibrate
from tests.helpers.commands import run
from tests.helpers.edited_checkpoints import edited_config, edited_weights
from tests.helpers.evaluating import evaluated
from tests.helpers.fp8_checkpoints import dequantized, quantized, save_fp8
from tests.helpers.tiny_models import write_f32

RAGGED = "model.layers.2.self_attn.kv_a_proj_with_mqa.weight"  # 288 rows: two blocks and a quarter


@pytest.fixture(scope="module")
def fp8(small_moe: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """textbook-moe-16m in FP8; the float32 that it stands for is beside it, in `floats`."""
    directory = tmp_path_factory.mktemp("fp8")
    save_fp8(small_moe, directory / "fp8", directory / "floats")
    return directory / "fp8"


@pytest.mark.parametrize("shape", [(128, 256), (288, 256), (5, 130), (1, 1), (257, 127)])
def test_values_are_scaled_by_block(shape):
    values, scales = quantized(torch.randn(shape, generator=torch.Generator().manual_seed(0)))
    stored = StoredValues(values, scales)
    assert torch.equal(stored.to(torch.float32), dequantized(values, scales))
    assert stored.num_bytes == values.numel() + 4 * scales.numel()
    stack = StoredValues(torch.stack([values.view(torch.uint8)] * 2).view(values.dtype), torch.stack([scales] * 2))
    assert torch.equal(stack.to(torch.float32)[1], dequantized(values, scales))


def test_scales_are_hidden_and_the_float_type_is_told(fp8):
    source = SafetensorsSource(fp8)
    plain = load_file(fp8.parent / "floats" / "model.safetensors")
    assert source.is_quantized and source.names() == sorted(plain)
    assert source.info(RAGGED).dtype == "BF16" and source.info(RAGGED).shape == (288, 256)
    assert all(torch.equal(source.load(name), plain[name].float()) for name in source.names())
    assert source.stored_bytes(RAGGED) == 288 * 256 + 4 * 3 * 2
    for rows in (slice(0, 288), slice(37, 300), slice(130, 140), slice(256, 288)):
        assert torch.equal(source.load(RAGGED, rows), plain[RAGGED].float()[rows])


@pytest.mark.nightly
def test_statistics_are_those_of_the_floats(fp8, tmp_path):
    options = {"tokens": 600, "window": 128}
    expected = calibrate(open_model(fp8.parent / "floats"), **options).stats
    model = open_model(fp8)
    found = calibrate(model, **options).stats
    inputs = text_inputs(model, None, **options)
    provenance = provenance_of(model, inputs, tokens=options["tokens"], seed=0)
    streamed = calibrate_streamed(model, inputs, provenance, tmp_path / "stats.safetensors").stats
    assert found.inputs.keys() == expected.inputs.keys() == streamed.inputs.keys()
    for key, one in expected.inputs.items():
        for other in (found, streamed):
            assert torch.equal(other.inputs[key].in_sum2, one.in_sum2), key
            assert other.inputs[key].samples is None or torch.equal(other.inputs[key].samples, one.samples)


def test_whatever_runs_the_model_has_the_weights_of_the_floats(fp8, tmp_path, small_moe):
    """transformers alone takes 288 / 3 = 96 rows for a block where it is 128."""
    expected = load_directory(fp8.parent / "floats", torch.float32).state_dict()
    base = write_f32(open_model(fp8), tmp_path / "base.gguf")
    for loaded in (load_directory(fp8, torch.float32), load_hf(open_model(fp8, base_gguf=base))):
        found = loaded.state_dict()
        assert found.keys() == expected.keys()
        assert all(torch.equal(found[name], values) for name, values in expected.items())
    text = (small_moe.parent / "demo_text.txt",)
    report = evaluated(fp8.parent / "floats", fp8, tasks=("kl",), text=text, window=128, max_tokens=256)
    assert report.texts[0].kl.mean.value < 1e-9


def test_fp8_of_any_architecture_runs(tmp_path, small_moe):
    config = AutoConfig.for_model(
        "granite", vocab_size=512, hidden_size=192, intermediate_size=288, num_hidden_layers=1
    )
    AutoModelForCausalLM.from_config(config, dtype=torch.float32).save_pretrained(tmp_path / "source")
    save_fp8(tmp_path / "source", tmp_path / "fp8", tmp_path / "floats")
    found, expected = (load_directory(tmp_path / name, torch.float32).state_dict() for name in ("fp8", "floats"))
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], values) for name, values in expected.items())


def test_scales_may_be_bfloat16_or_one_number(fp8, tmp_path):
    name, whole = "model.layers.0.self_attn.o_proj.weight", "model.layers.1.self_attn.o_proj.weight"

    def change(tensors):
        tensors[f"{name}_scale_inv"] = tensors[f"{name}_scale_inv"].bfloat16()
        tensors[f"{whole}_scale_inv"] = torch.tensor(0.5).bfloat16()
        tensors[f"{whole.removesuffix('weight')}activation_scale"] = torch.tensor(3.0)

    tensors = load_file(edited_weights(fp8, tmp_path / "other", change) / "model.safetensors")
    source = SafetensorsSource(tmp_path / "other")
    assert source.names() == SafetensorsSource(fp8).names()
    assert torch.equal(source.load(name), dequantized(tensors[name], tensors[f"{name}_scale_inv"].float()))
    assert torch.equal(source.load(whole), 0.5 * tensors[whole].float())
    assert torch.equal(source.load(whole, slice(7, 30)), 0.5 * tensors[whole][7:30].float())


def test_exports_are_those_of_the_floats(fp8, tmp_path):
    for name in ("fp8", "floats"):
        made = run("export", fp8.parent / name, "--preset", "uniform-q8_0", "--encoder", "ggml", "--tokens", "512",
                   "--hessians", "none", "-o", tmp_path / f"{name}.gguf")  # fmt: skip
        assert made.returncode == 0, made.stderr
    found, expected = GGUFSource(tmp_path / "fp8.gguf"), GGUFSource(tmp_path / "floats.gguf")
    assert found.names() == expected.names()
    assert all(torch.equal(found.load(name), expected.load(name)) for name in found.names())


@pytest.mark.nightly
def test_a_plan_is_made_within_a_limit(fp8, tmp_path):
    text = tmp_path / "text.txt"
    text.write_text("The heart pumps blood through the arteries to all parts of the body. " * 40)
    made = run("plan", fp8, "--bpw", "6", "--types", "q4_0,q8_0", "--calibration", text, "--window", "128",
               "--hessians", "none", "--no-report", "--max-memory", "8GB", "-o", tmp_path / "plan")  # fmt: skip
    assert made.returncode == 0, made.stderr
    entries = json.loads((tmp_path / "plan" / "plan.json").read_text())["entries"]
    assert {"Q8_0", "Q4_0"} <= {entry["type"] for entry in entries}


def test_a_missing_scale_is_named(fp8, tmp_path):
    def drop(tensors):
        del tensors[f"{RAGGED}_scale_inv"]

    with pytest.raises(CheckpointError, match=rf"`{RAGGED}` as F8_E4M3, but .* no `{RAGGED}_scale_inv`"):
        SafetensorsSource(edited_weights(fp8, tmp_path / "bad", drop))


@pytest.mark.parametrize("edit", [lambda s: s[:2], lambda s: s.repeat(2, 1), lambda s: s.flatten(), lambda s: s.half()])
def test_scales_that_do_not_fit_are_refused(fp8, tmp_path, edit):
    def change(tensors):
        tensors[f"{RAGGED}_scale_inv"] = edit(tensors[f"{RAGGED}_scale_inv"]).contiguous()

    with pytest.raises(CheckpointError, match=r"needs F32 or BF16 \[3, 2\], or one number"):
        SafetensorsSource(edited_weights(fp8, tmp_path / "bad", change))


@pytest.mark.parametrize("size", [[64], [0, 128], ["a", "b"], 7])
def test_a_block_size_that_is_none_is_refused(fp8, tmp_path, size):
    bad = edited_config(fp8, tmp_path / "bad", lambda c: c["quantization_config"].update(weight_block_size=size))
    with pytest.raises(CheckpointError, match=r"config\.json does not describe FP8 weights"):
        SafetensorsSource(bad)
