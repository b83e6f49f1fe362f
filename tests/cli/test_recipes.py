"""recipe, diff and `plan --recipe/--like` as a user types them, on the bundled model."""

import json

import gguf
import pytest
from typer.testing import CliRunner

from dynquant.cli.app import app
from dynquant.errors import PlanError
from dynquant.families.open import open_config
from dynquant.recipes.build_plan import plan_from_types
from dynquant.recipes.plan import Plan
from dynquant.recipes.presets import preset_types
from tests.helpers.commands import succeed


def invoke(*arguments):
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def planned(small_moe, *target):
    """plan.json from the config alone."""
    done = invoke("plan", "--config-only", small_moe, *target, "--json")
    assert done.exit_code == 0, done.exception
    return Plan.model_validate_json(done.stdout)


def types(plan):
    return [(entry.name, entry.type) for entry in plan.entries]


@pytest.fixture
def plans(small_moe, tmp_path):
    """Two plan.json files of the bundled model, in the layout that `export` writes."""
    model = open_config(small_moe)
    for name in ("r1-iq1_s", "llama-q2_k"):
        made = plan_from_types(model, preset_types(name, model), recipe=f"preset {name}")
        made.save(tmp_path / f"{name}.json")
    return tmp_path / "r1-iq1_s.json", tmp_path / "llama-q2_k.json"


def test_plan_to_recipe_to_plan(plans, small_moe, tmp_path):
    for path in plans:
        done = invoke("recipe", path, "--model", "in file.gguf", "--imatrix", "im.gguf", "-o", "out.gguf")
        assert done.exit_code == 0
        assert done.stdout.startswith("llama-quantize \\\n  --imatrix im.gguf \\\n  --token-embedding-type ")
        assert done.stdout.splitlines()[-1].startswith("  'in file.gguf' out.gguf ")
        script = tmp_path / "make.sh"
        script.write_text(done.stdout)
        for recipe in (script, done.stdout):
            again = planned(small_moe, "--recipe", recipe)
            assert types(again) == types(Plan.load(path))
        assert all("recipe" in e.reason for e in again.entries if e.type != "F32")
        assert planned(small_moe, "--recipe", script).recipe == "recipe make.sh"
        like = planned(small_moe, "--like", path)
        assert types(like) == types(again) and like.recipe == f"like {path.name}"


def test_recipe_without_paths_has_placeholders_and_json(plans):
    assert invoke("recipe", plans[0]).stdout.endswith("  MODEL.gguf OUT.gguf IQ1_S\n")
    document = json.loads(invoke("recipe", plans[0], "--json").stdout)
    assert document["base"] == "IQ1_S" and document["output_tensor_type"] == "Q6_K"
    assert {"pattern": r"^blk\.[0-9]+\.ffn_down_exps\.weight$", "type": "IQ2_XXS"} in document["tensor_types"]
    assert document["left_alone"] == [] and document["command"].startswith("llama-quantize")


def test_diff_prints_tables_and_json(plans):
    done = invoke("diff", *plans)
    assert done.exit_code == 0
    assert "Q4_K > Q2_K" in done.stdout and "1-5" in done.stdout and "tensors have another type" in done.stdout
    document = json.loads(invoke("diff", *plans, "--json").stdout)
    before, after = (Plan.load(path) for path in plans)
    assert document["before"]["file_bytes"] == before.predicted_bytes
    assert document["after"]["tensor_bytes"] == after.tensor_bytes
    change = sum(c["bytes_after"] - c["bytes_before"] for c in document["changes"])
    assert change == after.tensor_bytes - before.tensor_bytes
    down = next(c for c in document["changes"] if (c["role"], c["before"]) == ("expert_down", "IQ2_XXS"))
    assert down["layers"] == [1, 2, 3, 4, 5] and down["after"] == "Q3_K"
    assert "0 of" in invoke("diff", plans[0], plans[0]).stdout


@pytest.mark.parametrize(
    "arguments, words",
    [
        (("--like", "a.gguf", "--recipe", "b=q4_k"), "--like and --recipe"),
        (("--preset", "f16", "--size", "4MB", "--like", "a.gguf"), "--preset and --like and --size"),
        (("--bpw", "2", "--recipe", "b=q4_k"), "--recipe and --bpw"),
        (("--bpw", "2"), "--preset, --recipe or --like"),
        (("--recipe", "ffn=q4_k"), "no pattern for `token_embd.weight`"),
        (("--like", "none.json"), "none.json cannot be read"),
    ],
)
def test_targets_that_cannot_be_are_refused(small_moe, arguments, words):
    error = invoke("plan", "--config-only", small_moe, *arguments).exception
    assert isinstance(error, PlanError) and words in str(error)


@pytest.mark.nightly
def test_a_plan_like_another_is_measured_and_exported_with_its_types(small_moe, tmp_path):
    like = planned(small_moe, "--recipe", "ffn_.*_exps=q4_0 .*=q8_0")
    like.save(tmp_path / "like.json")
    done = invoke("plan", small_moe, "--like", tmp_path / "like.json", "--tokens", "512", "--types", "q4_0",
                  "--no-report", "--hessians", "none", "-o", tmp_path)  # fmt: skip
    assert done.exit_code == 0, done.exception
    plan = Plan.load(tmp_path / "plan.json")
    assert types(plan) == types(like) and plan.objective == "fixed recipe" and plan.recipe == "like like.json"
    assert all(e.weighted_error for e in plan.entries if e.type == "Q4_0")
    output = tmp_path / "out.gguf"
    done = invoke(
        "export", small_moe, "--plan", tmp_path / "plan.json", "--encoder", "ggml", "--tune", "0", "-o", output
    )
    assert done.exit_code == 0, done.exception
    assert output.stat().st_size == plan.predicted_bytes
    assert {tensor.name: tensor.tensor_type.name for tensor in gguf.GGUFReader(output).tensors} == dict(types(plan))


def test_a_file_with_a_capital_ending_is_read_as_any(f32_moe, tmp_path):
    lower, upper = tmp_path / "m.gguf", tmp_path / "m.GGUF"
    lower.hardlink_to(f32_moe)
    upper.hardlink_to(f32_moe)
    for command in ("inspect", "fit", "recipe"):
        assert succeed(command, upper).replace("m.GGUF", "m.gguf") == succeed(command, lower)
    assert succeed("diff", lower, upper)
