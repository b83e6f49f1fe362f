"""The `dynquant` command: in this process, which has imported everything already, or in one of its own."""

import io
import os
import shutil
import subprocess
import sys
from contextlib import chdir, redirect_stderr, redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from unittest.mock import patch

from dynquant.cli import app as cli


@dataclass(frozen=True)
class Finished:
    """What a command left: its exit status and what it printed."""

    returncode: int
    stdout: str
    stderr: str


def command(*arguments: object) -> list[str]:
    """The installed console script, for a process that a test starts or kills itself."""
    return [str(Path(sys.executable).with_name("dynquant")), *map(str, arguments)]


def run(*arguments: object) -> Finished:
    """Run the script's entry point here, with `/` as working directory; other errors than its exits are raised.

    What it sets in the environment (`--llama-cpp`) does not outlive it.
    """
    out, err = io.StringIO(), io.StringIO()
    with (
        patch.object(sys, "argv", ["dynquant", *map(str, arguments)]), chdir("/"), redirect_stdout(out),
        redirect_stderr(err), patch.dict(os.environ),
    ):  # fmt: skip
        try:
            cli.main()
            status = 0
        except SystemExit as left:
            status = left.code or 0
    return Finished(status, out.getvalue(), err.getvalue())


def succeed(*arguments: object) -> str:
    """Run a command that must succeed; returns all that it printed."""
    done = run(*arguments)
    assert done.returncode == 0, done.stderr[-4000:]
    return done.stdout + done.stderr


def linked_copy(folder: Path, target: Path) -> Path:
    """Copy a folder by hard links: whatever a command replaces in the copy stays as it is in the original."""
    return Path(shutil.copytree(folder, target, copy_function=os.link, dirs_exist_ok=True))


def run_alone(*arguments: object) -> Finished:
    """Run the installed console script in a process of its own."""
    done = subprocess.run(command(*arguments), capture_output=True, text=True, cwd="/")
    return Finished(done.returncode, done.stdout, done.stderr)


def refused(*arguments: object) -> str:
    """Run a command that must be refused; returns its one paragraph."""
    done = run(*arguments)
    assert done.returncode == 1, (done.returncode, done.stderr[-2000:])
    assert "Traceback" not in done.stderr
    paragraphs = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert len(paragraphs) == 1 and done.stderr.rstrip().endswith(paragraphs[0])
    return paragraphs[0]
