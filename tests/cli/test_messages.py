"""Ways out that messages name are there: commands and options, by the names of today."""

import ast
import re
from collections.abc import Iterator

import pytest
from typer.main import get_command
from typer.testing import CliRunner

from dynquant.cli.app import app
from tests.conftest import REPOSITORY

OF_OTHERS = {
    "llama-quantize": {
        "token-embedding-type", "output-tensor-type", "tensor-type", "tensor-type-file", "custom-q", "include-weights",
        "exclude-weights", "override-kv", "allow-requantize", "keep-split", "dry-run", "pure",
    },
    "llama-gguf-split": {"merge"},
    "convert_hf_to_gguf.py": {"outtype"},
    "llama-imatrix": {"in-file"},
    "llama-server": {"n-cpu-moe", "rope-scaling"},
    "vllm serve": {"tensor-parallel-size"},
    "ray start": {"head", "address"},
    "pip": {"no-deps", "no-binary", "dest"},
}  # fmt: skip
FORMER = re.compile(r"Former\(\"--[\w-]+\"\)")
OF_ALL = {"--json-progress", "--llama-cpp", "--debug", "--help"}
COMMANDS = get_command(app).commands  # type: ignore[attr-defined]
OPTIONS = {
    name: OF_ALL.union(*({*parameter.opts, *parameter.secondary_opts} for parameter in command.params))
    for name, command in COMMANDS.items()
}
_OPTION = re.compile(r"(?<![\w-])--[a-z][a-z-]*[a-z]")


def messages() -> Iterator[tuple[str, str]]:
    """Yield place and text of every string of the package that is no docstring; values are `{}`.

    Benchmarks are modules of their own, with their own options.
    """
    for folder in ("dynquant", "kernels", "analysis", "exporters"):
        for path in (path for path in (REPOSITORY / folder).rglob("*.py") if "bench" not in path.parts):
            tree = ast.parse(FORMER.sub("Former(None)", path.read_text()))
            docstrings = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)}
            for node in ast.walk(tree):
                if isinstance(node, ast.JoinedStr):
                    docstrings.update(map(id, node.values))
                    text = "".join(p.value if isinstance(p, ast.Constant) else "{}" for p in node.values)
                elif isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in docstrings:
                    text = node.value
                else:
                    continue
                yield f"{path.relative_to(REPOSITORY)}:{node.lineno}", text


def test_every_option_that_is_named_exists():
    known = set().union(*OPTIONS.values(), *({f"--{name}" for name in names} for names in OF_OTHERS.values()))
    unknown = [(place, option) for place, text in messages() for option in _OPTION.findall(text) if option not in known]
    assert not unknown


def test_every_command_that_is_named_takes_the_options_named_with_it():
    lines = [(place, line) for place, text in messages() for line in re.findall(r"`dynquant ([a-z][^`]*)`", text)]
    assert len(lines) > 20
    for place, line in lines:
        name, *words = line.split()
        assert name in COMMANDS, (place, line)
        assert OPTIONS[name].issuperset(_OPTION.findall(" ".join(words))), (place, line)


@pytest.mark.parametrize("width", [80, 200])
def test_help_names_every_option_in_full(width):
    for name, command in COMMANDS.items():
        shown = CliRunner().invoke(app, [name, "--help"], env={"COLUMNS": str(width)})
        words = re.split(r"[\s,/]+", shown.stdout)
        assert shown.exit_code == 0 and "\N{HORIZONTAL ELLIPSIS}" not in shown.stdout
        assert {option for p in command.params for option in (*p.opts, *p.secondary_opts)} <= {*words}, name
        assert max(map(len, shown.stdout.splitlines())) <= width
