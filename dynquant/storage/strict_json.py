"""JSON from files that strangers wrote: whatever is wrong with it is a ValueError."""

import json
from collections.abc import Iterator
from typing import Any

from dynquant.storage.stand_ins import stand_in


def parse_json(text: str | bytes, *, unique_names: bool = False) -> Any:
    """The value of a JSON text. With `unique_names`, an object that names something twice is refused.

    Raises:
        ValueError: not JSON, not UTF-8, nested too deeply for Python's parser, or a repeated name.
    """
    try:
        return json.loads(text, object_pairs_hook=_without_repeats if unique_names else None)
    except RecursionError as error:
        raise ValueError("it is nested too deeply") from error
    except ValueError as error:
        meaning = stand_in(text if isinstance(text, bytes) else text[:99].encode("utf-8", "replace"))
        if meaning is None:
            raise
        raise ValueError(f"it is {meaning[0]}. {meaning[1]}") from error


def json_lines(
    content: str, name: object, refusal: type[Exception], way_out: str = ""
) -> Iterator[tuple[int, str, Any]]:
    """Yield number, place ("NAME, line 3") and value of every line of a .jsonl file that is not blank.

    Raises:
        `refusal`: a line is not JSON; the paragraph ends in `way_out`.
    """
    # Not splitlines(): it also splits at U+2028 and the like, which JSON strings may hold.
    for number, line in enumerate(content.split("\n"), start=1):
        if line.strip():
            place = f"{name}, line {number}"
            try:
                value = parse_json(line)
            except ValueError as error:
                raise refusal(f"{place} is not JSON: {error}. {way_out}".rstrip()) from error
            yield number, place, value


def _without_repeats(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    values = dict(pairs)
    if len(values) != len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"{max(names, key=names.count)!r:.100} is named twice")
    return values
