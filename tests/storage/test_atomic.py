"""Files that appear whole or not at all."""

import errno
import os
import shutil
from unittest.mock import Mock

import pytest
import torch

from dynquant.errors import ExportError, WriteError
from dynquant.storage.atomic import check_space, read_tensors, replacing, save_tensors, write_atomically, writing_folder


def test_a_flipped_byte_in_a_file_of_tensors_is_found(tmp_path):
    path = tmp_path / "a.safetensors"
    tensors = {"x": torch.randn(40, 3), "y": torch.tensor(7), "z": torch.ones(0, 4), "half": torch.randn(5).bfloat16()}
    save_tensors(path, tensors, {"kind": "test"})
    header, loaded = read_tensors(path)
    assert header == {"kind": "test"} and all(torch.equal(loaded[name], tensors[name]) for name in tensors)
    content = bytearray(path.read_bytes())
    for position in range(len(content) - sum(tensor.nbytes for tensor in tensors.values()), len(content), 37):
        damaged = content.copy()
        damaged[position] ^= 4
        path.write_bytes(damaged)
        with pytest.raises(ValueError, match="its checksum is another"):
            read_tensors(path)


def test_a_file_is_replaced_whole_and_nothing_else_is_left(tmp_path):
    path = tmp_path / "new" / "plan.json"
    write_atomically(path, "old")
    with replacing(path) as temporary:
        temporary.write_text("new")
        assert path.read_text() == "old" and temporary.parent == path.parent
    assert path.read_text() == "new" and os.listdir(path.parent) == ["plan.json"]


def test_two_writers_have_a_file_each(tmp_path):
    path = tmp_path / "a"
    with replacing(path) as first, replacing(path) as second:
        assert first != second


def test_an_exception_leaves_the_older_file(tmp_path):
    path = tmp_path / "a"
    write_atomically(path, "old")
    with pytest.raises(KeyboardInterrupt), replacing(path) as temporary:
        temporary.write_text("half")
        raise KeyboardInterrupt
    assert path.read_text() == "old" and os.listdir(tmp_path) == ["a"]


def test_what_cannot_be_written_is_refused_with_its_name(tmp_path):
    write_atomically(tmp_path / "file", "")
    with pytest.raises(WriteError, match=r"a\.json could not be written: .*another place"):
        write_atomically(tmp_path / "file" / "a.json", "")


def test_the_space_for_a_folder_is_that_of_the_nearest_one_that_is_there(tmp_path, monkeypatch):
    check_space(tmp_path / "not" / "there", 1)
    with pytest.raises(WriteError, match=r"bytes are still to be written to .*there, but only .* are free"):
        check_space(tmp_path / "not" / "there", 1 << 62)
    denied = Mock(side_effect=PermissionError(errno.EACCES, "Permission denied", str(tmp_path)))
    for place, name in ((type(tmp_path), "is_dir"), (shutil, "disk_usage")):  # behind a closed folder; a lost disk
        with monkeypatch.context() as patch, pytest.raises(ExportError, match=f"denied: {tmp_path}. Choose another pl"):
            patch.setattr(place, name, denied)
            check_space(tmp_path / "a", 1, ExportError)


def test_a_folder_that_another_process_wrote_first_stays(tmp_path, monkeypatch):
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "first").touch()
    monkeypatch.setattr(type(tmp_path), "exists", lambda _: False)  # it came between the question and the move
    with writing_folder(tmp_path / "folder") as partial:
        (partial / "second").touch()
    assert [path.name for path in tmp_path.rglob("*")] == ["folder", "first"]
