"""The registry against gguf-py and the format, and the fallbacks of llama.cpp."""

import gguf
import pytest

from dynquant.errors import PlanError
from dynquant.formats.quant_types import QUANT_TYPES, fit_to_row, quant_type

BITS = {
    "F32": 32, "BF16": 16, "Q8_0": 8.5, "Q6_K": 6.5625, "Q4_K": 4.5, "IQ4_XS": 4.25, "Q3_K": 3.4375, "Q2_K": 2.625,
    "IQ3_XXS": 3.0625, "IQ2_XXS": 2.0625, "TQ1_0": 1.6875, "IQ1_M": 1.75, "IQ1_S": 1.5625, "MXFP4": 4.25, "NVFP4": 4.5,
    "Q2_0": 2.25, "Q1_0": 1.125,
}  # fmt: skip


@pytest.mark.parametrize("name", BITS)
def test_bits_per_weight(name):
    assert quant_type(name).bits_per_weight == BITS[name]


def test_ids_are_those_of_ggml_and_unique():
    numbers = {kind.name: int(kind) for kind in gguf.GGMLQuantizationType} | {"Q2_0": 42}  # later than gguf-py 0.19
    assert {name: t.ggml_id for name, t in QUANT_TYPES.items()} == {name: numbers[name] for name in QUANT_TYPES}
    assert len({t.ggml_id for t in QUANT_TYPES.values()}) == len(QUANT_TYPES)


def test_types_are_listed_from_precise_to_crushed_within_their_kind():
    for kind in ("Q6_K Q5_K Q4_K Q3_K Q2_K", "IQ4_XS IQ3_S IQ3_XXS IQ2_S IQ2_XS IQ2_XXS IQ1_M IQ1_S"):
        bits = [QUANT_TYPES[name].bits_per_weight for name in kind.split()]
        places = [list(QUANT_TYPES).index(name) for name in kind.split()]
        assert bits == sorted(bits, reverse=True) and places == sorted(places)


def test_sizes():
    assert quant_type("IQ1_S").tensor_bytes((8, 3, 512)) == 8 * 3 * 2 * 50
    assert quant_type("f32").tensor_bytes((7,)) == 28
    with pytest.raises(ValueError, match=r"300.*256.*Q4_K"):
        quant_type("Q4_K").row_bytes(300)


@pytest.mark.parametrize(
    "wanted, row, stored",
    [
        ("Q4_K", 512, "Q4_K"), ("Q4_K", 576, "Q5_0"), ("Q5_K", 576, "Q5_1"), ("Q6_K", 128, "Q8_0"),
        ("Q2_K", 576, "Q4_0"), ("Q3_K", 576, "Q4_0"), ("TQ1_0", 64, "Q4_0"), ("TQ2_0", 64, "Q4_0"),
        ("IQ1_S", 576, "IQ4_NL"), ("IQ1_M", 96, "IQ4_NL"), ("IQ2_XXS", 96, "IQ4_NL"), ("IQ4_XS", 96, "IQ4_NL"),
        ("Q4_K", 100, "F16"), ("IQ1_S", 40, "F16"), ("Q8_0", 33, "F16"), ("MXFP4", 33, "F16"), ("F32", 33, "F32"),
        ("Q2_0", 576, "Q2_0"), ("Q1_0", 1408, "Q1_0"), ("Q1_0", 576, "Q2_0"), ("Q1_0", 96, "Q4_0"),
        ("Q2_0", 96, "Q4_0"), ("Q1_0", 40, "F16"),
    ],
)  # fmt: skip
def test_fallbacks_follow_llama_cpp_and_say_why(wanted, row, stored):
    chosen, reason = fit_to_row(quant_type(wanted), row)
    assert chosen.name == stored
    if stored == wanted:
        assert reason is None
    else:
        assert f"rows of {row}" in reason and wanted in reason and stored in reason


def test_names_are_found_in_any_case_and_near_ones_are_offered():
    assert quant_type("iq2_xxs").name == "IQ2_XXS"
    with pytest.raises(PlanError, match=r"`q4km`.*Q4_K"):
        quant_type("q4km")
    with pytest.raises(PlanError, match=r"F32.*IQ1_S"):
        quant_type("@@@@")
