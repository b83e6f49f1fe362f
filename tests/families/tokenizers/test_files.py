"""All files that speak of a tokenizer: the GGUF gets what transformers makes of them, or they are refused."""

import json
import shutil
import warnings
from pathlib import Path

import pytest
from tokenizers import processors

from dynquant.errors import CheckpointError
from dynquant.evaluation.runners import describe_model, tokenizer_notes
from dynquant.families.open import open_config
from dynquant.running.load import load_tokenizer
from tests.families.tokenizers.test_tokenizer import (
    CONFIG,
    QWEN2,
    fast_tokenizer,
    keys,
    llama_cpp,
    save,
    sentencepiece_model,
    train,
)
from tests.helpers.tiny_models import write_f32

__all__ = ["llama_cpp", "sentencepiece_model"]
IM_START, IM_END, TOOL, SIZE = "<|im_start|>", "<|im_end|>", "<tool>", 900


def token(text: str, *, special: bool = True) -> dict[str, object]:
    return {
        "content": text, "lstrip": False, "rstrip": False, "single_word": False, "normalized": False,
        "special": special,
    }  # fmt: skip


DECODER = {"0": token("<|endoftext|>"), "900": token(IM_START), "901": token(IM_END), "902": token(TOOL, special=False)}
NAMED = {"eos_token": {"content": IM_END, "lstrip": False}, "additional_special_tokens": [IM_START]}
LAYOUTS = {
    "added_tokens_decoder": {"tokenizer_config": {"eos_token": IM_END, "added_tokens_decoder": DECODER}},
    "added_tokens.json": {
        "tokenizer_config": {"eos_token": IM_END}, "added_tokens": {IM_START: 900, IM_END: 901, TOOL: 902},
    },
    "special_tokens_map.json": {"added_tokens": {IM_START: 900, IM_END: 901}, "special_tokens_map": NAMED},
    "map before config": {"tokenizer_config": {"eos_token": "<|endoftext|>"}, "special_tokens_map": NAMED},
    "names alone": {"tokenizer_config": {"eos_token": IM_END, "pad_token": "[PAD]", "bos_token": IM_START}},
    "named in a table": {"tokenizer_config": {"eos_token": IM_END, "extra_special_tokens": {"image_token": "<image>"}}},
    "a word as EOS": {"tokenizer_config": {"eos_token": "~"}},
}  # fmt: skip


@pytest.fixture(scope="module")
def trained():
    return train((QWEN2,))


@pytest.fixture
def layout(trained, tmp_path):
    """Write a directory whose vocabulary has 900 tokens and whose embedding has six rows more."""

    def written(files: dict[str, object], **config: object) -> Path:
        save(trained, tmp_path, vocab_size=SIZE + 6, model_type="qwen2", bos_token_id=None, eos_token_id=None, **config)
        for name, content in files.items():
            (tmp_path / f"{name}.json").write_text(json.dumps(content))
        return tmp_path

    return written


def agrees_with_transformers(directory: Path) -> dict[str, object]:
    """Return the keys of the GGUF, whose tokens and EOS are those of transformers."""
    written, tokenizer = keys(directory), load_tokenizer(directory)
    names = written["tokenizer.ggml.tokens"]
    for text, token_id in tokenizer.get_vocab().items():
        assert names[token_id] == text
    assert sum(not name.startswith("[PAD9") for name in names) == len(tokenizer)
    assert written.get("tokenizer.ggml.eos_token_id") == tokenizer.eos_token_id
    assert describe_model(directory).num_named_tokens == len(tokenizer)
    gguf = write_f32(open_config(directory), directory / "vocabulary.gguf", with_tensors=False)
    assert tokenizer_notes(directory, gguf) == []
    return written


@pytest.mark.filterwarnings("ignore:.*name different EOS tokens")
@pytest.mark.parametrize("name", LAYOUTS)
def test_added_tokens_of_every_file_get_the_ids_of_transformers(name, layout):
    written = agrees_with_transformers(layout(LAYOUTS[name]))
    eos = written["tokenizer.ggml.eos_token_id"]
    assert written["tokenizer.ggml.token_type"][eos] == 3  # control
    if name != "a word as EOS":
        assert eos >= SIZE and written["tokenizer.ggml.tokens"][eos] == IM_END


