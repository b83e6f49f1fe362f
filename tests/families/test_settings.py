"""A configuration that was edited after the weights were measured or written: every step that goes on says so."""

import json
import re
import struct
from pathlib import Path

import pytest

from dynquant.calibration.options import CalibrationOptions
from dynquant.calibration.stage import statistics_in
from dynquant.encoding.stream import check_plan
from dynquant.errors import CheckpointError, PlanError
from dynquant.families.common.settings import differing_settings, settings_of_config
from dynquant.families.open import check_original, open_model, settings_of
from dynquant.recipes.plan import Plan
from dynquant.session import Session
from tests.helpers.commands import linked_copy, refused
from tests.helpers.edited_checkpoints import edited_config
from tests.helpers.evaluating import evaluated
from tests.helpers.packed_models import plan_of

EDITS = {
    "rms_norm_eps": (0.01, "was 1e-06 and is 0.01"),
    "rope_theta": (5000.0, r"was 10000 and is 5000"),
    "num_experts_per_tok": (1, "was 2 and is 1"),
    "norm_topk_prob": (False, r"`norm_topk_prob` in config.json\) was True and is absent"),
}


@pytest.fixture(params=EDITS)
def edit(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture
def edited(small_moe: Path, tmp_path: Path, edit: str) -> Path:
    return edited_config(small_moe, tmp_path / small_moe.name, lambda config: config.update({edit: EDITS[edit][0]}))


def test_every_step_refuses_what_another_configuration_gave(edited, edit, small_moe, planned_16m, packed_moe, tmp_path):
    said, stats = EDITS[edit][1], planned_16m / "stats.safetensors"
    assert re.search(said, refused("analyze", edited, "--stats", stats, "-o", tmp_path / "errors.json"))
    assert re.search(said, refused("export", edited, "--plan", planned_16m / "plan.json", "-o", tmp_path / "out.gguf"))
    assert re.search(said, refused("plan", edited, "--stats", stats, "--bpw", 3, "-o", tmp_path / "plan"))
    model = open_model(edited)
    for made in (packed_moe.gguf, packed_moe.directory):
        with pytest.raises(CheckpointError, match=said):
            check_original(made, model)
        check_original(made, open_model(small_moe))


def test_a_plan_folder_calibrates_anew(small_moe, planned_16m, tmp_path):
    edited = edited_config(small_moe, tmp_path / "model", lambda config: config.update(rms_norm_eps=0.01))
    folder = linked_copy(planned_16m, tmp_path / "plan")
    notes: list[str] = []
    options = CalibrationOptions(tokens=512, window=256, hessians="none")
    file = statistics_in(folder, open_model(edited), options, Session(note=notes.append))
    assert "configuration" in notes[0] and "weights" not in notes[0]
    assert file.stats.provenance.settings == open_model(edited).settings


def test_eval_says_what_differs_beside_the_weights(small_moe, tiny_moe, tmp_path):
    edited = edited_config(small_moe, tmp_path / "edited", lambda config: config.update(num_experts_per_tok=1))
    text = tmp_path / "text.txt"
    text.write_text("The sea is blue. " * 40)
    notes = evaluated(edited, small_moe, text=(text,), window=32, max_tokens=64, tasks=("kl",)).notes
    assert any("`num_experts_per_tok` in config.json) (2 and 1)" in note for note in notes), notes
    assert not evaluated(small_moe, small_moe, text=(text,), window=32, max_tokens=64, tasks=("kl",)).notes


def test_what_does_not_decide_the_computation_is_free(small_moe, planned_16m, tmp_path):
    free = {"transformers_version": "9.9", "use_cache": False, "eos_token_id": [0, 1], "max_position_embeddings": 512}
    edited = edited_config(small_moe, tmp_path / "model", lambda config: config.update(free))
    plan = Plan.load(planned_16m / "plan.json")
    plan.check_covers([entry.name for entry in plan.entries], open_model(edited))
    names = settings_of_config({**free, "_name_or_path": "/a", "torch_dtype": "float16", "hidden_act": "silu"})
    assert names == {"hidden_act": "silu"}


def test_keys_of_a_gguf_are_compared_too(packed_moe, tmp_path):
    source = packed_moe.gguf.read_bytes()
    place = source.index(b"deepseek2.rope.freq_base") + len(b"deepseek2.rope.freq_base") + 4
    content = source[:place] + struct.pack("<f", 5000.0) + source[place + 4 :]
    (tmp_path / "edited.gguf").write_bytes(content)
    model, edited = open_model(packed_moe.gguf), open_model(tmp_path / "edited.gguf")
    assert model.fingerprint == edited.fingerprint
    plan = plan_of(model, "Q8_0")
    with pytest.raises(PlanError, match=r"`rope_theta` in config.json\) was 10000 and is 5000"):
        check_plan(edited, plan)


def test_records_without_settings_pass(small_moe, planned_16m, tmp_path):
    """Those of older versions."""
    content = json.loads((planned_16m / "plan.json").read_text())
    del content["settings"]
    (tmp_path / "plan.json").write_text(json.dumps(content))
    plan = Plan.load(tmp_path / "plan.json")
    plan.check_covers([entry.name for entry in plan.entries], open_model(small_moe))


def test_an_unknown_family_and_a_vision_tower_are_compared_by_config_json(tiny_vision, tmp_path):
    original = tiny_vision("qwen2_vl")
    edited = edited_config(original, tmp_path / "m", lambda config: config["vision_config"].update(num_heads=1))
    said = differing_settings(open_model(original).settings, settings_of(edited))
    assert re.fullmatch("`vision_config.num_heads` was .* and is 1", said)
