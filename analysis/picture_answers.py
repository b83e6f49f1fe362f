"""Pictures with questions and the answers of two models, as a table for report.html."""

import base64
import io
from collections.abc import Sequence
from html import escape
from pathlib import Path
from typing import Protocol

SHOWN = 24
_THUMBNAIL = 96


class Answered(Protocol):
    """One question, the file's answer, and what both models said."""

    @property
    def image(self) -> str: ...
    @property
    def question(self) -> str: ...
    @property
    def right(self) -> str: ...
    @property
    def reference(self) -> str: ...
    @property
    def candidate(self) -> str: ...


def answer_table(answers: Sequence[Answered]) -> str:
    """HTML with thumbnails: first the questions on which the two models differ, at most SHOWN in all."""
    differing = [one for one in answers if one.reference != one.candidate]
    same = [one for one in answers if one.reference == one.candidate]
    shown = (differing + same)[:SHOWN]
    rows = "".join(_row(one) for one in shown)
    caption = f"{len(differing)} of {len(answers)} answers differ; {len(shown)} questions shown, those first"
    head = "".join(f"<th>{name}</th>" for name in ("Picture", "Question", "Right", "Reference", "Candidate"))
    return f"<table><caption>{caption}</caption><thead><tr>{head}</tr></thead><tbody>{rows}</tbody></table>"


def _row(one: Answered) -> str:
    cells = [_thumbnail(Path(one.image)), escape(one.question), escape(one.right)]
    cells += [_marked(answer, one.right) for answer in (one.reference, one.candidate)]
    return "<tr>" + "".join(f"<td>{cell}</td>" for cell in cells) + "</tr>"


def _marked(answer: str, right: str) -> str:
    is_right = answer.strip().casefold() == right.strip().casefold()
    return f"{'✓' if is_right else '✗'} {escape(answer)}"


def _thumbnail(path: Path) -> str:
    from PIL import Image

    try:
        with Image.open(path) as image:
            small = image.convert("RGB")
            small.thumbnail((_THUMBNAIL, _THUMBNAIL))
    except OSError:
        return "no picture"
    data = io.BytesIO()
    small.save(data, "PNG")
    text = base64.b64encode(data.getvalue()).decode()
    return f'<img alt="{escape(path.name)}" width="{small.width}" src="data:image/png;base64,{text}">'
