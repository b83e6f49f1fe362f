"""Other programs read our GGUF files: blocks bit for bit, headers key by key, likeliest tokens like ours."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch

from tests.readers.gguf_readers import (
    RUNNERS,
    agreement,
    decoded_by_libgguf,
    header_differences,
    our_tops,
    write_models,
)
from tests.readers.programs import Missing

pytestmark = pytest.mark.nightly
KNOWN_TO_MISTRAL = {
    "F32",
    "F16",
    "BF16",
    "Q8_0",
    "Q6_K",
    "Q5_K",
    "Q5_1",
    "Q5_0",
    "Q4_K",
    "Q4_1",
    "Q4_0",
    "Q3_K",
    "Q2_K",
}
ROUNDING = 0.3
"""Nats by which log-probabilities may differ: llama.cpp rounds activations to eight bits."""


@contextmanager
def skipped_if_missing() -> Iterator[None]:
    try:
        yield
    except Missing as missing:
        pytest.skip(str(missing))


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return write_models(tmp_path_factory.mktemp("models"))


@pytest.fixture(scope="module")
def expected(models: dict[str, Path]) -> dict[str, list[torch.Tensor]]:
    return {name: our_tops(file) for name, file in models.items()}


def test_libgguf_decodes_every_type_to_the_same_bits(tmp_path: Path) -> None:
    with skipped_if_missing():
        problems = decoded_by_libgguf(tmp_path)
    assert {name for name, problem in problems.items() if problem is not None} == {"Q2_0"}, problems
    assert "unsupported" in problems["Q2_0"]


def test_headers_are_read_as_gguf_py_reads_them(models: dict[str, Path]) -> None:
    with skipped_if_missing():
        assert not {name: different for name, file in models.items() if (different := header_differences(file))}


@pytest.mark.parametrize("program", RUNNERS)
def test_the_likeliest_tokens_are_ours(
    program: str, models: dict[str, Path], expected: dict[str, list[torch.Tensor]]
) -> None:
    with skipped_if_missing():
        found = {name: agreement(RUNNERS[program], file, expected[name]) for name, file in models.items()}
    refused = models.keys() - KNOWN_TO_MISTRAL if "mistral" in program else set()
    assert {name for name, each in found.items() if each.problem} == refused, found
    for name, each in found.items():
        assert each.problem or (each.behind < ROUNDING and (each.difference or 0) < ROUNDING), (name, each)
