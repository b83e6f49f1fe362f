"""Files that people give: every form is read alike on every way in, and what cannot be read is refused."""

import csv
import gzip
import json
import os
from pathlib import Path

import pytest

from dynquant.calibration.run import text_inputs
from dynquant.errors import DataError, DynquantError, EvaluationError, StatsError
from dynquant.evaluation.runners import open_encoder
from dynquant.families.open import open_model
from dynquant.inputs.chats import read_training_data
from dynquant.inputs.pictures import read_samples
from dynquant.inputs.questions import load_questions
from dynquant.inputs.text import CalibrationText, evaluation_windows, pack_windows, read_text
from dynquant.running.load import load_tokenizer
from tests.helpers.commands import run

DOCUMENTS = ['Zwölf Boxkämpfer\u2028jagen, "quer"\nüber', "NA", "12", " and some more text to be read here"]


def as_lines(records, path: Path) -> None:
    path.write_text("\n".join(map(json.dumps, records)) + "\n", "utf-8")


def as_array(records, path: Path) -> None:
    path.write_text(json.dumps(records, ensure_ascii=False, indent=1), "utf-8")


def as_csv(records, path: Path) -> None:
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, ["id", *records[0]])
        writer.writeheader()
        writer.writerows({"id": i} | record for i, record in enumerate(records))


def as_parquet(records, path: Path) -> None:
    from datasets import Dataset

    Dataset.from_list([{"id": i} | record for i, record in enumerate(records)]).to_parquet(path)


def with_bom(records, path: Path) -> None:
    as_lines(records, path)
    path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes())


def gzipped(write):
    def written(records, path: Path) -> None:
        write(records, path)
        path.write_bytes(gzip.compress(path.read_bytes()))

    return written


TABLES = {"t.csv": as_csv, "t.CSV": as_csv, "t.csv.gz": gzipped(as_csv)}
FORMS = {
    "t.JSONL": as_lines, "t.ndjson": as_lines, "t.NDJson": as_lines, "t.json": as_array, "lines.json": as_lines,
    "array.jsonl": as_array, "bom.jsonl": with_bom, "bom.json": with_bom, "t.jsonl.gz": gzipped(as_lines),
    "t.JSON.GZ": gzipped(as_array), "t.parquet": as_parquet, "t.Parquet": as_parquet,
}  # fmt: skip


@pytest.fixture(scope="module")
def encode(small_moe):
    with open_encoder(small_moe) as encoder:
        yield encoder


@pytest.mark.parametrize("name", FORMS | TABLES)
def test_every_form_of_a_text_gives_the_same_tokens(name, encode, small_moe, tmp_path):
    (FORMS | TABLES)[name]([{"text": document} for document in DOCUMENTS], tmp_path / name)
    as_lines([{"text": document} for document in DOCUMENTS], tmp_path / "plain.jsonl")
    assert sorted(read_text(tmp_path / name).documents) == sorted(DOCUMENTS)
    model = open_model(small_moe)
    windows, expected = (
        text_inputs(model, tmp_path / file, tokens=32, window=16).windows for file in (name, "plain.jsonl")
    )
    assert windows.equal(expected) and windows.numel()
    scored = evaluation_windows(tmp_path / name, encode, window=16, max_tokens=999)
    assert [batch.ids[0].tolist() for batch in scored] == [
        ids.tolist() for ids in load_ids(encode, "\n\n".join(DOCUMENTS)).split(16) if len(ids) > 1
    ]
    assert [row["text"] for row in read_training_data(tmp_path / name).rows] == DOCUMENTS


def load_ids(encode, text: str):
    import torch

    return torch.tensor(encode(text, add_special=False))


@pytest.mark.parametrize("name", FORMS)
def test_every_form_holds_chats_questions_and_samples(name, tmp_path):
    def written(stem: str, records) -> Path:
        FORMS[name](records, tmp_path / f"{stem}{name}")
        return tmp_path / f"{stem}{name}"

    parts = [{"type": "text", "text": "one "}, {"type": "text", "text": "two"}]
    turns = [{"role": "user", "content": parts}, {"role": "assistant", "content": [{"type": "text", "text": "yo"}]}]
    chats = written("chats", [{"messages": turns}])
    assert read_text(chats).documents == ("user: one two\n\nassistant: yo",)
    assert read_training_data(chats).rows[0]["prompt"] == [{"role": "user", "content": "one two"}]
    asked = {"subject": "s", "question": "q", "choices": ["a", "b"], "answer": 1}
    assert load_questions(written("asked", [asked]))[0].model_dump(mode="json") == asked
    samples = read_samples(written("samples", [{"images": ["a.png"], "text": "x"}])).samples
    assert [(sample.images[0].name, sample.text) for sample in samples] == [("a.png", "x")]


