"""Modules that moved still import under the names that were public."""

import subprocess
import sys
from importlib import import_module

import pytest

from dynquant.former_names import FORMER_NAMES


@pytest.mark.parametrize("name", FORMER_NAMES)
def test_former_name_is_the_module_of_today(name: str):
    assert import_module(name) is import_module(FORMER_NAMES[name])
    assert import_module(name).__spec__.name == FORMER_NAMES[name]


def test_code_of_the_former_readme_imports():
    code = (
        "from dynquant.checkpoint import open_model; from dynquant.codecs import decode\n"
        "from dynquant.codecs.ggml_encoder import encode; from dynquant.quant_types import QUANT_TYPES\n"
        "import dynquant.trl_support; dynquant.trl_support.use_packed_head\n"
        "from dynquant.formats.quant_types import QUANT_TYPES as today; assert QUANT_TYPES is today"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
