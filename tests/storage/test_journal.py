"""The journal of an unfinished run: kept, cut short, and of another run."""

import pytest

from dynquant.errors import WriteError
from dynquant.storage.journal import Journal, differing_key

IDENTITY = {"tokens": 8, "shape": (1, 2)}
RECORDS = [{"stage": 0}, {"stage": 1, "moments": ["a"]}]


def written(path):
    with Journal(path) as journal:
        journal.start(IDENTITY, RECORDS[:1])
        journal.add(RECORDS[1])
    return path.read_bytes()


def test_the_next_run_goes_on(tmp_path):
    path = tmp_path / "run" / "journal"
    assert Journal(path).identity is None
    content = written(path)
    with Journal(path) as journal:
        assert journal.belongs_to(IDENTITY) and not journal.belongs_to({"tokens": 9}) and journal.records == RECORDS
        journal.start(IDENTITY, journal.records)
        assert path.read_bytes() == content
        journal.remove()
        assert not path.exists() and journal.records == []


def test_a_line_that_was_cut_short_does_not_count(tmp_path):
    path = tmp_path / "journal"
    content = written(path)
    for length in range(len(content)):
        path.write_bytes(content[:length])
        assert len(Journal(path).records) == max(0, content[: length + 1].count(b"}\n") - 1)


def test_a_file_of_something_else_is_no_journal(tmp_path):
    for text in ("", "not a journal\n", "[1]\n", '{"identity": 3}\n', '{\n "indented": "json"\n}\n'):
        path = tmp_path / "journal"
        path.write_text(text)
        journal = Journal(path)
        assert journal.identity is None
        for change in (journal.remove, lambda journal=journal: journal.start(IDENTITY, ())) if text else ():
            with pytest.raises(WriteError, match="is in the way"):
                change()
        assert path.read_text() == text


def test_what_no_run_can_have_written_does_not_count(tmp_path):
    for line in ("[" * 100_000, '{"a": ' * 100_000, '{"a": 1e999}', '{"a": NaN}', '{"a": "\\ud800"}', "5"):
        path = tmp_path / "journal"
        written(path)
        lines = path.read_text().splitlines()
        path.write_text("\n".join([*lines[:2], line, *lines[2:]]) + "\n")
        assert Journal(path).records == RECORDS[:1]
        path.write_text(line + "\n")
        assert Journal(path).identity is None
        path.unlink()


def test_differing_key():
    assert differing_key({"a": 1, "b": 2}, {"a": 1, "b": 3}) == "b"
    assert differing_key({"a": 1}, {"a": 1, "c": 2}) == "c"
    assert differing_key({"a": 1}, {"a": 1}) is None
