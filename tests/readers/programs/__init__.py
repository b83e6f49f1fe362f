"""Programs that are not ours, each in an environment that `.ci/readers` sets up; files here run inside those."""

import os
import shutil
from pathlib import Path

HERE = Path(__file__).resolve().parent
READERS = Path(os.environ.get("DYNQUANT_READERS") or HERE.parents[2] / ".readers")


class Missing(Exception):
    """A program is not set up."""


def interpreter(name: str) -> Path:
    """Return the Python of an environment. Raises Missing."""
    python = READERS / name / "bin" / "python"
    if not python.is_file():
        raise Missing(f"{python} is not there: `.ci/readers` sets it up, or DYNQUANT_READERS says where it is")
    return python


def program(name: str) -> Path:
    """Return the file of a program that runs in another environment."""
    return HERE / name


def node_folder(package: str) -> Path:
    """Return the folder whose node_modules has a package. Raises Missing."""
    folder = READERS / "node"
    if not (folder / "node_modules" / package).is_dir() or shutil.which("node") is None:
        raise Missing(f"{package} is not in {folder}/node_modules: `.ci/readers` sets it up, which needs npm")
    return folder