SPM_NAMES = {"tokenizer_class": "LlamaTokenizer", "add_bos_token": True, "bos_token": "<s>", "eos_token": IM_END}
SPM_ADDED = {IM_END: 701, IM_START: 700}


@pytest.mark.parametrize("name", ["added_tokens.json", "added_tokens_decoder", "special_tokens_map.json", "both files"])
def test_the_old_sentencepiece_layout_keeps_its_added_tokens(name, sentencepiece_model, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({**CONFIG, "vocab_size": 705, "eos_token_id": None}))
    shutil.copy(sentencepiece_model, tmp_path / "tokenizer.model")
    decoder = {"0": token("<unk>"), "1": token("<s>"), "2": token("</s>"), "700": token(IM_START), "701": token(IM_END)}
    files = {
        "added_tokens.json": {"tokenizer_config": SPM_NAMES, "added_tokens": SPM_ADDED},
        "added_tokens_decoder": {"tokenizer_config": {**SPM_NAMES, "added_tokens_decoder": decoder}},
        "special_tokens_map.json": {
            "tokenizer_config": {**SPM_NAMES, "eos_token": None}, "added_tokens": SPM_ADDED,
            "special_tokens_map": NAMED,
        },
        "both files": {"tokenizer_config": {**SPM_NAMES, "add_bos_token": None}, "added_tokens": SPM_ADDED},
    }[name]  # fmt: skip
    if name == "both files":
        from sentencepiece import SentencePieceProcessor

        processor = SentencePieceProcessor(model_file=str(sentencepiece_model))
        fast_tokenizer(processor).save(str(tmp_path / "tokenizer.json"))
    for file, content in files.items():
        (tmp_path / f"{file}.json").write_text(json.dumps(content))
    written, tokenizer = keys(tmp_path), load_tokenizer(tmp_path)
    assert written["tokenizer.ggml.tokens"][700:703] == [IM_START, IM_END, "[PAD702]"]
    assert written["tokenizer.ggml.eos_token_id"] == tokenizer.eos_token_id == 701
    assert written["tokenizer.ggml.bos_token_id"] == tokenizer.bos_token_id == 1
    assert written.get("tokenizer.ggml.add_bos_token") is (tokenizer("a")["input_ids"][0] == 1)


def test_tokenizer_json_goes_before_another_tokenizer_model(sentencepiece_model, tmp_path):
    from sentencepiece import SentencePieceProcessor

    config = {**CONFIG, "vocab_size": 701, "bos_token_id": 1, "eos_token_id": 2}
    (tmp_path / "config.json").write_text(json.dumps(config))
    shutil.copy(sentencepiece_model, tmp_path / "tokenizer.model")
    fast_tokenizer(SentencePieceProcessor(model_file=str(sentencepiece_model))).save(str(tmp_path / "tokenizer.json"))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        alike = keys(tmp_path)["tokenizer.ggml.tokens"]
    content = json.loads((tmp_path / "tokenizer.json").read_text())
    vocab = content["model"]["vocab"]
    first, second = alike[690], alike[691]
    vocab[first], vocab[second], vocab["\u2581zz"] = 691, 690, 700
    (tmp_path / "tokenizer.json").write_text(json.dumps(content))
    with pytest.warns(UserWarning, match=r"tokenizer\.model and tokenizer\.json differ .* the id 690.*json is taken"):
        tokens = keys(tmp_path)["tokenizer.ggml.tokens"]
    assert tokens[690:692] == [second, first] and tokens[700] == "\u2581zz"


