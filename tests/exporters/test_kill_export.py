"""The command line under SIGKILL, and the memory of an export, each in processes of their own."""

import re
import subprocess
import sys

import pytest

from tests.conftest import REPOSITORY
from tests.examples.kill_export import run


@pytest.mark.nightly
@pytest.mark.parametrize("format", ["gguf", "safetensors"])
def test_killed_exports_end_with_the_bytes_of_an_undisturbed_one(small_moe, tmp_path, format):
    arguments = [str(small_moe), "--preset", "uniform-q8_0", "--encoder", "ggml", "--tune", "0", "-f", format]
    counts = run([*arguments, "--max-memory", "1.001GiB"], tmp_path, kills=2, seed=2, each_ends=True)
    assert counts["kills"] == 2 and counts["kills with parts kept"] >= 1 and counts["finished"] >= 2


@pytest.mark.nightly
def test_an_export_takes_the_memory_of_a_part_and_not_of_a_stack():
    command = [sys.executable, REPOSITORY / "tests/examples/export_memory.py", "--part-memory", "64MiB"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    more = int(re.search(r"(\d+) MiB more", done.stdout)[1])
    assert more < 128, "the stack is 1 GiB as float32, and 272 MiB packed"
