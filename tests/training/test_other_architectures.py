"""GGUF files of an architecture without a family in `eval`, `heal` and `finetune`, by the original that they name.

Skipped where there is no tree of llama.cpp, whose converter says where tensors are.
"""

import json
import shutil
import warnings
from pathlib import Path

import pytest
import torch

pytest.importorskip("trl", reason="trl is not installed")

from dynquant.encoding.stream import load_encoder
from dynquant.errors import CheckpointError
from dynquant.families.open import open_model
from dynquant.lora import load_adapter
from dynquant.packed.load_gguf import load
from dynquant.session import Session
from dynquant.training.finetune import finetune
from dynquant.training.heal import heal
from dynquant.training.options import FinetuneOptions, HealData, HealOptions, TrainOptions
from tests.helpers.evaluating import evaluated
from tests.helpers.exports import export_gguf, export_safetensors
from tests.helpers.tiny_models import randomize
from tests.helpers.traced_models import mixed_plan

pytestmark = pytest.mark.nightly
SIZES = {
    "vocab_size": 8192, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 512, "tie_word_embeddings": False, "bos_token_id": 0,
    "eos_token_id": 0, "pad_token_id": 0,
}  # fmt: skip
TRAINING = TrainOptions(rank=4, max_steps=2, evaluations=2)


@pytest.fixture(scope="module")
def folder(llama_cpp_tree, small_moe, tmp_path_factory):
    """A random OLMo 2 as `original`, `model.gguf` and `packed`."""
    from transformers import AutoConfig, AutoModelForCausalLM

    folder = tmp_path_factory.mktemp("olmo2")
    torch.manual_seed(0)
    hf_model = AutoModelForCausalLM.from_config(AutoConfig.for_model("olmo2", **SIZES), dtype=torch.float32)
    randomize(hf_model)
    hf_model.save_pretrained(folder / "original")
    for file in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(small_moe / file, folder / "original" / file)
    with pytest.MonkeyPatch.context() as patch, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        patch.setenv("LLAMA_CPP_DIR", str(llama_cpp_tree))
        model, encoder = open_model(folder / "original"), load_encoder("ggml")
        export_gguf(model, mixed_plan(model), None, folder / "model.gguf", encoder=encoder)
        export_safetensors(model, mixed_plan(model), None, folder / "packed", encoder=encoder)
        yield folder


def measured(folder: Path, candidate: str, text: Path, **options) -> float:
    report = evaluated(
        folder / candidate, folder / "original", tasks=["kl"], text=[text], window=64, max_tokens=256, device="cpu",
        reference_cache=folder / "cache", runner="transformers", **options,
    )  # fmt: skip
    return report.texts[0].kl.mean.value


def test_eval_loads_a_file_by_its_reference(folder, small_moe):
    text = small_moe.parent / "demo_text.txt"
    assert measured(folder, "model.gguf", text) == measured(folder, "packed", text) > 0
    with pytest.raises(CheckpointError, match=r"knows the architectures .* as --reference to eval and heal"):
        evaluated(folder / "model.gguf", folder / "model.gguf", text=[text], runner="transformers")


def test_heal_loads_a_file_by_its_reference(folder, small_moe, tmp_path):
    text = small_moe.parent / "demo_text.txt"
    data = HealData(data=str(text), tokens=1024, window=64, max_tokens=256)
    options = HealOptions(
        packed=str(folder / "model.gguf"), reference=str(folder / "original"), output=tmp_path / "adapter", data=data,
        training=TRAINING,
    )  # fmt: skip
    report = heal(options, Session("cpu"))
    assert report.changes[0].after.value < report.changes[0].before.value
    assert measured(folder, "model.gguf", text, adapter=tmp_path / "adapter") < measured(folder, "model.gguf", text)


def test_finetune_loads_a_file_by_its_base(folder, tmp_path):
    data, output = tmp_path / "data.jsonl", tmp_path / "adapter"
    data.write_text("".join(json.dumps({"text": f"Line {i} of a short text."}) + "\n" for i in range(20)), "utf-8")
    options = {"packed": str(folder / "model.gguf"), "data": data, "output": output, "training": TRAINING}
    options["max_length"] = 64
    with pytest.raises(CheckpointError, match=r"as --base to finetune"):
        finetune(FinetuneOptions(**options), Session("cpu"))
    report = finetune(FinetuneOptions(**options, base=str(folder / "original")), Session("cpu"))
    assert report.changes[0].after.value < report.changes[0].before.value
    assert (output / "tokenizer.json").is_file()
    load_adapter(load(folder / "model.gguf", base=folder / "original"), output)
