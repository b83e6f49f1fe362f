# ruff: noqa: RUF001 - the expressions are those of published tokenizers, letter ranges included
"""Names llama.cpp's pre-tokenizer for a byte-level BPE tokenizer, from the splitting rules in its tokenizer.json.

llama.cpp's converter recognizes tokenizers by hashing the ids of a test string, which fails for every newly trained
vocabulary although the rules are well known. The rules themselves decide here: a sequence of regular expressions, as in
`llm_tokenizer_bpe` of llama.cpp's src/llama-vocab.cpp. NFC normalization is accepted although llama.cpp does not apply
it: text that is already in that form, as nearly all is, gets the same ids.
"""

import warnings

from dynquant.errors import CheckpointError
from dynquant.families.common.config import WAY_OUT

GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
DIGIT = r"\p{N}"
_CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_TAIL = r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
LLAMA3 = rf"{_CONTRACTIONS}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}{{1,3}}|{_TAIL}"
QWEN2 = rf"{_CONTRACTIONS}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}|{_TAIL}"
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_SLASH_TAIL = r" ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_OPTIONAL_START = r"[^\r\n\p{L}\p{N}]?"
TEKKEN = rf"{_OPTIONAL_START}{_UPPER}*{_LOWER}+|{_OPTIONAL_START}{_UPPER}+{_LOWER}*|\p{{N}}|{_SLASH_TAIL}"
_CJK = "[一-龥\u0800-一가-퟿]+"
DEEPSEEK_V3 = (
    r"\p{N}{1,3}",
    "[一-龥぀-ゟ゠-ヿ]+",
    r"""[!"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+| ?[\p{P}\p{S}]+[\r\n]*"""
    r"|\s*[\r\n]+|\s+(?!\S)|\s+",
)
DEEPSEEK_CODER = (r"[\r\n]", r"\s?\p{L}+", r"\s?\p{P}+", _CJK, DIGIT)
# Characters that Unicode normalization would replace are written as escapes.
_DEEPSEEK_LLM_LETTERS = (
    "\\s?[A-Za-zµÀ-ÖØ-öø-ƺƼ-ƿǄ-ʓʕ-ʯͰ-ͳͶͷͻ-ͽͿΆΈ-ΊΌΎ-ΡΣ-ϵϷ-ҁҊ-ԯԱ-ՖႠ-ჅᎠ-Ᏽᏸ-ᏽᲐ-ᲺᲽ-Ჿᴀ-ᴫᵫ-ᵷᵹ-ᶚḀ-ἕἘ-Ἕἠ-ὅὈ-Ὅὐ-ὗὙὛὝὟ-"
    "\u1f7dᾀ-ᾴᾶ-ᾼ\u1fbeῂ-ῄῆ-ῌῐ-\u1fd3ῖ-\u1fdbῠ-Ῥῲ-ῴῶ-ῼℂℇℊ-\u2113\u2115\u2119-\u211d\u2124\u2126\u2128\u212a-"
    "\u212d\u212f-ℴℹℼ-ℿⅅ-ⅉⅎↃↄⰀ-ⱻⱾ-ⳤⳫ-ⳮⳲⳳꙀ-ꙭꚀ-ꚛꜢ-ꝯꝱ-ꞇꞋ-ꞎꭰ-ꮿﬀ-ﬆﬓ-ﬗＡ-Ｚａ-ｚ𐐀-𐑏𐒰-𐓓𐓘-𐓻𐲀-𐲲𐳀-𐳲𑢠-𑣟𞤀-𞥃]+"
)
DEEPSEEK_LLM = (r"[\r\n]", _DEEPSEEK_LLM_LETTERS, "\\s?[!-/:-~！-／：-～‘-‟\u3000-。]+", r"\s+$", _CJK, DIGIT)

