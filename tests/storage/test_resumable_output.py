"""Exports that are killed, interrupted, or meet a full disk: what they leave, and that they go on to the same bytes."""

import errno
import io
import multiprocessing
import os
import random
import shutil
from collections import namedtuple
from pathlib import Path

import pytest
import torch

from dynquant.encoding.parts import PartLimits
from dynquant.errors import EncodeError, ExportError
from dynquant.storage import resumable_output as artifacts
from dynquant.storage.work_files import remove_work
from tests.helpers.exports import export_gguf
from tests.helpers.tiny_gguf import GGML, WatchedEncoder, left_in, pause, tiny_model, tiny_plan


@pytest.mark.parametrize(
    "split_max_bytes", [None, pytest.param(60_000, marks=pytest.mark.nightly)], ids=["single", "split"]
)
def test_kills_at_random_moments_leave_a_file_with_the_same_bytes(tmp_path, split_max_bytes):
    torch.set_num_threads(1)
    model = tiny_model()
    plan = tiny_plan(model)
    options = {"threads": 1, "split_max_bytes": split_max_bytes}
    expected = export_gguf(model, plan, None, tmp_path / "straight" / "a.gguf", encoder=GGML, **options)
    context, dice, kills = multiprocessing.get_context("fork"), random.Random(1), 0
    output = tmp_path / "killed" / "a.gguf"
    wanted = {path.name: path.read_bytes() for path in expected}
    child = None
    while child is None or child.exitcode != 0:
        child = context.Process(
            target=export_gguf, args=(model, plan, None, output), kwargs={"encoder": WatchedEncoder(pause), **options}
        )
        child.start()
        # Pauses grow, so that a busy machine ends this loop too.
        child.join(dice.uniform(0.01, 0.1) * (1 + kills / 4))
        if child.exitcode is None:
            child.kill()
            child.join()
            kills += 1
        else:
            assert child.exitcode == 0, "the export failed on its own"
        for path in output.parent.glob("*.gguf"):
            assert path.read_bytes() == wanted[path.name], "a final name must only ever hold a complete file"
    assert kills >= 2
    remove_work(output)  # as every export does at its end: a kill may have cut off the journal while it was written
    assert {path.name: path.read_bytes() for path in output.parent.iterdir()} == wanted


def interrupt_after(monkeypatch, count: int) -> None:
    """Stop like a kill, right before the journal line of region number `count`."""
    record = artifacts.Journal.add
    calls = iter(range(10**6))

    def stop(self, line):
        if next(calls) == count:
            raise KeyboardInterrupt
        record(self, line)

    monkeypatch.setattr(artifacts.Journal, "add", stop)


def interrupted(monkeypatch, tmp_path, count=10):
    model = tiny_model()
    plan = tiny_plan(model)
    with monkeypatch.context() as patch:
        interrupt_after(patch, count)
        with pytest.raises(KeyboardInterrupt):
            export_gguf(model, plan, None, tmp_path / "a.gguf", encoder=GGML)
    assert left_in(tmp_path) == ["a.gguf.journal", "a.gguf.partial"]
    return model, plan


