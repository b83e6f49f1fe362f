"""llama.cpp's own type mixtures: which type llama-quantize would store for each tensor, and why.

Each file type (`iq1_s`, `q4_k_m`, ...) has a base type; tables of rules per tensor category raise or lower it, first
match wins; a last step fits the type to the row length. The facts are those of `src/llama-quant.cpp` in the llama.cpp
inside llama-cpp-python 0.3.36, for an F32 input and with an importance matrix, which dynquant always has.

Left out: pruning, and types outside the registry (Q1_0, Q2_0). Overrides given by hand (`--tensor-type` and the like)
are `command_line.py`'s.
"""

import difflib
import re
from collections import Counter
from collections.abc import Callable, Collection, Container, Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from dynquant.checkpoints.model import HyperParams
from dynquant.errors import PlanError
from dynquant.formats.quant_types import QUANT_TYPES, QuantType, fit_to_row
from dynquant.formats.storage_format import Choice


class FileType(NamedTuple):
    """A file type of llama-quantize: its `general.file_type` number and the type of what no rule names."""

    id: int
    base: str


LLAMA_FTYPES: dict[str, FileType] = {
    "f32": FileType(0, "F32"), "f16": FileType(1, "F16"), "q4_0": FileType(2, "Q4_0"),
    "q4_1": FileType(3, "Q4_1"), "q8_0": FileType(7, "Q8_0"), "q5_0": FileType(8, "Q5_0"),
    "q5_1": FileType(9, "Q5_1"), "q2_k": FileType(10, "Q2_K"), "q3_k_s": FileType(11, "Q3_K"),
    "q3_k_m": FileType(12, "Q3_K"), "q3_k_l": FileType(13, "Q3_K"), "q4_k_s": FileType(14, "Q4_K"),
    "q4_k_m": FileType(15, "Q4_K"), "q5_k_s": FileType(16, "Q5_K"), "q5_k_m": FileType(17, "Q5_K"),
    "q6_k": FileType(18, "Q6_K"), "iq2_xxs": FileType(19, "IQ2_XXS"), "iq2_xs": FileType(20, "IQ2_XS"),
    "q2_k_s": FileType(21, "Q2_K"), "iq3_xs": FileType(22, "IQ3_S"), "iq3_xxs": FileType(23, "IQ3_XXS"),
    "iq1_s": FileType(24, "IQ1_S"), "iq4_nl": FileType(25, "IQ4_NL"), "iq3_s": FileType(26, "IQ3_S"),
    "iq3_m": FileType(27, "IQ3_S"), "iq2_s": FileType(28, "IQ2_XS"), "iq2_m": FileType(29, "IQ2_S"),
    "iq4_xs": FileType(30, "IQ4_XS"), "iq1_m": FileType(31, "IQ1_M"), "bf16": FileType(32, "BF16"),
    "tq1_0": FileType(36, "TQ1_0"), "tq2_0": FileType(37, "TQ2_0"), "mxfp4_moe": FileType(38, "MXFP4"),
    "q1_0": FileType(40, "Q1_0"), "q2_0": FileType(41, "Q2_0"),
}  # fmt: skip
_ALIASES = {"q3_k": "q3_k_m", "q4_k": "q4_k_m", "q5_k": "q5_k_m"}


_FFN = ("ffn_up", "ffn_gate", "ffn_down")
_CATEGORY_OF_SUBSTRING = {
    "attn_qkv.weight": "attn_v", "attn_kv_b.weight": "attn_v", "attn_v.weight": "attn_v", "attn_k.weight": "attn_k",
    "attn_q.weight": "attn_q", "attn_output.weight": "attn_out", **{name: name for name in _FFN},
}  # fmt: skip
OUTPUT_NAME = "output.weight"  # tensor of `--output-tensor-type`
EMBEDDING_NAMES = ("token_embd.weight", "per_layer_token_embd.weight")  # tensors of `--token-embedding-type`


def _category(name: str) -> str:
    if name == OUTPUT_NAME:
        return "output"
    if name in EMBEDDING_NAMES:
        return "token_embd"
    return next((category for part, category in _CATEGORY_OF_SUBSTRING.items() if part in name), "other")


