"""JSON from files that strangers wrote: whatever is wrong with it is a ValueError."""

import json
from typing import Any


def parse_json(text: str | bytes, *, unique_names: bool = False) -> Any:
    """The value of a JSON text. With `unique_names`, an object that names something twice is refused.

    Raises:
        ValueError: not JSON, not UTF-8, nested too deeply for Python's parser, or a repeated name.
    """
    try:
        return json.loads(text, object_pairs_hook=_without_repeats if unique_names else None)
    except RecursionError as error:
        raise ValueError("it is nested too deeply") from error


def _without_repeats(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    values = dict(pairs)
    if len(values) != len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"{max(names, key=names.count)!r:.100} is named twice")
    return values
