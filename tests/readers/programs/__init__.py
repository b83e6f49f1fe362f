"""Programs that are not ours, each in an environment that `.ci/readers` sets up; files here run inside those."""

import shutil
from pathlib import Path

from dynquant.analysis.bench import readers
from dynquant.errors import LibraryError

HERE = Path(__file__).resolve().parent


class Missing(Exception):
    """A program is not set up."""


def interpreter(name: str) -> Path:
    """Return the Python of an environment. Raises Missing."""
    try:
        return readers.interpreter(name)
    except LibraryError as error:
        raise Missing(str(error)) from error


def program(name: str) -> Path:
    """Return the file of a program that runs in another environment."""
    return HERE / name


def node_folder(package: str) -> Path:
    """Return the folder whose node_modules has a package. Raises Missing."""
    folder = readers.readers_folder() / "node"
    if not (folder / "node_modules" / package).is_dir() or shutil.which("node") is None:
        raise Missing(f"{package} is not in {folder}/node_modules: `.ci/readers` sets it up, which needs npm")
    return folder
