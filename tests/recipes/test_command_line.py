"""Recipes against llama.cpp itself: our command gives it the plan's types, and we read commands as it does."""

import random
import re
from pathlib import Path

import pytest

from dynquant.checkpoints.inspect import TensorRecord
from dynquant.checkpoints.tensor_roles import role_of
from dynquant.errors import PlanError
from dynquant.families.open import open_model
from dynquant.formats.quant_types import QUANT_TYPES, fit_to_row
from dynquant.recipes.build_plan import plan_from_types
from dynquant.recipes.command_line import (
    Recipe,
    command_line,
    left_alone,
    numbers_pattern,
    parse_recipe,
    recipe_of,
    recipe_types,
    uses_imatrix,
)
from dynquant.recipes.presets import preset_types
from dynquant.recipes.type_lists import TypeList, read_types
from tests.helpers.llama_quantize import (
    TinyModel,
    deepseek_model,
    llama_model,
    llama_quantize,
    llama_quantize_types,
    read_command,
)
from tests.helpers.representatives import represented_by

PATHS = {"model": "in.gguf", "imatrix": "imatrix.gguf", "output": "out.gguf"}
MODELS = {
    "deepseek": deepseek_model(layers=13),
    "tied": llama_model(layers=12, tied=True),
    "rows-576": llama_model(layers=11, hidden=576, heads=9, kv_heads=3, ffn=1536),
    "falcon": llama_model(arch="falcon", layers=8, fused_qkv=True),
    "experts-8": llama_model(layers=16, experts=8),
}
ODD_SHAPES = dict.fromkeys(("blk.1.nextn.eh_proj.weight", "per_layer_token_embd.weight"), (256, 512))
ODD_SHAPES |= dict.fromkeys(("blk.1.attn_rel_b.weight", "blk.0.altup_router.weight"), (256, 256))


def type_list(model: TinyModel, types: dict[str, str]) -> TypeList:
    tensors = [
        TensorRecord(name, shape, types[name], QUANT_TYPES[types[name]].tensor_bytes(shape), role_of(name))
        for name, shape in model.shapes.items()
    ]
    return TypeList("x", model.hyper.arch, 0, tuple(tensors))


def random_types(model: TinyModel, source: Path, seed: int) -> dict[str, str]:
    """A type for every tensor that llama-quantize does not leave alone, as its row length allows."""
    generator = random.Random(seed)
    changed = {name for name, kind in llama_quantize_types(source, 7).items() if kind != "F32"}
    pool = generator.sample(list(QUANT_TYPES), 5)
    return {
        name: fit_to_row(QUANT_TYPES[generator.choice(pool)], shape[-1])[0].name if name in changed else "F32"
        for name, shape in model.shapes.items()
    }


@pytest.mark.parametrize("seed", represented_by((0,), range(3)))
@pytest.mark.parametrize("model", MODELS.values(), ids=MODELS)
def test_llama_cpp_gives_random_plans_their_types(model: TinyModel, seed: int, tmp_path: Path):
    source = model.write_hollow(tmp_path / "model.gguf")
    types = random_types(model, source, seed)
    recipe = recipe_of(type_list(model, types))
    command = command_line(recipe, **PATHS)
    assert llama_quantize_types(source, *read_command(command)) == types
    assert parse_recipe(command) == recipe
    ours = plan_from_types(open_model(source), recipe_types(command, open_model(source)), recipe="recipe", exact=True)
    assert {entry.name: entry.type for entry in ours.entries} == types


@pytest.mark.parametrize("embeddings", [("Q4_K", "Q8_0"), ("Q4_K", "Q4_K")])
def test_odd_tensors_keep_their_types(embeddings, tmp_path: Path):
    base = llama_model(layers=2)
    model = TinyModel(base.hyper, base.shapes | ODD_SHAPES, base.metadata)
    source = model.write_hollow(tmp_path / "model.gguf")
    types = random_types(model, source, 5)
    types |= dict(zip(("token_embd.weight", "per_layer_token_embd.weight"), embeddings, strict=True))
    types["blk.1.nextn.eh_proj.weight"] = "F32"
    found = llama_quantize_types(source, *read_command(command_line(recipe_of(type_list(model, types)), **PATHS)))
    assert found == types


def test_every_tensor_has_exactly_one_pattern():
    model = MODELS["deepseek"]
    generator = random.Random(1)
    types = {name: generator.choice(["Q4_0", "Q8_0", "IQ4_NL"]) if len(shape) > 1 else "F32"
             for name, shape in model.shapes.items()}  # fmt: skip
    recipe = recipe_of(type_list(model, types))
    for name, shape in model.shapes.items():
        found = [type_name for pattern, type_name in recipe.patterns if re.search(pattern, name)]
        if len(shape) > 1 and not name.startswith(("token", "output")) and "gate_inp" not in name:
            assert found == [types[name]], name
    assert all(pattern == pattern.lower() and pattern[0] + pattern[-1] == "^$" for pattern, _ in recipe.patterns)


