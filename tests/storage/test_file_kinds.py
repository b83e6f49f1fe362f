"""What a file is, its first bytes say: under any name it is read as that, or refused as that."""

import gzip
import json
import shutil

import pytest
import torch
from safetensors.torch import save_file

from dynquant.storage.file_kinds import GGUF, SAFETENSORS, kind_of
from tests.helpers.commands import refused, succeed
from tests.helpers.packed_models import plan_of


@pytest.fixture(scope="module")
def plan(moe_model, tmp_path_factory):
    path = tmp_path_factory.mktemp("plan") / "plan.json"
    plan_of(moe_model, "Q8_0").save(path)
    return path


@pytest.fixture(scope="module")
def renamed(f32_moe, small_moe, plan, planned_16m, tmp_path_factory):
    """Files under names of other kinds."""
    folder = tmp_path_factory.mktemp("renamed")
    contents = {
        "gguf.safetensors": f32_moe, "gguf": f32_moe, "safetensors.gguf": small_moe / "model.safetensors",
        "plan.gguf": plan, "plan": plan, "model": small_moe, "priced": planned_16m,
        "stats": planned_16m / "stats.safetensors", "moments": planned_16m / "hessians.safetensors",
        "errors.json": planned_16m / "errors.json",
    }  # fmt: skip
    for name, file in contents.items():
        (folder / name).symlink_to(file)
    torch.save({"weight": torch.zeros(4)}, folder / "pickle.gguf")
    shutil.copyfile(folder / "pickle.gguf", folder / "pickle.safetensors")
    (folder / "musicgen.json").write_text('{"decoder": {}, "encoder": {}, "model_type": "musicgen"}')
    (folder / "other.json").write_text('{"a": 1}')
    (folder / "indented.jsonl.gz").write_bytes(gzip.compress(b'{\n "text": "a"\n}\n'))
    (folder / "text.gguf").write_text("Once upon a time there was a model.\n")
    return folder


def test_inspect_reads_models_under_other_names(f32_moe, small_moe, renamed):
    files = ((f32_moe, "gguf.safetensors", "gguf"), (small_moe / "model.safetensors", "safetensors.gguf"))
    for original, *names in files:
        expected = json.loads(succeed("inspect", "--json", original))
        for name in names:
            shown = json.loads(succeed("inspect", "--json", renamed / name))
            assert all(shown[key] == expected[key] for key in ("format", "types", "roles", "total_bytes")), name


def test_diff_reads_plans_and_files_under_other_names(f32_moe, plan, renamed):
    expected = json.loads(succeed("diff", "--json", f32_moe, plan))
    for names in (("gguf", "plan.gguf"), ("gguf.safetensors", "plan")):
        shown = json.loads(succeed("diff", "--json", *(renamed / name for name in names)))
        assert [shown[side].pop("name") for side in ("before", "after")] == [*names]
        assert shown["changes"] == expected["changes"] != [] and shown["histogram"] == expected["histogram"]


@pytest.mark.parametrize(
    ("command", "words"),
    [
        ("inspect pickle.gguf", "but a zip archive, as pickled weights are"),
        ("inspect pickle.safetensors", "but a zip archive, as pickled weights are"),
        ("inspect plan.gguf", "but a plan of dynquant. Check"),
        ("inspect musicgen.json", "but the configuration of a model. Check"),
        ("inspect other.json", "but a JSON file. Check"),
        ("inspect text.gguf", "does not begin with `GGUF`"),
        ("inspect --lint safetensors.gguf", "is a safetensors file, not a GGUF file"),
        ("diff safetensors.gguf plan", "is a safetensors file, which has no GGUF types"),
        ("diff gguf pickle.safetensors", "is a zip archive, as pickled weights are, not a plan of dynquant. "),
        ("export gguf --plan safetensors.gguf -o out.gguf", "is a safetensors file, not a plan of dynquant. "),
        ("tune safetensors.gguf --reference gguf -o out.gguf", "nor a GGUF file, but a safetensors file. Check"),
        ("fit safetensors.gguf", "is no GGUF file, which llama.cpp runs, but a safetensors file. Export"),
        ("export model --plan stats -o out.gguf", "stats is a statistics file of dynquant, not a plan of dynquant. "),
        ("export model --plan errors.json -o out.gguf", "errors.json is an error table of dynquant, not a plan. Make"),
        ("export model --plan other.json -o out.gguf", "is not a plan of dynquant (`model` is missing)"),
        ("export model --plan priced/plan.json --stats plan -o out.gguf", "plan is a plan of dynquant, not a stat"),
        ("export model --plan priced/plan.json --stats gguf -o out.gguf", "gguf is a GGUF file, not a statistics file"),
        ("export model --plan priced/plan.json --stats moments -o out.gguf", "not a statistics file of dynquant, wh"),
        ("export model --plan priced/plan.json --stats safetensors.gguf -o out.gguf", "it has no header of dynquant"),
        ("export model --preset uniform-q4_k --stats errors.json -o out.gguf", "is an error table of dynquant, not a"),
        ("analyze model --stats plan -o out.json", "plan is a plan of dynquant, not a statistics file"),
        ("calibrate model --imatrix plan -o out.safetensors", "a plan of dynquant, not an importance matrix in a GGUF"),
        ("calibrate model --calibration errors.json -o out.safetensors", "an error table of dynquant. Records are"),
        ("calibrate model --calibration indented.jsonl.gz -o out.safetensors", "indented.jsonl.gz, line 1 is not JSON"),
        ("plan model --recipe plan -o out", "plan is a plan of dynquant, not a recipe. --like FILE takes"),
        ("diff gguf stats", "is a statistics file of dynquant, which has no GGUF types"),
        ("calibrate errors.json -o out.safetensors", "owner/name, but an error table of dynquant; check the path"),
        ("plan --config-only plan --preset f16", "(--config-only) is a file; give the directory"),
        ("calibrate safetensors.gguf -o stats.safetensors", "but a safetensors file; give the directory"),
    ],
)
def test_wrong_content_is_named(command, words, renamed):
    name, *arguments = command.split()
    message = refused(name, *(renamed / word if (renamed / word).exists() else word for word in arguments))
    assert words in message


def test_no_length_of_a_safetensors_header_is_taken_for_another_kind(tmp_path):
    for length in (0x0280, 0x8B1F + 1, ord("{") * 8):  # as pickles, gzip archives and JSON begin
        name = "x" * (length - len('{"":{"dtype":"U8","shape":[1],"data_offsets":[0,1]}}'))
        save_file({name: torch.zeros(1, dtype=torch.uint8)}, tmp_path / "file")
        assert int.from_bytes((tmp_path / "file").read_bytes()[:8], "little") == -(-length // 8) * 8
        assert kind_of(tmp_path / "file") == SAFETENSORS
    (tmp_path / "file").write_bytes(b"GGUF\x03\x00\x00\x00{")
    assert kind_of(tmp_path / "file") == GGUF
