"""What presets and recipes store where rows do not fit a type's blocks: llama.cpp's choice, or a nearer one."""

import json

import pytest
from typer.testing import CliRunner

from dynquant.analysis.errors.measure import tensor_formats, unmeasured_table
from dynquant.cli.app import app
from dynquant.families.open import open_config
from dynquant.formats.quant_types import SMALL_BLOCK_TYPES, candidates_for_row, fit_to_row, quant_type
from dynquant.recipes.build_plan import plan_from_types
from dynquant.recipes.command_line import recipe_types
from dynquant.recipes.presets import preset_types

SMOLLM2 = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "vocab_size": 49152, "hidden_size": 576,
    "intermediate_size": 1536, "num_hidden_layers": 4, "num_attention_heads": 9, "num_key_value_heads": 3,
    "tie_word_embeddings": True,
}  # fmt: skip
GATE, DOWN, EMBEDDING = "blk.1.ffn_gate.weight", "blk.1.ffn_down.weight", "token_embd.weight"


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    folder = tmp_path_factory.mktemp("smollm2")
    (folder / "config.json").write_text(json.dumps(SMOLLM2))
    return folder


@pytest.mark.parametrize(
    "wanted, row, stored",
    [
        ("IQ2_XXS", 576, "Q2_0"), ("IQ1_S", 576, "Q2_0"), ("IQ1_S", 1408, "Q1_0"), ("IQ1_M", 1408, "Q2_0"),
        ("Q2_K", 1408, "Q2_0"), ("IQ3_XXS", 576, "Q2_0"), ("IQ3_S", 576, "IQ4_NL"), ("Q3_K", 576, "Q4_0"),
        ("Q6_K", 576, "Q8_0"), ("IQ2_XXS", 512, "IQ2_XXS"), ("IQ2_XXS", 96, "IQ4_NL"), ("IQ2_XXS", 40, "F16"),
    ],
)  # fmt: skip
def test_the_nearest_type_in_bits_stands_in(wanted, row, stored):
    chosen, reason = fit_to_row(quant_type(wanted), row, SMALL_BLOCK_TYPES)
    assert chosen.name == stored
    assert reason is None if stored == wanted else stored in reason
    of_llama_cpp, _ = fit_to_row(quant_type(wanted), row)
    assert {each.name for each in candidates_for_row(quant_type(wanted), row)} == {stored, of_llama_cpp.name}


@pytest.mark.parametrize("fallback, gate", [((), "IQ4_NL"), (("Q2_0",), "Q2_0"), (("Q1_0", "MXFP4"), "MXFP4")])
@pytest.mark.parametrize("kind", ["preset", "mixture", "pattern", "pure"])
def test_presets_and_recipes_take_it(directory, kind, fallback, gate):
    model, fallbacks = open_config(directory), tuple(map(quant_type, fallback))
    if kind == "preset":
        types = preset_types("uniform-iq2_xxs", model, fallbacks=fallbacks)
    elif kind == "mixture":
        types = preset_types("llama-iq2_xxs", model, fallbacks=fallbacks)
    else:
        recipe = "llama-quantize --pure in out IQ2_XXS" if kind == "pure" else "token_embd=q6_k .*=iq2_xxs"
        types = recipe_types(recipe, model, fallbacks=fallbacks)
    plan = {entry.name: entry for entry in plan_from_types(model, types, recipe="test").entries}
    assert plan[GATE].type == gate and "rows of 576 do not divide" in plan[GATE].reason
    assert plan[DOWN].type in ("IQ2_XXS", "Q2_K")
    if kind in ("mixture", "pattern"):
        assert plan[EMBEDDING].type == "Q8_0", "no fallback takes bits from a type that has many"


def test_a_planner_may_choose_what_llama_cpp_stores_and_the_nearer_type(directory):
    model = open_config(directory)
    table = unmeasured_table(model, tensor_formats(model, None, ("IQ2_XXS", "Q8_0")), ("IQ2_XXS", "Q8_0"))
    assert set(table.tensors()[GATE]) == {"IQ4_NL", "Q2_0", "Q8_0", "BF16"}
    assert set(table.tensors()[DOWN]) == {"IQ2_XXS", "Q8_0", "BF16"}
    assert table.row(GATE, "IQ2_XXS").type == "IQ4_NL", "what a recipe without --fallback stores"
    assert set(table.restricted_to(["IQ2_XXS"]).tensors()[GATE]) == {"IQ4_NL", "Q2_0"}


@pytest.mark.parametrize(
    "arguments, problem",
    [
        (("--bpw", "3", "--fallback", "q2_0"), "goes with --preset and --recipe"),
        (("--preset", "uniform-iq2_xxs", "--fallback", "q2_9"), "no quant type `q2_9`"),
    ],
)
def test_a_fallback_without_use_or_of_no_type_is_refused(directory, arguments, problem):
    done = CliRunner().invoke(app, ["plan", "--config-only", str(directory), *arguments])
    assert done.exit_code == 1 and problem in " ".join(str(done.exception or done.output).split())


def test_the_plan_remembers_the_fallback(directory):
    arguments = [
        "plan",
        "--config-only",
        str(directory),
        "--preset",
        "uniform-iq1_s",
        "--fallback",
        "q2_0,q1_0",
        "--json",
    ]
    plan = json.loads(CliRunner().invoke(app, arguments).stdout)
    assert plan["recipe"] == "preset uniform-iq1_s, fallback Q2_0 Q1_0"
    assert {entry["type"] for entry in plan["entries"]} == {"F32", "IQ1_S", "Q2_0"}
