"""One writer an output: across processes, also when one of them was killed."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from dynquant.errors import WriteError
from dynquant.storage import lock
from dynquant.storage.journal import Journal
from dynquant.storage.lock import locked
from dynquant.storage.resumable_output import Region, ResumableOutput

HOLD = "import sys, time; from pathlib import Path; from dynquant.storage.lock import locked\n" \
    "with locked(Path(sys.argv[1])): print('held', flush=True); time.sleep(60)"  # fmt: skip


@pytest.fixture
def holder():
    """Starts processes that hold the lock of a path; they are killed in the end."""
    processes = []

    def hold(path):
        process = subprocess.Popen([sys.executable, "-c", HOLD, str(path)], stdout=subprocess.PIPE, text=True)
        processes.append(process)
        assert process.stdout.readline() == "held\n"
        return process

    yield hold
    for process in processes:
        process.kill()
        process.wait()
        process.stdout.close()


def test_a_second_process_is_told_of_the_first_until_it_is_dead(tmp_path, holder):
    output = tmp_path / "model.gguf"
    process = holder(output)
    with pytest.raises(WriteError, match=rf"model.gguf is being written by process {process.pid} on .* started at 20"):
        locked(output).__enter__()
    with locked(tmp_path / "other.gguf"):
        pass
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    assert (tmp_path / ".model.gguf.lock").exists(), "a kill leaves the file"
    with locked(output):
        assert str(os.getpid()) in (tmp_path / ".model.gguf.lock").read_text()
    assert list(tmp_path.iterdir()) == []


def test_a_stopped_process_still_holds_its_lock(tmp_path, holder):
    process = holder(tmp_path / "a")
    os.kill(process.pid, signal.SIGSTOP)
    with pytest.raises(WriteError, match=str(process.pid)):
        locked(tmp_path / "a").__enter__()


def test_names_of_one_place_are_one_output(tmp_path, holder):
    (tmp_path / "plan").mkdir()
    (tmp_path / "link").symlink_to("plan")
    process = holder(tmp_path / "plan")
    for name in ("link", "link/", "plan/.", "../" + tmp_path.name + "/plan"):
        with pytest.raises(WriteError, match=str(process.pid)):
            locked(tmp_path / name).__enter__()
    process = holder(tmp_path / "plan" / "model.gguf")
    with pytest.raises(WriteError, match=str(process.pid)):
        locked(tmp_path / "link" / "model.gguf").__enter__()


def test_a_process_may_lock_its_output_within_and_leaves_no_folder_that_it_did_not_fill(tmp_path):
    output = tmp_path / "new" / "folder" / "out"
    with locked(output):
        with locked(output):
            pass
        assert (output.parent / ".out.lock").is_file()
    assert list(tmp_path.iterdir()) == []


def test_a_lock_that_another_process_has_made_anew_stays(tmp_path, holder):
    with locked(tmp_path / "out"):
        (tmp_path / ".out.lock").unlink()  # as people do with files that they do not know
        process = holder(tmp_path / "out")
    assert f"process {process.pid} " in (tmp_path / ".out.lock").read_text()
    with pytest.raises(WriteError, match=str(process.pid)):
        locked(tmp_path / "out").__enter__()


def test_a_root_is_locked_within(tmp_path):
    file, descriptor = lock._acquired(Path("/") if os.access("/", os.W_OK) else tmp_path)
    os.close(descriptor)
    file.unlink()
    assert file.name.endswith(".lock")


def test_a_file_of_something_else_is_no_lock(tmp_path):
    file = tmp_path / ".out.lock"
    file.write_text("processes of which I keep a list")
    with pytest.raises(WriteError, match=r"\.out\.lock is in the way"):
        locked(tmp_path / "out").__enter__()
    assert file.read_text() == "processes of which I keep a list"
    file.write_bytes(b"")
    with locked(tmp_path / "out"):
        pass
    assert not file.exists()


def test_places_that_cannot_be_written_to_are_refused_with_the_reason(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(WriteError, match=r"cannot be written: .*file is no directory"):
        locked(tmp_path / "file" / "out").__enter__()
    with pytest.raises(WriteError, match="File name too long"):
        locked(tmp_path / "new" / ("x" * 300)).__enter__()
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


@pytest.mark.parametrize("link", ["symlink_to", "hardlink_to"])
def test_a_link_at_the_name_of_a_partial_file_is_not_written_through(tmp_path, link):
    precious, output = tmp_path / "precious", tmp_path / "out.bin"
    precious.write_bytes(b"keep")
    getattr(tmp_path / "out.bin.partial", link)(precious)
    with pytest.raises(WriteError, match="is in the way"):
        ResumableOutput({output: 4}, {"all": Region(0, 0, 4)}, {})
    with Journal(tmp_path / "out.bin.journal") as journal:
        journal.start({}, ())  # whoever put the link there, an export was interrupted
    with ResumableOutput({output: 4}, {"all": Region(0, 0, 4)}, {}) as target:
        target.write("all", b"data")
        target.commit()
    assert precious.read_bytes() == b"keep" and output.read_bytes() == b"data" and not output.is_symlink()


def test_an_output_that_another_process_fills_is_left_alone(tmp_path, holder):
    process = holder(tmp_path / "out.bin")
    for resume in (True, False):
        with pytest.raises(WriteError, match=str(process.pid)):
            ResumableOutput({tmp_path / "out.bin": 4}, {"all": Region(0, 0, 4)}, {}, resume=resume)
