"""The unfinished run of a training, and what has the names of its folders and is something else."""

import pytest

from dynquant.errors import WriteError
from dynquant.training.run import LossPoint, RunDirectory

FIELDS = {
    "task": "heal", "base": "base", "options": {}, "trained_examples": 1, "held_out_examples": 1, "steps": 1,
    "best_step": 1, "history": [LossPoint(step=1, train=1.0), LossPoint(step=1, held_out=1.0)], "changes": [],
    "notes": [], "seconds": 1.0,
}  # fmt: skip


def finished(run):
    run.finish(lambda folder: (folder / "adapter").write_text("weights"), measure="loss", **FIELDS)


@pytest.mark.parametrize("resume", [True, False])
def test_a_folder_with_the_name_of_the_checkpoints_is_refused_and_stays(tmp_path, resume):
    notes = tmp_path / ".a.training" / "notes"
    notes.parent.mkdir()
    notes.write_text("mine")
    with pytest.raises(WriteError, match=r"\.a\.training is in the way"):
        RunDirectory(tmp_path / "a", {"seed": 1}, resume=resume)
    assert notes.read_text() == "mine" and list(tmp_path.rglob("*")) == [notes.parent, notes]


def test_a_finished_run_replaces_its_output_and_nothing_beside_it(tmp_path):
    (tmp_path / ".a.partial").mkdir()
    (tmp_path / ".a.partial" / "notes").write_text("mine")
    (tmp_path / ".a.0123abcd.partial").mkdir()  # of a run that was killed at its end
    finished(RunDirectory(tmp_path / "a", {"seed": 1}, resume=True))
    (tmp_path / "a" / "adapter").write_text("older")
    finished(RunDirectory(tmp_path / "a", {"seed": 2}, resume=True))
    assert (tmp_path / "a" / "adapter").read_text() == "weights"
    assert {path.name for path in tmp_path.iterdir()} == {"a", ".a.partial"}
    assert (tmp_path / ".a.partial" / "notes").read_text() == "mine"


def test_an_output_that_cannot_be_written_keeps_the_checkpoints(tmp_path):
    def fail(folder):
        raise OSError(28, "No space left on device")

    run = RunDirectory(tmp_path / "a", {"seed": 1}, resume=True)
    with pytest.raises(WriteError, match=r"No space left on device.*checkpoints are kept"):
        run.finish(fail, measure="loss", **FIELDS)
    assert [path.name for path in tmp_path.iterdir()] == [".a.training"]
