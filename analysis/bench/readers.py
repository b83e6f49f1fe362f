"""Programs that are not ours and read our files, each in an environment that `.ci/readers` sets up."""

import os
from pathlib import Path

from dynquant.errors import LibraryError


def readers_folder() -> Path:
    """Return where `.ci/readers` puts them: what DYNQUANT_READERS names, or .readers in the working directory."""
    return Path(os.environ.get("DYNQUANT_READERS") or ".readers").absolute()


def interpreter(reader: str, asked: str | None = None) -> Path:
    """Return the Python of an environment, or the one that was asked for. Raises LibraryError: it is not there."""
    python = Path(asked) if asked else readers_folder() / reader / "bin" / "python"
    if not python.is_file():
        raise LibraryError(
            f"{python} is not there: `.ci/readers` sets {reader} up in .readers or where DYNQUANT_READERS says, and "
            "--python, where there is that option, names another interpreter that has it."
        )
    return python