def test_llama_cpp_writes_the_plan_of_the_bundled_model(moe_model, f32_moe, tmp_path: Path):
    """A real file of fast types, with patterns that split layers, and back to a plan from the file."""
    types = dict.fromkeys(preset_types("f16", moe_model), ("TQ2_0", "test"))
    types |= {name: ("Q8_0", "test") for name in types if "attn" in name} | {"output.weight": ("Q4_0", "test")}
    for layer in (1, 4, 5):
        types[f"blk.{layer}.ffn_down_exps.weight"] = ("Q3_K", "test")
    plan = plan_from_types(moe_model, types, recipe="test")
    plan.save(tmp_path / "plan.json")
    command = command_line(recipe_of(read_types(tmp_path / "plan.json")), **PATHS)
    assert r"^blk\.[145]\.ffn_down_exps\.weight$=q3_k" in command
    ftype, overrides = read_command(command)
    shapes = {name: moe_model.source.info(name).shape for name in moe_model.source.names()}
    importance = TinyModel(moe_model.hyper, shapes).importance()
    written = llama_quantize(f32_moe, tmp_path / "out.gguf", ftype, importance, overrides)
    assert {name: kind for name, (kind, _) in written.items()} == {entry.name: entry.type for entry in plan.entries}
    again = recipe_types(command_line(recipe_of(read_types(tmp_path / "out.gguf")), **PATHS), moe_model)
    back = plan_from_types(moe_model, again, recipe="recipe", exact=True)
    assert [(entry.name, entry.type) for entry in back.entries] == [(entry.name, entry.type) for entry in plan.entries]


COMMANDS = {
    "one pattern": "--tensor-type ffn_down=iq2_xxs IN OUT Q4_K_M",
    "first match wins": "--tensor-type FFN=q2_k --tensor-type 'blk\\.[0-4]\\.'=q6_k IN OUT IQ2_S",
    "row lengths": "--tensor-type attn=iq1_s --tensor-type .*=q5_k IN OUT Q2_K",
    "output alone": "--output-tensor-type q8_0 IN OUT IQ3_XXS",
    "both ends": "--token-embedding-type f16 --output-tensor-type q8_0 --tensor-type output=q4_0 IN OUT Q3_K_L",
    "pure": "--pure --tensor-type attn=q8_0 --output-tensor-type q5_0 IN OUT IQ4_XS",
    "float base": "--output-tensor-type q8_0 IN OUT BF16",
    "counted rules": "--tensor-type 'blk\\.[02468]\\.(ffn_down|attn_v)'=q3_k IN OUT Q5_K_M",
    "mxfp4": "--tensor-type attn_q=q6_k IN OUT MXFP4_MOE",
}


@pytest.mark.parametrize("command", COMMANDS.values(), ids=COMMANDS)
def test_commands_mean_what_llama_cpp_makes_of_them(command: str, tmp_path: Path):
    for number, tiny in enumerate(MODELS.values()):
        source = tiny.write_hollow(tmp_path / f"{number}.gguf")
        model = open_model(source)
        plan = plan_from_types(model, recipe_types(f"llama-quantize {command}", model), recipe="recipe", exact=True)
        theirs = llama_quantize_types(source, *read_command(f"llama-quantize {command}"))
        assert {entry.name: entry.type for entry in plan.entries} == theirs
        source.unlink()


def test_a_uniform_float_needs_no_pattern(moe_model):
    names = moe_model.source.names()
    tensors = [
        TensorRecord(name, moe_model.source.info(name).shape, "BF16" if name.endswith("_exps.weight") else "F32", 0,
                     role_of(name)) for name in names
    ]  # fmt: skip
    mixed = recipe_of(TypeList("x", moe_model.arch, 0, tuple(tensors)))
    assert mixed.base == "q8_0" and mixed.output == "F32" and not uses_imatrix(mixed)
    only = recipe_of(TypeList("x", moe_model.arch, 0, tuple(t for t in tensors if t.type == "BF16")))
    assert only == Recipe(base="bf16")


def test_what_llama_quantize_copies_is_told():
    model = llama_model(layers=1, experts=8)
    types = {name: "F32" if len(shape) < 2 else "Q8_0" for name, shape in model.shapes.items()}
    types["blk.0.ffn_gate_inp.weight"] = "BF16"
    assert [(tensor.name, tensor.type) for tensor, _ in left_alone(type_list(model, types))] == [
        ("blk.0.ffn_gate_inp.weight", "BF16")
    ]


@pytest.mark.parametrize(
    "numbers, pattern",
    [
        ([7], "7"), ([3, 4, 5], "[3-5]"), ([1, 2, 4], "[124]"), ([3, 10], "(3|10)"), ([10, 11], "1[01]"),
        (range(9, 61), "(9|[1-5][0-9]|60)"), (range(98, 112), "(9[89]|10[0-9]|11[01])"),
    ],
)  # fmt: skip
def test_numbers_become_a_short_regex(numbers, pattern):
    assert numbers_pattern(numbers) == pattern
    assert [n for n in range(200) if re.fullmatch(numbers_pattern(numbers), str(n))] == list(numbers)