def test_plain_text_loses_its_byte_order_mark(tmp_path):
    for name in ("a.txt", "a.md", "wiki.test.raw", "README"):
        (tmp_path / name).write_bytes(b"\xef\xbb\xbfplain\r\ntext")
        assert read_text(tmp_path / name).documents == ("plain\ntext",)
    (tmp_path / "a.txt.gz").write_bytes(gzip.compress(b"plain", mtime=0))
    assert read_text(tmp_path / "a.txt.gz").documents == ("plain",)


def test_turns_without_content_are_left_out(tmp_path):
    turns = [
        {"role": "user", "content": "hi"}, {"role": "assistant", "content": None, "tool_calls": []},
        {"role": "tool", "content": [{"type": "text", "text": None}, {"type": "text", "text": "4"}]},
        {"role": "assistant", "content": "four"},
    ]  # fmt: skip
    as_lines([{"messages": turns}], tmp_path / "t.jsonl")
    assert read_text(tmp_path / "t.jsonl").documents == ("user: hi\n\ntool: 4\n\nassistant: four",)
    (row,) = read_training_data(tmp_path / "t.jsonl").rows
    assert [turn["content"] for turn in row["prompt"]] == ["hi", "4"]
    as_lines([{"images": ["a.png"], "messages": turns}], tmp_path / "pictures.jsonl")
    (sample,) = read_samples(tmp_path / "pictures.jsonl").samples
    assert [turn["content"][-1]["text"] for turn in sample.turns] == ["hi", "4", "four"]


def chat(content) -> bytes:
    turns = [{"role": "user", "content": "q"}, {"role": "assistant", "content": content}]
    return json.dumps({"messages": turns, "images": ["a.png"]}).encode()


BAD = {
    "a.xlsx": (b"PK", "is not known from its ending `.xlsx`"),
    "a.tsv": (b"text\nx", "ending `.tsv`"),
    "a.jsonl.zst": (b"x", "ending `.zst`"),
    "a.jsonl": ('{"text": "ab"}'.encode("utf-16"), "is text in UTF-16. Convert it: iconv -f UTF-16 -t UTF-8 "),
    "b.jsonl": ('{"text": "\u00e9"}'.encode("latin-1"), "cannot be read as UTF-8"),
    "c.jsonl": (b'{"text": "\\ud83d x"}', "line 1 is not JSON: it holds half of a surrogate pair"),
    "d.jsonl": (b"\n" + b'{"text": "x"}{', "line 2 is not JSON"),
    "e.jsonl": (b"[" * 100_000, "nested too deeply"),
    "f.jsonl": (b'{"text": "\xed\xa0\xbd"}', "cannot be read as UTF-8"),
    "g.json": (b'[{"text": "x"}, 5]', "entry 2"),
    "h.jsonl": (b"5", "line 1"),
    "i.jsonl.gz": (gzip.compress(b'{"text": "x"}' * 999)[:-9], "cannot be read"),
    "j.jsonl.gz": (b'{"text": "x"}', "cannot be read: Not a gzipped file"),
    "k.parquet": (b"PAR1 oops", "is not a parquet file"),
    "m.csv": (b'text\n"x" y\n', "is not csv"),
    "n.csv": (b"text\nx,y\n", "row 1 has not the 1 values"),
    "x.csv": (b"id;text\n1;x\n", "has ';' between its columns. Save it with commas."),
    "o.csv": (b"text,text\nx,y\n", "names a column twice"),
    "p.jsonl": (b'{"text": "x", "text": "y"}', "'text' is named twice"),
    "q.jsonl": (b'{"text": 5}', "line 1"),
    "r.jsonl": (chat(5), "`content` must be a text or a list of parts"),
    "s.jsonl": (chat([{"type": "text", "text": 5}]), "only parts of text"),
    "t.jsonl": (b'{"messages": {"role": "user"}, "images": ["a.png"]}', "messages"),
    "u.jsonl": (b'{"messages": [null], "images": ["a.png"]}', "`role` and `content`"),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
@pytest.mark.parametrize("read", [read_text, "eval", read_training_data, load_questions, read_samples])
def test_what_cannot_be_read_is_refused_on_every_way_in(name, read, encode, tmp_path):
    content, reason = BAD[name]
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DynquantError) as refused:
        if read == "eval":
            evaluation_windows(tmp_path / name, encode, window=16, max_tokens=99)
        else:
            read(tmp_path / name)
    says_otherwise = {load_questions: "ghmnqrstu", read_samples: "mnq"}.get(read, "")
    assert name[0] in says_otherwise or reason in str(refused.value), refused.value
    assert name in str(refused.value)


