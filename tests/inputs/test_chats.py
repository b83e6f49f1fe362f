"""Examples for fine-tuning: the three forms, held-out lines, and one paragraph for every bad line."""

import json

import pytest
import torch

from dynquant.errors import DataError
from dynquant.inputs.chats import read_training_data
from dynquant.inputs.held_out import RUN_TOKENS, split_documents, without_repeats
from dynquant.inputs.text import CalibrationText

CHAT = {
    "messages": [
        {"role": "user", "content": "one"}, {"role": "assistant", "content": "two"},
        {"role": "user", "content": "three"}, {"role": "assistant", "content": "four"},
    ]
}  # fmt: skip


def written(path, *lines):
    path.write_text("\n".join(line if isinstance(line, str) else json.dumps(line) for line in lines) + "\n", "utf-8")
    return path


def test_every_reply_of_a_conversation_is_an_example(tmp_path):
    data = read_training_data(written(tmp_path / "d.jsonl", CHAT, "", CHAT))
    assert data.form == "messages" and data.groups == (1, 1, 3, 3)
    assert [len(row["prompt"]) for row in data.rows] == [1, 3, 1, 3]
    assert [row["completion"][0]["content"] for row in data.rows] == ["two", "four"] * 2


def test_prompts_completions_and_text(tmp_path):
    pairs = read_training_data(written(tmp_path / "p.jsonl", {"prompt": "", "completion": "a", "more": 1}))
    assert pairs.form == "completion" and pairs.rows == ({"prompt": "", "completion": "a"},)
    separated = '{"text": "a\u2028b"}'  # str.splitlines would cut this line
    text = read_training_data(written(tmp_path / "t.jsonl", separated, {"text": "c"}))
    assert text.form == "text" and [row["text"] for row in text.rows] == ["a\u2028b", "c"]


def test_lines_are_held_out_whole_and_copies_stay_together(tmp_path):
    lines = [{"text": f"line {i}"} for i in range(20)] * 2
    data = read_training_data(written(tmp_path / "d.jsonl", *lines))
    train, held = data.split(0.25, seed=0)
    assert len(train.rows) == 30 and len(held.rows) == 10
    assert not {row["text"] for row in train.rows} & {row["text"] for row in held.rows}
    again, _ = data.split(0.25, seed=0)
    other, _ = data.split(0.25, seed=1)
    assert again.rows == train.rows and other.rows != train.rows
    chats = read_training_data(written(tmp_path / "c.jsonl", CHAT, {"messages": CHAT["messages"][:2]}))
    for part in chats.split(0.1, seed=0):
        assert len(set(part.groups)) == 1


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        ((), r"holds no example"),
        (("", "  "), r"holds no example"),
        (({"text": "a"}, '{"text": '), r"d.jsonl, line 2 is not JSON"),
        (({"text": "a"}, "[1]"), r"line 2 is list, not an object"),
        (({"body": "a"},), r"line 1 has no usable field: it has `body`"),
        (({"text": " "},), r"line 1: `text` must be a text"),
        (({"prompt": "a"},), r"line 1: `completion` must be a text, but it is null"),
        (({"text": "a"}, {"prompt": "a", "completion": "b"}), r"line 2 has the field `completion`.*have `text`"),
        (({"messages": "hello"},), r"`messages` must be a list of turns"),
        (({"messages": [{"role": "user", "content": "a"}]},), r"no turn of `messages` is an answer"),
    ],
)
def test_bad_lines_are_named(tmp_path, lines, message):
    with pytest.raises(DataError, match=message):
        read_training_data(written(tmp_path / "d.jsonl", *lines))


def test_a_missing_file_and_a_single_example_are_refused(tmp_path):
    with pytest.raises(DataError, match="There is no file"):
        read_training_data(tmp_path / "none.jsonl")
    data = read_training_data(written(tmp_path / "d.jsonl", {"text": "a"}, {"text": "a"}))
    with pytest.raises(DataError, match="one example only"):
        data.split(0.1, seed=0)


def test_documents_are_held_out_whole_and_one_document_is_cut_at_a_line():
    train, held = split_documents(CalibrationText("t", ("a" * 50, "b" * 40, "c" * 6, "d" * 4)), 0.1)
    assert (train.documents, held.documents) == (("a" * 50, "b" * 40), ("c" * 6, "d" * 4))
    train, held = split_documents(CalibrationText("t", ("line\n" * 100,)), 0.1)
    assert train.documents[0] + held.documents[0] == "line\n" * 100
    assert 40 <= len(held.documents[0]) <= 60 and held.documents[0].startswith("\n")
    with pytest.raises(DataError, match="one document without a line break"):
        split_documents(CalibrationText("t", ("x" * 1000,)), 0.1)


def test_windows_that_repeat_a_passage_are_left_out():
    windows = torch.arange(4 * 100).reshape(4, 100)
    passage = torch.cat([torch.full((50,), 7), windows[2, 30 : 30 + RUN_TOKENS], torch.full((50,), 7)])
    short = torch.cat([torch.full((50,), 7), windows[0, 30 : 29 + RUN_TOKENS], torch.full((50,), 7)])
    assert torch.equal(without_repeats(windows, [passage, short]), windows[[0, 1, 3]])
    assert torch.equal(without_repeats(windows, []), windows)
