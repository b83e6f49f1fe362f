"""Write the guide of all commands, reports/guides/commands.md, from the command line itself.

python -m dynquant.cli.guide > reports/guides/commands.md
"""

import re
from collections.abc import Iterator
from typing import Any

from typer.main import get_command

from dynquant.cli.app import app

_INTRODUCTION = """# All commands and options

This page is made from the command line: `python -m dynquant.cli.guide > reports/guides/commands.md`. Every command also
takes `--json-progress FILE` (`-` is stderr; [what it writes](progress-json.md)), `--llama-cpp DIR` (the source tree
whose converter opens architectures that dynquant does not convert by itself; [models](models.md)) and `--debug`. Exit
status: 0 done, 1 refused with one paragraph on stderr, 2 wrong usage, 130 interrupted. Options that count tokens also
take `16k`, `128k` or `1m`: k is 1,024 and m 1,048,576, as lengths of context are called.

While a command runs, its outputs are locked (`.NAME.lock` beside each): a second one that would write them is refused
with the process and start time of the first; locks that a kill left do not count, and the next command removes them. An
output that is one of the files that the command reads, also through links, is refused before any work, and so is a file
whose name does not end as its kind does (`.gguf`, `.safetensors`, `.json`), with a name that would do. What an
interrupted export leaves lies beside its output (`.NAME.untuned-...`, `NAME.journal`, `NAME.partial` and the like): the
same command goes on from it, and one with other settings that finishes this output removes it. Files of your own with
such names are not touched: a command that would need the name is refused. Who reads the command's output or progress
through a pipe may go; the command goes on.
"""


def commands_guide() -> str:
    """Return the page as Markdown: commands in the order of `dynquant --help`, each with its options."""
    commands: dict[str, Any] = get_command(app).commands  # type: ignore[attr-defined]
    table = [f"| [`{name}`](#{name}) | {_cell(command.help.split(chr(10))[0])} |" for name, command in commands.items()]
    lines = [_INTRODUCTION, "| command | what it does |", "|---|---|", *table]
    for name, command in commands.items():
        lines += ["", *_section(name, command)]
    return "\n".join(lines) + "\n"


def _section(name: str, command: Any) -> Iterator[str]:
    paragraphs = command.help.split("\n\n")
    arguments = [p for p in command.params if p.param_type_name == "argument"]
    options = [p for p in command.params if p.param_type_name == "option" and p.name != "help"]
    yield f"## {name}"
    yield ""
    yield " ".join(part for part in paragraphs if not part.startswith("Example: "))
    yield ""
    usage = [f"dynquant {name}", *(f"{p.name.upper()}" if p.required else f"[{p.name.upper()}]" for p in arguments)]
    yield "```"
    yield " ".join([*usage, "[OPTIONS]"] if options else usage)
    yield from (part.removeprefix("Example: ") for part in paragraphs if part.startswith("Example: "))
    yield "```"
    if arguments or options:
        yield from ("", "| option | meaning | default |", "|---|---|---|")
    for parameter in (*arguments, *options):
        is_option = parameter not in arguments
        label = ", ".join([*parameter.opts, *parameter.secondary_opts]) if is_option else parameter.name.upper()
        default = "required" if parameter.required else _default(parameter)
        yield f"| `{label}` | {_cell(parameter.help or '')} | {default} |"


def _default(parameter: Any) -> str:
    if parameter.default is None or parameter.default is False or callable(parameter.default):
        return ""
    return "on" if parameter.default is True else f"`{parameter.default}`"


def _cell(text: str) -> str:
    return re.sub(r"\s+", " ", text).strip().replace("|", "\\|")


if __name__ == "__main__":
    print(commands_guide(), end="")
