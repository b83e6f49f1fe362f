"""The wheel: built from what is committed and installed where no checkout is near, it runs the demo."""

import os
import subprocess
import sys
import venv
import zipfile
from importlib.metadata import version
from pathlib import Path

import pytest
import torch

from dynquant.llama_library import is_installed

ROOT = Path(__file__).parents[1]
SITE = Path(torch.__file__).parents[1]


def run(*command: object, cwd: Path) -> str:
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
    done = subprocess.run(
        list(map(str, command)), cwd=cwd, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, (done.stdout + done.stderr)[-4000:]
    return done.stdout


@pytest.mark.nightly
@pytest.mark.skipif(not is_installed(), reason="there is no llama.cpp")
def test_the_wheel_runs_the_demo_without_a_checkout(tmp_path):
    if int(version("setuptools").partition(".")[0]) < 77:
        pytest.skip("the build needs setuptools 77")
    source = tmp_path / "source"
    run("git", "clone", "--quiet", ROOT, source, cwd=tmp_path)
    build = (sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation", "--no-index")
    run(*build, "--wheel-dir", tmp_path, source, cwd=tmp_path)
    (wheel,) = tmp_path.glob("*.whl")
    venv.create(tmp_path / "venv", symlinks=True)
    python = next((tmp_path / "venv").glob("*/python"))
    site = Path(run(python, "-c", "import site; print(site.getsitepackages()[0])", cwd=tmp_path).strip())
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(site)
    (site / "others.pth").write_text(f"{SITE}\n")  # .pth files in there, as of a checkout, are not read
    empty = tmp_path / "empty"
    empty.mkdir()
    assert Path(run(python, "-c", "import dynquant; print(dynquant.__file__)", cwd=empty).strip()).is_relative_to(site)
    said = run(python, "-m", "dynquant", "demo", "-o", "out", cwd=empty)
    assert "llama.cpp continues: The purpose of a statistical test is to" in said
    assert (empty / "out" / "plan" / "report.html").is_file()
