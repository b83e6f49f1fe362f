"""The notebook of the guides runs from the first cell to the last."""

import sys
from pathlib import Path

import pytest

NOTEBOOK = Path(__file__).parents[1] / "reports" / "guides" / "start.ipynb"


@pytest.mark.nightly
def test_the_notebook_runs_and_says_what_it_shows(tmp_path: Path, monkeypatch) -> None:
    nbformat, nbclient = pytest.importorskip("nbformat"), pytest.importorskip("nbclient")
    monkeypatch.setenv("PATH", str(Path(sys.executable).parent), prepend=":")
    shown = nbformat.read(NOTEBOOK, as_version=4)
    run = nbformat.read(NOTEBOOK, as_version=4)
    nbclient.NotebookClient(
        run, timeout=1200, kernel_name="python3", resources={"metadata": {"path": tmp_path}}
    ).execute()
    for before, after in zip(shown.cells, run.cells, strict=True):
        assert kinds(before) == kinds(after)
    assert "bits per weight" in text_of(run) and "never part" in text_of(run)


def kinds(cell: dict) -> set[str]:
    """Return what the outputs of a cell are: printed, or data of some kinds."""
    return {kind for output in cell.get("outputs", ()) for kind in output.get("data", [output["output_type"]])}


def text_of(notebook: dict) -> str:
    return "".join(o.get("text", "") for cell in notebook.cells for o in cell.get("outputs", ()))
