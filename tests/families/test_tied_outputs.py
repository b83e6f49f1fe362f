"""Checkpoints that store an output matrix although config.json ties it: values decide, as in transformers."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from dynquant.analysis.sensitivity.closed_form import output_sensitivity
from dynquant.calibration.run import StatisticsOptions
from dynquant.calibration.second_moments import hessian
from dynquant.checkpoints.gguf_source import GGUFSource
from dynquant.errors import CheckpointError
from dynquant.families.open import open_model
from dynquant.inputs.model_inputs import ModelInputs
from dynquant.running.live_weights import LiveWeights
from dynquant.running.load import load_directory, load_hf
from dynquant.running.streaming.layer_stream import LayerStream
from dynquant.running.weight_inputs import weight_inputs
from tests.helpers.calibrating import calibrate
from tests.helpers.commands import succeed
from tests.helpers.exports import export_gguf, export_safetensors
from tests.helpers.packed_models import plan_of
from tests.helpers.representatives import represented_by
from tests.helpers.tiny_gguf import GGML
from tests.helpers.tiny_models import hf_logits, llama_logits, mean_kl, save_tiny
from tests.helpers.tiny_vision import save_vision_model

TIED = ("llama-tied", "qwen3", "gemma3-period-3", "qwen2-moe-tied")
TOKENS = torch.randint(1, 8000, (60,), generator=torch.Generator().manual_seed(3)).tolist()


def store_output(directory: Path, values: torch.Tensor | None = None, name: str = "lm_head.weight") -> Path:
    """Add an output matrix to a checkpoint whose config.json ties it: `values`, or a copy of the embedding."""
    tensors = load_file(directory / "model.safetensors")
    embedding = next(tensor for stored, tensor in tensors.items() if stored.endswith("embed_tokens.weight"))
    assert name not in tensors and json.loads((directory / "config.json").read_text())["tie_word_embeddings"]
    tensors[name] = embedding.clone() if values is None else values.to(embedding.dtype)
    save_file(tensors, directory / "model.safetensors", {"format": "pt"})
    return directory


def other_output(rows: int, columns: int) -> torch.Tensor:
    return 0.08 * torch.randn(rows, columns, generator=torch.Generator().manual_seed(9))


@pytest.mark.parametrize("name", represented_by(("llama-tied",), TIED[:-1]))
def test_an_embedding_that_is_the_output_too_has_the_statistics_of_that(name: str, tmp_path: Path, small_moe) -> None:
    """All but in files of qwen2moe, which have an output of their own."""
    model = open_model(save_tiny(name, tmp_path / name, small_moe))
    found = calibrate(model, tokens=128, window=32, options=StatisticsOptions("activations"))
    assert found.stats.input_of("token_embd.weight").counts.sum() == 96  # a window is held back
    assert hessian(found.moments, found.stats, "token_embd.weight", (8192, 256), slice(0, 1)) is not None
    assert model.reads_input("token_embd.weight")
    untied = open_model(store_output(model.path, other_output(8192, 256)))
    assert untied.reads_input("output.weight") and not untied.reads_input("token_embd.weight")


def test_an_output_that_files_store_apart_is_priced_apart(tmp_path: Path, small_moe: Path) -> None:
    """llama.cpp loads no qwen2moe without it: two tensors in the file, each with a type, of one matrix."""
    model = open_model(save_tiny("qwen2-moe-tied", tmp_path / "tied", small_moe))
    hf_model, inputs = load_hf(model), ModelInputs(torch.tensor(TOKENS[:48]).view(2, 24))
    names = weight_inputs(model, hf_model)
    tied, _ = output_sensitivity(hf_model, names, inputs)
    live = LiveWeights(model, hf_model)  # from here on the running model has two matrices, too
    assert live.parameters("output.weight")[0] is not live.parameters("token_embd.weight")[0]
    apart, _ = output_sensitivity(hf_model, names, inputs)
    assert {"output.weight", "token_embd.weight"} <= tied.keys() and tied == apart


@pytest.mark.parametrize("name", represented_by(("llama-tied",), TIED))
def test_an_output_of_its_own_is_written(name: str, tmp_path: Path, small_moe: Path) -> None:
    pytest.importorskip("llama_cpp", reason="llama-cpp-python is not installed")
    output = other_output(8192, 256)
    directory = store_output(save_tiny(name, tmp_path / name, small_moe), output)
    reference, model = hf_logits(directory, TOKENS), open_model(directory)
    assert torch.equal(model.source.load("output.weight"), output)
    plan = plan_of(model, "Q8_0")
    export_gguf(model, plan, None, tmp_path / "model.gguf", encoder=GGML)
    export_safetensors(model, plan, None, tmp_path / "packed", encoder=GGML)
    assert mean_kl(reference, llama_logits(tmp_path / "model.gguf", TOKENS)) < 5e-3
    packed = load_directory(tmp_path / "packed", torch.float32)
    assert mean_kl(reference, packed(torch.tensor([TOKENS])).logits[0].detach()) < 5e-3
    assert not packed.config.tie_word_embeddings
    layers = LayerStream(model)
    with layers.running(), torch.inference_mode():
        streamed = layers.hf_model(torch.tensor([TOKENS])).logits[0]
    assert mean_kl(reference, streamed) < 1e-9


def test_vllm_is_told_that_they_are_not_tied(tmp_path: Path, small_moe: Path) -> None:
    output = other_output(8192, 256)
    directory = store_output(save_tiny("llama-tied", tmp_path / "tied", small_moe), output)
    succeed("export", directory, "-f", "compressed-tensors", "--preset", "uniform-fp8", "-o", tmp_path / "vllm",
            "--tokens", "512", "--hessians", "none")  # fmt: skip
    assert json.loads((tmp_path / "vllm" / "config.json").read_text())["tie_word_embeddings"] is False
    assert mean_kl(hf_logits(directory, TOKENS), hf_logits(tmp_path / "vllm", TOKENS)) < 0.02


@pytest.mark.parametrize("edit", [lambda w: w, lambda w: torch.cat([w[:-1], w[-1:] + 1])], ids=["copy", "last row"])
def test_a_copy_is_left_out_and_one_other_row_is_not(edit, tmp_path: Path, small_moe: Path) -> None:
    directory = save_tiny("llama-tied", tmp_path / "tied", small_moe)
    embedding = load_file(directory / "model.safetensors")["model.embed_tokens.weight"]
    output = edit(embedding)
    model = open_model(store_output(directory, output))
    assert ("output.weight" in model.source.names()) == (not torch.equal(output, embedding))


def test_other_shapes_are_refused_by_name(tmp_path: Path, small_moe: Path) -> None:
    directory = store_output(save_tiny("llama-tied", tmp_path / "tied", small_moe), other_output(8192, 128))
    with pytest.raises(CheckpointError, match=r"`lm_head\.weight` .* shape \[8192, 128\]"):
        open_model(directory)


@pytest.mark.parametrize("is_copy", [True, False])
def test_a_vision_model_keeps_its_own_output(is_copy: bool, tmp_path: Path) -> None:
    directory = save_vision_model("gemma3", tmp_path / "gemma")
    output = None if is_copy else other_output(512, 64)
    model = open_model(store_output(directory, output, "language_model.lm_head.weight"))
    language = next(part.model for part in model.parts if not part.is_projector)
    assert ("output.weight" in model.source.names()) == ("output.weight" in language.source.names()) != is_copy
    if output is not None:
        assert torch.equal(language.source.load("output.weight"), output.bfloat16().float())
        export_safetensors(model, plan_of(model, "Q8_0"), None, tmp_path / "packed", encoder=GGML)
        head = load_directory(tmp_path / "packed", torch.float32).lm_head
        assert (head(torch.eye(64)).detach().T - output).abs().max() < 0.01


def test_a_gguf_keeps_what_it_stores(tmp_path: Path, small_moe: Path) -> None:
    """Float GGUF in, quantized GGUF out: nothing is tied by anybody's configuration."""
    directory = store_output(save_tiny("llama-tied", tmp_path / "tied", small_moe), other_output(8192, 256))
    succeed("export", directory, "--preset", "uniform-f16", "-o", tmp_path / "f16.gguf")
    succeed(
        "export", tmp_path / "f16.gguf", "--preset", "uniform-q8_0", "-o", tmp_path / "q8.gguf", "--encoder", "ggml"
    )
    head = GGUFSource(tmp_path / "q8.gguf").load("output.weight")
    assert (head - other_output(8192, 256)).abs().max() < 0.01
