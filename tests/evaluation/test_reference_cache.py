"""Entries of the reference cache: they come back unchanged, damage is named, and names depend on all that matters."""

import os
from pathlib import Path

import pytest
import torch

from dynquant.errors import EvaluationError, WriteError
from dynquant.evaluation import reference_cache
from dynquant.evaluation.distributions import Distributions


def test_entries_come_back_unchanged_and_damage_is_named(tmp_path: Path) -> None:
    stored = Distributions.of(torch.randn(5, 300)).tensors()
    assert reference_cache.load_cached(tmp_path / "cache", "k") is None
    reference_cache.save_cached(tmp_path / "cache", "k", stored)
    loaded = reference_cache.load_cached(tmp_path / "cache", "k")
    assert loaded.keys() == stored.keys()
    for name, tensor in stored.items():
        assert torch.equal(loaded[name], tensor)
    [file] = (tmp_path / "cache").iterdir()
    os.truncate(file, 100)
    with pytest.raises(EvaluationError, match="damaged"):
        reference_cache.load_cached(tmp_path / "cache", "k")


def test_one_process_makes_an_entry_and_others_read_it(tmp_path: Path) -> None:
    fcntl = pytest.importorskip("fcntl", reason="the test takes a lock as POSIX systems do")
    with (tmp_path / ".reference-k.safetensors.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with pytest.raises(WriteError, match="is being written by"):
            reference_cache.cached(tmp_path, "k", lambda: {"a": torch.ones(3)})
    made = reference_cache.cached(tmp_path, "k", lambda: {"a": torch.ones(3)})
    read = reference_cache.cached(tmp_path, "k", lambda: pytest.fail("it was made again"))
    assert torch.equal(made["a"], read["a"])
    assert [file.name for file in tmp_path.iterdir()] == ["reference-k.safetensors"]


def test_all_parts_of_a_split_file_are_the_model_whatever_its_name(tmp_path: Path) -> None:
    for name in ("[x]*", "x"):
        parts = [tmp_path / f"{name}-0000{number}-of-00002.gguf" for number in (1, 2)]
        for part in parts:
            part.touch()
        assert reference_cache.model_files(parts[0]) == parts


def test_an_unwritable_cache_is_refused_with_its_reason(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(WriteError, match="could not be written"):
        reference_cache.save_cached(tmp_path / "file", "k", {"a": torch.zeros(3)})


def test_key_depends_on_model_tokens_and_options(tmp_path: Path) -> None:
    model = tmp_path / "m-00001-of-00002.gguf"
    second = tmp_path / "m-00002-of-00002.gguf"
    model.write_bytes(b"a" * 10)
    second.write_bytes(b"b" * 10)
    keys = [
        reference_cache.cache_key(model, [1, 2], window=512),
        reference_cache.cache_key(model, [1, 3], window=512),
        reference_cache.cache_key(model, [1, 2], window=256),
    ]
    second.write_bytes(b"c" * 10)
    keys.append(reference_cache.cache_key(model, [1, 2], window=512))
    assert len(set(keys)) == 4
    assert reference_cache.cache_key(model, [1, 2], window=512) == keys[-1]
