"""README, guides and reports tell the truth that can be checked: links, commands, Python names, generated pages."""

import ast
import re
import shlex
from collections.abc import Iterator
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
from typer.main import get_command

from dynquant.cli.app import app
from dynquant.cli.guide import commands_guide

ROOT = Path(__file__).resolve().parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "reports").rglob("*.md"))]
NAMES = [page.relative_to(ROOT).as_posix() for page in PAGES]
COMMANDS: dict[str, Any] = get_command(app).commands  # type: ignore[attr-defined]
ON_EVERY_COMMAND = {"--json-progress", "--debug", "--help"}


def blocks(page: Path, language: str) -> Iterator[str]:
    """Contents of the code blocks of one language, `` for those without."""
    return iter(re.findall(rf"^```{language}\n(.*?)^```", page.read_text(), re.M | re.S))


def commands_of(page: Path) -> Iterator[list[str]]:
    """Arguments of every `dynquant ...` in a block, without comments."""
    for block in (*blocks(page, ""), *blocks(page, "console")):
        for line in block.replace("\\\n", " ").splitlines():
            line = line.removeprefix("$ ")
            if line.startswith("dynquant ") and "..." not in line:
                yield shlex.split(line, comments=True)[1:]


def test_readme_fits_on_a_few_screens():
    assert len((ROOT / "README.md").read_text().splitlines()) <= 140


@pytest.mark.parametrize("page", PAGES, ids=NAMES)
def test_links_resolve(page: Path):
    targets = re.findall(r"\]\(([^)\s]+)\)", re.sub(r"^```.*?^```", "", page.read_text(), flags=re.M | re.S))
    local = [target for target in targets if not re.match(r"https?://|#", target)]
    assert [target for target in local if not (page.parent / target.partition("#")[0]).exists()] == []


@pytest.mark.parametrize("page", PAGES, ids=NAMES)
def test_commands_have_the_options_that_are_shown(page: Path):
    for name, *arguments in commands_of(page):
        command = COMMANDS[name]
        known = {flag for option in command.params for flag in (*option.opts, *option.secondary_opts)}
        flags = {argument.partition("=")[0] for argument in arguments if re.match(r"--?[a-zA-Z]", argument)}
        assert flags <= known | ON_EVERY_COMMAND, f"dynquant {name}"


@pytest.mark.parametrize("page", PAGES, ids=NAMES)
def test_modules_that_are_shown_exist(page: Path):
    for module in re.findall(r"python -m ((?:dynquant|tests)\.[\w.]+)", page.read_text()):
        assert find_spec(module) or (ROOT / f"{module.replace('.', '/')}.py").is_file(), module
    for script in re.findall(r"(?:python|pytest) ((?:tests|reports)/[\w/.]+\.py)", page.read_text()):
        assert (ROOT / script).is_file(), script


@pytest.mark.parametrize("page", PAGES, ids=NAMES)
def test_python_that_is_shown_imports(page: Path):
    for block in blocks(page, "python"):
        for node in ast.walk(ast.parse(block)):
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("dynquant"):
                module = import_module(str(node.module))
                assert all(hasattr(module, alias.name) for alias in node.names), node.module


def test_every_command_has_a_place_in_the_generated_guide():
    """Make it anew with `python -m dynquant.cli.guide > reports/guides/commands.md`."""
    assert (ROOT / "reports/guides/commands.md").read_text() == commands_guide()
