"""The tokenizer of a Hugging Face directory as `tokenizer.ggml.*` keys.

Byte-level BPE becomes llama.cpp's "gpt2" model with merges and a named pre-tokenizer; SentencePiece BPE becomes "llama"
with scores. Embedding rows without a token are named [PADn]. Unigram and WordPiece tokenizers are refused.
"""

import warnings
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import gguf
from gguf import TokenType

from dynquant.errors import CheckpointError
from dynquant.families.common.config import WAY_OUT
from dynquant.families.tokenizers.files import KINDS, TokenizerFiles, read_tokenizer_files
from dynquant.families.tokenizers.pre_tokenizers import pre_tokenizer_name
from dynquant.families.tokenizers.sentencepiece import (
    Piece,
    json_pieces,
    model_pieces,
    model_prefixes_space,
    model_special_ids,
    prefixes_space,
)

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
        """Raises CheckpointError when the embedding has no row for the token, or the row has another one."""
        if not 0 <= token_id < len(self.tokens):
            raise CheckpointError(
                f"{where} gives {text!r} the id {token_id}, but the embedding has {len(self.tokens)} rows. Tokenizer "
                "and weights belong to different models, or the embedding was not resized after tokens were added."
            )
        before = self.tokens[token_id]
        if before != f"[PAD{token_id}]" and before.replace("\u2581", " ") != text.replace("\u2581", " "):
            raise CheckpointError(
                f"{where} gives the id {token_id} to {before!r} and to {text!r}. Which one the model was trained with "
                "cannot be told: remove the wrong entry."
            )
        self.tokens[token_id], self.types[token_id], self.scores[token_id] = text, kind, score


def write_tokenizer(writer: gguf.GGUFWriter, directory: Path, vocab_size: int) -> None:
    """Write all tokenizer keys.

    Raises:
        CheckpointError: no tokenizer, a damaged one, or one that llama.cpp cannot reproduce.
    """
    files = read_tokenizer_files(directory)
    if files.tokenizer is None and not (directory / "tokenizer.model").is_file():
        raise CheckpointError(
            f"{directory} holds neither tokenizer.json nor tokenizer.model. A GGUF carries its tokenizer: copy the "
            "model's tokenizer files into the directory."
        )
    vocabulary = Vocabulary.padding(vocab_size)
    is_byte_level = files.tokenizer is not None and _is_byte_level(files.tokenizer, directory / "tokenizer.json")
    write = _write_byte_level if is_byte_level else _write_sentencepiece
    ids = write(writer, files, vocabulary)
    if len(set(vocabulary.tokens)) != len(vocabulary.tokens):
        repeated = Counter(vocabulary.tokens).most_common(1)[0][0]
        raise CheckpointError(
            f"{directory}: the token {repeated!r} has two ids, which llama.cpp cannot load. {WAY_OUT}"
        )
    if is_byte_level:
        _write_merges(writer, files.tokenizer["model"].get("merges") or [])  # type: ignore[index]
    _write_special_tokens(writer, files, ids, vocab_size)


def num_named_tokens(directory: Path) -> int | None:
    """Return the highest id of a token in the files of a directory plus one; None where tokenizer.json is missing."""
    files = read_tokenizer_files(directory)
    if files.tokenizer is None:
        return None
    vocab = files.tokenizer["model"].get("vocab") or {}
    ids = {text: i for i, (text, *_) in enumerate(vocab)} if isinstance(vocab, list) else vocab
    return max([-1, *ids.values(), *files.numbered(ids)]) + 1


