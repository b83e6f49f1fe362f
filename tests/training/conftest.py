"""The model that the training tests share."""

import pytest

from tests.helpers.made_once import made_once
from tests.helpers.packed_models import Crushed, crush


@pytest.fixture(scope="session")
def crushed(small_moe, tiny_text, tmp_path_factory) -> Crushed:
    """Read only."""
    original, text = tiny_text("deepseek-v3"), small_moe.parent / "demo_text.txt"
    folder = made_once(tmp_path_factory, "crushed", lambda folder: crush(original, folder, text))
    return Crushed(original, folder / "packed", folder / "text.jsonl", folder / "held-out.txt")
