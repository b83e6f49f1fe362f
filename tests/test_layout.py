"""The house keeps its order: imports follow the order of folders, every folder is a package, importing stays light."""

import ast
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from tests import house

ROOT = Path(__file__).resolve().parent.parent
FOLDERS = """
    dynquant storage formats checkpoints families kernels inputs running calibration recipes encoding packed lora
    evaluation analysis analysis.errors analysis.outliers analysis.sensitivity planning analysis.plots analysis.report
    analysis.costs exporters publishing training cli.terminal cli kernels.bench analysis.bench
"""
ORDER = ["dynquant", *(f"dynquant.{name}" for name in FOLDERS.split()[1:])]
"""A module imports from its own folder and from those before it; a sub-folder without an entry counts as its parent."""
LAZY_PLUGS = {"dynquant", "dynquant.__main__", "dynquant.registration"}
"""They look upward on purpose, inside functions."""


def dotted(path: str) -> str:
    """Name under which the module at `path` in the repository is imported."""
    name = path.removesuffix(".py").removesuffix("/__init__").replace("/", ".")
    return name if name.startswith("dynquant") else f"dynquant.{name}"


MODULES = {dotted(module.place): module for module in house.read_modules()}


def place(module: str) -> int:
    """Position in `ORDER` of the folder that holds `module`."""
    folder = module if MODULES[module].is_package else module.rpartition(".")[0]
    while folder not in ORDER:
        folder = folder.rpartition(".")[0]
    return ORDER.index(folder)


def imported_modules(module: house.Module) -> set[str]:
    names = set()
    for node in ast.walk(module.tree):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    assert not names & {"kernels", "analysis", "exporters"}, f"{module.place} imports by the name of a folder"
    return names & MODULES.keys()


def test_imports_follow_the_order_of_folders() -> None:
    wrong = [
        f"{module} must not import {name}"
        for module in sorted(MODULES.keys() - LAZY_PLUGS)
        for name in sorted(imported_modules(MODULES[module]))
        if place(name) > place(module)
    ]
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize("check", house.CHECKS)
def test_the_house_keeps_its_measures(check) -> None:
    assert not check(list(MODULES.values()))


def test_installed_packages_match_the_folders() -> None:
    listed = set(tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"])
    assert listed == {name for name, module in MODULES.items() if module.is_package}
    assert {module.folder for module in MODULES.values()} == {MODULES[name].folder for name in listed}


def test_importing_dynquant_loads_no_heavy_package() -> None:
    heavy = ("torch", "transformers", "llama_cpp", "matplotlib", "ray")
    code = f"import sys, dynquant; print([m for m in {heavy} if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd="/")
    assert done.stdout.strip() == "[]"


def test_the_help_loads_no_heavy_package() -> None:
    heavy = ("torch", "numpy", "pydantic", "transformers", "re2")
    code = (
        "import sys; sys.argv = ['dynquant', '--help']; from dynquant.cli.app import main\ntry:\n    main()\n"
        f"except SystemExit:\n    print([m for m in {heavy} if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd="/")
    assert done.stdout.splitlines()[-1] == "[]"


def test_no_machine_path_or_registry_in_tracked_files() -> None:
    tracked = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout.split()
    texts = [ROOT / name for name in tracked if Path(name).suffix in (".py", ".md", ".toml", ".txt", ".json", "")]
    assert texts
    for path in texts:
        if path.is_file() and path.stat().st_size < 400_000:
            text = path.read_text(errors="ignore")
            assert str(ROOT.parent) + "/" not in text, path
            assert "pypi" + ".org" not in text, path
