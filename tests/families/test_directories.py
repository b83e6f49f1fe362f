"""Directories with more, less or other files than a model has: read as transformers reads them, or refused by name."""

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from dynquant.checkpoints.inspect import inspect
from dynquant.checkpoints.safetensors_source import INDEX_NAME, SINGLE_NAME, weight_files
from dynquant.encoding.stream import load_encoder
from dynquant.errors import CheckpointError
from dynquant.families.open import locate_model, open_model
from dynquant.recipes.build_plan import plan_from_types
from dynquant.recipes.presets import preset_types
from dynquant.running.load import load_directory, load_hf
from tests.helpers.commands import refused, run
from tests.helpers.edited_checkpoints import edited_weights
from tests.helpers.exports import export_gguf
from tests.helpers.tiny_models import save_tiny, write_f32
from tests.helpers.tiny_vision import save_vision_model

POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:4d7a214614ab2935\nsize 4096\n"


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory, small_moe: Path) -> Path:
    return save_tiny("llama", tmp_path_factory.mktemp("tiny") / "llama", small_moe)


@pytest.fixture
def model(original: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(original, tmp_path / "model"))


def add_shards(directory: Path, *, scale: float, listed: slice = slice(None)) -> None:
    """Write the weights times `scale` as two shards; `listed` are the names that the index has."""
    tensors = load_file(directory / SINGLE_NAME)
    names = sorted(tensors)
    weight_map = {}
    for number, part in enumerate((names[::2], names[1::2]), start=1):
        file = f"model-{number:05d}-of-00002.safetensors"
        save_file({name: scale * tensors[name] for name in part}, directory / file, {"format": "pt"})
        weight_map |= dict.fromkeys(part[listed], file)
    (directory / INDEX_NAME).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


def opens(directory: Path) -> list:
    """Every way in, as functions: the opener, what runs a directory as it is, and `inspect`."""
    return [lambda: open_model(directory), lambda: load_directory(directory, torch.float32), lambda: inspect(directory)]


def test_two_sets_of_weights_are_ambiguous(model: Path) -> None:
    add_shards(model, scale=2.0)
    for way_in in opens(model):
        with pytest.raises(CheckpointError, match=r"two sets of weights: model\.safetensors.*2 files of .*index\.json"):
            way_in()
    (model / SINGLE_NAME).unlink()
    shards = open_model(model)
    loaded = dict(load_hf(shards).named_parameters())
    assert torch.equal(shards.source.load("token_embd.weight"), loaded["model.embed_tokens.weight"])
    assert inspect(model).num_weights == shards.num_weights


def test_files_that_transformers_does_not_read_are_not_read(model: Path, original: Path) -> None:
    tensors = {name: 0 * values for name, values in load_file(model / SINGLE_NAME).items()}
    for name in ("consolidated.safetensors", "model.fp16.safetensors", "adapter_model.safetensors", "a.safetensors"):
        save_file(tensors, model / name)
    torch.save(tensors, model / "pytorch_model.bin")
    (model / "pytorch_model.bin.index.json").write_text('{"weight_map": {}}')
    (model / "consolidated.00.safetensors").write_text(POINTER)
    opened = open_model(model)
    assert opened.fingerprint == open_model(original).fingerprint
    num_bytes = (model / SINGLE_NAME).stat().st_size
    assert inspect(model).total_bytes == num_bytes == sum(file.stat().st_size for file in weight_files(model))
    expected = load_file(model / SINGLE_NAME)["model.layers.1.mlp.up_proj.weight"]
    assert torch.equal(opened.source.load("blk.1.ffn_up.weight"), expected)
    assert torch.equal(load_directory(model, torch.float32).model.layers[1].mlp.up_proj.weight, expected)


def test_a_shard_is_read_whole_whatever_the_index_lists(model: Path, original: Path) -> None:
    """As transformers does: a shard's tensors count, and an output that no index lists is not lost."""
    expected = open_model(original).source
    add_shards(model, scale=1.0, listed=slice(1, None))
    (model / SINGLE_NAME).unlink()
    source = open_model(model).source
    assert source.names() == expected.names()
    assert all(torch.equal(source.load(name), expected.load(name)) for name in source.names())


def test_a_tensor_in_two_shards_is_refused(model: Path) -> None:
    add_shards(model, scale=1.0)
    (model / SINGLE_NAME).unlink()
    second = model / "model-00002-of-00002.safetensors"
    save_file(load_file(second) | {"lm_head.weight": torch.zeros(8192, 256)}, second, {"format": "pt"})
    for way_in in opens(model):
        with pytest.raises(CheckpointError, match=r"`lm_head\.weight` is stored twice"):
            way_in()


