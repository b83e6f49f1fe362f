"""Tokenizers: ids of llama.cpp equal those of the `tokenizers` library, for every splitting rule that is named."""

import json
import shutil
from pathlib import Path

import pytest
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

from dynquant.errors import CheckpointError
from dynquant.families.open import open_config
from dynquant.families.tokenizers.pre_tokenizers import (
    DEEPSEEK_CODER,
    DEEPSEEK_LLM,
    DEEPSEEK_V3,
    DIGIT,
    GPT2,
    LLAMA3,
    QWEN2,
    TEKKEN,
)
from tests.helpers.tiny_models import llama_token_ids, write_f32

TRICKY = [
    "Hello, world! It's 3:45pm, isn't it? WE'LL see; I'd've gone.",
    "  leading,   runs     of spaces\t\ttabs \n\n\n newlines\r\n and trailing   ",
    "1234567890 3.14159 1,000,000 x=42;y=007 ²³ ٣٤٥",
    "naïve café, Größe, Ελληνικά, русский текст, 日本語のテスト, 한국어, العربية, हिन्दी",
    "🙂🚀👩‍👩‍👧‍👦 e\u0301 \u00a0nbsp\u3000ideographic \ufeffbom",
    "def f(x_1: int) -> str:\n    return f'{x_1!r:>10}'  # café\n\n\n    pass\n",
    "before<|endoftext|>after <|endoftext|> HTTPServer camelCaseWords don't-stop/now...",
    "",
]
CONFIG = {"model_type": "llama", "hidden_size": 256, "intermediate_size": 256, "num_hidden_layers": 1}
CONFIG |= {"num_attention_heads": 4, "bos_token_id": 0, "eos_token_id": 0}


@pytest.fixture(autouse=True)
def llama_cpp() -> None:
    pytest.importorskip("llama_cpp", reason="llama-cpp-python is not installed")


def training_text() -> list[str]:
    return [*TRICKY, Path(__file__).read_text(encoding="utf-8")] * 3


def train(rules: tuple[str, ...], *, ignore_merges: bool = False) -> Tokenizer:
    """A byte-level BPE tokenizer with these splitting rules."""
    tokenizer = Tokenizer(models.BPE(ignore_merges=ignore_merges))
    steps = [
        pre_tokenizers.Digits(individual_digits=True)
        if rule == DIGIT
        else pre_tokenizers.Split(Regex(rule), "isolated")
        for rule in rules
        if rule != GPT2
    ]
    steps.append(pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=GPT2 in rules))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(steps)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=900, special_tokens=["<|endoftext|>"], initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(training_text(), trainer)
    return tokenizer


def save(tokenizer: Tokenizer, directory: Path, *, vocab_size: int | None = None, **config: object) -> Path:
    tokenizer.save(str(directory / "tokenizer.json"))
    size = vocab_size or tokenizer.get_vocab_size()
    (directory / "config.json").write_text(json.dumps({**CONFIG, "vocab_size": size, **config}))
    return directory


def keys(directory: Path) -> dict[str, object]:
    return {field.key: field.value for field in open_config(directory).metadata}


def assert_same_ids(tokenizer: Tokenizer, directory: Path, texts: list[str] = TRICKY) -> None:
    file = write_f32(open_config(directory), directory / "vocabulary.gguf", with_tensors=False)
    for text in texts:
        assert llama_token_ids(file, text) == tokenizer.encode(text, add_special_tokens=False).ids, text


@pytest.mark.parametrize(
    ("rules", "ignore_merges", "name"),
    [
        ((GPT2,), False, "gpt-2"),
        ((DIGIT, GPT2), False, "smollm"),
        ((LLAMA3,), True, "llama-bpe"),
        ((LLAMA3,), False, "smaug-bpe"),
        ((QWEN2,), False, "qwen2"),
        (DEEPSEEK_LLM, False, "deepseek-llm"),
        (DEEPSEEK_CODER, False, "deepseek-coder"),
        (DEEPSEEK_V3, False, "deepseek-v3"),
    ],
    ids=lambda value: value if isinstance(value, str) else "-",
)
def test_byte_level_ids(rules: tuple[str, ...], ignore_merges: bool, name: str, tmp_path: Path) -> None:
    tokenizer = train(rules, ignore_merges=ignore_merges)
    directory = save(tokenizer, tmp_path)
    assert keys(directory)["tokenizer.ggml.pre"] == name
    assert_same_ids(tokenizer, directory)


def test_tekken_ids_but_for_combining_marks(tmp_path: Path) -> None:
    tokenizer = train((TEKKEN,), ignore_merges=True)
    directory = save(tokenizer, tmp_path)
    with pytest.warns(UserWarning, match="tekken.*combining marks"):
        assert keys(directory)["tokenizer.ggml.pre"] == "tekken"
    assert_same_ids(tokenizer, directory, [text.replace("हिन्दी", "") for text in TRICKY])


def test_bundled_tokenizer_ids(small_moe: Path, tmp_path: Path) -> None:
    file = write_f32(open_config(small_moe), tmp_path / "vocabulary.gguf", with_tensors=False)
    tokenizer = Tokenizer.from_file(str(small_moe / "tokenizer.json"))
    for text in TRICKY:
        assert llama_token_ids(file, text) == tokenizer.encode(text, add_special_tokens=False).ids, text