_KEPT_NAMES = ("position_embd.weight", "token_types.weight")
_KEPT_SUBSTRINGS = (
    "_norm.weight", "ffn_gate_inp.weight", "ffn_gate_tid2eid.weight", "altup", "laurel", "per_layer_model_proj",
    "ssm_conv1d", "shortconv.conv.weight", "indexer.k_proj.weight", "indexer.q_proj.weight", "time_mix_first.weight",
    *(f"time_mix_{part}.weight" for part in ("w0", "w1", "w2", "v0", "v1", "v2", "a0", "a1", "a2", "g1", "g2")),
    "time_mix_decay_w1.weight", "time_mix_decay_w2.weight", "time_mix_lerp_fused.weight", "attn_rel_b.weight",
    ".position_embd", "sam.pos_embd", "sam.neck.", "sam.net_", ".rel_pos", ".patch_embd", ".patch_merger",
    "a.rvq.codebook", "mm.a.code_embd",
)  # fmt: skip
_KEPT_IN_ARCH = {
    "glm5-next": (
        "hc_", "indexer.attn_q_b", "indexer.attn_k", "indexer.proj", "indexer_compressor_gate",
        "indexer_compressor_ape", "ssm_f_a.weight", "ssm_f_b.weight", "ssm_g_a.weight", "ssm_g_b.weight",
        "ssm_beta.weight", "attn_kv_a_mqa.weight", "attn_k_b.weight", "attn_v_b.weight",
    ),
}  # fmt: skip
_AT_LEAST_Q8_0_IN_ARCH = {"glm5-next": ("attn_q_a", "attn_q_b", "nextn.eh_proj")}


def kept_because(name: str, shape: Sequence[int], arch: str) -> str | None:
    """Say why llama-quantize leaves this tensor as it is; None when it quantizes it. `shape` ends in the row length."""
    if len(shape) - next((i for i, n in enumerate(shape) if n != 1), len(shape)) < 2:
        return "one-dimensional"
    if not name.endswith("weight"):
        return "not a weight"
    parts = (*_KEPT_SUBSTRINGS, *_KEPT_IN_ARCH.get(arch, ()))
    if name in _KEPT_NAMES or any(part in name for part in parts):
        return "small or delicate, never quantized"
    return None


@dataclass(frozen=True)
class _Position:
    """Facts that conditions may look at: number `index` of `total` in its category (or layer `index`), and the
    model."""

    index: int
    total: int
    hyper: HyperParams

    @property
    def heads_share_kv(self) -> bool:
        """At least four query heads use one key/value head, so these matrices are small for what they do."""
        return self.hyper.n_head_kv > 0 and self.hyper.n_head // self.hyper.n_head_kv >= 4

    @property
    def has_more_bits(self) -> bool:
        """The first and last eighth, and every third between them."""
        eighth, last = self.total // 8, 7 * self.total // 8
        return self.index < eighth or self.index >= last or (self.index - eighth) % 3 == 2  # `use_more_bits`


class _Condition(NamedTuple):
    """`words` stand in the reason; empty where the rule needs no explanation."""

    words: str
    holds: Callable[[_Position], bool]


