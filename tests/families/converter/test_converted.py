"""Checkpoints opened by llama.cpp's converter hold, bit for bit, what that converter writes of them.

The converter runs as itself here, with data and in its own process; dynquant follows its graphs without. Skipped where
there is no tree: set LLAMA_CPP_DIR, or run `dynquant fetch-llama-cpp`.
"""

import shutil
import subprocess
import sys
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from dynquant.checkpoints.gguf_source import GGUFSource
from dynquant.checkpoints.model import Model
from dynquant.errors import CheckpointError, EvaluationError
from dynquant.evaluation.agreement.same_computation import check_computation
from dynquant.evaluation.runners import open_runner
from dynquant.families.converter.converted import open_converted
from dynquant.families.open import open_model
from dynquant.running.load import load_directory
from dynquant.session import Session
from tests.helpers.commands import succeed
from tests.helpers.edited_checkpoints import edited_weights
from tests.helpers.exports import export_safetensors
from tests.helpers.packed_models import plan_of
from tests.helpers.tiny_gguf import GGML
from tests.helpers.tiny_models import TINY, hf_logits, llama_logits, mean_kl, randomize, write_f32
from tests.helpers.traced_models import packed_and_decoded

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
    "gemma2": {"head_dim": 16, "query_pre_attn_scalar": 16, "tie_word_embeddings": True},
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

OTHER_KEYS = {
    "tokenizer.ggml.add_eos_token": "False is llama.cpp's default",
    "vocab_size": "the converter writes it where the configuration is of Llama",
}
OTHER_KEYS_OF = {
    "qwen2-moe-tied": {"general.size_label": "counts the output matrix, without which llama.cpp loads no qwen2moe"},
    "gemma3-period-3": {"attention.sliding_window_pattern": "else every sixth layer sees all tokens: KL 0.03"},
    "deepseek-v2": {"expert_gating_func": "llama.cpp guesses it where the configuration names none"},
    "deepseek-v2-lite": {
        "expert_gating_func": "as above", "attention.q_lora_rank": "llama.cpp loads no file without it",
        "expert_group_count": "one", "expert_group_used_count": "one",
    },
    "deepseek-v3": {"expert_gating_func": "llama.cpp guesses softmax: KL 0.13"},
    "deepseek-v3-yarn": {"expert_gating_func": "as above"},
}  # fmt: skip
"""Keys, without their architecture, that a family writes otherwise than the converter does, and why."""

pytestmark = pytest.mark.nightly


@pytest.fixture(scope="module")
def tree(llama_cpp_tree: Path) -> Iterator[Path]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LLAMA_CPP_DIR", str(llama_cpp_tree))
        yield llama_cpp_tree


def saved(model_type: str, settings: dict[str, Any], folder: Path, tokenizer_from: Path) -> Path:
    """Write a random checkpoint of an architecture, in bfloat16, and return its directory."""
    from transformers import AutoConfig, AutoModelForCausalLM

    directory = folder / model_type
    torch.manual_seed(0)
    config = AutoConfig.for_model(model_type, **settings)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    randomize(model)
    model.to(torch.bfloat16).save_pretrained(directory)
    for file in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(tokenizer_from / file, directory / file)
    return directory


@pytest.fixture
def checkpoint(request: pytest.FixtureRequest, tmp_path: Path, small_moe: Path) -> Path:
    return saved(request.param, COMMON | ARCHITECTURES[request.param], tmp_path, small_moe)


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


def values_by_key(model: Model) -> dict[str, tuple[object, ...]]:
    """GGUF keys without their architecture; floats as GGUF holds them, in 32 bits."""
    values = {field.key.removeprefix(f"{model.arch}."): field for field in model.metadata}
    return {
        key: (np.float32(field.value) if isinstance(field.value, float) else field.value, field.value_type)
        for key, field in values.items()
    }