@pytest.mark.parametrize(
    ("rename", "message"),
    [
        (lambda name: f"base_model.model.{name}", "PEFT's wrapper"),
        (lambda name: f"_orig_mod.{name}", r"torch\.compile's wrapper"),
        (lambda name: name.replace("layers.1.", "layers.1._orig_mod."), r"torch\.compile's wrapper"),
        (lambda name: f"module.{name}", "distributed training"),
        (lambda name: name.replace("q_proj.weight", "q_proj.base_layer.weight"), "adapter that is not merged"),
        (lambda name: f"base_model.model.{name}".replace("up_proj", "up_proj.lora_A"), "adapter that is not merged"),
    ],
    ids=["peft", "compile", "compiled layer", "ddp", "base layer", "lora"],
)
def test_wrappers_in_names_are_recognised(rename, message: str, model: Path) -> None:
    tensors = load_file(model / SINGLE_NAME)
    save_file({rename(name): values for name, values in tensors.items()}, model / SINGLE_NAME, {"format": "pt"})
    for way_in in opens(model):
        with pytest.raises(CheckpointError, match=message):
            way_in()


@pytest.mark.parametrize("name", [SINGLE_NAME, "config.json", "tokenizer.json", "tokenizer_config.json", "x.model"])
@pytest.mark.parametrize("content", [POINTER, "<!DOCTYPE html>\n<html>", "Entry not found"], ids=["lfs", "page", "404"])
def test_what_stands_in_for_a_file_is_named(name: str, content: str, model: Path) -> None:
    (model / name).write_text(content)
    meaning = "Git LFS pointer.*git lfs pull" if content == POINTER else "a web server said"
    with pytest.raises(CheckpointError, match=rf"{re.escape(name)} is .*{meaning}"):
        open_model(model)


def test_a_gguf_pointer_is_named(tmp_path: Path) -> None:
    file = tmp_path / "m.gguf"
    file.write_text(POINTER)
    for command, *more in (("inspect",), ("calibrate",), ("eval", "--reference", file, "--text", file)):
        assert "m.gguf is a Git LFS pointer" in refused(command, file, *more)


@pytest.mark.parametrize("name", ["t.txt", "t.jsonl", "t.csv"])
def test_a_text_pointer_is_not_calibrated_on(name: str, model: Path, tmp_path: Path) -> None:
    (tmp_path / name).write_text(POINTER)
    said = refused("calibrate", model, "--calibration", tmp_path / name, "-o", tmp_path / "stats.safetensors")
    assert f"{name} is a Git LFS pointer" in said


def test_an_adapter_is_not_a_model(model: Path, tmp_path: Path) -> None:
    adapter = json.dumps({"peft_type": "LORA", "base_model_name_or_path": "org/base", "r": 8})
    (tmp_path / "adapter").mkdir()
    (tmp_path / "adapter" / "adapter_config.json").write_text(adapter)
    save_file(
        {"base_model.model.x.lora_A.weight": torch.ones(2, 2)}, tmp_path / "adapter" / "adapter_model.safetensors"
    )
    with pytest.raises(CheckpointError, match=r"is an adapter, not a model.*'org/base'.*merge_and_unload.*--adapter"):
        locate_model(tmp_path / "adapter")
    (model / "adapter_config.json").write_text(adapter)
    with pytest.raises(CheckpointError, match=r"holds a model and an adapter.*Merge them"):
        open_model(model)


def edit_config(directory: Path, **changes: object) -> None:
    config = json.loads((directory / "config.json").read_text())
    config |= changes
    (directory / "config.json").write_text(json.dumps({key: value for key, value in config.items() if value != "gone"}))


def test_another_weights_file_in_the_configuration_is_refused(model: Path) -> None:
    edit_config(model, transformers_weights="other.safetensors")
    with pytest.raises(CheckpointError, match=r"names 'other\.safetensors' as the weights that transformers reads"):
        open_model(model)


@pytest.mark.parametrize("field", ["hidden_size", "num_attention_heads", "vocab_size", "num_hidden_layers"])
def test_a_missing_field_is_named(field: str, model: Path) -> None:
    edit_config(model, **{field: "gone"})
    with pytest.raises(CheckpointError, match=rf"config\.json does not state `{field}`"):
        open_model(model)


@pytest.mark.parametrize("method", ["bitsandbytes", "gptq", "awq", "fp8", "compressed-tensors", None])
def test_quantized_is_said_of_tensors_that_are(method: str | None, model: Path) -> None:
    edit_config(model, quantization_config={"quant_method": method, "bits": 4})
    with pytest.raises(CheckpointError, match=r"stored as floats.*take `quantization_config` out"):
        open_model(model)
    tensors = load_file(model / SINGLE_NAME)
    name = "model.layers.0.mlp.up_proj.qweight"
    tensors[name] = tensors.pop("model.layers.0.mlp.up_proj.weight").to(torch.int32)
    save_file(tensors, model / SINGLE_NAME)
    with pytest.raises(CheckpointError, match=rf"already quantized \(.*`{name}` is stored as I32"):
        open_model(model)