def _is_byte_level(tokenizer: dict[str, object], path: Path) -> bool:
    model = tokenizer.get("model")
    # Files from before 2021 do not name the type.
    kind = model.get("type", "BPE" if "merges" in model else None)  # type: ignore[union-attr,attr-defined,operator]
    if kind != "BPE":
        raise CheckpointError(f"{path} holds a tokenizer of type {kind!r}; only BPE can be converted. {WAY_OUT}")
    if not isinstance(model.get("vocab"), dict) or not model["vocab"]:
        raise CheckpointError(f"{path} has no `model.vocab`, an object of tokens and ids. Fetch it again.")
    if model.get("continuing_subword_prefix") or model.get("end_of_word_suffix"):
        raise CheckpointError(f"{path} marks word parts with a prefix or suffix, which llama.cpp lacks. {WAY_OUT}")
    return not model.get("byte_fallback")


def _write_byte_level(writer: gguf.GGUFWriter, files: TokenizerFiles, vocabulary: Vocabulary) -> dict[str, int]:
    """Write tokens by id, and return the ids by token."""
    path = files.directory / "tokenizer.json"
    pre_tokenizer = pre_tokenizer_name(files.tokenizer, str(path))  # type: ignore[arg-type]
    ids: dict[str, int] = files.tokenizer["model"]["vocab"]  # type: ignore[index]
    for text, token_id in ids.items():
        vocabulary.put(token_id, text, TokenType.NORMAL, 0.0, path)
    ids = _put_added_tokens(vocabulary, files, ids, escaped=False)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(pre_tokenizer)
    writer.add_token_list(vocabulary.tokens)
    writer.add_token_types([int(kind) for kind in vocabulary.types])
    return ids


def _write_merges(writer: gguf.GGUFWriter, merges: list[str | list[str]]) -> None:
    if merges:
        # A space inside a part is written as the letter that stands for its byte.
        parts = ([part.replace(" ", "\u0120") for part in merge] for merge in merges if not isinstance(merge, str))
        writer.add_token_merges([merge if isinstance(merge, str) else " ".join(next(parts)) for merge in merges])


def _write_sentencepiece(writer: gguf.GGUFWriter, files: TokenizerFiles, vocabulary: Vocabulary) -> dict[str, int]:
    """Write tokens and scores, and return the ids by token."""
    pieces, prefixes_space, source = _pieces(files)
    for token_id, (text, kind, score) in enumerate(pieces):
        if text is not None:
            vocabulary.put(token_id, text, kind, score, source)
    ids = {text: token_id for token_id, (text, _, _) in enumerate(pieces) if text is not None}
    ids = _put_added_tokens(vocabulary, files, ids, escaped=True)
    writer.add_tokenizer_model("llama")
    writer.add_tokenizer_pre("default")
    writer.add_token_list(vocabulary.tokens)
    writer.add_token_scores(vocabulary.scores)
    writer.add_token_types([int(kind) for kind in vocabulary.types])
    writer.add_add_space_prefix(prefixes_space)
    return ids


def _pieces(files: TokenizerFiles) -> tuple[list[Piece], bool, Path]:
    """Return pieces, whether a space is put before the text, and the file that says so.

    Scores come from tokenizer.model where it has the tokens of tokenizer.json, otherwise from the order of merges.
    """
    json_path, model_path = files.directory / "tokenizer.json", files.directory / "tokenizer.model"
    if not model_path.is_file():
        return *json_pieces(files.tokenizer, json_path), json_path  # type: ignore[arg-type]
    pieces = model_pieces(model_path)
    if files.tokenizer is None:
        return pieces, model_prefixes_space(model_path), model_path
    by_id = {token_id: text for text, token_id in files.tokenizer["model"]["vocab"].items()}
    for token_id in range(max(len(pieces), *by_id, 0) + 1):
        here = pieces[token_id][0] if token_id < len(pieces) else None
        if token_id not in files.added and here != by_id.get(token_id):
            warnings.warn(
                f"{files.directory}: tokenizer.model and tokenizer.json differ ({here!r} and "
                f"{by_id.get(token_id)!r} have the id {token_id}); tokenizer.json is taken, as transformers does.",
                stacklevel=2,
            )
            return *json_pieces(files.tokenizer, json_path), json_path
    return pieces, prefixes_space(files.tokenizer, json_path), model_path


