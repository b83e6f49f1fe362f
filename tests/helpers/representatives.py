"""Long lists of like cases: `make test` runs the ones that stand for the others, `make nightly` all."""

from collections.abc import Container, Iterable

import pytest

SLOW_GGML_TABLES = ("IQ1_S", "IQ1_M", "IQ2_XS", "IQ2_S")
"""Types for which each process that encodes with ggml builds tables first, three to nine seconds; IQ2_XXS takes one."""


def represented_by(chosen: Container[str], names: Iterable[str]) -> list:
    """Return the parameters `names`, of which those outside `chosen` are marked nightly."""
    return [name if name in chosen else pytest.param(name, marks=pytest.mark.nightly) for name in names]