def test_parts_that_are_no_text_are_refused(encode, tmp_path):
    (tmp_path / "t.jsonl").write_bytes(chat([{"type": "image", "image": "a.png"}]))
    for read in (read_text, read_training_data, lambda path: evaluation_windows(path, encode, window=9, max_tokens=9)):
        with pytest.raises(DynquantError, match=r"only parts of text.*--data FILE"):
            read(tmp_path / "t.jsonl")


NO_PROSE = {
    '{"id": 1, "text": "x"}\n': "holds JSON. Rename it to .jsonl or .json.",
    '[{"messages": []},': "holds JSON. Rename it",
    '[\n  {\n    "id": 1,\n    "text": "x"\n  }\n]\n': "holds JSON. Rename it to .jsonl or .json.",
    '{"prompt": "a", "n": {}}\n{"prompt": "b"}\n': '"text" (it has `n`, `prompt`)',
    '\n{\n "content": "a"\n}\n': "(it has `content`)",
    '["one", "two"]': "into a line of a .jsonl file",
    "{'text': 'x'}\n{'text': 'y'}\n": "records as Python prints them",
    'id,text\n1,"a, b"\n2,c\n': "holds a table. Save it with commas as .csv.",
    "prompt\tlabel\na\tb\n": "(it has prompt, label)",
    "Question;Answer\na;b\n": "(it has question, answer)",
    "{\\rtf1\\ansi x}": "is a rich text document",
    "%PDF-1.7\nx": "is a PDF document",
    "x\0y": "zero bytes",
    "\ufeffx".encode("utf-16-le"): "is text in UTF-16",
    gzip.compress(b"x", mtime=0): "is a gzip archive",
    "": "is empty",
}
PROSE = (
    "GGUF is a binary file format for language models.",
    "BZhang and others (2019) say so.",
    "PAR1 and PAR2 are regions of a chromosome.",
    "%PDF-1.7 is the first line of such a file.",
    "{\\rtfm} is what they say.",
    '[{"role": "user", "content": "hi"}] is what a chat looks like.',
    '{"k": 1}, where k is the key, is the smallest configuration.',
    '{"a": 1}{% if x %} is a template.',
    '[{"a": 1}].forEach(x => x);',
    "{'text': 'a'} is a dict in Python.",
    "Input, output\nGarbage in, garbage out\n",
    "[see here](https://a.b), he said, and [there](c)",
    "[1] A note.\n[2] Another.",
    "[[nodiscard]] int f();\n",
    "{\n  int x = 1;\n}\n",
    '{"a": 1} is an object in JSON.',
    "[x for x in y]\n",
    '["a"] + b\n',
    "Text, he said\nis a word, and\nso is this, too\n",
    "title: x\n\nbody",
    "a | b\n",
    "| id | text |\n|--|--|\n| 1 | x |\n",
    "Title, answer\nThis is a poem\n",
    "{{ text }}\n",
    "{'a': b}\n",
)


@pytest.mark.parametrize("content", NO_PROSE)
def test_data_under_a_name_of_plain_text_is_refused_by_name(content, encode, tmp_path):
    for name in ("a.txt", "b.md", "c"):
        (tmp_path / name).write_bytes(content if isinstance(content, bytes) else content.encode())
        with pytest.raises(StatsError) as refused:
            read_text(tmp_path / name)
        assert NO_PROSE[content] in str(refused.value) and f"{name} " in str(refused.value)
        with pytest.raises(EvaluationError):
            evaluation_windows(tmp_path / name, encode, window=9, max_tokens=9)


@pytest.mark.parametrize("content", PROSE)
def test_prose_and_code_are_no_data(content, tmp_path):
    (tmp_path / "a.txt").write_text(content)
    assert read_text(tmp_path / "a.txt").documents == (content,)


@pytest.mark.parametrize("read", [read_text, "eval", read_training_data, load_questions, read_samples])
def test_what_is_no_file_is_refused_as_that(read, encode, tmp_path):
    read_one = (lambda path: evaluation_windows(path, encode, window=9, max_tokens=9)) if read == "eval" else read
    (tmp_path / "folder.jsonl").mkdir()
    os.mkfifo(tmp_path / "pipe.jsonl")
    for path in (Path(os.devnull), tmp_path / "pipe.jsonl"):
        with pytest.raises(DynquantError, match=f"{path.name} is a device or pipe"):
            read_one(path)
    with pytest.raises(DynquantError, match=r"folder\.jsonl"):
        read_one(tmp_path / "folder.jsonl")


def test_a_record_without_text_is_named(tmp_path):
    (tmp_path / "t.jsonl").write_text('{"text": "x"}\n{"text": null}\n')
    with pytest.raises(StatsError, match=r't\.jsonl, line 2 has null as "text", which must be a string'):
        read_text(tmp_path / "t.jsonl")


