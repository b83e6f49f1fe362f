"""The tokenizer of a Hugging Face directory as `tokenizer.ggml.*` keys.

Byte-level BPE becomes llama.cpp's "gpt2" model with merges and a named pre-tokenizer; SentencePiece BPE becomes "llama"
with scores. Embedding rows without a token are named [PADn]. Unigram and WordPiece tokenizers are refused.
"""

import warnings
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import gguf
from gguf import TokenType

from dynquant.errors import CheckpointError
from dynquant.families.common.config import WAY_OUT, read_json
from dynquant.families.tokenizers.pre_tokenizers import pre_tokenizer_name
from dynquant.families.tokenizers.sentencepiece import json_pieces, model_pieces, model_prefixes_space

PAD_SCORE = -10000.0
ADDED_SCORE = -1000.0


@dataclass
class Vocabulary:
    """Token texts, types and, for SentencePiece, scores; one entry per embedding row."""

    tokens: list[str]
    types: list[TokenType]
    scores: list[float]

    @classmethod
    def padding(cls, size: int) -> "Vocabulary":
        return cls([f"[PAD{i}]" for i in range(size)], [TokenType.UNUSED] * size, [PAD_SCORE] * size)

    def put(self, token_id: int, text: str, kind: TokenType, score: float, where: Path) -> None:
        """Raises CheckpointError when the embedding has no row for the token."""
        if not 0 <= token_id < len(self.tokens):
            raise CheckpointError(
                f"{where} gives {text!r} the id {token_id}, but the embedding has {len(self.tokens)} rows. Tokenizer "
                "and weights belong to different models, or the embedding was not resized after tokens were added."
            )
        self.tokens[token_id], self.types[token_id], self.scores[token_id] = text, kind, score


def write_tokenizer(writer: gguf.GGUFWriter, directory: Path, vocab_size: int) -> None:
    """Write all tokenizer keys.

    Raises:
        CheckpointError: no tokenizer, a damaged one, or one that llama.cpp cannot reproduce.
    """
    json_path, model_path = directory / "tokenizer.json", directory / "tokenizer.model"
    tokenizer = read_json(json_path) if json_path.is_file() else None
    if tokenizer is None and not model_path.is_file():
        raise CheckpointError(
            f"{directory} holds neither tokenizer.json nor tokenizer.model. A GGUF carries its tokenizer: copy the "
            "model's tokenizer files into the directory."
        )
    vocabulary = Vocabulary.padding(vocab_size)
    if tokenizer is not None and _is_byte_level(tokenizer, json_path):
        _write_byte_level(writer, tokenizer, json_path, vocabulary)
    else:
        _write_sentencepiece(writer, tokenizer, json_path, model_path, vocabulary)
    _write_special_tokens(writer, directory, vocabulary, tokenizer)


def _is_byte_level(tokenizer: dict[str, object], path: Path) -> bool:
    model = tokenizer.get("model")
    if not isinstance(model, dict) or model.get("type") != "BPE" or not isinstance(model.get("vocab"), dict):
        kind = model.get("type") if isinstance(model, dict) else model
        raise CheckpointError(f"{path} holds a tokenizer of type {kind!r}; only BPE can be converted. {WAY_OUT}")
    if model.get("continuing_subword_prefix") or model.get("end_of_word_suffix"):
        raise CheckpointError(f"{path} marks word parts with a prefix or suffix, which llama.cpp lacks. {WAY_OUT}")
    return not model.get("byte_fallback", False)


def _write_byte_level(
    writer: gguf.GGUFWriter, tokenizer: dict[str, object], path: Path, vocabulary: Vocabulary
) -> None:
    pre_tokenizer = pre_tokenizer_name(tokenizer, str(path))
    for text, token_id in tokenizer["model"]["vocab"].items():  # type: ignore[index]
        vocabulary.put(token_id, text, TokenType.NORMAL, 0.0, path)
    _put_added_tokens(vocabulary, tokenizer, path)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(pre_tokenizer)
    writer.add_token_list(vocabulary.tokens)
    writer.add_token_types([int(kind) for kind in vocabulary.types])


