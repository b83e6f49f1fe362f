"""Whole-module decisions from the errors of a made-up table: keep, 8 bits, or types like all others."""

import pytest

from dynquant.analysis.errors.table import ErrorRow, ErrorTable
from dynquant.checkpoints.tensor_roles import layer_of, role_of
from dynquant.errors import OptionError
from dynquant.planning.target import Target
from dynquant.planning.vision_modules import every_choice, held_to, module_choices, with_measured_reasons

TYPES = {"Q2_K": 4.0, "Q4_K": 1.0, "Q8_0": 0.05, "BF16": 0.0}
NAMES = (
    "blk.0.ffn_up.weight",
    "blk.1.ffn_up.weight",
    "v.blk.0.ffn_up.weight",
    "v.blk.0.attn_qkv.weight",
    "mm.0.weight",
)


def table_of(errors: dict[str, float]) -> ErrorTable:
    """Rows whose activation error in Q4_K is that of `errors` by prefix of the name."""
    rows = []
    for name in NAMES:
        scale = next(error for prefix, error in errors.items() if name.startswith(prefix))
        for type_name, factor in TYPES.items():
            rows.append(
                ErrorRow(
                    name=name, role=role_of(name), layer=layer_of(name), type=type_name, bytes=100,
                    relative_rms=factor, weighted_error=factor, weighted_energy=1.0, activation_error=factor * scale,
                )
            )  # fmt: skip
    return ErrorTable(
        model="m", fingerprint="f", stats_hash="s", encoder="ggml", types=("Q2_K", "Q4_K", "Q8_0"), rows=tuple(rows)
    )


def types_of(table: ErrorTable, name: str) -> set[str]:
    return set(table.tensors()[name])


def test_errors_decide_for_whole_modules():
    table = table_of({"blk": 0.05, "v.": 0.15, "mm": 0.07})
    choices = next(module_choices(table, "auto"))
    assert [choice.level for choice in choices] == ["keep", "8bit"]
    assert "3.00 times that of the language model" in choices[0].reason and "Q4_K" in choices[0].reason
    held = held_to(table, choices)
    assert types_of(held, "v.blk.0.attn_qkv.weight") == {"BF16"} and types_of(held, "mm.0.weight") == {"Q8_0"}
    assert types_of(held, "blk.0.ffn_up.weight") == set(TYPES)


def test_errors_like_the_language_models_leave_modules_free():
    table = table_of({"blk": 0.05, "v.": 0.06, "mm": 0.01})
    assert [choice.level for choice in next(module_choices(table, "auto"))] == ["lower", "lower"]


def test_decisions_are_lowered_step_by_step_and_say_so():
    table = table_of({"blk": 0.05, "v.": 0.15, "mm": 0.07})
    found = [tuple(choice.level for choice in choices) for choices in module_choices(table, "auto")]
    assert found == [("keep", "8bit"), ("8bit", "lower"), ("lower", "lower")]
    last = list(module_choices(table, "auto"))[-1]
    assert "the budget does not hold that" in last[0].reason


@pytest.mark.parametrize(("wanted", "types"), [("keep", {"BF16"}), ("8bit", {"Q8_0"}), ("lower", set(TYPES))])
def test_a_wanted_level_is_the_only_one(wanted, types):
    table = table_of({"blk": 0.05, "v.": 0.15, "mm": 0.07})
    (choices,) = module_choices(table, wanted)
    held = held_to(table, choices)
    assert types_of(held, "v.blk.0.ffn_up.weight") == types == types_of(held, "mm.0.weight")


def test_a_language_model_has_nothing_to_decide():
    table = table_of({"blk": 0.05, "v.": 0.15, "mm": 0.07})
    language = table.with_rows(row for row in table.rows if row.name.startswith("blk"))
    assert list(module_choices(language, "auto")) == [()]


def test_an_unknown_level_is_refused():
    with pytest.raises(OptionError, match="--vision half is not known; give one of auto, keep"):
        Target(vision="half")


def test_every_combination_is_offered_and_the_measured_one_explained():
    table = table_of({"blk": 0.05, "v.": 0.15, "mm": 0.07})
    every = list(every_choice(table, "auto"))
    assert len(every) == 9 and len({tuple(one.level for one in choices) for choices in every}) == 9
    measured = {choices: 0.01 * number for number, choices in enumerate(every, start=1)}
    tower, projector = with_measured_reasons(every[0], measured, "3 samples")
    assert tower.reason == (
        "the vision tower stays whole; KL on 3 samples: whole 0.01, with 8 bits 0.04, with types like all others 0.07"
    )
    assert projector.reason.endswith("whole 0.01, with 8 bits 0.02, with types like all others 0.03")
    assert [len(list(every_choice(table, level))) for level in ("keep", "8bit", "lower")] == [1, 1, 1]
