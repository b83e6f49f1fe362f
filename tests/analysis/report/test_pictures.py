"""The table of pictures and answers in report.html."""

import re
from dataclasses import dataclass

import pytest

pytest.importorskip("PIL", reason="Pillow is not installed")
from PIL import Image

from dynquant.analysis.report.pictures import SHOWN, answer_table, picture_section


@dataclass(frozen=True)
class Answer:
    image: str
    question: str
    right: str
    reference: str
    candidate: str


@pytest.fixture
def picture(tmp_path):
    path = tmp_path / "train & coast.png"
    Image.new("RGB", (300, 150), "red").save(path)
    return str(path)


def rows_of(html: str) -> list[str]:
    return re.findall(r"<tr>(?:<td>).*?</tr>", html)


def test_losses_come_first_and_every_kind_is_counted(picture):
    answers = [
        Answer(picture, "same?", "a", "a", "A "), Answer(picture, "changed?", "a", "b", "c"),
        Answer(picture, "won?", "a", "b", "a"), Answer(picture, "lost?", "a", "a", "c"),
    ]  # fmt: skip
    html = answer_table(answers)
    assert "4 answers: 1 lost, 1 won, 1 changed and wrong, 1 the same; 4 shown" in html
    asked = [re.search(r"(\w+)\?", row)[1] for row in rows_of(html)]
    assert asked == ["lost", "won", "changed", "same"]
    assert 'class="right">✓ a' in rows_of(html)[0] and 'class="wrong">✗ c' in rows_of(html)[0]


def test_thumbnails_are_small_and_inside_the_page(picture):
    html = answer_table([Answer(picture, "<b>what</b>", "a", "a", "")])
    assert 'width="96" height="48" src="data:image/png;base64,' in html
    assert 'alt="train &amp; coast.png"' in html and "<b>" not in html and "✗ (nothing)" in html


def test_a_picture_that_is_gone_leaves_its_row(tmp_path):
    (row,) = rows_of(answer_table([Answer(str(tmp_path / "gone.png"), "what?", "a", "a", "b")]))
    assert "no picture" in row and "what?" in row


def test_long_files_are_cut(picture):
    html = answer_table([Answer(picture, "what?", "a", "a", "b")] * (SHOWN + 5))
    assert len(rows_of(html)) == SHOWN and f"{SHOWN + 5} answers" in html


def test_measures_stand_before_the_answers(picture):
    rows = [("bytes", "100", "40", "40%")]
    html = picture_section(rows, "2 samples", [Answer(picture, "what?", "a", "a", "b")])
    assert html.index(">Original<") < html.index("<td>40</td>") < html.index("what?")
    assert "pictures" not in picture_section(rows, "2 samples", [])