@pytest.mark.parametrize(
    ("files", "message"),
    [
        (
            {"tokenizer_config": {"added_tokens_decoder": {"900": token(IM_END)}}, "added_tokens": {IM_END: 901}},
            r"added_tokens\.json gives .* the id 901, but .*tokenizer_config\.json gives the id 900",
        ),
        (
            {"tokenizer_config": {"added_tokens_decoder": {"0": token("<other>")}}},
            r"tokenizer_config\.json gives .*'<other>' the id 0, but .*tokenizer\.json gives that id to '<\|endo",
        ),
        ({"added_tokens": {IM_END: 1000}}, r"'<\|im_end\|>' the id 1000, but the embedding has 906 rows"),
        ({"added_tokens": {"!": 903}}, r"the token '!' has two ids"),
    ],
)
def test_ids_that_contradict_each_other_are_refused(files, message, layout):
    with pytest.raises(CheckpointError, match=message):
        open_config(layout(files))


def test_an_eos_without_a_row_is_refused(trained, tmp_path):
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"eos_token": IM_END}))
    with pytest.raises(
        CheckpointError, match=r"names the EOS token '<\|im_end\|>', to which no file gives an id below"
    ):
        open_config(save(trained, tmp_path))


@pytest.mark.parametrize("adds", [True, False])
def test_settings_of_bos_that_differ_are_said(adds, layout):
    """The GGUF gets what tokenizer_config.json states, as from llama.cpp's converter."""
    names = {"bos_token": "<|endoftext|>", "eos_token": "<|endoftext|>"}
    tokenizer = train((QWEN2,))
    if not adds:
        tokenizer.post_processor = processors.TemplateProcessing(
            single="<|endoftext|> $A", special_tokens=[("<|endoftext|>", 0)]
        )
    directory = layout({"tokenizer_config": {**names, "add_bos_token": adds}})
    tokenizer.save(str(directory / "tokenizer.json"))
    other = "does not add" if adds else "adds"
    with pytest.warns(
        UserWarning, match=rf"`add_bos_token` of tokenizer_config\.json is {adds}, .*json {other} the BOS"
    ):
        assert keys(directory)["tokenizer.ggml.add_bos_token"] is adds
    assert (load_tokenizer(directory)("a")["input_ids"][0] == 0) is not adds
    (directory / "tokenizer_config.json").write_text(json.dumps(names))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert keys(directory)["tokenizer.ggml.add_bos_token"] is not adds


def test_a_template_that_llama_cpp_lacks_is_said(layout):
    tokenizer = train((QWEN2,))
    tokenizer.add_special_tokens([IM_START, IM_END])
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"<|endoftext|> {IM_START} $A {IM_START}", special_tokens=[("<|endoftext|>", 0), (IM_START, 900)]
    )
    directory = layout({"tokenizer_config": {"bos_token": "<|endoftext|>", "eos_token": IM_END}})
    tokenizer.save(str(directory / "tokenizer.json"))
    with pytest.warns(UserWarning) as said:
        written = keys(directory)
    before, behind = (str(warning.message).split(" puts ")[1] for warning in said)
    assert before.startswith("<|endoftext|> <|im_start|> before every text, which is not the BOS token alone")
    assert behind.startswith("<|im_start|> behind every text, which is not the EOS token alone")
    assert (written["tokenizer.ggml.add_bos_token"], written["tokenizer.ggml.add_eos_token"]) == (False, False)
    assert written["tokenizer.ggml.eos_token_id"] == 901


def test_the_chat_template_is_that_of_transformers(layout):
    directory = layout({"tokenizer_config": {"eos_token": "<|endoftext|>", "chat_template": "old"}})
    assert keys(directory)["tokenizer.chat_template"] == "old"
    (directory / "chat_template.jinja").write_text("new", "utf-8")
    with pytest.warns(UserWarning, match=r"chat_template\.jinja and tokenizer_config\.json differ; the first is taken"):
        assert keys(directory)["tokenizer.chat_template"] == "new" == load_tokenizer(directory).chat_template


