"""Descriptions are kept once, made again where they are damaged, and never in the way of another process."""

import json
import re
from pathlib import Path
from types import SimpleNamespace

import pytest

from dynquant.checkpoints.safetensors_source import SafetensorsSource
from dynquant.errors import CheckpointError
from dynquant.families.converter import description, worker


@pytest.fixture
def runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """A cache of its own, a worker that writes an empty description, and the folders that it was run for."""
    monkeypatch.setenv("DYNQUANT_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(description, "GGUFSource", lambda path: path)
    description._read.cache_clear()
    folders: list[Path] = []

    def write(_: Path, __: Path, ___: object, folder: Path) -> None:
        folders.append(folder)
        (folder / worker.TENSORS).write_text(json.dumps(dict.fromkeys(worker.PARTS)))
        (folder / worker.METADATA).touch()

    monkeypatch.setattr(description, "_run", write)
    return folders


def described(directory: Path) -> None:
    description.describe(directory, SafetensorsSource(directory), directory)


@pytest.mark.parametrize("damage", [b"", b"{}", None])
def test_a_damaged_description_is_made_again(
    damage: bytes | None, runs: list[Path], small_moe: Path, tmp_path: Path
) -> None:
    described(small_moe)
    described(small_moe)
    assert len(runs) == 1
    (folder,) = (tmp_path / "cache" / "converted").iterdir()
    part = folder / worker.TENSORS
    part.unlink() if damage is None else part.write_bytes(damage)
    description._read.cache_clear()
    described(small_moe)
    described(small_moe)
    assert len(runs) == 2 and part.stat().st_size > 2
    assert [path.name for path in folder.parent.iterdir()] == [folder.name]


def test_folders_of_other_processes_stay(tmp_path: Path) -> None:
    for number in range(description._KEPT + 3):
        (tmp_path / str(number)).mkdir()
    (tmp_path / ".other.partial").mkdir()
    description._forget_old(tmp_path / "absent")
    description._forget_old(tmp_path)
    assert (tmp_path / ".other.partial").is_dir()
    assert len(list(tmp_path.iterdir())) == description._KEPT + 1


def test_every_small_file_and_library_counts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    keys = [description._key(tmp_path, tmp_path, [])]
    for name in ("tokenizer.tiktoken", "vocab.bpe"):
        (tmp_path / name).write_text("a")
        keys.append(description._key(tmp_path, tmp_path, []))
    monkeypatch.setattr(description, "version", lambda _: "0.0.1")
    keys.append(description._key(tmp_path, tmp_path, []))
    assert len(set(keys)) == len(keys)
    (tmp_path / "model.safetensors").write_text("weights are known by their stamps")
    assert description._key(tmp_path, tmp_path, []) == keys[-1]


def test_a_worker_that_was_killed_names_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    killed = SimpleNamespace(returncode=-9, stderr="")
    monkeypatch.setattr(description, "run_module", lambda *_, **__: killed)
    with pytest.raises(CheckpointError, match="memory"):
        description._run(tmp_path, tmp_path, {}, tmp_path)


@pytest.mark.parametrize(
    ("kind", "config", "said"),
    [
        ("failed", {"num_experts": 16}, "do not agree: `num_experts` is 16 and the tensors have 2."),
        ("failed", {"hidden_size": 32, "num_hidden_layers": 1}, "`hidden_size` is 32 and the tensors have 64"),
        ("failed", {"num_experts": 2, "vocab_size": 90}, "refuses"),
        ("unknown", {"model_type": "olmoe"}, 'has no `architectures`, .* Set it to \\["OlmoeForCausalLM"\\]'),
    ],
)
def test_a_refusal_names_what_is_wrong_in_config_json(kind: str, config: dict, said: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"architectures": ["A"] * (kind == "failed")} | config))
    shapes = {"model.embed_tokens.weight": (96, 64), "model.layers.0.mlp.experts.1.up_proj.weight": (8, 64)}
    shapes |= {"model.layers.0.mlp.experts.0.up_proj.weight": (8, 64)}
    refusal = str(description._refused(tmp_path, tmp_path, shapes, kind, "AssertionError: "))
    assert re.search(said, refusal) and "--base-gguf" not in refusal