@pytest.mark.parametrize("name", TINY)
def test_families_and_the_converter_agree(name: str, tree: Path, tiny_text: Callable[[str], Path]) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        ours, theirs = open_model(tiny_text(name)), open_converted(tiny_text(name), tree)
    assert ours.has_family and not theirs.has_family
    lacking = {"output.weight"} if name == "qwen2-moe-tied" else set()
    assert set(ours.source.names()) - lacking == set(theirs.source.names())
    for tensor in theirs.source.names():
        values, converted = ours.source.load(tensor), theirs.source.load(tensor)
        assert ours.source.checkpoint_names(tensor) == theirs.source.checkpoint_names(tensor)
        # Frequency factors are computed, here in float64.
        tolerance = 2e-7 if tensor == "rope_freqs.weight" else 0.0
        torch.testing.assert_close(values, converted, rtol=tolerance, atol=0.0, msg=tensor)
        if values.dim() > 1:
            assert torch.equal(ours.source.load(tensor, 1), theirs.source.load(tensor, 1)), tensor
    here, there = values_by_key(ours), values_by_key(theirs)
    others = {key for key in here.keys() | there.keys() if here.get(key) != there.get(key)}
    assert others - OTHER_KEYS.keys() == OTHER_KEYS_OF.get(name, {}).keys()


def test_an_own_magnitude_of_yarn_is_that_of_transformers(tree: Path, tmp_path: Path, small_moe: Path) -> None:
    """Under the converter's name of it, `yarn_attn_factor`, llama.cpp does not read it: KL 0.2."""
    yarn = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 128}
    rope = {"rope_parameters": {**yarn, "attention_factor": 1.5}}
    directory, file = saved("olmo2", COMMON | rope, tmp_path, small_moe), tmp_path / "model.gguf"
    succeed("export", directory, "--preset", "f16", "-o", file)
    tokens = list(range(100, 228))
    assert mean_kl(hf_logits(directory, tokens), llama_logits(file, tokens)) < 1e-4


