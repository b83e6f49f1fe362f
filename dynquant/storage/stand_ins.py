"""Recognizes what lies where a file was never fetched: a Git LFS pointer, or a page that a server sent instead."""

from pathlib import Path

from dynquant.errors import CheckpointError

_POINTER = (
    "a Git LFS pointer, which only names the file", "Run `git lfs pull` in its directory, or download the file"
)  # fmt: skip
_ANSWER = ("what a web server said instead of sending the file", "Log in if the model asks for it, and fetch it again")
_ANSWERS = (b"<!doctype html", b"<html", b"entry not found", b"access to model", b"invalid username or password")
_STAND_INS = {b"version https://git-lfs": _POINTER, **dict.fromkeys(_ANSWERS, _ANSWER)}
_LONGEST = max(map(len, _STAND_INS))


def stand_in(start: bytes) -> tuple[str, str] | None:
    """Return what a file that begins like this is instead of itself, and the way out; None for any other."""
    start = start[: _LONGEST + 8].lstrip().lower()
    return next((meaning for prefix, meaning in _STAND_INS.items() if start.startswith(prefix)), None)


def refuse_stand_in(path: Path, *, is_text: bool = False) -> None:
    """Raise CheckpointError for a file in whose place something else lies; a text may be a page."""
    try:
        with path.open("rb") as file:
            meaning = stand_in(file.read(_LONGEST + 8))
    except OSError:
        return  # what reads the file will say so
    if meaning is not None and not (is_text and meaning is _ANSWER):
        raise CheckpointError(f"{path} is {meaning[0]}. {meaning[1]}.")