def _write_sentencepiece(
    writer: gguf.GGUFWriter,
    tokenizer: dict[str, object] | None,
    json_path: Path,
    model_path: Path,
    vocabulary: Vocabulary,
) -> None:
    """Scores come from tokenizer.model where there is one, otherwise from the merge order in tokenizer.json."""
    if model_path.is_file():
        pieces, prefixes_space = model_pieces(model_path), model_prefixes_space(model_path)
    else:
        pieces, prefixes_space = json_pieces(tokenizer, json_path)
    source = model_path if model_path.is_file() else json_path
    for token_id, (text, kind, score) in enumerate(pieces):
        if text is not None:
            vocabulary.put(token_id, text, kind, score, source)
    if tokenizer is not None:
        _put_added_tokens(vocabulary, tokenizer, json_path, escaped=True)
    writer.add_tokenizer_model("llama")
    writer.add_tokenizer_pre("default")
    writer.add_token_list(vocabulary.tokens)
    writer.add_token_scores(vocabulary.scores)
    writer.add_token_types([int(kind) for kind in vocabulary.types])
    writer.add_add_space_prefix(prefixes_space)


def _put_added_tokens(
    vocabulary: Vocabulary, tokenizer: dict[str, object], path: Path, *, escaped: bool = False
) -> None:
    """Tokens that are matched before splitting. With `escaped`, spaces in them are stored plain, as llama.cpp wants."""
    stripping = []
    for token in tokenizer.get("added_tokens") or []:  # type: ignore[attr-defined]
        text, token_id = token["content"], token["id"]
        if token.get("lstrip") or token.get("rstrip") or token.get("single_word"):
            stripping.append(text)
        if escaped and vocabulary.types[token_id : token_id + 1] == [TokenType.UNKNOWN]:
            continue
        is_control = token.get("special", False) or _looks_like_control(text)
        kind = TokenType.CONTROL if is_control else TokenType.USER_DEFINED
        stored = text.replace("\u2581", " ") if escaped and not is_control else text
        vocabulary.put(token_id, stored, kind, ADDED_SCORE if escaped else 0.0, path)
    if stripping:
        warnings.warn(
            f"{path}: llama.cpp keeps the spaces beside {', '.join(stripping[:5])}, which the tokenizer strips; text "
            "with spaces there gets different ids.",
            stacklevel=2,
        )


def _looks_like_control(text: str) -> bool:
    """Chat markers that checkpoints leave unmarked; llama.cpp's converter treats the same shapes as control tokens."""
    return (
        text in ("<pad>", "<mask>", "[@BOS@]")
        or (text.startswith("<|") and text.endswith("|>"))
        or (text.startswith("<\uff5c") and text.endswith("\uff5c>"))
        or (text.startswith("<unused") and text.endswith(">"))
    )


def _write_special_tokens(
    writer: gguf.GGUFWriter, directory: Path, vocabulary: Vocabulary, tokenizer: dict[str, object] | None
) -> None:
    """Merges, ids of special tokens, whether BOS and EOS are added, and the chat template."""
    if len(set(vocabulary.tokens)) != len(vocabulary.tokens):
        repeated = Counter(vocabulary.tokens).most_common(1)[0][0]
        raise CheckpointError(
            f"{directory}: the token {repeated!r} has two ids, which llama.cpp cannot load. {WAY_OUT}"
        )
    is_byte_level = tokenizer is not None and _is_byte_level(tokenizer, directory)
    special = gguf.SpecialVocab(directory, load_merges=is_byte_level, n_vocab=len(vocabulary.tokens))
    if tokenizer is not None:
        # llama.cpp's default depends on the pre-tokenizer's name, so the absence of a rule is written as well.
        special.add_special_token.setdefault("bos", False)
    for kind in ("bos", "eos"):
        if special.add_special_token.get(kind) and kind not in special.special_token_ids:
            raise CheckpointError(
                f"{directory}: the tokenizer adds a {kind.upper()} token to every text, but tokenizer_config.json and "
                f"config.json do not say which. Set `{kind}_token` in tokenizer_config.json."
            )
    special.add_to_gguf(writer, quiet=True)