def test_published_lists_are_read(moe_model, tmp_path: Path):
    path = tmp_path / "ubergarm.txt"
    path.write_text(
        "# attention\nblk\\..*\\.attn_.*=q8_0\n\n## experts\nblk\\.[1-3]\\.ffn_(gate|up)_exps\\.weight=iq2_xxs\n"
        "ffn_.*_exps=iq1_s,token_embd\\.weight=q4_k\nblk\\.\\d{1,2}\\.ffn=q5_k\noutput\\.weight=Q6_K\n"
    )
    types = {name: kind for name, (kind, _) in recipe_types(str(path), moe_model).items()}
    assert types["blk.2.ffn_up_exps.weight"] == "IQ2_XXS" and types["blk.4.ffn_up_exps.weight"] == "IQ1_S"
    assert types["blk.2.ffn_down_exps.weight"] == "IQ1_S" and types["blk.0.ffn_down.weight"] == "Q5_K"
    assert types["token_embd.weight"] == "Q4_K" and types["output.weight"] == "Q6_K"
    assert recipe_types(str(path), moe_model)["output.weight"][1] == r"recipe: output\.weight"


def test_a_shell_script_with_comments_is_read(moe_model, tmp_path: Path):
    path = tmp_path / "make.sh"
    path.write_text(
        "#!/bin/sh\n# make it\nnice ./build/bin/llama-quantize --imatrix i.dat \\\n"
        "  --custom-q 'ffn=q4_k,attn=q6_k' \\\n"
        "  --output-tensor-type Q8_0 \\\n  in.gguf out.gguf 15 8\n"
    )
    assert parse_recipe(path.read_text()) == Recipe("q4_k_m", (("ffn", "Q4_K"), ("attn", "Q6_K")), output="Q8_0")
    listed = tmp_path / "types.txt"
    listed.write_text("ffn=q4_k\nattn=q6_k\n")
    command = f"llama-quantize --tensor-type-file {listed} in.gguf Q8_0"
    assert parse_recipe(command) == Recipe("q8_0", (("ffn", "Q4_K"), ("attn", "Q6_K")))


@pytest.mark.parametrize(
    "recipe, words",
    [
        ("ffn=iq4_ks", "`ffn` the type `iq4_ks`.*IQ4_XS.*ik_llama"),
        (".*=q4_k nothing_such=q6_k", "pattern `nothing_such` .* no tensor of textbook-moe-16m"),
        ("ffn=q4_k", r"no pattern for `token_embd\.weight` and \d+ more .*llama-quantize command line"),
        ("llama-quantize --tensor-type ffn=q4_k", "no pattern for `token_embd"),
        ("ffn(=q4_k", r"`ffn\(` .* no regular expression"),
        ("(?!ffn)attn=q4_k", r"`\(\?!ffn\)attn` .* Look-ahead"),
        ("ffn=", "`ffn=` .* not of the form"),
        ("none.txt", "no file `none.txt`, and it is not a recipe"),
        ("# a=b", "recipe is empty"),
        ("llama-quantize --tensor-type 'ffn=q4_k in out Q4_K", "no command line"),
        ("llama-quantize --prune-layers 3 in out Q4_K", "option `--prune-layers`"),
        ("llama-quantize --output-tensor-type q4_k_m in out Q4_K", "`--output-tensor-type` the type `q4_k_m`"),
        ("llama-quantize in out --tensor-type", "ends in `in out --tensor-type`"),
        ("llama-quantize --tensor-type", "no value"),
        ("llama-quantize --tensor-type ffn=q4_k in out F16", "ignores --tensor-type .* f16"),
        ("llama-quantize --tensor-type-file no.txt in out Q8_0", "file `no.txt`"),
    ],
)
def test_what_is_wrong_is_named(moe_model, recipe, words):
    with pytest.raises(PlanError, match=words):
        recipe_types(recipe, moe_model)


@pytest.mark.parametrize("pattern", [".?" * 30 + "z", "(a|b|.)*(b+)+(l.*)*z", "(.{0,30}){1,9}z"])
def test_patterns_that_keep_a_backtracking_matcher_busy_for_years_are_followed_at_once(moe_model, pattern):
    with pytest.raises(PlanError, match="no tensor of textbook-moe-16m"):
        recipe_types(f"{pattern}=q4_k .*=q8_0", moe_model)


def test_a_recipe_that_is_not_text_is_refused(moe_model, tmp_path: Path):
    path = tmp_path / "model.bin"
    for content, words in (b"\xff\x00=", "cannot be read as text"), ("a=q4_k".encode("utf-16"), "is text in UTF-16"):
        path.write_bytes(content)
        with pytest.raises(PlanError, match=rf"model\.bin {words}"):
            recipe_types(str(path), moe_model)
