"""The class of transformers that a checkpoint is loaded as, with and without a vision tower."""

from pathlib import Path

import pytest
import torch
import transformers as hf

from dynquant.families.vision.checkpoint import has_tower, is_vision_checkpoint
from dynquant.running.load import auto_class, load_directory

TEXT = {
    "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 1, "num_attention_heads": 2, "head_dim": 32,
    "num_key_value_heads": 1, "vocab_size": 128,
    "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [4, 6, 6]},
}  # fmt: skip
TOWER = {"depth": 1, "hidden_size": 32, "intermediate_size": 64, "num_heads": 2, "out_hidden_size": 64}


@pytest.fixture(scope="module")
def qwen3_vl(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model whose tower dynquant does not open, and whose configuration no class for text alone takes."""
    tower = {**TOWER, "deepstack_visual_indexes": [0], "num_position_embeddings": 16}
    model = hf.AutoModelForImageTextToText.from_config(hf.Qwen3VLConfig(text_config=TEXT, vision_config=tower))
    directory = tmp_path_factory.mktemp("qwen3_vl")
    model.save_pretrained(directory)
    return directory


def test_a_configuration_takes_the_class_that_knows_it():
    of_text, of_pictures = "AutoModelForCausalLM", "AutoModelForImageTextToText"
    assert auto_class(hf.LlamaConfig(), sees_pictures=False) == of_text
    for config in (hf.Mistral3Config(), hf.Qwen3VLMoeConfig()):
        assert auto_class(config, sees_pictures=False) == auto_class(config, sees_pictures=True) == of_pictures
    llama4 = hf.Llama4Config()
    assert auto_class(llama4, sees_pictures=False) == of_text and auto_class(llama4, sees_pictures=True) == of_pictures


def test_a_model_whose_tower_is_not_opened_runs_on_text(qwen3_vl):
    assert has_tower(qwen3_vl) and not is_vision_checkpoint(qwen3_vl)
    loaded = load_directory(qwen3_vl, torch.float32)
    assert type(loaded) is hf.Qwen3VLForConditionalGeneration
    with torch.inference_mode():
        assert loaded(input_ids=torch.arange(9)[None]).logits.shape == (1, 9, 128)
