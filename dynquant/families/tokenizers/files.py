"""The tokenizer files of a Hugging Face directory: all of them are read, and their shapes checked, before any is used.

A token that was added to a vocabulary can stand in tokenizer.json, under `added_tokens_decoder` of
tokenizer_config.json or in added_tokens.json; the names of special tokens in tokenizer_config.json or, where that has
no `added_tokens_decoder`, in special_tokens_map.json. They are united as transformers does it; ids that contradict each
other are refused.
"""

import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError, create_model, model_validator

from dynquant.errors import CheckpointError
from dynquant.families.common.config import read_json
from dynquant.storage.documents import first_fault

KINDS = ("bos", "eos", "unk", "sep", "pad", "cls", "mask")
"""Special tokens that transformers names, in the order in which it gives ids to those that have none."""
TokenId = Annotated[int, Field(ge=0, lt=1 << 31)]
Merge = Annotated[str, Field(pattern=r"^[^ ]+ [^ ]+$")] | Annotated[list[str], Field(min_length=2, max_length=2)]


class _Shape(BaseModel):
    """Fields that are read; others may be anything."""

    model_config = ConfigDict(strict=True, extra="ignore")


class Token(_Shape):
    """A token that is matched before text is split."""

    content: str
    special: bool = False
    lstrip: bool = False
    rstrip: bool = False
    single_word: bool = False


class _NumberedToken(Token):
    id: TokenId


class _Piece(_Shape):
    id: str


class Stage(_Shape):
    """A normalizer, pre-tokenizer or post-processor, or a sequence of them."""

    type: str
    normalizers: "list[Stage]" = []
    pretokenizers: "list[Stage]" = []
    processors: "list[Stage]" = []
    pattern: dict[str, str] = {}
    content: str | None = None
    behavior: str | None = None
    prepend: str | None = None
    prepend_scheme: str | None = None
    add_prefix_space: bool | None = None
    use_regex: bool | None = None
    individual_digits: bool | None = None
    invert: bool | None = None
    split: bool | None = None
    single: list[dict[str, _Piece]] = []
    pair: list[dict[str, _Piece]] = []
    special_tokens: dict[str, _Piece] = {}
    cls: Annotated[list[str | int], Field(min_length=2)] = ["", 0]
    sep: Annotated[list[str | int], Field(min_length=2)] = ["", 0]

    @model_validator(mode="after")
    def _template_has_its_tokens(self) -> "Stage":
        for kind, piece in (item for step in (*self.single, *self.pair) for item in step.items()):
            if kind == "SpecialToken" and piece.id not in self.special_tokens:
                raise ValueError(f"{piece.id!r} is not among its special_tokens")
        return self


class _Model(_Shape):
    type: str | None = None
    vocab: dict[str, TokenId] | list[Annotated[list[str | float], Field(min_length=2)]] | None = None
    merges: list[Merge] | None = None
    unk_token: str | None = None
    continuing_subword_prefix: str | None = None
    end_of_word_suffix: str | None = None
    byte_fallback: bool | None = None
    ignore_merges: bool | None = None

    @model_validator(mode="after")
    def _merges_have_the_prefix(self) -> "_Model":
        # The `tokenizers` library cuts it off unseen, and aborts the process within a letter.
        prefix, merges = self.continuing_subword_prefix or "", (self.merges or ()) if self.type in ("BPE", None) else ()
        for merge in merges if prefix else ():
            if not (merge.split(" ") if isinstance(merge, str) else merge)[1].startswith(prefix):
                raise ValueError(f"the merge {merge!r} lacks the continuing_subword_prefix {prefix!r}")
        return self


class _TokenizerJson(_Shape):
    model: _Model
    added_tokens: list[_NumberedToken] | None = None
    normalizer: Stage | None = None
    pre_tokenizer: Stage | None = None
    post_processor: Stage | None = None


class _Template(_Shape):
    name: str
    template: str


_Named = create_model(
    "_Named", __base__=_Shape, **dict.fromkeys((f"{kind}_token" for kind in KINDS), (str | Token | None, None))
)
_TokenIds = create_model(
    "_TokenIds",
    __base__=_Shape,
    **dict.fromkeys((f"{kind}_token_id" for kind in KINDS), (int | list[int] | None, None)),
)
"""Ids in config.json and generation_config.json; -1 stands for none in old files."""
_Int32 = Annotated[int, Field(ge=-(1 << 31), lt=1 << 31)]
_Float32 = Annotated[float, Field(ge=-3.4e38, le=3.4e38)]
_Generation = create_model(
    "_Generation",
    __base__=_TokenIds,
    **dict.fromkeys(("top_k", "penalty_last_n", "mirostat"), (_Int32 | None, None)),
    **dict.fromkeys(
        (
            "temperature", "top_p", "min_p", "typical_p", "repetition_penalty", "xtc_probability", "xtc_threshold",
            "penalty_repeat", "mirostat_tau", "mirostat_eta",
        ),
        (_Float32 | None, None),
    ),
)  # fmt: skip
"""Numbers of generation_config.json that are stored in a GGUF, or that transformers compares with others."""


