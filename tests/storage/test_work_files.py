"""Work files of an output: those of interrupted runs go when it is finished, and nobody else's."""

import json

import pytest

from dynquant.errors import WriteError
from dynquant.storage.atomic import save_tensors
from dynquant.storage.journal import Journal
from dynquant.storage.resumable_output import Region, ResumableOutput
from dynquant.storage.work_files import check_folder, check_work, remove_folder, remove_work, work_path
from tests.storage.test_lock import holder  # noqa: F401

HEX, DIGEST = "0123abcd", "0123456789ab"
OURS = (
    f".m[1].gguf.untuned-{DIGEST}.gguf",
    f".m[1].gguf.untuned-{DIGEST}.gguf.partial",
    f".m[1].gguf.untuned-{DIGEST}-00001-of-00002.gguf.journal",
    f".m[1].gguf.tuned-{DIGEST}.gguf",
    f".m[1].gguf.tuned-{DIGEST}.gguf.outcome",
    f".m[1].gguf.asymmetric-{DIGEST}/states/1",
    ".m[1].gguf.written.safetensors",
    f"..m[1].gguf.written.safetensors.{HEX}.partial",
    f"..m[1].gguf.untuned-{DIGEST}.gguf.lock",
    ".m[1].gguf.partial/config.json.journal",
    f".m[1].gguf.{HEX}.partial",
    f".m[1].gguf.journal.{HEX}.partial",
    f".m[1]-00002-of-00003.gguf.{HEX}.partial",
    f".m[1]-00001-of-00003.gguf.journal.{HEX}.partial",
    ".m[1]-00001-of-00003.gguf.lock",
    "m[1].gguf.journal",
    "m[1].gguf.partial",
    "m[1].gguf.errors.journal",
    "mmproj-m[1].gguf.journal",
    "mmproj-m[1].gguf.partial",
    "m[1]-00001-of-00003.gguf.journal",
    "m[1]-00001-of-00003.gguf.partial",
    "m[1]-00003-of-00003.gguf.partial",
)
OTHERS = (
    "m[1].gguf",
    "m[1]-00001-of-00003.gguf",
    "m[1]-00001-of-00004.gguf.partial",  # without a journal it may be anybody's
    f".m[1].gguf.untuned-{DIGEST}.gguf.bak",
    ".m[1].gguf.untuned-mine.gguf",
    f".m[1].untuned-{DIGEST}.gguf",
    f".m[1]x.gguf.untuned-{DIGEST}.gguf",
    f".m1.gguf.untuned-{DIGEST}.gguf",
    f".m[1].gguf.untuned-{DIGEST}.gguf.untuned-{DIGEST}.gguf.lock",
    "n.gguf.journal",
    "n.gguf.partial",
    ".n.gguf.written.safetensors",
    "m[1].gguf.x.journal",
    "m[1].Modelfile",
)


@pytest.fixture
def output(tmp_path):
    for name in (*OURS, *OTHERS):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("" if name.endswith(".lock") else json.dumps({"identity": {}}) + "\n")
    save_tensors(tmp_path / ".m[1].gguf.written.safetensors", {}, {})
    return tmp_path / "m[1].gguf"


def left_of(folder):
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}


def test_work_of_this_output_goes_and_all_else_stays(output, tmp_path):
    remove_work(output)
    assert left_of(tmp_path) == {*OTHERS}


def test_a_partial_file_without_a_journal_of_ours_stays(output, tmp_path):
    (tmp_path / "m[1].gguf.journal").write_text("a diary")
    remove_work(output)
    assert left_of(tmp_path) == {*OTHERS, "m[1].gguf.journal", "m[1].gguf.partial"}


def test_an_output_without_ending_leaves_those_of_the_file_alone(output, tmp_path):
    remove_work(output.with_suffix(""))
    assert left_of(tmp_path) == {*OURS, *OTHERS} - {f".m[1].untuned-{DIGEST}.gguf"}


def test_nothing_of_a_running_process_goes(output, tmp_path, holder):  # noqa: F811
    holder(output)
    remove_work(output)
    assert left_of(tmp_path) == {*OURS, *OTHERS, ".m[1].gguf.lock"}


def test_a_kill_leaves_no_part_of_a_folder_under_the_name_of_a_whole_one(tmp_path, monkeypatch):
    def removes_one_file(folder, **_: object) -> None:
        next(folder.iterdir()).unlink()
        raise KeyboardInterrupt

    folder = work_path(tmp_path / "m", f"untuned-{DIGEST}")
    folder.mkdir()
    for name in ("config.json", "model.safetensors"):
        (folder / name).write_text("whole")
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr("shutil.rmtree", removes_one_file)
        remove_work(tmp_path / "m")
    (left,) = left_of(tmp_path)
    assert not folder.exists() and left.startswith(".m.")
    remove_work(tmp_path / "m")
    assert not any(tmp_path.iterdir())