@pytest.fixture(scope="module")
def sentencepiece_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    sentencepiece = pytest.importorskip("sentencepiece", reason="sentencepiece is not installed")
    directory = tmp_path_factory.mktemp("sentencepiece")
    lines = [line for text in training_text() for line in text.splitlines() if line.strip()]
    (directory / "text.txt").write_text("\n".join(lines), encoding="utf-8")
    paths = {"input": str(directory / "text.txt"), "model_prefix": str(directory / "tokenizer")}
    pieces = {"vocab_size": 700, "byte_fallback": True, "allow_whitespace_only_pieces": True}
    kept = {"normalization_rule_name": "identity", "remove_extra_whitespaces": False}
    sentencepiece.SentencePieceTrainer.train(model_type="bpe", minloglevel=2, **paths, **pieces, **kept)
    return directory / "tokenizer.model"


def fast_tokenizer(processor) -> Tokenizer:
    """The same tokenizer as merges, ordered as transformers orders them: by score, then by length."""
    scores = {processor.IdToPiece(i): processor.GetScore(i) for i in range(processor.GetPieceSize())}
    pairs = [(text[:i], text[i:]) for text in scores for i in range(1, len(text))]
    merges = [pair for pair in pairs if pair[0] in scores and pair[1] in scores]
    merges.sort(key=lambda pair: (scores["".join(pair)], len(pair[0]), len(pair[1])), reverse=True)
    vocabulary = {text: i for i, text in enumerate(scores)}
    tokenizer = Tokenizer(models.BPE(vocabulary, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.add_special_tokens(["<unk>", "<s>", "</s>"])
    return tokenizer


@pytest.mark.parametrize("keep_model", [True, False], ids=["tokenizer.model", "tokenizer.json"])
def test_sentencepiece_ids(sentencepiece_model: Path, keep_model: bool, tmp_path: Path) -> None:
    """From the exact scores in tokenizer.model, and from the merge order in a tokenizer.json made of it."""
    from sentencepiece import SentencePieceProcessor

    processor = SentencePieceProcessor(model_file=str(sentencepiece_model))
    config = {**CONFIG, "vocab_size": processor.GetPieceSize(), "bos_token_id": 1, "eos_token_id": 2}
    (tmp_path / "config.json").write_text(json.dumps(config))
    if keep_model:
        shutil.copy(sentencepiece_model, tmp_path / "tokenizer.model")
    else:
        fast_tokenizer(processor).save(str(tmp_path / "tokenizer.json"))
    assert keys(tmp_path)["tokenizer.ggml.model"] == "llama"
    file = write_f32(open_config(tmp_path), tmp_path / "vocabulary.gguf", with_tensors=False)
    for text in TRICKY:
        assert llama_token_ids(file, text) == processor.EncodeAsIds(text), text


def test_unnamed_rules_are_refused(tmp_path: Path) -> None:
    directory = save(train((r"\p{L}+|\p{N}{1,2}|\s+|[^\s\p{L}\p{N}]+",)), tmp_path)
    with pytest.raises(CheckpointError, match=r"cannot name for llama\.cpp.*--base-gguf"):
        open_config(directory)


def test_normalizer_is_refused(tmp_path: Path) -> None:
    tokenizer = train((GPT2,))
    tokenizer.normalizer = normalizers.Lowercase()
    with pytest.raises(CheckpointError, match="Lowercase"):
        open_config(save(tokenizer, tmp_path))


def test_rows_without_a_token_are_padded(tmp_path: Path) -> None:
    tokenizer = train((GPT2,))
    size = tokenizer.get_vocab_size()
    tokens = keys(save(tokenizer, tmp_path, vocab_size=size + 3))["tokenizer.ggml.tokens"]
    assert tokens[size:] == [f"[PAD{i}]" for i in range(size, size + 3)]


def test_more_tokens_than_rows_are_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="embedding has 300 rows"):
        open_config(save(train((GPT2,)), tmp_path, vocab_size=300))


@pytest.mark.parametrize("adds_bos", [True, False])
def test_bos_follows_the_post_processor(adds_bos: bool, tmp_path: Path) -> None:
    """Always written: llama.cpp's own default depends on the pre-tokenizer's name ("llama-bpe" adds one)."""
    tokenizer = train((LLAMA3,), ignore_merges=True)
    if adds_bos:
        tokenizer.post_processor = processors.TemplateProcessing(
            single="<|endoftext|> $A", special_tokens=[("<|endoftext|>", 0)]
        )
    (tmp_path / "tokenizer_config.json").write_text('{"bos_token": "<|endoftext|>", "chat_template": "{{ messages }}"}')
    written = keys(save(tokenizer, tmp_path))
    assert written["tokenizer.ggml.add_bos_token"] is adds_bos
    assert written["tokenizer.chat_template"] == "{{ messages }}"
    assert written["tokenizer.ggml.bos_token_id"] == 0


def test_wordpiece_is_refused(tmp_path: Path) -> None:
    tokenizer = Tokenizer(models.WordPiece({"[UNK]": 0, "a": 1}, unk_token="[UNK]"))
    with pytest.raises(CheckpointError, match=r"WordPiece.*only BPE"):
        open_config(save(tokenizer, tmp_path))
