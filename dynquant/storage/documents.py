"""JSON documents of ours: records of fixed fields, written whole, and refused in one paragraph when damaged."""

from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any, TypeVar

from pydantic import BaseModel, ConfigDict, TypeAdapter, ValidationError

from dynquant import __version__
from dynquant.errors import PlanError
from dynquant.options import Options, shown_values
from dynquant.storage.atomic import file_hash, write_atomically
from dynquant.storage.file_kinds import JSON, content_of, refuse_other_kind

T = TypeVar("T")


class FrozenRecord(BaseModel):
    """A record that does not change; a field that it does not know is refused."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    def save(self, path: Path) -> None:
        """Write the document, whole or not at all.

        Raises:
            WriteError: no space, no permission, or a parent that is no directory.
        """
        write_atomically(path, self.model_dump_json(indent=1) + "\n")


def read_document(
    path: Path, form: type[T], what: str, way_out: str, check: Callable[[T], None] = lambda document: None
) -> T:
    """Return the document at `path`, of a record class or a collection of them.

    Args:
        what: Its kind with an article, as in "`path` is not an error table of dynquant".
        way_out: A sentence for who cannot use the file.
        check: Raises ValueError for values that the types of the fields let through.

    Raises:
        PlanError: missing, not JSON, or not such a document; the first field that is wrong is named.
    """
    refuse_other_kind(path, JSON, f"{what} of dynquant", way_out, PlanError)  # a model may be larger than memory
    try:
        document = TypeAdapter(form).validate_json(path.read_bytes())
        check(document)
        return document
    except OSError as error:
        raise PlanError(f"{path} cannot be read ({error.strerror}). {way_out}") from error
    except ValidationError as error:
        if (content := content_of(path)) not in ("", JSON, f"{what} of dynquant"):
            raise PlanError(f"{path} is {content}, not {what}. {way_out}") from error
        raise PlanError(f"{path} is not {what} of dynquant ({first_fault(error)}). {way_out}") from error
    except ValueError as error:
        raise PlanError(f"{path} is not {what} of dynquant ({error}). {way_out}") from error


def first_fault(error: ValidationError) -> str:
    """Return in words the first thing that pydantic found wrong: its place, the value there, and the rule."""
    first = error.errors(include_url=False, include_context=False)[0]
    place, rule = ".".join(map(str, first["loc"]))[:200], first["msg"].removeprefix("Value error, ")
    if not place:
        return rule
    if first["type"] == "extra_forbidden":
        return f"`{place}` is not known to dynquant {__version__}: it may be of a newer one, or be misspelt"
    return f"`{place}` is missing" if first["type"] == "missing" else f"`{place}` is {first['input']!r:.80}: {rule}"


def recorded_settings(options: Options, leave_out: Collection[str]) -> dict[str, Any]:
    """Return flags and values of options as JSON holds them, but those of `leave_out`; a file counts by its content,
    and the model by its name."""
    settings: dict[str, Any] = {}
    for flag, option, value, _ in shown_values(options):
        if isinstance(value, str | Path | tuple):
            paths = map(Path, value if isinstance(value, tuple) else [value])
            value = [file_hash(path) if path.is_file() and not flag.is_argument else path.name for path in paths]
        if option not in leave_out:
            settings[option] = value
    return settings
