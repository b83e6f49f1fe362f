"""Words, negative numbers and the like in config.json are refused by name, on every way in, before anything is made."""

import json
from pathlib import Path

import pytest
import transformers

from dynquant.errors import CheckpointError
from dynquant.families.common.config import check_values, read_json
from tests.helpers.commands import refused
from tests.helpers.edited_checkpoints import edited_config

COMMANDS = (
    "inspect {m}",
    "calibrate {m} -o {t}/stats.safetensors",
    "plan {m} --bpw 4 -o {t}/plan",
    "plan --config-only {m} --preset f16",
    "export {m} --preset f16 -o {t}/out.gguf",
    "eval {m} --reference {good} --text {text}",
    "eval {good} --reference {m} --text {text}",
    "compare {m} --presets f16 --text {text} -o {t}/compared",
    "compare-encoders {m} --presets uniform-q4_k --text {text} -o {t}/compared",
    "super-weights {m}",
    "finetune {m} --data {data} -o {t}/adapter",
    "heal {m} --reference {good} -o {t}/adapter",
)


@pytest.mark.parametrize("command", COMMANDS)
def test_a_word_for_a_number_is_named(command: str, small_moe: Path, tmp_path: Path) -> None:
    model = edited_config(small_moe, tmp_path / "model", lambda config: config.update(hidden_size="large"))
    text, data = small_moe.parent / "demo_text.txt", tmp_path / "chats.jsonl"
    data.write_text("".join(json.dumps({"text": text}) + "\n" for text in ("one", "two")))
    said = refused(*command.format(m=model, t=tmp_path, good=small_moe, text=text, data=data).split())
    assert "config.json gives `hidden_size` as 'large'; a whole number from 1 to" in said
    assert "Correct it, or fetch the file again." in said
    assert sorted(path.name for path in tmp_path.iterdir()) == ["chats.jsonl", "model"]


VALUES = [
    ("num_hidden_layers", None, "`num_hidden_layers` as None"),
    ("vocab_size", -1, "`vocab_size` as -1"),
    ("num_attention_heads", [4, 4], "`num_attention_heads` as [4, 4]"),
    ("num_key_value_heads", "two", "`num_key_value_heads` as 'two'; a whole number is needed"),
    ("intermediate_size", 1e40, "`intermediate_size` as 1e+40"),
    ("n_routed_experts", True, "`n_routed_experts` as True"),
    ("rms_norm_eps", 1e40, "`rms_norm_eps` as 1e+40; a finite number"),  # beyond float32, which GGUF has
    ("rms_norm_eps", float("nan"), "`rms_norm_eps` as nan"),
    ("rope_theta", "far", "`rope_theta` as 'far'"),
    ("rope_scaling", {"rope_type": "yarn", "rope_theta": "far"}, "`rope_scaling.rope_theta` as 'far'"),
    ("rope_scaling", "linear", "`rope_scaling` as 'linear', which a 'deepseek_v3' cannot have; an object is needed"),
    ("topk_group", "one", "`topk_group` as 'one'"),
    (
        "first_k_dense_replace",
        {},
        "`first_k_dense_replace` as {}, which a 'deepseek_v3' cannot have; a whole number is",
    ),
    ("dtype", "int4", "`dtype` as 'int4'; the name of a float type, as 'bfloat16', is needed"),
    ("text_config", {"hidden_size": 8}, "has a `text_config`, which a 'deepseek_v3' has no place for"),
    ("hidden_act", 5, "`hidden_act` as 5, which a 'deepseek_v3' cannot have; a text is needed"),
    ("attention_bias", "yes", "`attention_bias` as 'yes', which a 'deepseek_v3' cannot have; true or false is needed"),
]


@pytest.mark.parametrize("key, value, words", VALUES)
def test_every_kind_of_wrong_value_is_named(key, value, words, small_moe: Path, tmp_path: Path) -> None:
    model = edited_config(small_moe, tmp_path / "model", lambda config: config.update({key: value}))
    said = refused("plan", "--config-only", model, "--preset", "f16")
    assert words in said and said.count("`") == 2
    assert "Correct it, or fetch the file again." in said


def test_a_router_that_chooses_more_experts_than_there_are_is_named(small_moe: Path, tmp_path: Path) -> None:
    """It would end in the words of torch.topk, during the first batch."""
    model = edited_config(small_moe, tmp_path / "model", lambda config: config.update(num_experts_per_tok=99))
    said = refused("calibrate", model, "-o", tmp_path / "stats.safetensors")
    assert "`num_experts_per_tok` as 99 and `n_routed_experts` as" in said
    assert "no more experts can be chosen than there are" in said
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_values_of_an_architecture_without_a_family_are_named(small_moe: Path, tmp_path: Path) -> None:
    """llama.cpp's converter would end in its own words, or leave a key out."""

    def edit(config: dict) -> None:
        config.clear()
        config.update(json.loads(transformers.Olmo2Config().to_json_string(use_diff=False)) | {"rms_norm_eps": None})

    model = edited_config(small_moe, tmp_path / "model", edit)
    with pytest.raises(CheckpointError, match=r"`rms_norm_eps` as None, which a 'olmo2' cannot have"):
        check_values(model)
    edited_config(small_moe, tmp_path / "new", lambda config: config.update(model_type="of_next_year"))
    check_values(tmp_path / "new")


@pytest.mark.nightly
def test_no_configuration_of_transformers_is_refused(tmp_path: Path) -> None:
    """Names alone say what is a number: the defaults of every architecture pass."""
    path, passed = tmp_path / "config.json", 0
    for model_type, of_type in transformers.CONFIG_MAPPING.items():
        try:
            text = of_type().to_json_string(use_diff=False)
        except Exception:  # parts of others, which cannot be made without them
            continue
        path.write_text(text)
        try:
            read_json(path)
        except CheckpointError as error:  # encoders of other things than text
            assert model_type in NOT_OF_TEXT, error
        passed += 1
    assert passed > 100


NOT_OF_TEXT = {"esm", "glpn", "levit", "lxmert", "pvt", "pvt_v2", "rag", "segformer", "clap_audio_model"} | {
    "wav2vec2-bert", "wav2vec2-conformer",
}  # fmt: skip
"""Types whose sizes are lists, or have no vocabulary."""