def test_weights_that_transformers_would_make_up_are_refused_by_name(model: Path, small_moe: Path) -> None:
    tensors = load_file(model / SINGLE_NAME)
    del tensors["model.layers.1.self_attn.k_proj.weight"]
    save_file(tensors, model / SINGLE_NAME, {"format": "pt"})
    name = r"`model\.layers\.1\.self_attn\.k_proj\.weight`"
    with pytest.raises(CheckpointError, match=rf"lacks 1 weights.*{name}.*random numbers"):
        load_directory(model, torch.float32)
    with pytest.raises(CheckpointError, match=rf"lacks 1 tensors.*{name}"):
        open_model(model)
    text = small_moe.parent / "demo_text.txt"
    said = run("eval", model, "--reference", model, "--max-tokens", "64", "--text", text).stderr
    assert "k_proj" in said and "REPORT" not in said


def test_weights_that_transformers_leaves_out_are_said(model: Path) -> None:
    tensors = load_file(model / SINGLE_NAME)
    tensors["model.layers.1.self_attn.k_proj.bias"] = torch.ones(128)
    save_file(tensors, model / SINGLE_NAME, {"format": "pt"})
    with pytest.warns(UserWarning, match=r"does not use 1 tensors.*k_proj\.bias"):
        load_directory(model, torch.float32)
    with pytest.raises(CheckpointError, match=r"k_proj\.bias"):
        open_model(model)


def test_layers_ahead_are_not_said_to_be_left_out(model: Path, recwarn: pytest.WarningsRecorder) -> None:
    tensors = load_file(model / SINGLE_NAME)
    tensors |= {"model.layers.99.eh_proj.weight": torch.ones(8, 16), "mtp.fc.weight": torch.ones(8, 16)}
    save_file(tensors, model / SINGLE_NAME, {"format": "pt"})
    load_directory(model, torch.float32)
    assert not [warning for warning in recwarn if "does not use" in str(warning.message)]


def test_a_quantized_base_gguf_is_refused(model: Path, tmp_path: Path) -> None:
    opened, base = open_model(model), tmp_path / "base.gguf"
    assert open_model(model, base_gguf=write_f32(opened, base)).base_gguf == base
    plan = plan_from_types(opened, preset_types("uniform-q4_0", opened), recipe="preset uniform-q4_0")
    export_gguf(opened, plan, None, base, encoder=load_encoder("ggml", "cpu"))
    with pytest.raises(CheckpointError, match=r"base-gguf\) is quantized: `\S+weight` is of type Q4_0\."):
        open_model(model, base_gguf=base)


@pytest.mark.parametrize("name", ["visual.blocks.1.attn.qkv.weight", "norm.weight"])
def test_a_vision_model_without_a_tensor_is_refused(name: str, tmp_path: Path) -> None:
    directory = save_vision_model("qwen2_vl", tmp_path / "qwen")
    tensors = load_file(directory / SINGLE_NAME)
    lost = next(stored for stored in tensors if stored.endswith(name))
    del tensors[lost]
    save_file(tensors, directory / SINGLE_NAME, {"format": "pt"})
    with pytest.raises(CheckpointError, match=rf"lacks 1 weights that its configuration calls for.*{name}"):
        open_model(directory)


def test_weights_of_another_shape_are_named(model: Path) -> None:
    tensors = load_file(model / SINGLE_NAME)
    tensors["model.layers.1.self_attn.k_proj.weight"] = torch.ones(64, 256)
    save_file(tensors, model / SINGLE_NAME, {"format": "pt"})
    name = r"`model\.layers\.1\.self_attn\.k_proj\.weight`"
    with pytest.raises(CheckpointError, match=rf"1 tensors have other shapes .*{name} is stored as \[64, 256\], and"):
        load_directory(model, torch.float32)


def test_a_checkpoint_without_its_output_is_named_as_one_with(small_moe: Path, tmp_path: Path) -> None:
    """As `AutoModel` saves one, and many models that embed texts are published: transformers adds `model.`."""
    whole = save_tiny("llama-tied", tmp_path / "whole", small_moe)
    base = edited_weights(
        whole, tmp_path / "base", lambda tensors: _rename(tensors, lambda name: name.removeprefix("model."))
    )
    for directory in (base, whole):
        opened = open_model(directory)
        loaded = dict(load_hf(opened).named_parameters())
        assert torch.equal(opened.source.load("token_embd.weight"), loaded["model.embed_tokens.weight"])
    assert open_model(base).fingerprint == open_model(whole).fingerprint
    assert inspect(base).num_weights == inspect(whole).num_weights


def _rename(tensors: dict[str, torch.Tensor], called: Callable[[str], str]) -> None:
    for name in list(tensors):
        tensors[called(name)] = tensors.pop(name)


def test_missing_tensors_are_explained(model: Path, tmp_path: Path) -> None:
    def of_tower(name: str) -> str:
        return name.replace("model.", "model.language_model.", 1)

    named = edited_weights(model, tmp_path / "named", lambda tensors: _rename(tensors, of_tower))
    with pytest.raises(CheckpointError, match=r"`model\.language_model\.embed_tokens\.weight` in the place of `model"):
        open_model(named)
    without = edited_weights(model, tmp_path / "without", lambda tensors: tensors.pop("lm_head.weight"))
    with pytest.raises(CheckpointError, match=r"the output is the embedding.*set `tie_word_embeddings` to true"):
        open_model(without)
