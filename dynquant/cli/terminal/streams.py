"""Standard output and error that a command outlives: a reader may go, and both may be closed from the start."""

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any, TextIO

from dynquant.errors import WriteError, reason


@contextmanager
def lasting_streams() -> Iterator[None]:
    """Context manager: what nobody reads any more is dropped, by this program and its libraries alike.

    Raises:
        WriteError: standard output cannot be written for another reason, as a full disk.
    """
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # takes the lowest number, so that no file of ours gets it
    before = sys.stdout, sys.stderr
    sys.stdout, sys.stderr = _Lasting(sys.stdout, is_result=True), _Lasting(sys.stderr, is_result=False)  # type: ignore[assignment]
    try:
        yield
    finally:
        sys.stdout, sys.stderr = before


class _Lasting:
    """A text stream that drops what it cannot write once its reader is gone."""

    def __init__(self, stream: TextIO | None, *, is_result: bool) -> None:
        self._stream = stream or open(os.devnull, "w")  # noqa: SIM115 (until exit)
        self._is_result = is_result

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def write(self, text: str) -> int:
        """Write `text`, or drop it."""
        with self._dropping():
            self._stream.write(text)
        return len(text)

    def flush(self) -> None:
        """Flush the stream, or drop what it holds."""
        with self._dropping():
            self._stream.flush()

    @contextmanager
    def _dropping(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            with suppress(OSError):  # what is buffered must not fail once more at exit
                os.dup2(os.open(os.devnull, os.O_WRONLY), self._stream.fileno())
            if self._is_result and not isinstance(error, BrokenPipeError):
                raise WriteError(
                    f"Standard output cannot be written: {reason(error)}. Free some space or send it elsewhere."
                ) from error