class _Names(_Named):
    additional_special_tokens: list[str | Token] | None = None
    extra_special_tokens: list[str | Token] | dict[str, str | Token] | None = None


class _TokenizerConfig(_Names):
    added_tokens_decoder: dict[Annotated[str, Field(pattern=r"^\d{1,9}$")], Token] | None = None
    add_bos_token: bool | None = None
    add_eos_token: bool | None = None
    chat_template: str | list[_Template] | None = None


class _AddedTokens(_Shape):
    tokens: dict[str, TokenId]


class _ChatTemplate(_Shape):
    chat_template: str | list[_Template] | None = None


class _Config(_TokenIds):
    text_config: _TokenIds | None = None


_S = TypeVar("_S", bound=BaseModel)


@dataclass(frozen=True)
class TokenizerFiles:
    """Content of all files. `tokenizer` is tokenizer.json as it stands, with its shape checked."""

    directory: Path
    tokenizer: dict[str, Any] | None
    added: dict[int, Token]
    """Added tokens by id."""
    names: dict[str, str]
    """Texts of special tokens by kind (`eos`)."""
    extras: tuple[str, ...]
    """Texts of further special tokens."""
    adds: dict[str, bool]
    """Settings of tokenizer_config.json: whether a BOS and an EOS are put around a text."""
    stated: dict[str, dict[str, tuple[int, ...]]]
    """Ids that config.json and generation_config.json give to special tokens, by file and kind; EOS may be several."""
    chat_template: str | list[dict[str, str]] | None

    @property
    def ids(self) -> dict[str, int]:
        """Ids of special tokens by kind, of config.json where it has them."""
        return {kind: ids[0] for stated in reversed(self.stated.values()) for kind, ids in stated.items()}

    @property
    def special(self) -> tuple[str, ...]:
        """Texts of all special tokens that are named."""
        return tuple(dict.fromkeys((*self.names.values(), *self.extras)))

    def numbered(self, vocabulary: Mapping[str, int]) -> dict[int, Token]:
        """Return added tokens by id; special ones without an id get what transformers gives them, the next ones."""
        added = dict(self.added)
        texts = vocabulary.keys() | {token.content for token in added.values()}
        for text in self.special:
            if text not in texts:
                added[max([len(vocabulary), *(token_id + 1 for token_id in added)])] = Token(content=text, special=True)
        return added


def read_tokenizer_files(directory: Path) -> TokenizerFiles:
    """Read all that a directory says about its tokenizer.

    Raises:
        CheckpointError: a file is not JSON in UTF-8, has not the shape of its kind, or contradicts another one.
    """
    json_path = directory / "tokenizer.json"
    tokenizer = read_json(json_path) if json_path.is_file() else None
    numbered = checked(tokenizer, _TokenizerJson, json_path).added_tokens if tokenizer is not None else None
    config_path = directory / "tokenizer_config.json"
    config = _read(config_path, _TokenizerConfig)
    is_legacy = config.added_tokens_decoder is None
    named = _read(directory / "special_tokens_map.json", _Names)
    names, extras = _names(config, named if is_legacy else None)
    for kind in names:
        stated = {_text(token) for file in (config, named) if (token := getattr(file, f"{kind}_token")) is not None}
        if len(stated) > 1:
            warnings.warn(
                f"{directory}: tokenizer_config.json and special_tokens_map.json name different {kind.upper()} tokens "
                f"({', '.join(sorted(stated))}); {names[kind]} is taken, as transformers does.",
                stacklevel=1,
            )
    path = directory / "added_tokens.json"
    old = checked({"tokens": read_json(path)}, _AddedTokens, path).tokens if path.is_file() else {}
    sources = {
        json_path: {token.id: token for token in numbered or ()},
        config_path: {int(key): token for key, token in (config.added_tokens_decoder or {}).items()},
        path: {
            token_id: Token(content=text, special=text in names.values() or text in extras)
            for text, token_id in old.items()
        },
    }
    return TokenizerFiles(
        directory, tokenizer, _united(sources), names, extras,
        {kind: value for kind in ("bos", "eos") if (value := getattr(config, f"add_{kind}_token")) is not None},
        _stated_ids(directory), _chat_template(directory, config),
    )  # fmt: skip


