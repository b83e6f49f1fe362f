"""GGUF files in transformers: every family as its checkpoint, whatever transformers' own reader makes of the file."""

from pathlib import Path

import pytest
import torch

from dynquant.encoding.stream import load_encoder
from dynquant.errors import CheckpointError
from dynquant.families.open import open_model
from dynquant.packed.load_gguf import load
from dynquant.recipes.build_plan import plan_from_types, stays_f32
from dynquant.running.live_weights import fill_from_gguf
from dynquant.running.load import empty_hf, load_hf, load_tokenizer
from tests.helpers.exports import export_gguf
from tests.helpers.representatives import represented_by
from tests.helpers.tiny_models import TINY, hf_logits, write_f32

TOKENS = torch.randint(1, 8000, (100,), generator=torch.Generator().manual_seed(3)).tolist()
QUICK = ("mixtral", "qwen2-yarn", "gemma3-period-3", "deepseek-v3-yarn")


def logits_of(hf_model) -> torch.Tensor:
    with torch.inference_mode():
        return hf_model(torch.tensor([TOKENS], device=hf_model.device)).logits[0].float().cpu()


@pytest.mark.parametrize("name", represented_by(QUICK, TINY))
def test_a_file_has_the_logits_and_weights_of_its_checkpoint(name: str, tmp_path: Path, tiny_text) -> None:
    directory = tiny_text(name)
    model = open_model(write_f32(open_model(directory), tmp_path / "model.gguf"))
    loaded = load_hf(model)
    loaded.set_attn_implementation("eager")
    torch.testing.assert_close(logits_of(loaded), hf_logits(directory, TOKENS), atol=3e-5, rtol=1e-5)
    # In bfloat16 the ones that Gemma's norms have in the file must not cost their digits.
    rounded, original = load_hf(model, dtype=torch.bfloat16), load_hf(open_model(directory), dtype=torch.bfloat16)
    assert rounded.state_dict().keys() == original.state_dict().keys()
    for key, values in original.state_dict().items():
        torch.testing.assert_close(rounded.state_dict()[key], values, rtol=2**-7, atol=1e-6)


@pytest.mark.parametrize("name", represented_by(["qwen2"], ["llama-tied", "qwen2"]))
def test_the_reader_of_transformers_gives_the_same(name: str, tmp_path: Path, tiny_text) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    path = write_f32(open_model(tiny_text(name)), tmp_path / "model.gguf")
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file=path.name, dtype=torch.float32)
    torch.testing.assert_close(logits_of(load_hf(open_model(path))), logits_of(theirs), atol=1e-5, rtol=1e-5)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path, gguf_file=path.name)
    assert load_tokenizer(open_model(path)).backend_tokenizer.to_str() == tokenizer.backend_tokenizer.to_str()


def packed_file(directory: Path, path: Path) -> Path:
    model = open_model(directory)
    names = [name for name in model.source.names() if not stays_f32(name, model.source.info(name).shape)]
    types = {name: (("Q8_0", "Q4_0", "IQ4_NL")[number % 3], "test") for number, name in enumerate(names)}
    plan = plan_from_types(model, types, recipe="test")
    return export_gguf(model, plan, None, path, encoder=load_encoder("ggml"))[0]


def test_a_packed_file_is_decoded(tmp_path: Path, tiny_text) -> None:
    path = packed_file(tiny_text("llama-tied"), tmp_path / "packed.gguf")
    torch.testing.assert_close(logits_of(load_hf(open_model(path))), logits_of(load(path)), atol=1e-4, rtol=1e-4)


@pytest.mark.gpu
def test_a_packed_file_is_decoded_on_a_gpu(cuda: torch.device, tmp_path: Path, tiny_text) -> None:
    model = open_model(packed_file(tiny_text("deepseek-v2"), tmp_path / "packed.gguf"))
    expected, found = load_hf(model).state_dict(), load_hf(model, dtype=torch.float32, device=str(cuda)).state_dict()
    assert all(torch.equal(values.cpu(), expected[name]) for name, values in found.items())


def test_tensors_of_another_model_are_refused(tmp_path: Path, tiny_text) -> None:
    model = open_model(write_f32(open_model(tiny_text("llama")), tmp_path / "model.gguf"))
    empty = empty_hf(open_model(tiny_text("llama-rope3")), dtype=torch.float32)
    with pytest.raises(CheckpointError, match=r"lacks `.*which its metadata calls for"):
        fill_from_gguf(model, empty, torch.float32, "cpu")
    model = open_model(write_f32(open_model(tiny_text("llama-rope3")), tmp_path / "other.gguf"))
    with pytest.raises(CheckpointError, match=r"holds `.*has no place"):
        fill_from_gguf(model, empty_hf(open_model(tiny_text("llama")), dtype=torch.float32), torch.float32, "cpu")
