"""Checkpoints opened by llama.cpp's converter hold, bit for bit, what that converter writes of them.

The converter runs as itself here, with data and in its own process; dynquant follows its graphs without. Skipped where
there is no tree: set LLAMA_CPP_DIR, or run `dynquant fetch-llama-cpp`.
"""

import shutil
import subprocess
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from dynquant.checkpoints.gguf_source import GGUFSource
from dynquant.families.open import open_model
from tests.helpers.tiny_models import randomize

COMMON: dict[str, Any] = {
    "vocab_size": 8192, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 512, "tie_word_embeddings": False, "bos_token_id": 0,
    "eos_token_id": 0, "pad_token_id": 0,
}  # fmt: skip
LINEAR = {
    "head_dim": 16, "linear_num_key_heads": 2, "linear_num_value_heads": 4, "linear_key_head_dim": 16,
    "linear_value_head_dim": 16, "full_attention_interval": 2,
}  # fmt: skip
EXPERTS = {"num_local_experts": 4, "num_experts_per_tok": 2}
ARCHITECTURES = {
    "qwen3_5_text": LINEAR,
    "olmo2": {},
    "granitemoe": EXPERTS,
    "gpt_oss": EXPERTS | {"head_dim": 16, "sliding_window": 128},
    "olmoe": {"num_experts": 4, "num_experts_per_tok": 2},
    "glm4": {"head_dim": 16},
    "glm4_moe": {  # its configuration counts a layer that predicts tokens ahead, which transformers does not save
        "head_dim": 16, "moe_intermediate_size": 32, "n_routed_experts": 4, "num_experts_per_tok": 2,
        "n_shared_experts": 1, "first_k_dense_replace": 1, "n_group": 1, "topk_group": 1, "num_nextn_predict_layers": 1,
    },
    "apertus": {},
    "gemma2": {"head_dim": 16},
    "qwen3_next": LINEAR | {
        "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32, "shared_expert_intermediate_size": 32,
    },
    "gemma3n_text": {
        "head_dim": 16, "num_hidden_layers": 4, "tie_word_embeddings": True, "num_kv_shared_layers": 0,
        "vocab_size_per_layer_input": 8000, "hidden_size_per_layer_input": 32, "sliding_window": 128,
        "layer_types": ["sliding_attention", "full_attention"] * 2, "activation_sparsity_pattern": [0.95] * 4,
        "intermediate_size": 96,
    },
}  # fmt: skip
REFERENCE = """
import sys
from pathlib import Path
tree, directory, output = map(Path, sys.argv[1:])
sys.path[:0] = [str(tree / "gguf-py"), str(tree)]
import gguf, torch
from conversion import ModelBase, ModelType, get_model_architecture, get_model_class
from conversion.base import TextModel
TextModel.get_vocab_base_pre = lambda self, tokenizer: "gpt-2"
with torch.inference_mode():
    model_class = get_model_class(get_model_architecture(ModelBase.load_hparams(directory, False), ModelType.TEXT))
    model_class.set_vocab = lambda self: self._set_vocab_gpt2()
    model_class.no_mtp = model_class.supports_mtp_export
    model_class(directory, gguf.LlamaFileType.ALL_F32, output, eager=True).write()
"""

pytestmark = pytest.mark.nightly


@pytest.fixture(scope="module")
def tree(llama_cpp_tree: Path) -> Iterator[Path]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LLAMA_CPP_DIR", str(llama_cpp_tree))
        yield llama_cpp_tree


@pytest.fixture
def checkpoint(request: pytest.FixtureRequest, tmp_path: Path, small_moe: Path) -> Path:
    return save_checkpoint(request.param, tmp_path / request.param, small_moe)


def save_checkpoint(model_type: str, directory: Path, small_moe: Path, **changes: Any) -> Path:
    """Write a random checkpoint of an architecture, in bfloat16."""
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.for_model(model_type, **COMMON | ARCHITECTURES[model_type] | changes)
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    randomize(model)
    model.to(torch.bfloat16).save_pretrained(directory)
    for file in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(small_moe / file, directory / file)
    return directory


@pytest.mark.parametrize("checkpoint", ARCHITECTURES, indirect=True)
def test_tensors_and_keys_are_those_of_the_converter(checkpoint: Path, tree: Path, tmp_path: Path) -> None:
    output = tmp_path / "converted.gguf"
    subprocess.run([sys.executable, "-c", REFERENCE, tree, checkpoint, output], check=True, capture_output=True)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = open_model(checkpoint)
    reference = GGUFSource(output)
    assert set(model.source.names()) == set(reference.names())
    for name in reference.names():
        assert torch.equal(model.source.load(name), reference.load(name)), name
        shape = model.source.info(name).shape
        assert shape == reference.info(name).shape
        if len(shape) == 3:
            assert torch.equal(model.source.load(name, 1), reference.load(name, 1)), name
        elif len(shape) == 2:
            assert torch.equal(model.source.load(name, slice(1, 3)), reference.load(name)[1:3]), name
    ours = {field.key: field.value for field in model.metadata if not field.key.startswith("tokenizer.")}
    theirs = {field.key: field.value for field in reference.metadata if not field.key.startswith("tokenizer.")}
    for key in ("general.file_type", "general.quantization_version"):
        theirs.pop(key, None)
    assert ours == theirs
