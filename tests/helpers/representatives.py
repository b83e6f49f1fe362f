"""Long lists of like cases: `make test` runs the ones that stand for the others, `make nightly` all."""

from collections.abc import Container, Iterable

import pytest


def represented_by(chosen: Container[str], names: Iterable[str]) -> list:
    """Return the parameters `names`, of which those outside `chosen` are marked nightly."""
    return [name if name in chosen else pytest.param(name, marks=pytest.mark.nightly) for name in names]