def test_a_link_goes_and_not_what_it_leads_to(tmp_path):
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "weights").write_text("weights")
    path = work_path(tmp_path / "out", "partial")
    path.symlink_to(tmp_path / "model")
    remove_work(tmp_path / "out")
    assert left_of(tmp_path) == {"model/weights"} and not path.is_symlink()


FOREIGN = (
    "m.gguf.journal", "m.gguf.partial", ".m.gguf.written.safetensors", ".m.gguf.partial/notes",
    ".m.gguf.streaming/notes", ".m.gguf.streaming/progress.jsonl", "m.gguf.errors.journal", "mmproj-m.gguf.journal",
    "..m.gguf.partial.lock",
)  # fmt: skip


def test_what_only_has_the_name_of_a_work_file_stays(tmp_path):
    for name in FOREIGN:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("mine")
    remove_work(tmp_path / "m.gguf")
    assert left_of(tmp_path) == {*FOREIGN}


@pytest.mark.parametrize("name", FOREIGN[:3])
def test_it_is_refused_before_any_work_and_by_what_would_replace_it(name, tmp_path):
    output, path = tmp_path / "m.gguf", tmp_path / name
    path.write_text("mine")
    with pytest.raises(WriteError, match=rf"{name} is in the way"):
        check_work(output)
    for resume in (True, False) if name in FOREIGN[:2] else ():
        with pytest.raises(WriteError, match=rf"{name} is in the way"):
            ResumableOutput({output: 4}, {"all": Region(0, 0, 4)}, {}, resume=resume)
    assert path.read_text() == "mine" and left_of(tmp_path) == {name}
    path.write_bytes(b"")
    check_work(output)
    with ResumableOutput({output: 4}, {"all": Region(0, 0, 4)}, {}) as target:
        check_work(output)
        target.write("all", b"data")
        target.commit()
    assert left_of(tmp_path) - {FOREIGN[2]} == {"m.gguf"}


def test_a_part_of_a_split_is_refused_as_well(tmp_path):
    files = {tmp_path / f"m-0000{number}-of-00002.gguf": 4 for number in (1, 2)}
    (tmp_path / "m-00002-of-00002.gguf.partial").write_text("mine")
    with pytest.raises(WriteError, match=r"m-00002-of-00002\.gguf\.partial is in the way"):
        ResumableOutput(files, {"all": Region(0, 0, 4)}, {})
    assert left_of(tmp_path) == {"m-00002-of-00002.gguf.partial"}


def test_a_kill_before_the_partial_file_is_there_leaves_what_the_next_run_goes_on_from(tmp_path, monkeypatch):
    def kill(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("dynquant.storage.resumable_output.open", kill, raising=False)
        with pytest.raises(KeyboardInterrupt):
            ResumableOutput({tmp_path / "m": 4}, {"all": Region(0, 0, 4)}, {})
    assert left_of(tmp_path) == {"m.journal"}
    with ResumableOutput({tmp_path / "m": 4}, {"all": Region(0, 0, 4)}, {}) as target:
        target.write("all", b"data")
        target.commit()
    assert left_of(tmp_path) == {"m"}


def test_a_folder_of_work_is_ours_by_its_journal_to_the_last(tmp_path, monkeypatch):
    folder = tmp_path / ".m.training"
    check_folder(folder)
    (folder / "sub").mkdir(parents=True)
    with pytest.raises(WriteError, match=r"\.m\.training is in the way"):
        check_folder(folder)
    (folder / "sub").rmdir()
    (folder / f".run.json.{HEX}.partial").touch()  # a kill while the journal was written
    check_folder(folder)
    with Journal(folder / "run.json") as journal:
        journal.start({}, ())
    (folder / "checkpoint").write_text("weights")
    with monkeypatch.context() as patch:
        patch.setattr("shutil.rmtree", lambda *_, **__: None)  # a kill before the folder itself goes
        remove_folder(folder)
    assert left_of(tmp_path) == {".m.training/run.json"}
    check_folder(folder)
    remove_folder(folder)
    assert not folder.exists()
    folder.write_text("mine")
    with pytest.raises(WriteError, match=r"\.m\.training is in the way"):
        check_folder(folder)


def test_a_finished_checkpoint_that_a_kill_kept_from_its_name_is_ours_by_its_card(tmp_path):
    folder = tmp_path / ".out.partial"
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    card = folder / "README.md"
    card.write_text("---\nlibrary_name: transformers\ntags: [gguf, other]\n---\n# About dynquant\n")
    with pytest.raises(WriteError, match="in the way"):
        check_folder(folder)
    card.write_text("---\nlibrary_name: transformers\ntags: [compressed-tensors, vllm, dynquant]\n---\n")
    check_folder(folder)