WRONG = {
    "tokenizer.json": [
        ("model", 5), ("model", []), ("model.vocab", []), ("model.vocab.!", "1"), ("model.vocab.!", -1),
        ("model.vocab.!", 1 << 40), ("model.vocab", {}), ("model.merges", {}), ("model.merges.0", 5),
        ("model.merges.0", "x"), ("model.merges.0", ["a"]), ("model.continuing_subword_prefix", "xy"),
        ("model.ignore_merges", 5), ("added_tokens", 5), ("added_tokens.0", "x"), ("added_tokens.0.id", "0"),
        ("added_tokens.0.id", None), ("added_tokens.0.content", 5), ("added_tokens.0.special", "yes"),
        ("normalizer", []), ("normalizer", {"type": "Sequence", "normalizers": [5]}), ("pre_tokenizer", "x"),
        ("pre_tokenizer.pretokenizers", {}), ("pre_tokenizer.pretokenizers.0", 5),
        ("pre_tokenizer.pretokenizers.0.pattern", None), ("pre_tokenizer.pretokenizers.0.pattern", {"Regex": 5}),
        ("post_processor", []), ("post_processor", {"type": "TemplateProcessing", "single": [5]}),
        ("post_processor", {"type": "TemplateProcessing", "single": [{"SpecialToken": {"id": "x"}}]}),
    ],
    "tokenizer_config.json": [
        ("eos_token", 5), ("eos_token", {"content": 5}), ("bos_token", ["x"]), ("add_bos_token", "yes"),
        ("added_tokens_decoder", []), ("added_tokens_decoder", {"x": token("a")}),
        ("added_tokens_decoder", {"900": "x"}), ("added_tokens_decoder", {"900": {"content": None}}),
        ("additional_special_tokens", "x"), ("additional_special_tokens", [5]), ("extra_special_tokens", 5),
        ("chat_template", 5), ("chat_template", [5]), ("chat_template", [{"name": "default"}]),
    ],
    "special_tokens_map.json": [("eos_token", 5), ("additional_special_tokens", {"a": 1})],
    "added_tokens.json": [("x", "900"), ("x", None), ("x", -3), ("x", [1])],
    "config.json": [("eos_token_id", "2"), ("bos_token_id", [[1]]), ("text_config", [])],
    "generation_config.json": [("eos_token_id", "2"), ("top_k", 1 << 70), ("temperature", "hot")],
    "chat_template.json": [("chat_template", 5)],
}  # fmt: skip
CASES = [(name, place, value) for name, cases in WRONG.items() for place, value in cases]


@pytest.mark.parametrize(("name", "place", "value"), CASES, ids=[f"{n}-{p}-{i}" for i, (n, p, _) in enumerate(CASES)])
def test_wrong_shapes_are_refused_by_file_and_place(name, place, value, layout):
    directory = layout({"tokenizer_config": {"eos_token": "<|endoftext|>"}})
    path = directory / name
    content = inner = json.loads(path.read_text()) if path.is_file() else {}
    *outer, last = place.split(".")
    for key in outer:
        inner = inner[int(key)] if isinstance(inner, list) else inner[key]
    inner[int(last) if isinstance(inner, list) else last] = value
    path.write_text(json.dumps(content))
    with pytest.raises(CheckpointError, match=name.replace(".", r"\.") if name != "config.json" else None) as refused:
        open_config(directory)
    assert len(str(refused.value)) < 700
    if name.startswith(("tokenizer", "special", "added")) and place != "model.vocab":
        for read in (load_tokenizer, describe_model):
            with pytest.raises(CheckpointError):
                read(directory)