def checked(content: object, shape: type[_S], path: Path) -> _S:
    """Return content of a file as `shape`, or raise CheckpointError naming the place that does not fit."""
    try:
        return shape.model_validate(content)
    except ValidationError as error:
        raise CheckpointError(
            f"{path} has not the shape of such a file: {first_fault(error)}. It is damaged or of another program; "
            "fetch it again."
        ) from error


def _read(path: Path, shape: type[_S]) -> _S:
    return checked(read_json(path), shape, path) if path.is_file() else shape()


def _names(config: _Names, named: _Names | None) -> tuple[dict[str, str], tuple[str, ...]]:
    """Return special tokens by kind, and further ones; `named` (special_tokens_map.json) goes first if it counts."""
    files = [file for file in (named, config) if file is not None]
    values = {kind: [getattr(file, f"{kind}_token") for file in files] for kind in KINDS}
    names = {kind: _text(value) for kind, all_ in values.items() if (value := next(filter(None, all_), None))}
    return names, tuple(dict.fromkeys(map(_text, (token for file in files for token in _extras(file)))))


def _extras(file: _Names) -> Iterator[str | Token]:
    yield from file.additional_special_tokens or ()
    extra = file.extra_special_tokens or ()
    yield from extra.values() if isinstance(extra, dict) else extra


def _text(token: str | Token) -> str:
    return token if isinstance(token, str) else token.content


def _united(sources: Mapping[Path, Mapping[int, Token]]) -> dict[int, Token]:
    """Unite added tokens; what tokenizer_config.json says of a token goes before what tokenizer.json says."""
    added: dict[int, Token] = {}
    ids: dict[str, tuple[int, Path]] = {}
    for path, tokens in sources.items():
        for token_id, token in tokens.items():
            other = added.get(token_id)
            before, place = ids.setdefault(token.content, (token_id, path))
            if before != token_id or (other is not None and other.content != token.content):
                earlier = f"the id {before}" if before != token_id else f"that id to {other.content!r}"  # type: ignore[union-attr]
                place = place if before != token_id else ids[other.content][1]  # type: ignore[union-attr]
                raise CheckpointError(
                    f"{path} gives the token {token.content!r} the id {token_id}, but {place} gives {earlier}. Which "
                    "one the model was trained with cannot be told: remove the wrong file or entry."
                )
            if other is None or path.name == "tokenizer_config.json":
                added[token_id] = token
    return added


def checked_generation(directory: Path) -> _TokenIds:  # type: ignore[valid-type]
    """Return the ids in generation_config.json, or raise CheckpointError naming a number that is none."""
    return _read(directory / "generation_config.json", _Generation)


def _stated_ids(directory: Path) -> dict[str, dict[str, tuple[int, ...]]]:
    config = _read(directory / "config.json", _Config)
    generation = checked_generation(directory)
    stated: dict[str, dict[str, tuple[int, ...]]] = {}
    for name, parts in {"config.json": (config, config.text_config), "generation_config.json": (generation,)}.items():
        stated[name] = {}
        for kind in KINDS:
            values = (getattr(part, f"{kind}_token_id") for part in parts if part is not None)
            value = next((value for value in values if value is not None), [])
            if ids := tuple(i for i in (value if isinstance(value, list) else [value]) if i >= 0):
                stated[name][kind] = ids
    return stated


def _chat_template(directory: Path, config: _TokenizerConfig) -> str | list[dict[str, str]] | None:
    """Return the template that transformers takes: that of chat_template.jinja before that of tokenizer_config.json."""
    file = directory / "chat_template.jinja"
    stated = _templates(config.chat_template)
    if not file.is_file():
        return stated or _templates(_read(directory / "chat_template.json", _ChatTemplate).chat_template)
    template = _jinja(file)
    if stated is not None and stated != template:
        warnings.warn(
            f"{directory}: the chat templates in chat_template.jinja and tokenizer_config.json differ; the first is "
            "taken, as transformers does.",
            stacklevel=1,
        )
    more = sorted((directory / "additional_chat_templates").glob("*.jinja"))
    if not more:
        return template
    return [
        {"name": name, "template": _jinja(path)} for name, path in [("default", file), *((p.stem, p) for p in more)]
    ]


def _templates(value: str | list[_Template] | None) -> str | list[dict[str, str]] | None:
    return [template.model_dump() for template in value] if isinstance(value, list) else value


def _jinja(path: Path) -> str:
    try:
        return path.read_text("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise CheckpointError(f"{path} cannot be read as UTF-8 text ({error}). Fetch it again.") from error