OPEN = {
    "gpt2": {"vocab_size": 8192, "n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 512},
    "olmo3": COMMON | {"layer_types": ["full_attention"] * 2},
    "olmo2": COMMON | {"tie_word_embeddings": True},
    "youtu": COMMON | {
        "num_key_value_heads": 4, "kv_lora_rank": 32, "q_lora_rank": 48, "qk_nope_head_dim": 16, "qk_rope_head_dim": 16,
        "v_head_dim": 16,
    },
    "granitemoe": COMMON | {"num_local_experts": 1, "num_experts_per_tok": 1, "tie_word_embeddings": True},
}  # fmt: skip
"""Checkpoints of whose file the converter leaves something out, or at which llama.cpp ended the process."""


@pytest.mark.parametrize("model_type", OPEN)
def test_what_the_converter_leaves_open_is_filled_in(model_type: str, tree: Path, tmp_path: Path, small_moe) -> None:
    directory = saved(model_type, OPEN[model_type], tmp_path, small_moe)
    file, tokens = write_f32(open_model(directory), tmp_path / "model.gguf"), list(range(100, 228))
    assert mean_kl(hf_logits(directory, tokens), llama_logits(file, tokens)) < 1e-8


def test_a_tied_output_is_packed_once(tree: Path, tmp_path: Path, small_moe: Path) -> None:
    model = open_model(saved("olmo2", OPEN["olmo2"], tmp_path, small_moe))
    assert "output.weight" in model.source.names()
    plan = plan_of(model, lambda name: "Q4_0" if name == "token_embd.weight" else "Q8_0")
    export_safetensors(model, plan, None, tmp_path / "packed", encoder=GGML)
    packed, tokens = load_directory(tmp_path / "packed", torch.float32), torch.arange(100, 160)[None]
    assert packed.config.tie_word_embeddings  # of the 8 bits that the output has
    logits = packed(tokens).logits[0].detach()
    assert mean_kl(hf_logits(model.path, tokens[0].tolist()), logits) < 5e-3


def test_a_packed_embedding_whose_tied_output_is_read_directly_stays_float(tree: Path, tmp_path, small_moe) -> None:
    settings = COMMON | {"state_size": 16, "time_step_rank": 16, "tie_word_embeddings": True, "intermediate_size": 128}
    model, tokens = open_model(saved("mamba", settings, tmp_path, small_moe)), torch.arange(100, 160)[None]
    _, found, expected = packed_and_decoded(model, tmp_path, tokens)
    torch.testing.assert_close(found, expected, atol=1e-3, rtol=1e-3)


def test_a_count_of_no_layers_ahead_is_no_key(tree: Path, tmp_path: Path, small_moe: Path) -> None:
    """Else files of plans, which are written without such layers, would lack the bytes of it."""
    settings = COMMON | ARCHITECTURES["glm4_moe"] | {"num_nextn_predict_layers": 0}
    directory = saved("glm4_moe", settings, tmp_path, small_moe)
    assert open_model(directory).metadata == open_model(directory, mtp=False).metadata


def test_a_graph_of_other_tensors_is_refused_before_anything_is_measured(tree: Path, tmp_path, small_moe) -> None:
    model = open_model(saved("ernie4_5", COMMON | {"use_bias": True}, tmp_path, small_moe))
    with pytest.raises(CheckpointError, match=r"graph of `ernie4_5` has other tensors \(.*wrong number of tensors"):
        check_computation(model, Session(threads=1, device="cpu"))


@pytest.mark.parametrize("name", ["lm_head.weight", "model.layers.1.mlp.down_proj.weight"])
def test_a_checkpoint_that_lacks_a_weight_is_refused(name: str, tree: Path, tmp_path: Path, small_moe: Path) -> None:
    """The converter would leave it out, and llama.cpp take the embedding for an output matrix."""
    whole = saved("olmo2", COMMON, tmp_path, small_moe)
    model = open_model(edited_weights(whole, tmp_path / "without", lambda tensors: tensors.pop(name)))
    notes: list[str] = []
    how = {"session": Session(threads=1, device="cpu", note=notes.append)}
    with pytest.raises(CheckpointError, match=rf"lacks 1 weights of the model \(`{name}`\).*--allow-difference"):
        check_computation(model, **how)
    assert check_computation(model, **how, allow_difference=True) is None
    assert "was not compared with transformers" in notes[0] and f"`{name}`" in notes[0]


def test_a_checkpoint_with_weights_of_other_shapes_is_refused(tree: Path, tmp_path: Path, small_moe: Path) -> None:
    name, whole = "model.layers.1.self_attn.q_norm.weight", saved("olmo2", COMMON, tmp_path, small_moe)

    def halve(tensors: dict[str, torch.Tensor]) -> None:
        tensors[name] = tensors[name][::2]

    model = open_model(edited_weights(whole, tmp_path / "halved", halve))
    with pytest.raises(CheckpointError, match=rf"`{name}` is stored as .*--allow-difference the run goes on with the"):
        check_computation(model, Session(threads=1, device="cpu"))


@pytest.mark.parametrize(
    "settings",
    [{}, {"num_hidden_layers": 4, "no_rope_layers": [1] * 4, "layer_types": ["full_attention"] * 4}],
    ids=["two layers", "all global"],
)
def test_a_llama_4_at_which_llama_cpp_ends_is_refused(settings, tree: Path, tmp_path: Path, small_moe: Path) -> None:
    """It would take this process with it."""
    llama4 = EXPERTS | {"num_experts_per_tok": 1, "intermediate_size_mlp": 96, "interleave_moe_layer_step": 2}
    directory = saved("llama4_text", COMMON | llama4 | {"head_dim": 32} | settings, tmp_path, small_moe)
    file = write_f32(open_model(directory), tmp_path / "model.gguf")
    with pytest.raises(EvaluationError, match=r"model\.gguf: llama\.cpp cannot run it: .*every fourth layer"):
        open_runner(file, threads=1)


def test_a_tensor_without_a_place_is_refused_by_name(tree: Path, tmp_path: Path, small_moe: Path) -> None:
    """llama.cpp's graph of LFM2 with experts reads the embedding as its output matrix."""
    settings = COMMON | {"layer_types": ["conv", "full_attention"], "num_dense_layers": 1, "moe_intermediate_size": 32}
    directory = saved("lfm2_moe", settings | {"num_experts": 4, "num_experts_per_tok": 2}, tmp_path, small_moe)
    with pytest.raises(CheckpointError, match=r"has no place for a tensor.*'lm_head\.weight'"):
        open_model(directory)