_ALWAYS = _Condition("", lambda at: True)
_HEADS_SHARE_KV = _Condition("4 or more query heads share it", lambda at: at.heads_share_kv)
_KV_SHARED_OR_EXPERTS = _Condition(
    "4 or more query heads share it, or 4 or more experts", lambda at: at.heads_share_kv or at.hyper.n_expert >= 4
)
_EIGHT_EXPERTS = _Condition("8 experts", lambda at: at.hyper.n_expert == 8)
_NOT_EIGHT_EXPERTS = _Condition("", lambda at: at.hyper.n_expert != 8)
_MORE_BITS = _Condition("a layer given more bits", lambda at: at.has_more_bits)
_EIGHT_EXPERTS_MORE_BITS = _Condition(
    "8 experts, a layer given more bits", lambda at: at.hyper.n_expert == 8 and at.has_more_bits
)
_FIRST_EIGHTH = _Condition("among the first eighth", lambda at: at.index < at.total // 8)
_FIRST_SIXTEENTH = _Condition("among the first sixteenth", lambda at: at.index < at.total // 16)
_MIDDLE = _Condition("neither first nor last eighth", lambda at: at.total // 8 <= at.index < 7 * at.total // 8)
_FIRST_TWO = _Condition("", lambda at: at.index < 2)
_FIRST_FOUR = _Condition("", lambda at: at.index < 4)


class _Rule(NamedTuple):
    file_types: frozenset[str]
    type: str
    condition: _Condition = _ALWAYS


def _rule(file_types: str | Iterable[str], type_name: str, condition: _Condition = _ALWAYS) -> _Rule:
    names = file_types.split() if isinstance(file_types, str) else file_types
    return _Rule(frozenset(names), type_name, condition)


_IQ1 = frozenset(("iq1_s", "iq1_m"))
_IQ2_SMALL = frozenset(("iq2_xxs", "iq2_xs"))
_IQ2_LARGE = frozenset(("iq2_s", "iq2_m"))
_VERY_LOW = _IQ1 | _IQ2_SMALL | _IQ2_LARGE
_OTHERS = frozenset(LLAMA_FTYPES) - _VERY_LOW - {"mxfp4_moe"}

_EMBEDDING_RULES = (
    _rule(_IQ1 | _IQ2_SMALL, "Q2_K"),
    _rule(_IQ2_LARGE | {"iq3_xxs"}, "IQ3_S"),
    _rule("tq1_0 tq2_0 q2_0", "Q4_K"),
)
_OUTPUT_RULES = (_rule(_VERY_LOW | {"iq3_xxs"}, "Q5_K"), _rule("mxfp4_moe q8_0", "Q8_0"), _rule(_OTHERS, "Q6_K"))
_COMMON_FFN_DOWN_RULES = (
    _rule(_IQ1 | _IQ2_SMALL, "Q2_K", _FIRST_EIGHTH),
    _rule(_IQ2_LARGE, "IQ3_S", _FIRST_EIGHTH),
    _rule("q2_k", "Q3_K"),
    _rule("q2_k_s", "Q4_K", _FIRST_EIGHTH),
    _rule("iq3_m", "Q4_K", _FIRST_EIGHTH),
    _rule("iq3_m", "Q4_K", _EIGHT_EXPERTS_MORE_BITS),
    _rule("q5_k_m", "Q6_K", _MORE_BITS),
    _rule("q4_0", "Q4_1", _FIRST_EIGHTH),
    _rule("q5_0", "Q5_1", _FIRST_EIGHTH),
)
_MIDDLE_FFN_RULES = (_rule("iq3_xs", "IQ3_XXS", _MIDDLE),)
_RULES: dict[str, tuple[_Rule, ...]] = {
    "attn_v": (
        _rule(_VERY_LOW, "Q4_K", _KV_SHARED_OR_EXPERTS),
        _rule(_IQ1 | _IQ2_SMALL, "Q2_K"),
        _rule(_IQ2_LARGE, "IQ3_S"),
        _rule(_OTHERS, "Q8_0", _EIGHT_EXPERTS),
        _rule("q2_k q2_k_s iq3_xxs iq3_xs iq3_s", "Q4_K", _HEADS_SHARE_KV),
        _rule("q2_k", "Q3_K"),
        _rule("iq3_m", "Q4_K"),
        _rule("q3_k_m", "Q5_K", _FIRST_TWO),
        _rule("q3_k_m", "Q4_K"),
        _rule("q3_k_l", "Q5_K"),
        _rule("iq4_nl iq4_xs", "Q5_K", _HEADS_SHARE_KV),
        _rule("q4_k_m q5_k_m", "Q6_K", _MORE_BITS),
        _rule("q4_k_s", "Q5_K", _FIRST_FOUR),
    ),
    "attn_k": (
        _rule(_VERY_LOW, "Q4_K", _EIGHT_EXPERTS),
        _rule(_OTHERS, "Q8_0", _EIGHT_EXPERTS),
        _rule("iq3_xs", "IQ3_XXS"),
        _rule("iq3_xxs", "IQ2_S"),
    ),
    "attn_q": (_rule("iq3_xs", "IQ3_XXS"), _rule("iq3_xxs", "IQ2_S")),
    "attn_out": (
        _rule(_VERY_LOW, "Q5_K", _EIGHT_EXPERTS),
        _rule(_IQ1, "IQ2_XXS"),
        _rule(_IQ2_LARGE, "IQ3_S"),
        _rule("q2_k iq3_xs iq3_xxs q3_k_s q3_k_m iq4_nl q4_k_s q4_k_m iq3_s iq3_m iq4_xs", "Q5_K", _EIGHT_EXPERTS),
        _rule("q2_k", "Q3_K", _NOT_EIGHT_EXPERTS),
        _rule("iq3_xxs", "IQ3_S", _NOT_EIGHT_EXPERTS),
        _rule("q3_k_m iq3_m", "Q4_K", _NOT_EIGHT_EXPERTS),
        _rule("q3_k_l", "Q5_K", _NOT_EIGHT_EXPERTS),
    ),
    "ffn_down": (
        *_COMMON_FFN_DOWN_RULES,
        _rule("q3_k_m", "Q5_K", _FIRST_SIXTEENTH),
        _rule("q3_k_m", "Q4_K"),
        _rule("q3_k_l", "Q5_K"),
        _rule("q4_k_m", "Q6_K", _MORE_BITS),
        _rule("q4_k_s", "Q5_K", _FIRST_EIGHTH),
    ),
    "ffn_up": _MIDDLE_FFN_RULES,
    "ffn_gate": _MIDDLE_FFN_RULES,
}
_FALCON_RULES = _RULES | {
    "attn_out": (*_RULES["attn_out"][:3], _rule("q3_k_l", "Q4_K")),
    "ffn_down": (
        *_COMMON_FFN_DOWN_RULES,
        _rule("q3_k_m", "Q5_K", _FIRST_SIXTEENTH),
        _rule("q3_k_m", "Q4_K", _MORE_BITS),
        _rule("q3_k_l", "Q4_K"),
        _rule("q4_k_m", "Q6_K", _FIRST_SIXTEENTH),
        _rule("q4_k_m", "Q5_K", _MORE_BITS),
    ),
}
_SEVENTY_BILLION_LAYERS = {"llama": 80, "llama-embed": 80, "deci": 80, "olmo": 80, "qwen2": 80, "jais2": 68}


_BLOCK = re.compile(r"blk\.(\d+)")


def _counting_order(name: str) -> tuple[int, bytes]:
    """llama.cpp's order of tensors, whatever the file's: outside layers first, then by layer, then by name."""
    match = _BLOCK.match(name)
    return int(match.group(1)) if match else -1, name.encode()


class _Mixture:
    """One file type applied to one model: counts tensors per category as llama-quantize does."""

    def __init__(
        self, file_type: str, names: Sequence[str], hyper: HyperParams, fallbacks: Collection[QuantType]
    ) -> None:
        self.file_type, self.fallbacks = file_type, fallbacks
        self.base = LLAMA_FTYPES[file_type].base
        self.hyper = hyper
        self.is_tied = OUTPUT_NAME not in names
        self.num_attn_v = sum(_category(name) == "attn_v" for name in names)
        self.seen: Counter[str] = Counter()
        # llama.cpp tells its model size "70B" by the number of layers.
        self._is_70b = hyper.n_layer == _SEVENTY_BILLION_LAYERS.get(hyper.arch) and (
            not hyper.arch.startswith("llama") or (hyper.n_expert != 8 and hyper.n_head != hyper.n_head_kv)
        )

    def choose(self, name: str, shape: Sequence[int]) -> Choice:
        """Return the type that is stored; tensors must come in `_counting_order`."""
        kept = kept_because(name, shape, self.hyper.arch)
        if kept:
            return Choice("F32", f"llama.cpp {self.file_type}: {kept}")
        if QUANT_TYPES[self.base].is_float:
            return Choice(self.base, f"llama.cpp {self.file_type}: all matrices")
        mixed = self._mixed(name, shape)
        fitted, misfit = fit_to_row(QUANT_TYPES[mixed.type], shape[-1], self.fallbacks)
        reason = f"llama.cpp {self.file_type}: {mixed.reason}" + (f"; {misfit}" if misfit else "")
        return Choice(fitted.name, reason)

    def _mixed(self, name: str, shape: Sequence[int]) -> Choice:
        category, arch = _category(name), self.hyper.arch
        if any(part in name for part in _AT_LEAST_Q8_0_IN_ARCH.get(arch, ())):
            return Choice("Q8_0", f"never lower in {arch}")
        if category == "output" or (self.is_tied and category == "token_embd"):
            return self._output(shape[-1])
        if self.file_type == "mxfp4_moe":
            is_expert = len(shape) > 2 and shape[-3] > 1 and (arch != "bailingmoe3" or category in _FFN)
            return Choice("MXFP4", "expert weights") if is_expert else Choice("Q8_0", "not expert weights")
        position = self._position(category, name)
        if category == "token_embd":
            return self._by_rules(_EMBEDDING_RULES, position, "token embedding")
        self.seen[category] += 1
        rules = (_FALCON_RULES if arch == "falcon" else _RULES).get(category, ())
        choice = self._by_rules(rules, position, category)
        is_raised = category == "attn_v" and self.file_type in _OTHERS and choice.type in ("Q3_K", "Q4_K")
        if is_raised and self._is_70b:
            return Choice("Q5_K", "attn_v of a 70B model")
        return choice

    def _output(self, row_length: int) -> Choice:
        subject = "output (tied to the token embedding)" if self.is_tied else "output"
        if self.hyper.arch == "falcon" or row_length % QUANT_TYPES[self.base].block_size:
            return Choice("Q8_0", f"{subject}; rows of {row_length} in {self.hyper.arch}")
        return self._by_rules(_OUTPUT_RULES, _Position(0, 1, self.hyper), subject)  # no rule looks at its place

    def _position(self, category: str, name: str) -> _Position:
        if category == "attn_v":
            return _Position(self.seen[category], self.num_attn_v, self.hyper)
        # Experts of one layer may be apart in the file, so layers are read from the name; the rules for 1- and 2-bit
        # files count tensors instead, experts and shared experts alike.
        counts_layers = category in _FFN and self.hyper.n_expert > 1 and self.file_type not in _VERY_LOW
        index = _counting_order(name)[0] if counts_layers else self.seen[category]
        return _Position(index, self.hyper.n_layer, self.hyper)

    def _by_rules(self, rules: tuple[_Rule, ...], position: _Position, subject: str) -> Choice:
        for rule in rules:
            if self.file_type in rule.file_types and rule.condition.holds(position):
                words = rule.condition.words
                return Choice(rule.type, f"{subject} ({words})" if words else subject)
        return Choice(self.base, "base type")


def file_type_name(ftype: str) -> str:
    """Return the key of `LLAMA_FTYPES` that llama-quantize understands by `ftype`. Raises PlanError: no such file type;
    the message lists the nearest names."""
    file_type = _ALIASES.get(ftype.lower(), ftype.lower())
    if file_type not in LLAMA_FTYPES:
        near = difflib.get_close_matches(file_type, LLAMA_FTYPES, n=4, cutoff=0.4) or list(LLAMA_FTYPES)
        raise PlanError(f"llama.cpp has no file type `{ftype}`. Did you mean one of: {', '.join(near)}?")
    return file_type


def llama_tensor_types(
    ftype: str,
    tensors: Iterable[tuple[str, Sequence[int]]],
    hyper: HyperParams,
    *,
    overridden: Container[str] = (),
    fallbacks: Collection[QuantType] = (),
) -> dict[str, Choice]:
    """Return the types that llama-quantize gives to a model's tensors for a file type, in the order of `tensors`.

    `ftype` is a key of `LLAMA_FTYPES` in any case, or `q3_k`, `q4_k`, `q5_k` for their `_m` mixtures; `tensors` are all
    GGUF names with shapes, row length last; `n_head_kv` of `hyper` is 1 for MLA, as llama.cpp's converter writes it.
    Names in `overridden` get their type by hand: they are not in the answer, nor counted by rules that count tensors,
    as in llama-quantize. What llama-quantize leaves alone is F32. `fallbacks` are those of `fit_to_row`.

    Raises:
        PlanError: no such file type.
    """
    file_type = file_type_name(ftype)
    shapes = {name: tuple(shape) for name, shape in tensors}
    mixture = _Mixture(file_type, list(shapes), hyper, fallbacks)
    left = [name for name in shapes if name not in overridden]
    choices = {name: mixture.choose(name, shapes[name]) for name in sorted(left, key=_counting_order)}
    return {name: choices[name] for name in left}
