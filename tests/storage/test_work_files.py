"""Work files of an output: those of interrupted runs go when it is finished, and nobody else's."""

import json

import pytest

from dynquant.storage.work_files import remove_work, work_path
from tests.storage.test_lock import holder  # noqa: F401

HEX, DIGEST = "0123abcd", "0123456789ab"
OURS = (
    f".m[1].gguf.untuned-{DIGEST}.gguf",
    f".m[1].gguf.untuned-{DIGEST}.gguf.partial",
    f".m[1].gguf.untuned-{DIGEST}-00001-of-00002.gguf.journal",
    f".m[1].gguf.tuned-{DIGEST}.gguf",
    f".m[1].gguf.asymmetric-{DIGEST}/states/1",
    ".m[1].gguf.written.safetensors",
    f"..m[1].gguf.written.safetensors.{HEX}.partial",
    f"..m[1].gguf.untuned-{DIGEST}.gguf.lock",
    ".m[1].gguf.partial/config.json.journal",
    f".m[1].gguf.{HEX}.partial",
    f".m[1].gguf.journal.{HEX}.partial",
    f".m[1]-00002-of-00003.gguf.{HEX}.partial",
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
        (tmp_path / name).write_text(json.dumps({"identity": {}}) + "\n")
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


def test_a_link_goes_and_not_what_it_leads_to(tmp_path):
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "weights").write_text("weights")
    path = work_path(tmp_path / "out", "partial")
    path.symlink_to(tmp_path / "model")
    remove_work(tmp_path / "out")
    assert left_of(tmp_path) == {"model/weights"} and not path.is_symlink()
