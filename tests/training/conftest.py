"""The model that the training tests share."""

import pytest

from tests.helpers.packed_models import Crushed, crush


@pytest.fixture(scope="session")
def crushed(small_moe, tmp_path_factory) -> Crushed:
    """Read only."""
    return crush(small_moe, tmp_path_factory.mktemp("crushed"), small_moe.parent / "demo_text.txt")