def _put_added_tokens(
    vocabulary: Vocabulary, files: TokenizerFiles, ids: Mapping[str, int], *, escaped: bool
) -> dict[str, int]:
    """Put tokens that are matched before splitting, and return all ids by token.

    With `escaped`, spaces in them are stored plain, as llama.cpp wants.
    """
    stripping, all_ids = [], dict(ids)
    for token_id, token in files.numbered(ids).items():
        all_ids[token.content] = token_id
        if token_id >= len(vocabulary.tokens) and token_id not in files.added:
            continue  # a name for which no row was made
        if token.lstrip or token.rstrip or token.single_word:
            stripping.append(token.content)
        if escaped and vocabulary.types[token_id : token_id + 1] == [TokenType.UNKNOWN]:
            continue
        is_control = token.special or _looks_like_control(token.content)
        kind = TokenType.CONTROL if is_control else TokenType.USER_DEFINED
        stored = token.content.replace("\u2581", " ") if escaped and not is_control else token.content
        vocabulary.put(token_id, stored, kind, ADDED_SCORE if escaped else 0.0, files.directory)
    for text in files.special:  # in the vocabulary, and yet matched before splitting
        token_id = ids.get(text, len(vocabulary.types))
        if vocabulary.types[token_id : token_id + 1] == [TokenType.NORMAL]:
            vocabulary.types[token_id] = TokenType.CONTROL
    if stripping:
        warnings.warn(
            f"{files.directory}: llama.cpp keeps the spaces beside {', '.join(stripping[:5])}, which the tokenizer "
            "strips; text with spaces there gets different ids.",
            stacklevel=2,
        )
    return all_ids


def _looks_like_control(text: str) -> bool:
    """Chat markers that checkpoints leave unmarked; llama.cpp's converter treats the same shapes as control tokens."""
    return (
        text in ("<pad>", "<mask>", "[@BOS@]")
        or (text.startswith("<|") and text.endswith("|>"))
        or (text.startswith("<\uff5c") and text.endswith("\uff5c>"))
        or (text.startswith("<unused") and text.endswith(">"))
    )


def _write_special_tokens(
    writer: gguf.GGUFWriter, files: TokenizerFiles, ids: Mapping[str, int], vocab_size: int
) -> None:
    """Write the ids of special tokens, whether BOS and EOS are added, and the chat template."""
    special = {kind: ids[text] for kind in KINDS if (text := files.names.get(kind)) in ids}
    special = {kind: token_id for kind, token_id in special.items() if token_id < vocab_size}
    if "eos" in files.names and "eos" not in special:
        raise CheckpointError(
            f"{files.directory} names the EOS token {files.names['eos']!r}, to which no file gives an id below "
            f"{vocab_size:,}, the number of embedding rows. Add it to tokenizer.json, or name another in "
            "tokenizer_config.json."
        )
    if files.tokenizer is None:
        special = model_special_ids(files.directory / "tokenizer.model") | special
    _check_stated_ids(files, special, vocab_size)
    special |= {kind: i for kind, i in files.ids.items() if kind not in special and i < vocab_size}
    adds = files.adds
    if files.tokenizer is not None:
        before, behind, has_middle = _template(files.tokenizer.get("post_processor"))
        if "bos" not in special and len(before) == 1 and before[0] in ids:
            special["bos"] = ids[before[0]]
        around = {"bos": before, "eos": behind}
        fits = {
            kind: len(texts) == 1 and texts[0] in ids and ids[texts[0]] == special.get(kind)
            for kind, texts in around.items()
        }
        _tell_differences(files, around, fits)
        # llama.cpp's default depends on the pre-tokenizer's name, so the absence of a rule is written as well.
        adds = {"bos": fits["bos"]} | ({"eos": fits["eos"]} if behind else {}) | ({"sep": False} if has_middle else {})
        adds |= files.adds
    for kind in ("bos", "eos"):
        if adds.get(kind) and kind not in special:
            raise CheckpointError(
                f"{files.directory}: the tokenizer adds a {kind.upper()} token to every text, but "
                f"tokenizer_config.json and config.json do not say which. Set `{kind}_token` in tokenizer_config.json."
            )
    for kind, token_id in special.items():
        getattr(writer, f"add_{kind}_token_id")(token_id)
    for kind, value in adds.items():
        getattr(writer, f"add_add_{kind}_token")(value)
    if files.chat_template is not None:
        writer.add_chat_template(files.chat_template)


