"""Pictures with questions and the answers of two models, as a table for report.html."""

import base64
import io
from collections.abc import Sequence
from html import escape
from pathlib import Path

from dynquant.analysis.report.tables import html_table
from dynquant.evaluation.report import Answer
from dynquant.evaluation.tasks.multiple_choice import is_right

SHOWN = 24
_THUMBNAIL = 96
_KINDS = ("lost", "won", "changed and wrong", "the same")


def picture_section(rows: Sequence[tuple[str, str, str, str]], title: str, answers: Sequence[Answer]) -> str:
    """HTML: a before/after table of `rows` (measure, original, plan, comparison), and the answers if there are any."""
    before_after = html_table(title, ("Measure", "Original", "This plan", "Comparison"), rows)
    return before_after + (answer_table(answers) if answers else "")


def answer_table(answers: Sequence[Answer]) -> str:
    """HTML with thumbnails, at most SHOWN: what quantization lost first, then what it won, then what else differs."""
    ordered = sorted(answers, key=_kind)
    counts = [sum(_kind(answer) == kind for answer in answers) for kind in range(len(_KINDS))]
    told = ", ".join(f"{count} {name}" for count, name in zip(counts, _KINDS, strict=True) if count)
    caption = f"{len(answers)} answers: {told}; {min(SHOWN, len(answers))} shown, in this order"
    heads = ("Picture", "Question", "Right answer", "Original", "This plan")
    head = "".join(f'<th scope="col">{name}</th>' for name in heads)
    rows = "\n".join(map(_row, ordered[:SHOWN]))
    return (
        f'<div class="scroll pictures" tabindex="0" role="region" aria-label="Answers"><table>'
        f"<caption>{escape(caption)}</caption><thead><tr>{head}</tr></thead><tbody>\n{rows}\n</tbody></table></div>"
    )


def _kind(answer: Answer) -> int:
    """Index into _KINDS."""
    before, after = is_right(answer.reference, answer.right), is_right(answer.candidate, answer.right)
    if before != after:
        return 0 if before else 1
    return 3 if before or answer.reference == answer.candidate else 2


def _row(answer: Answer) -> str:
    cells = [_thumbnail(Path(answer.image)), escape(answer.question), escape(answer.right)]
    for text in (answer.reference, answer.candidate):
        kind, mark = ("right", "✓") if is_right(text, answer.right) else ("wrong", "✗")
        cells.append(f'<span class="{kind}">{mark} {escape(text) or "(nothing)"}</span>')
    return "<tr>" + "".join(f"<td>{cell}</td>" for cell in cells) + "</tr>"


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
    size = f'width="{small.width}" height="{small.height}"'
    return f'<img alt="{escape(path.name)}" {size} src="data:image/png;base64,{text}">'