@pytest.mark.parametrize("answer", ["true", "1.0", '"1"', "null"])
def test_only_a_whole_number_is_the_index_of_an_answer(answer, tmp_path):
    question = '{"subject": "s", "question": "q", "choices": ["a", "1"], "answer": '
    (tmp_path / "t.jsonl").write_text(f"{question}1}}\n{question}{answer}}}\n")
    with pytest.raises(EvaluationError, match=r"t\.jsonl, line 2 is not a question \(`answer` is "):
        load_questions(tmp_path / "t.jsonl")


def test_questions_of_a_data_set_are_checked(tmp_path, monkeypatch):
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr(datasets, "load_dataset", lambda *_, **__: [{"question": "q"}])
    with pytest.raises(EvaluationError, match=r"owner/name, row 1 is not a question \(`subject` is missing\)"):
        load_questions("owner/name")


def test_an_evaluation_text_may_be_a_data_set(encode, tmp_path):
    (tmp_path / "set").mkdir()
    as_lines([{"text": "one"}, {"text": "two"}], tmp_path / "set" / "train.jsonl")
    (batch,) = evaluation_windows(tmp_path / "set", encode, window=16, max_tokens=99)
    assert batch.ids[0].tolist() == encode("one\n\ntwo", add_special=False)
    with pytest.raises(EvaluationError, match=r"There is no text .*none\.parquet"):
        evaluation_windows(tmp_path / "none.parquet", encode, window=16, max_tokens=99)


def test_no_more_of_a_long_text_is_encoded_than_is_needed(small_moe, encode, tmp_path):
    tokenizer, longest = load_tokenizer(small_moe), 0
    text = read_text(None).documents[0]
    long_text = text * 100

    def counted(part: str, **options):
        nonlocal longest
        longest = max(longest, len(part))
        return tokenizer(part, **options)

    counted.bos_token_id = counted.eos_token_id = None
    windows = pack_windows(CalibrationText("t", (long_text, long_text)), counted, window=32, max_tokens=64)
    assert windows.flatten().tolist() == tokenizer(text)["input_ids"][:64] and longest < 5000
    (tmp_path / "t.txt").write_text(long_text)
    batches = evaluation_windows(tmp_path / "t.txt", encode, window=64, max_tokens=512)
    ids = [token for batch in batches for token in batch.ids[0].tolist()]
    assert ids == encode(long_text, add_special=False)[:512]
    blanks = " " * 100_000 + text
    assert pack_windows(CalibrationText("t", (blanks,)), tokenizer, window=999, max_tokens=999).equal(
        pack_windows(CalibrationText("t", (blanks[:200_000],)), tokenizer, window=999, max_tokens=999)
    )


def test_windows_beyond_the_context_and_no_tokens_are_refused(small_moe, tmp_path):
    model = open_model(small_moe)
    too_long = model.hyper.n_ctx + 1
    assert model.hyper.n_ctx == json.loads((small_moe / "config.json").read_text())["max_position_embeddings"]
    with pytest.raises(StatsError, match=f"{too_long:,} tokens at once do not fit the context of textbook-moe-16m"):
        text_inputs(model, None, tokens=2 * too_long, window=too_long)
    assert text_inputs(model, None, tokens=100, window=too_long).windows.shape == (1, 100)
    for tokens, window in ((0, 512), (-5, 512), (512, 0), (512, 1)):
        with pytest.raises(StatsError, match="cannot be"):
            text_inputs(model, None, tokens=tokens, window=window)


def test_few_tokens_are_warned_about(tiny_moe, tmp_path):
    (tmp_path / "t.JSONL").write_text('{"text": "just four words"}')
    call = ("calibrate", tiny_moe, "--calibration", tmp_path / "t.JSONL", "-o", tmp_path / "s.safetensors")
    done = run(*call, "--tokens", 1000)
    assert done.returncode == 0 and "calibrating on only 3 tokens of t.JSONL" in done.stderr
    assert "t.JSONL has 3 tokens, fewer than the 1,000 of --tokens" in done.stderr
    done = run("calibrate", tiny_moe, "--tokens", 0, "-o", tmp_path / "none.safetensors")
    assert done.returncode != 0 and "tokens" in done.stderr and not (tmp_path / "none.safetensors").exists()


def test_data_of_a_kind_is_refused_as_that_kind(tmp_path):
    (tmp_path / "t.jsonl").write_text("{")
    for read, kind in ((read_text, StatsError), (read_training_data, DataError), (load_questions, EvaluationError)):
        with pytest.raises(kind, match="line 1 is not JSON"):
            read(tmp_path / "t.jsonl")