def _check_stated_ids(files: TokenizerFiles, special: Mapping[str, int], vocab_size: int) -> None:
    """Say where config.json or generation_config.json have other BOS and EOS ids than the tokenizer, or several.

    Raises:
        CheckpointError: an EOS id has no row in the embedding: generation would not stop.
    """
    for kind in ("bos", "eos"):
        stated = {name: ids[kind] for name, ids in files.stated.items() if kind in ids}
        for name, ids in stated.items():
            if kind == "eos" and max(ids) >= vocab_size:
                raise CheckpointError(
                    f"{files.directory / name} gives `{kind}_token_id` as {max(ids)}, but the embedding has "
                    f"{vocab_size:,} rows. The file belongs to another model, or the embedding was not resized after "
                    "tokens were added: fetch it again, or correct the id."
                )
        named = {"the tokenizer": (special[kind],)} if kind in special else {}
        if len({frozenset(ids) for ids in (named | stated).values()}) > 1 or any(
            len(ids) > 1 for ids in stated.values()
        ):
            listed = ", ".join(f"{' '.join(map(str, ids))} in {place}" for place, ids in (named | stated).items())
            stops = ", and llama.cpp also stops at tokens whose names it knows" if kind == "eos" else ""
            warnings.warn(
                f"{files.directory}: the {kind.upper()} ids are {listed}. GGUF has one, the first{stops}; transformers "
                "follows generation_config.json.",
                stacklevel=2,
            )


def _template(processor: object) -> tuple[list[str], list[str], bool]:
    """Return the tokens that tokenizer.json puts before and behind a text, and whether any go between two texts."""
    if not isinstance(processor, dict):
        return [], [], False
    if processor.get("type") == "Sequence":
        steps = map(_template, processor.get("processors", []))
        return next(filter(any, steps), ([], [], False))
    if "cls" in processor and "sep" in processor:  # of BERT and RoBERTa
        return [processor["cls"][0]], [processor["sep"][0]], True
    texts = [piece.get("SpecialToken", {}).get("id") for piece in processor.get("single", [])]
    pair = [piece.get("SpecialToken", {}).get("id") for piece in processor.get("pair", [])]
    place = texts.index(None) if None in texts else 0
    before, behind = texts[:place], texts[place + 1 :]
    return before, behind, len(pair[len(before) : len(pair) - len(behind)]) > 2


def _tell_differences(files: TokenizerFiles, around: Mapping[str, list[str]], fits: Mapping[str, bool]) -> None:
    """Say where a text gets other tokens around it than the tokenizer of transformers puts there."""
    for kind, texts in around.items():
        name, place = kind.upper(), "before" if kind == "bos" else "behind"
        if texts and not fits[kind]:
            warnings.warn(
                f"{files.directory / 'tokenizer.json'} puts {' '.join(texts)} {place} every text, "
                f"which is not the {name} token alone. llama.cpp cannot, and texts get other ids there.",
                stacklevel=2,
            )
        if files.adds.get(kind, fits[kind]) != fits[kind]:
            warnings.warn(
                f"{files.directory}: `add_{kind}_token` of tokenizer_config.json is {files.adds[kind]}, but "
                f"tokenizer.json {'adds' if fits[kind] else 'does not add'} the {name} token to texts. GGUF gets the "
                "former, as from llama.cpp's converter; transformers follows the latter from version 5 on. Set both "
                "alike.",
                stacklevel=2,
            )