def test_a_resumed_export_encodes_only_what_is_missing_or_damaged(monkeypatch, tmp_path):
    model, plan = interrupted(monkeypatch, tmp_path)
    first = plan.entries[0]
    partial = tmp_path / "a.gguf.partial"
    with partial.open("r+b") as file:
        file.seek(partial.stat().st_size - sum(-(-entry.bytes // 32) * 32 for entry in plan.entries) + 5)
        file.write(b"damage")
    encoded = []
    recorder = WatchedEncoder(lambda name, _: encoded.append(name))
    with (tmp_path / "a.gguf.journal").open("ab") as journal:
        journal.write(b'{"file": 0, "offset": 1%020d, "num_bytes": 1%020d, "sha256": ""}\n' % (0, 0))
        journal.write(b'{"region": "blk.7.ffn_up_e')
    (path,) = export_gguf(model, plan, None, tmp_path / "a.gguf", encoder=recorder)
    assert first.name in encoded and len(encoded) == len(plan.entries) - 8
    (straight,) = export_gguf(model, plan, None, tmp_path / "b.gguf", encoder=GGML)
    assert path.read_bytes() == straight.read_bytes()


def test_a_kill_between_two_renames_is_finished_by_the_next_run(monkeypatch, tmp_path):
    model = tiny_model()
    plan = tiny_plan(model)
    expected = export_gguf(model, plan, None, tmp_path / "b.gguf", encoder=GGML, split_max_bytes=60_000)
    move, moved = os.replace, []

    def move_once(source, target):
        if Path(source).name == f"{Path(target).name}.partial":
            if moved:
                raise KeyboardInterrupt
            moved.append(target)
        move(source, target)

    with monkeypatch.context() as patch:
        patch.setattr(artifacts.os, "replace", move_once)
        with pytest.raises(KeyboardInterrupt):
            export_gguf(model, plan, None, tmp_path / "a.gguf", encoder=GGML, split_max_bytes=60_000)
    assert len(moved) == 1

    unused = WatchedEncoder(None)  # everything was already encoded
    paths = export_gguf(model, plan, None, tmp_path / "a.gguf", encoder=unused, split_max_bytes=60_000)
    assert [path.read_bytes() for path in paths] == [path.read_bytes() for path in expected]
    assert left_in(tmp_path) == sorted(path.name for path in (*paths, *expected))


def test_an_interrupted_export_of_another_plan_is_refused_and_kept(monkeypatch, tmp_path):
    model, _ = interrupted(monkeypatch, tmp_path)
    before = (tmp_path / "a.gguf.partial").read_bytes()
    other = tiny_plan(model, "Q5_K")
    with pytest.raises(ExportError, match="another plan"):
        export_gguf(model, other, None, tmp_path / "a.gguf", encoder=GGML)
    assert (tmp_path / "a.gguf.partial").read_bytes() == before
    (path,) = export_gguf(model, other, None, tmp_path / "a.gguf", encoder=GGML, resume=False)
    assert left_in(tmp_path) == ["a.gguf"] and path.stat().st_size == other.predicted_bytes


def test_an_older_output_stays_until_the_new_one_is_complete(monkeypatch, tmp_path):
    model = tiny_model()
    output = tmp_path / "a.gguf"
    output.write_bytes(b"older")
    with monkeypatch.context() as patch:
        interrupt_after(patch, 5)
        with pytest.raises(KeyboardInterrupt):
            export_gguf(model, tiny_plan(model), None, output, encoder=GGML)
    assert output.read_bytes() == b"older"
    export_gguf(model, tiny_plan(model), None, output, encoder=GGML)
    assert output.read_bytes()[:4] == b"GGUF" and left_in(tmp_path) == ["a.gguf"]


def test_a_disk_that_fills_up_keeps_what_is_done_and_says_how_to_go_on(monkeypatch, tmp_path):
    model = tiny_model()
    plan = tiny_plan(model)
    write, calls = artifacts.write_all, iter(range(10**6))

    def fill_up(file, data):
        is_journal = str(file.name).endswith(".journal")
        if not is_journal and next(calls) == 9:
            write(file, data[: len(data) // 2])
            raise OSError(errno.ENOSPC, "No space left on device")
        write(file, data)

    with monkeypatch.context() as patch:
        patch.setattr(artifacts, "write_all", fill_up)
        with pytest.raises(ExportError, match=r"full: `blk\.3\..*9 of 26 parts are kept.*same command") as refusal:
            export_gguf(model, plan, None, tmp_path / "a.gguf", encoder=GGML)
    assert "a.gguf.partial" in str(refusal.value)
    (path,) = export_gguf(model, plan, None, tmp_path / "a.gguf", encoder=GGML)
    (straight,) = export_gguf(model, plan, None, tmp_path / "b.gguf", encoder=GGML)
    assert path.read_bytes() == straight.read_bytes()


@pytest.mark.parametrize("seed", range(4))
def test_a_disk_full_at_any_byte_is_gone_on_from(monkeypatch, tmp_path, seed):
    """Room for a random number of bytes, in tensors or in the journal; then again, until the export fits."""
    model, dice = tiny_model(), random.Random(seed)
    plan, room, full_for = tiny_plan(model), 0, ""
    os_open = open

    class SmallDisk(io.FileIO):
        def write(self, data):
            nonlocal room
            if not str(self.name).endswith(full_for):
                return super().write(data)
            if not room:
                raise OSError(errno.ENOSPC, "No space left on device")
            count = super().write(memoryview(data)[: min(room, len(data))])
            room -= count
            return count

    def open_small(path, mode="r", **options):
        if "b" in mode and ("w" in mode or "+" in mode or "a" in mode):
            file = SmallDisk(path, mode.replace("b", ""))
            return file if options.get("buffering") == 0 else io.BufferedWriter(file)
        return os_open(path, mode, **options)

    monkeypatch.setattr(artifacts, "open", open_small, raising=False)
    monkeypatch.setattr(Path, "open", open_small)
    fills, options = 0, {"encoder": GGML, "limits": PartLimits(20 * 256 * 12)}
    while True:
        full_for = dice.choice(["", ".journal"])
        room = dice.randrange(2000 if full_for else plan.predicted_bytes // 2)
        try:
            (path,) = export_gguf(model, plan, None, tmp_path / "a.gguf", **options)
            break
        except ExportError as refusal:
            assert "is full" in str(refusal) and left_in(tmp_path) == ["a.gguf.journal", "a.gguf.partial"]
            fills += 1
    assert fills >= 2
    monkeypatch.undo()
    (straight,) = export_gguf(model, plan, None, tmp_path / "b.gguf", encoder=GGML)
    assert path.read_bytes() == straight.read_bytes()


def test_a_resumed_export_may_have_other_parts(monkeypatch, tmp_path):
    model = tiny_model()
    plan, parts = tiny_plan(model), PartLimits(20 * 256 * 12)
    encoded = []
    recorder = WatchedEncoder(lambda name, weights: encoded.append((name, len(weights))))
    with monkeypatch.context() as patch:
        interrupt_after(patch, 12)
        with pytest.raises(KeyboardInterrupt):
            export_gguf(model, plan, None, tmp_path / "a.gguf", encoder=recorder, limits=parts, threads=1)
    assert {name: [n for other, n in encoded if other == name] for name, _ in encoded}["blk.0.ffn_up_exps.weight"] == [
        1, 1, 1,
    ]  # fmt: skip
    done, encoded[:] = {name for name, _ in encoded[:-1]}, []
    (path,) = export_gguf(model, plan, None, tmp_path / "a.gguf", encoder=recorder, threads=1)
    begun = encoded[0][0]
    assert {name for name, _ in encoded}.isdisjoint(done - {begun}) and (begun, 3) in encoded[:1]
    (straight,) = export_gguf(model, plan, None, tmp_path / "b.gguf", encoder=GGML)
    assert path.read_bytes() == straight.read_bytes()


def test_space_that_the_partial_file_has_already_is_not_asked_for_again(monkeypatch, tmp_path):
    model, plan = interrupted(monkeypatch, tmp_path, count=25)
    allocated = 512 * (tmp_path / "a.gguf.partial").stat().st_blocks
    usage = namedtuple("usage", "total used free")
    free = max(0, plan.predicted_bytes - allocated)
    assert free < plan.predicted_bytes // 4
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(10**9, 10**9 - free, free))
    (path,) = export_gguf(model, plan, None, tmp_path / "a.gguf", encoder=GGML)
    assert path.stat().st_size == plan.predicted_bytes


def test_too_little_space_is_refused_before_anything_is_written(monkeypatch, tmp_path):
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(10**6, 10**6 - 9, 9))
    with pytest.raises(ExportError, match="only 9 are free"):
        export_gguf(tiny_model(), tiny_plan(tiny_model()), None, tmp_path / "a.gguf", encoder=GGML)
    assert left_in(tmp_path) == []


def test_nan_weights_are_refused_and_nothing_is_left(tmp_path):
    name = "blk.5.ffn_up_exps.weight"
    broken = torch.randn(3, 16, 256)
    broken[2, 3, 4] = float("nan")
    model = tiny_model(**{name: broken})
    with pytest.raises(EncodeError, match=name):
        export_gguf(model, tiny_plan(model), None, tmp_path / "a.gguf", encoder=GGML)
    assert left_in(tmp_path) == []