# (splitting rules, whether whole words in the vocabulary skip merging) -> llama.cpp's name
_NAMES: dict[tuple[tuple[str, ...], bool], str] = {
    ((GPT2,), False): "gpt-2",
    ((DIGIT, GPT2), False): "smollm",
    ((LLAMA3,), True): "llama-bpe",
    ((LLAMA3,), False): "smaug-bpe",
    ((QWEN2,), False): "qwen2",
    ((TEKKEN,), True): "tekken",
    (DEEPSEEK_LLM, False): "deepseek-llm",
    (DEEPSEEK_CODER, False): "deepseek-coder",
    (DEEPSEEK_V3, False): "deepseek-v3",
}

_INEXACT = {"tekken": "words with combining marks (Devanagari, for instance)"}
"""Texts that llama.cpp splits differently, because its own expression is an approximation."""


def pre_tokenizer_name(tokenizer: dict[str, object], where: str) -> str:
    """llama.cpp's name for the rules of a byte-level BPE tokenizer.json.

    Raises:
        CheckpointError: rules, or a normalizer, that no pre-tokenizer of llama.cpp has.
    """
    _check_normalizer(tokenizer.get("normalizer"), where)
    pre_tokenizer = tokenizer.get("pre_tokenizer")
    if not _maps_bytes(pre_tokenizer):
        raise CheckpointError(f"{where} is a BPE tokenizer on characters, not bytes, which llama.cpp lacks. {WAY_OUT}")
    rules = splitting_rules(pre_tokenizer, where)
    ignores_merges = bool(tokenizer["model"].get("ignore_merges", False))  # type: ignore[attr-defined]
    name = _NAMES.get((rules, ignores_merges))
    if name is None:
        raise CheckpointError(
            f"{where} splits text by rules that dynquant cannot name for llama.cpp: {list(rules)} with ignore_merges="
            f"{ignores_merges}. A wrong name would change token ids in silence. {WAY_OUT}"
        )
    if name in _INEXACT:
        warnings.warn(
            f"{where}: llama.cpp's pre-tokenizer `{name}` splits {_INEXACT[name]} differently than this tokenizer; "
            "they get other ids.",
            stacklevel=2,
        )
    return name


def splitting_rules(pre_tokenizer: object, where: str) -> tuple[str, ...]:
    """The regular expressions that are applied one after the other, line breaks written as escapes."""
    if not isinstance(pre_tokenizer, dict):
        return ()
    kind = pre_tokenizer.get("type")
    if kind == "Sequence":
        steps = (splitting_rules(step, where) for step in pre_tokenizer.get("pretokenizers", []))
        return tuple(rule for step in steps for rule in step)
    if kind == "ByteLevel" and not pre_tokenizer.get("add_prefix_space", False):
        return (GPT2,) if pre_tokenizer.get("use_regex", True) else ()
    if kind == "Digits" and pre_tokenizer.get("individual_digits", False):
        return (DIGIT,)
    pattern = pre_tokenizer.get("pattern", {}).get("Regex") if kind == "Split" else None
    # Matches become words of their own; removing what is not matched is the same for these expressions.
    isolating = (("Isolated", False), ("Removed", True))
    if pattern is not None and (pre_tokenizer.get("behavior"), bool(pre_tokenizer.get("invert", False))) in isolating:
        return (pattern.replace("\r", r"\r").replace("\n", r"\n"),)
    raise CheckpointError(f"{where} has a pre-tokenizer step that llama.cpp cannot do: {pre_tokenizer!r}. {WAY_OUT}")


def _maps_bytes(pre_tokenizer: object) -> bool:
    if not isinstance(pre_tokenizer, dict):
        return False
    return pre_tokenizer.get("type") == "ByteLevel" or any(map(_maps_bytes, pre_tokenizer.get("pretokenizers", [])))


def _check_normalizer(normalizer: object, where: str) -> None:
    steps = [normalizer] if normalizer else []
    if isinstance(normalizer, dict) and normalizer.get("type") == "Sequence":
        steps = normalizer.get("normalizers", [])
    for step in steps:
        if not isinstance(step, dict) or step.get("type") != "NFC":
            raise CheckpointError(f"{where} normalizes text in a way that llama.cpp does not: {step!r}. {WAY_OUT}")
