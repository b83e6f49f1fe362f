"""Makes the parameters of a command from the fields of options dataclasses.

A command is a function of options, of a session and of what only the terminal knows:

    def analyze(options: AnalyzeOptions, session: Annotated[Session, Only(("threads",))]) -> None: ...

`from_options` returns the same command with one parameter for each field that has a `Flag`, for typer to read.
"""

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import MISSING, Field, fields, is_dataclass
from inspect import Parameter, Signature, signature
from keyword import iskeyword
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple, get_args, get_origin, get_type_hints

import typer
from typer.core import TyperCommand

from dynquant.cli.terminal import console
from dynquant.cli.terminal.outputs import guarded
from dynquant.options import Flag, Former, Only, note_of, typed_fields
from dynquant.session import Session

AsJson = Annotated[bool, typer.Option("--json", help="Print JSON instead of tables.")]


class Typed(NamedTuple):
    """Values of all parameters by name, and the names of those that stood on the command line."""

    values: dict[str, Any]
    names: set[str]


_Build = Callable[[Typed], Any]
"""Makes an argument of what was typed."""


def parsed(kind: type, words: Sequence[str]) -> Any:
    """Return the options that a command makes of the words behind its name; what it would write is not locked."""
    taken: list[Any] = []

    def command(options: Any) -> None:
        taken.append(options)

    command.__annotations__["options"] = kind
    function, app = from_options(command, writes=False), typer.Typer()
    app.command(cls=command_class(function))(function)
    app(args=list(words), standalone_mode=False)
    return taken[0]


def from_options(function: Callable[..., None], *, writes: bool = True) -> Callable[..., None]:
    """Return a command with the fields of `function`'s options dataclasses as parameters.

    Where it `writes`, its outputs are checked and locked while it runs.
    """
    hints = get_type_hints(function, include_extras=True)
    parameters: list[Parameter] = []
    builds = {name: _opened(hint, parameters) for name, hint in hints.items() if is_dataclass(_bare(hint)[0])}
    for name, argument in signature(function).parameters.items():
        if name not in builds:
            parameters.append(argument.replace(kind=Parameter.KEYWORD_ONLY, annotation=hints[name]))
            builds[name] = lambda typed, name=name: typed.values[name]  # type: ignore[misc]

    def command(invocation: typer.Context, **values: Any) -> None:
        sources = {name: invocation.get_parameter_source(name) for name in values}
        typed = Typed(values, {name for name, source in sources.items() if source and source.name == "COMMANDLINE"})
        with guarded(parameters, values) if writes else nullcontext(lambda: None) as lock:
            arguments = {name: build(typed) for name, build in builds.items()}
            lock()
            function(**arguments)

    first = Parameter("invocation", Parameter.KEYWORD_ONLY, annotation=typer.Context)
    command.__signature__ = Signature([first, *parameters])  # type: ignore[attr-defined]
    command.__annotations__ = {parameter.name: parameter.annotation for parameter in (first, *parameters)}
    command.former_names = {  # type: ignore[attr-defined]
        note.name: f"--{parameter.name.replace('_', '-')}"
        for parameter in parameters
        for note in _bare(parameter.annotation)[1]
        if isinstance(note, Former)
    }
    paragraphs = (" ".join(paragraph.split()) for paragraph in (function.__doc__ or "").split("\n\n"))
    command.__doc__, command.__name__ = "\n\n".join(paragraphs), function.__name__  # lines as wide as the terminal
    return command


def command_class(function: Callable[..., None]) -> type[TyperCommand]:
    """Return the class of a command of `from_options`, which also takes the former names of its options."""
    former_names: dict[str, str] = function.former_names  # type: ignore[attr-defined]

    class Command(TyperCommand):
        def __init__(self, *args: Any, **options: Any) -> None:
            """Show help as plain text: panels have six columns, which at 80 letters cut names and words."""
            super().__init__(*args, **options | {"rich_markup_mode": None})

        def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
            words = (word.partition("=") for word in args)
            return super().parse_args(ctx, ["".join((former_names.get(name, name), *rest)) for name, *rest in words])

    return Command


def _bare(hint: Any) -> tuple[Any, tuple[Any, ...]]:
    """Type and notes of an Annotated type."""
    return (hint.__origin__, hint.__metadata__) if get_origin(hint) is Annotated else (hint, ())


def _opened(hint: Any, parameters: list[Parameter]) -> _Build:
    """Add a parameter for each field that the hint of a dataclass shows; return what makes the dataclass of them."""
    options, only = _bare(hint)[0], note_of(hint, Only)
    hints = get_type_hints(options, include_extras=True)
    builds: dict[str, _Build] = {}
    parameter_of: dict[str, str] = {}
    for field in fields(options):
        kind, notes = _bare(hints[field.name])
        flag = note_of(hints[field.name], Flag)
        if only is not None and field.name not in only.names:
            continue
        if flag is not None:
            # The longest flag names the parameter, so that two options may have fields of one name.
            name = flag.option(field.name).lstrip("-").replace("-", "_")
            name = f"{name}_" if iskeyword(name) else name
            typer_kind, value = _reading(kind, flag, field)
            parameters.append(_parameter(name, typer_kind, flag, field.default, notes))
            parameter_of[field.name] = name
            builds[field.name] = lambda typed, name=name, value=value: value(typed.values[name])  # type: ignore[misc]
        elif is_dataclass(kind):
            builds[field.name] = _opened(hints[field.name], parameters)

    def opened(typed: Typed) -> Any:
        values = {name: build(typed) for name, build in builds.items()}
        with typed_fields(name for name, parameter in parameter_of.items() if parameter in typed.names):
            arguments = options(**values)
        return console.session(arguments) if options is Session else arguments

    return opened


def _reading(kind: Any, flag: Flag, field: Field) -> tuple[Any, Callable[[Any], Any]]:
    """The type that typer reads, and what makes the field's value of what it has read."""
    text = str if field.default else str | None  # as typed, before it is parsed or split
    if flag.parse is not None:
        return text, lambda typed: None if typed is None else flag.parse(typed)
    if get_origin(kind) is tuple and get_args(kind)[0] is Path:  # the flag may be repeated
        return list[Path] | None, lambda paths: tuple(paths or ())
    if get_origin(kind) is tuple:
        read = (lambda part: str(flag.tokens(part, field.name))) if flag.is_tokens else str.strip
        return text, lambda typed: tuple(read(part) for part in (typed or "").split(",") if part.strip())
    return text if get_origin(kind) is Literal else kind, lambda typed: typed


def _parameter(name: str, kind: Any, flag: Flag, default: Any, notes: tuple[Any, ...]) -> Parameter:
    if isinstance(default, tuple):
        default = ",".join(default) or None
    default = Parameter.empty if default is MISSING else default
    make = typer.Argument if flag.is_argument else typer.Option
    tokens: dict[str, Any] = {}
    if flag.is_tokens and int in (kind, *get_args(kind)):
        tokens = {"parser": lambda typed: flag.tokens(str(typed), name), "metavar": "<tokens>"}
    info = make(*flag.names, help=f"{flag.help} {flag.range}".strip(), show_default=flag.show_default, **tokens)
    return Parameter(name, Parameter.KEYWORD_ONLY, default=default, annotation=Annotated[kind, info, *notes])
