"""Modules that moved still import under the names that were public."""

from importlib import import_module

import pytest

from dynquant.formats import quant_types
from dynquant.former_names import FORMER_NAMES


@pytest.mark.parametrize("name", FORMER_NAMES)
def test_former_name_is_the_module_of_today(name: str):
    assert import_module(name) is import_module(FORMER_NAMES[name])
    assert import_module(name).__spec__.name == FORMER_NAMES[name]


def test_code_of_the_former_readme_imports():
    import dynquant.trl_support
    from dynquant.checkpoint import open_model
    from dynquant.codecs import decode
    from dynquant.codecs.ggml_encoder import encode
    from dynquant.quant_types import QUANT_TYPES

    assert all(map(callable, (open_model, decode, encode, dynquant.trl_support.use_packed_head)))
    assert QUANT_TYPES is quant_types.QUANT_TYPES
