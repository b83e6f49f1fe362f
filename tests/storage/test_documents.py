"""JSON documents: what is written is read again, and what is damaged is refused with place, reason and way out."""

import pytest

from dynquant.errors import PlanError
from dynquant.storage.documents import FrozenRecord, read_document


class Point(FrozenRecord):
    x: float
    name: str = "a"


def read(path, form=Point, **options):
    return read_document(path, form, "a point", "Measure again.", **options)


def test_a_document_comes_back(tmp_path):
    path = tmp_path / "folder" / "point.json"
    Point(x=0.1, name="π").save(path)
    assert read(path) == Point(x=0.1, name="π")


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"{", "Invalid JSON"),
        (b"\xff", "Invalid JSON"),
        (b"[" * 100_000, "Invalid JSON"),
        (b'{"x": "one"}', "`x` is 'one': Input should be a valid number"),
        (b'{"x": 1, "y": 2}', "`y` is not known to dynquant"),
    ],
)
def test_a_damaged_document_is_refused_by_its_first_wrong_field(tmp_path, content, reason):
    path = tmp_path / "point.json"
    path.write_bytes(content)
    with pytest.raises(PlanError) as refusal:
        read(path)
    message = str(refusal.value)
    assert f"{path} is not a point of dynquant ({reason}" in message and message.endswith("Measure again.")


def test_missing_files_and_impossible_values_are_refused_too(tmp_path):
    def refuse(point):
        raise ValueError(f"{point.x} is too small")

    path = tmp_path / "point.json"
    with pytest.raises(PlanError, match=r"cannot be read \(No such file or directory\)\. Measure again"):
        read(path)
    Point(x=1).save(path)
    with pytest.raises(PlanError, match=r"is not a point of dynquant \(1\.0 is too small\)\. Measure again"):
        read(path, check=refuse)
    path.write_text('[{"x": 1}, {}]')
    with pytest.raises(PlanError, match=r"\(`1\.x` is missing\)"):
        read(path, list[Point])
