"""Makes the parameters of a command from the fields of options dataclasses.

A command is a function of options, of a session and of what only the terminal knows:

    def analyze(options: AnalyzeOptions, session: Annotated[Session, Only(("threads",))]) -> None: ...

`from_options` returns the same command with one parameter for each field that has a `Flag`, for typer to read.
"""

from collections.abc import Callable, Iterator
from dataclasses import MISSING, Field, dataclass, fields, is_dataclass
from inspect import Parameter, Signature, signature
from keyword import iskeyword
from pathlib import Path
from typing import Annotated, Any, Literal, get_args, get_origin, get_type_hints

import typer

from dynquant.cli.terminal import console
from dynquant.options import Flag, Only
from dynquant.session import Session

AsJson = Annotated[bool, typer.Option("--json", help="Print JSON instead of tables.")]


@dataclass(frozen=True)
class _Shown:
    """A field that the command line shows, under the name of its parameter."""

    name: str
    type: Any
    flag: Flag
    default: Any


def from_options(function: Callable[..., None]) -> Callable[..., None]:
    """Return a command with the fields of `function`'s options dataclasses as parameters."""
    hints = get_type_hints(function, include_extras=True)
    own = signature(function).parameters
    groups = {name: hint for name, hint in hints.items() if is_dataclass(_bare(hint)[0])}

    def command(**values: Any) -> None:
        arguments = {name: _build(hint, values) for name, hint in groups.items()}
        for name, value in arguments.items():
            if isinstance(value, Session):
                arguments[name] = console.session(value.device, value.threads, value.seed)
        function(**arguments, **{name: values[name] for name in own if name not in groups})

    parameters = [_parameter(shown) for hint in groups.values() for shown in _shown(hint)]
    parameters += [
        Parameter(name, Parameter.KEYWORD_ONLY, default=own[name].default, annotation=hints[name])
        for name in own
        if name not in groups
    ]
    command.__signature__ = Signature(parameters)  # type: ignore[attr-defined]
    command.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
    command.__doc__, command.__name__ = function.__doc__, function.__name__
    return command


def _bare(hint: Any) -> tuple[Any, tuple[Any, ...]]:
    """Type and notes of an Annotated type."""
    if get_origin(hint) is Annotated:
        bare, *notes = get_args(hint)
        return bare, tuple(notes)
    return hint, ()


def _fields(hint: Any) -> Iterator[tuple[Field[Any], Any, Flag | None]]:
    """Fields of a dataclass that its hint shows, with their hints; a nested dataclass has no flag."""
    options, notes = _bare(hint)
    names = next((note.names for note in notes if isinstance(note, Only)), None)
    hints = get_type_hints(options, include_extras=True)
    for field in fields(options):
        bare, field_notes = _bare(hints[field.name])
        flag = next((note for note in field_notes if isinstance(note, Flag)), None)
        if (flag is not None or is_dataclass(bare)) and (names is None or field.name in names):
            yield field, hints[field.name], flag


def _shown(hint: Any) -> Iterator[_Shown]:
    for field, field_hint, flag in _fields(hint):
        if flag is None:
            yield from _shown(field_hint)
        else:
            yield _Shown(_name(field, flag), _bare(field_hint)[0], flag, field.default)


def _name(field: Field[Any], flag: Flag) -> str:
    """Name of the parameter: that of its longest flag, so that two options may have fields of one name."""
    name = max(flag.names, key=len).lstrip("-").replace("-", "_") if flag.names else field.name
    return f"{name}_" if iskeyword(name) else name


def _parameter(shown: _Shown) -> Parameter:
    flag, kind = shown.flag, _typer_type(shown)
    default = shown.default
    if isinstance(default, tuple):
        default = ",".join(default) or None
    more = {} if flag.is_argument else {"min": flag.min, "max": flag.max}
    make = typer.Argument if flag.is_argument else typer.Option
    info = make(*flag.names, help=flag.help, show_default=flag.show_default, **more)
    default = Parameter.empty if default is MISSING else default
    return Parameter(shown.name, Parameter.KEYWORD_ONLY, default=default, annotation=Annotated[kind, info])


def _typer_type(shown: _Shown) -> Any:
    """The type that typer reads: text for what is split or parsed, a list for a flag that may be repeated."""
    if _is_repeated(shown.type):
        return list[Path] | None
    if shown.flag.parse is not None or get_origin(shown.type) in (tuple, Literal):
        return str if shown.default else str | None
    return shown.type


def _is_repeated(kind: Any) -> bool:
    return get_origin(kind) is tuple and get_args(kind)[0] is Path


def _build(hint: Any, values: dict[str, Any]) -> Any:
    """The dataclass with what was typed."""
    made = {}
    for field, field_hint, flag in _fields(hint):
        if flag is None:
            made[field.name] = _build(field_hint, values)
        else:
            made[field.name] = _value(_bare(field_hint)[0], flag, values[_name(field, flag)])
    return _bare(hint)[0](**made)


def _value(kind: Any, flag: Flag, typed: Any) -> Any:
    if flag.parse is not None:
        return None if typed is None else flag.parse(typed)
    if _is_repeated(kind):
        return tuple(typed or ())
    if get_origin(kind) is tuple:
        return tuple(part.strip() for part in (typed or "").split(",") if part.strip())
    return typed
