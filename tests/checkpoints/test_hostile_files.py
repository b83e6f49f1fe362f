"""Damaged files of every kind that is read: no crash but a refusal, no hang, no memory beyond a small file's needs."""

import random

import pytest

from tests.helpers.hostile_files import Target, damage, make_targets, read_damaged
from tests.helpers.limits import at_most
from tests.helpers.representatives import represented_by

CASES = {
    "gguf": 1000, "imatrix": 500, "safetensors": 1000, "index": 400, "config": 60, "stats": 500, "moments": 500,
    "plan": 700, "errors": 500,
}  # fmt: skip
SECONDS, MEMORY = 3, 256 << 20


@pytest.fixture(scope="module")
def targets(tmp_path_factory, small_moe) -> dict[str, Target]:
    return make_targets(tmp_path_factory.mktemp("hostile"), small_moe)


@pytest.mark.parametrize("kind", represented_by(("gguf",), CASES))
def test_damaged_files_are_read_or_refused(targets, kind):
    target = targets[kind]
    whole = target.file.read_bytes()
    assert read_damaged(target, whole) is None
    refused = 0
    for seed in range(CASES[kind]):
        content = damage(whole, random.Random(f"{kind} {seed}"), target.header_bytes)
        try:
            with at_most(SECONDS, MEMORY):
                refused += read_damaged(target, content) is not None
        except BaseException as error:
            pytest.fail(f"case {seed} of {kind}: {type(error).__name__}: {error}")
        finally:
            target.file.write_bytes(whole)
    assert refused > CASES[kind] / 4, "the damage is too mild to test anything"
