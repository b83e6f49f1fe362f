"""The command line under SIGKILL, and the memory of an export, each in processes of their own."""

import contextlib
import re
import subprocess
import sys

import pytest

from dynquant.exporters import stage
from dynquant.exporters.options import ExportOptions
from dynquant.exporters.tuning import export as tuned_export
from dynquant.storage.resumable_output import ResumableOutput
from tests.conftest import REPOSITORY
from tests.examples.kill_export import run


@pytest.mark.nightly
@pytest.mark.parametrize("format", ["gguf", "safetensors"])
def test_killed_exports_end_with_the_bytes_of_an_undisturbed_one(small_moe, tmp_path, format):
    arguments = [str(small_moe), "--preset", "uniform-q8_0", "--encoder", "ggml", "--tune", "0", "-f", format]
    counts = run([*arguments, "--max-memory", "1.001GiB"], tmp_path, kills=2, seed=2, each_ends=True)
    assert counts["kills"] == 2 and counts["kills with parts kept"] >= 1 and counts["finished"] >= 2


@pytest.mark.nightly
def test_an_export_with_other_settings_leaves_no_work_of_an_interrupted_one(
    small_moe, calibrated_16m, tmp_path, monkeypatch
):
    def interrupt(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    def left(**others: object) -> set[str]:
        options = {"model": str(small_moe), "output": tmp_path / "m.gguf", "preset": "uniform-q8_0", "tune": 0}
        with contextlib.suppress(KeyboardInterrupt):
            stage.export(ExportOptions(**options | others))
        return {path.name for path in tmp_path.iterdir()}

    tuned = {"stats": calibrated_16m / "stats.safetensors", "tune": 512}
    with monkeypatch.context() as patch:
        patch.setattr(tuned_export, "tune_file", interrupt)
        (untuned,) = left(**tuned)
        assert untuned.startswith(".m.gguf.untuned-") and untuned.endswith(".gguf")
        patch.setattr(ResumableOutput, "commit", interrupt)
        assert left() == {untuned, "m.gguf.journal", "m.gguf.partial"}
        split = left(split_max_size="9MB")
        assert len(split) > 5
    assert left(encoder="ggml", resume=False) == {"m.gguf"}
    with monkeypatch.context() as patch:
        patch.setattr(ResumableOutput, "commit", interrupt)
        assert left(split_max_size="9MB") == {"m.gguf"} | {name for name in split if "-of-" in name}
        left(output=tmp_path / "m", format="compressed-tensors", preset="uniform-w8a16", **tuned)
        left(output=tmp_path / "m", format="compressed-tensors", preset="uniform-w8a16", **tuned | {"tune": 0})
        left(output=tmp_path / "m", format="safetensors", split_max_size="4MB")
    assert (names := left()) > {".m.partial", "m", "m.gguf"} and any(".m.untuned-" in name for name in names)
    assert left(output=tmp_path / "m", format="safetensors", resume=False) == {"m.gguf", "m"}
    assert not [path.name for path in (tmp_path / "m").iterdir() if "partial" in path.name or "journal" in path.name]


@pytest.mark.nightly
def test_an_export_takes_the_memory_of_a_part_and_not_of_a_stack():
    command = [sys.executable, REPOSITORY / "tests/examples/export_memory.py", "--part-memory", "64MiB"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    more = int(re.search(r"(\d+) MiB more", done.stdout)[1])
    assert more < 128, "the stack is 1 GiB as float32, and 272 MiB packed"
