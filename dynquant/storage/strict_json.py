"""JSON from files that strangers wrote: whatever is wrong with it is a ValueError."""

import json
import re
from typing import Any

from dynquant.storage.stand_ins import stand_in


def parse_json(text: str | bytes, *, unique_names: bool = False) -> Any:
    """The value of a JSON text, with or without a byte-order mark. With `unique_names`, repeated names are refused.

    Raises:
        ValueError: not JSON, not UTF-8, nested too deeply for Python's parser, half of a surrogate pair, or a repeated
            name.
    """
    if isinstance(text, bytes):
        encoding = json.detect_encoding(text)
        if not encoding.startswith("utf-8"):
            raise ValueError(f"it is {encoding[:6].upper()} and must be UTF-8: convert it")
        text = text.decode("utf-8-sig")
    try:
        value = json.loads(text, object_pairs_hook=_without_repeats if unique_names else None)
        if re.search(r"\\u[dD][89a-fA-F]", text):
            json.dumps(value, ensure_ascii=False).encode()
    except RecursionError as error:
        raise ValueError("it is nested too deeply") from error
    except json.JSONDecodeError as error:
        meaning = stand_in(text[:99].encode("utf-8", "replace"))
        if meaning is None:
            raise
        raise ValueError(f"it is {meaning[0]}. {meaning[1]}") from error
    except UnicodeEncodeError as error:
        raise ValueError("it holds half of a surrogate pair, which is no character") from error
    return value


def _without_repeats(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    values = dict(pairs)
    if len(values) != len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"{max(names, key=names.count)!r:.100} is named twice")
    return values
