"""Options of a step are one dataclass beside its door; `Flag` says what the command line shows of a field.

    tokens: Annotated[int, Flag("Calibrate on this many tokens.")] = 131072

`cli/options.py` turns such fields into parameters of a command, so that a flag, its default and its help stand once.
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class Flag:
    """Appearance of a field of an options dataclass on the command line."""

    help: str
    names: tuple[str, ...] = ()
    """Such as `("-o", "--output")`; empty for the field's own name with dashes."""
    is_argument: bool = False
    show_default: bool = True