@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer_config.json", "generation_config.json", "config.json"])
@pytest.mark.parametrize("damage", ["cut", "utf-16", "latin-1", "empty", "deep", "list"])
def test_damaged_files_are_refused(name, damage, layout):
    directory = layout({"tokenizer_config": {"eos_token": "<|endoftext|>"}, "generation_config": {"eos_token_id": 0}})
    content = (directory / name).read_bytes()
    (directory / name).write_bytes({
        "cut": content[: len(content) // 2], "utf-16": content.decode().encode("utf-16"), "latin-1": content + b"\xe9",
        "empty": b"", "deep": b"[" * 100_000, "list": b"[1]",
    }[damage])  # fmt: skip
    words = r".*it is UTF-16 and must be UTF-8: convert it" if damage == "utf-16" else ""
    with pytest.raises(CheckpointError, match=name.replace(".", r"\.") + words):
        open_config(directory)
    (directory / "chat_template.jinja").write_bytes(b"\xe9")
    with pytest.raises(CheckpointError):
        load_tokenizer(directory)


def test_a_damaged_tokenizer_model_is_refused(sentencepiece_model, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({**CONFIG, "vocab_size": 705}))
    content = sentencepiece_model.read_bytes()
    place = content.index("\u2581the".encode()) + 3
    for damaged in (b"", content[:100], content[:place] + b"\xc1" + content[place + 1 :], content[1:]):
        (tmp_path / "tokenizer.model").write_bytes(damaged)
        with pytest.raises(CheckpointError, match=r"tokenizer\.model"):
            open_config(tmp_path)


@pytest.mark.parametrize("card", ["tags: 5", ": : {", "license: {a: b}", "tags: [5, {a: b}]", "base_model: 5", "\xe9"])
def test_a_damaged_model_card_is_refused_or_left_out(card, layout):
    directory = layout({})
    (directory / "README.md").write_bytes(f"---\n{card}\n---\n".encode("latin-1"))
    try:
        write_f32(open_config(directory), directory / "vocabulary.gguf", with_tensors=False)
    except CheckpointError as error:
        assert "README.md" in str(error)


def test_eos_ids_of_other_files_are_compared_with_the_tokenizer(layout):
    directory = layout({"tokenizer_config": {"eos_token": IM_END, "added_tokens_decoder": DECODER}})
    edited = json.loads((directory / "config.json").read_text())
    cases = [
        (901, 901, ""), (None, None, ""), (-1, 901, ""), (0, 901, "EOS ids are 901 in the tokenizer, 0 in config.json"),
        (901, [901, 0], "EOS ids are 901 in the tokenizer, 901 in config.json, 901 0 in generation_config.json"),
    ]  # fmt: skip
    for config, generation, words in cases:
        (directory / "config.json").write_text(json.dumps(edited | {"eos_token_id": config}))
        (directory / "generation_config.json").write_text(json.dumps({"eos_token_id": generation}))
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            assert keys(directory)["tokenizer.ggml.eos_token_id"] == 901
        told = [str(warning.message) for warning in caught if " ids are " in str(warning.message)]
        assert len(told) == bool(words) and all(words in text for text in told), (config, generation, told)


@pytest.mark.parametrize("file", ["config", "generation_config"])
def test_an_eos_id_beyond_the_vocabulary_is_refused(file, layout):
    directory = layout({"tokenizer_config": {"eos_token": IM_END, "added_tokens_decoder": DECODER}})
    path = directory / f"{file}.json"
    content = json.loads(path.read_text()) if path.is_file() else {}
    path.write_text(json.dumps(content | {"eos_token_id": [901, 906]}))
    with pytest.raises(
        CheckpointError, match=rf"{file}\.json gives `eos_token_id` as 906, but the embedding has 906 rows"
    ):
        keys(directory)


def test_a_word_for_a_number_of_sampling_is_named_and_a_directory_without_a_tokenizer_too(layout):
    directory = layout({"generation_config": {"temperature": "hot"}})
    with pytest.raises(CheckpointError, match=r"generation_config\.json .*temperature"):
        open_config(directory)
    (directory / "generation_config.json").write_text('{"temperature": 1, "top_p": 0.9, "top_k": 20}')
    open_config(directory)
    for file in (*directory.glob("tokenizer*"), *directory.glob("vocab*"), directory / "merges.txt"):
        file.unlink(missing_ok=True)
    with pytest.raises(CheckpointError, match="holds no tokenizer"):
        load_tokenizer(directory)


def test_eos_of_generation_config_counts_where_no_other_file_has_one(layout):
    directory = layout({"generation_config": {"eos_token_id": [899, 898]}})
    with pytest.warns(UserWarning, match="EOS ids are 899 898 in generation_config"):
        assert keys(directory)["tokenizer.ggml.eos_token_id"] == 899
