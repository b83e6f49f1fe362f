"""The `dynquant` command: registers one command a file, and turns refusals into one paragraph.

Exit status: 0 done, 1 refused with one paragraph on stderr, 2 wrong usage, 130 interrupted. Tracebacks are bugs, or
--debug.
"""

import os
import sys
from collections.abc import Collection
from typing import Annotated

import typer

from dynquant import __version__
from dynquant.cli.analyze import analyze, super_weights
from dynquant.cli.calibrate import calibrate
from dynquant.cli.compare import compare, compare_encoders
from dynquant.cli.demo import demo, fetch_llama_cpp
from dynquant.cli.evaluate import evaluate
from dynquant.cli.export import export, export_adapter, release, tune
from dynquant.cli.inspect import diff, fit, inspect, measure_machine, recipe
from dynquant.cli.plan import plan
from dynquant.cli.terminal import console
from dynquant.cli.terminal.interrupt import ends_promptly
from dynquant.cli.terminal.parameters import command_class, from_options
from dynquant.cli.terminal.streams import lasting_streams
from dynquant.cli.train import finetune, heal
from dynquant.errors import DynquantError, OptionError, reason
from dynquant.families.converter.source_tree import find_tree
from dynquant.resources import let_waiting_threads_sleep

_PACKAGES_OF = {
    "models": {"transformers", "accelerate", "datasets", "sentencepiece", "scipy", "tokenizers", "huggingface_hub"},
    "llama": {"llama_cpp"},
    "report": {"matplotlib"},
    "train": {"peft", "trl"},
    "ray": {"ray"},
    "tasks": {"lm_eval"},
    "vision": {"PIL"},
    "gpu": {"triton"},
}
"""Extras of the installation, and the packages that come with them."""

app = typer.Typer(no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False)


@app.callback()
def every_command(
    json_progress: Annotated[
        str | None,
        typer.Option(
            metavar="FILE",
            help="Tell progress as JSON lines in FILE, or with - on stderr. May stand behind the command.",
            show_default=False,
        ),
    ] = None,
    llama_cpp: Annotated[
        str | None,
        typer.Option(
            metavar="DIR",
            help="llama.cpp's source tree, whose converter opens the architectures that dynquant does not convert by "
            "itself; all others do without. Default: LLAMA_CPP_DIR, or what `dynquant fetch-llama-cpp` keeps. May "
            "stand behind the command.",
            show_default=False,
        ),
    ] = None,
    debug: Annotated[bool, typer.Option("--debug", help="Show tracebacks of refusals.")] = False,
) -> None:
    """Dynamic low-bit quantization: measure where it hurts, keep those places precise, crush the rest."""
    if json_progress is not None:
        console.write_json_to(json_progress)
    if llama_cpp is not None:
        os.environ["LLAMA_CPP_DIR"] = os.path.abspath(llama_cpp)  # for processes that the command starts, too
        find_tree()  # refuses what is no tree, be it needed or not


def version() -> None:
    """Print the version."""
    console.say(__version__)


_STEPS = (calibrate, analyze, plan, export, tune, evaluate, release, finetune, heal, export_adapter)
_VIEWS = (compare, compare_encoders, inspect, fit, measure_machine, recipe, diff, super_weights)
_OTHERS = (demo, fetch_llama_cpp, version)
_ALWAYS = "Every command also takes --json-progress FILE (- is stderr), --llama-cpp DIR and --debug."
for _function in (*_STEPS, *_VIEWS, *_OTHERS):
    _name = "eval" if _function is evaluate else _function.__name__.replace("_", "-")
    _command = from_options(_function)
    app.command(_name, cls=command_class(_command), epilog=_ALWAYS)(_command)


def _global_options_first(arguments: list[str]) -> list[str]:
    """Options of all commands may stand anywhere on the line; typer wants them before the command."""
    first, rest = [], list(arguments)
    is_training = bool({"finetune", "heal"} & {*arguments})
    for option, num_words in (("--debug", 1), ("--json-progress", 2), ("--llama-cpp", 2)):
        for index, word in enumerate(rest):
            if word == "--llama-cpp" and is_training and not os.path.isdir("".join(rest[index + 1 : index + 2])):
                continue  # there, it was a name of --for-llama-cpp before it was one of all commands
            if word == option or (num_words == 2 and word.startswith(f"{option}=")):
                end = index + (num_words if word == option else 1)
                first += rest[index:end]
                del rest[index:end]
                break
    return first + rest


def main() -> None:
    """Entry point of the `dynquant` command."""
    let_waiting_threads_sleep()
    arguments = _global_options_first(sys.argv[1:])
    console.begin(["dynquant", *sys.argv[1:]])  # to be typed again after an interruption
    noted = console.noted_warnings(of_all_kinds="--debug" in arguments)
    with ends_promptly(console.interrupted), lasting_streams(), noted:
        try:
            try:
                _check_words(arguments)
                app(args=arguments, prog_name="dynquant")
            except SystemExit as left:
                sys.stdout.flush()
                console.finish("failed" if left.code else "done")
                raise
        except Exception as error:
            paragraph = _paragraph(error, trains={"finetune", "heal"}.intersection(arguments))
            if not paragraph:
                console.finish("failed", f"{type(error).__name__}: {error}")
            if not paragraph or "--debug" in arguments:  # the callback's value does not reach this place
                raise
            console.fail(paragraph)
            sys.exit(1)


def _check_words(arguments: list[str]) -> None:
    """Raise OptionError for a word that is not UTF-8: neither plans nor GGUF files nor libraries take such names."""
    for word in arguments:
        try:
            word.encode()
        except UnicodeEncodeError as error:
            raise OptionError(
                f"`{word}` has bytes that are not UTF-8. Rename the file, or give another name."
            ) from error


def _paragraph(error: Exception, *, trains: Collection[str]) -> str | None:
    """Return the words of a refusal, or None for a bug; a command that `trains` needs an extra that holds others."""
    if isinstance(error, DynquantError):
        return str(error)
    if isinstance(error, OSError):
        return f"The system refused: {reason(error)}. Check the path, its permissions and the space on its disk."
    package = (error.name or "").partition(".")[0] if isinstance(error, ModuleNotFoundError) else ""
    extra = next((extra for extra, packages in _PACKAGES_OF.items() if package in packages), None)
    extra = "train" if trains and extra in ("models", "report") else extra
    return extra and f"This command needs {package}, which is not there: pip install 'dynquant-toolchain[{extra}]'."
