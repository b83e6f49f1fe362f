"""Regular expressions from users and files, run in time linear in the text (RE2): none can keep a command busy."""

from functools import lru_cache
from typing import Any


@lru_cache  # RE2's own cache misses, since it compares options by identity; callers try a pattern on every name
def compile_pattern(pattern: str) -> Any:
    """Return RE2's compiled pattern, which has the methods of `re`.

    Raises:
        ValueError: what RE2 cannot run: wrong syntax, look-ahead, back references, or too large when compiled.
    """
    import re2  # here, since `--help` imports this module

    options = re2.Options()
    options.log_errors = False  # RE2 writes to stderr otherwise
    try:
        return re2.compile(pattern, options)
    except re2.error as error:
        raise ValueError(error.args[0].decode(errors="replace")) from error
