"""The registry of quant types: named byte layouts of ggml, as plain data.

Block sizes and block bytes come from the `gguf` package (GGML_QUANT_SIZES); what is added here are the facts that
llama.cpp keeps in code: which types need or use an importance matrix, and which type replaces one whose block does
not divide the row length (llama.cpp `tensor_type_fallback`, src/llama-quant.cpp; it has none for Q1_0, and stops).
"""

import difflib
from collections.abc import Iterable
from dataclasses import dataclass
from math import prod

from gguf import GGML_QUANT_SIZES, GGMLQuantizationType

from dynquant.errors import PlanError


@dataclass(frozen=True)
class QuantType:
    """One byte layout. `block_size` weights are stored in `block_bytes` bytes."""

    name: str
    ggml_id: int
    block_size: int
    block_bytes: int
    needs_imatrix: bool = False
    """ggml refuses to encode without an importance matrix (`ggml_quantize_requires_imatrix`)."""
    uses_imatrix: bool = False
    """The importance matrix changes the encoded bytes."""
    fallback: str | None = None
    """Type that llama.cpp takes when `block_size` does not divide the row length."""

    @property
    def bits_per_weight(self) -> float:
        return 8 * self.block_bytes / self.block_size

    @property
    def is_float(self) -> bool:
        return self.block_size == 1

    def row_bytes(self, row_length: int) -> int:
        """Bytes of one row. Raises ValueError: `row_length` is not a multiple of the block size."""
        if row_length % self.block_size:
            raise ValueError(
                f"`row_length` {row_length} is not a multiple of the block size {self.block_size} of {self.name}"
            )
        return row_length // self.block_size * self.block_bytes

    def tensor_bytes(self, shape: tuple[int, ...]) -> int:
        """Bytes of a tensor whose last dimension is the row."""
        return prod(shape[:-1]) * self.row_bytes(shape[-1])


_USES_IMATRIX = {
    "Q6_K", "Q5_K", "Q4_K", "Q3_K", "Q2_K", "IQ4_XS", "IQ4_NL", "IQ3_S", "IQ3_XXS", "IQ2_S", "IQ2_XS", "IQ2_XXS",
    "IQ1_M", "IQ1_S", "Q4_0", "Q4_1", "Q5_0", "Q5_1",
}  # fmt: skip
_NEEDS_IMATRIX = {"IQ1_S", "IQ2_XXS", "IQ2_XS"}
_FALLBACK = {
    **dict.fromkeys(("IQ1_S", "IQ1_M", "IQ2_XXS", "IQ2_XS", "IQ2_S", "IQ3_XXS", "IQ3_S", "IQ4_XS"), "IQ4_NL"),
    **dict.fromkeys(("Q2_K", "Q3_K", "TQ1_0", "TQ2_0"), "Q4_0"),
    "Q4_K": "Q5_0",
    "Q5_K": "Q5_1",
    "Q6_K": "Q8_0",
    "Q1_0": "Q2_0",
    "Q2_0": "Q4_0",
}
_NAMES = (
    "F32", "F16", "BF16", "Q8_0", "Q6_K", "Q5_K", "Q5_1", "Q5_0", "Q4_K", "Q4_1", "Q4_0", "IQ4_NL", "IQ4_XS",
    "MXFP4", "NVFP4", "Q3_K", "IQ3_S", "IQ3_XXS", "Q2_K", "IQ2_S", "IQ2_XS", "Q2_0", "IQ2_XXS", "TQ2_0", "IQ1_M",
    "TQ1_0", "IQ1_S", "Q1_0",
)  # fmt: skip
_LATER_THAN_GGUF = {"Q2_0": (42, 64, 18)}
"""Id, weights and bytes of a block of types that the `gguf` package (0.19) does not know yet."""


def _layout(name: str) -> QuantType:
    if name in _LATER_THAN_GGUF:
        sizes = _LATER_THAN_GGUF[name]
    else:
        ggml_type = GGMLQuantizationType[name]
        sizes = int(ggml_type), *GGML_QUANT_SIZES[ggml_type]
    return QuantType(name, *sizes, name in _NEEDS_IMATRIX, name in _USES_IMATRIX, _FALLBACK.get(name))


QUANT_TYPES: dict[str, QuantType] = {name: _layout(name) for name in _NAMES}
SMALL_BLOCK_TYPES = (QUANT_TYPES["Q2_0"], QUANT_TYPES["Q1_0"])
"""Types of few bits with small blocks, for rows that blocks of 256 do not divide."""


def quant_type(name: str) -> QuantType:
    """Look up a type by name, in any case. Raises PlanError: no such type; the message lists the nearest names."""
    layout = QUANT_TYPES.get(name.upper())
    if layout is None:
        near = difflib.get_close_matches(name.upper(), QUANT_TYPES, n=4, cutoff=0.4) or list(QUANT_TYPES)
        raise PlanError(f"There is no quant type `{name}`. Did you mean one of: {', '.join(near)}?")
    return layout


def fit_to_row(wanted: QuantType, row_length: int, fallbacks: Iterable[QuantType] = ()) -> tuple[QuantType, str | None]:
    """The type that llama.cpp would store for `wanted` in rows of this length, and why it differs.

    Follows `tensor_type_fallback` of llama.cpp: to the fallback type, if that does not fit either to F16. One of
    `fallbacks` that fits takes its place if its bits per weight are nearer to those of `wanted`.
    """
    if row_length % wanted.block_size == 0:
        return wanted, None
    chosen = wanted
    while row_length % chosen.block_size:
        chosen = QUANT_TYPES[chosen.fallback or "F16"]
    fitting = (fallback for fallback in fallbacks if row_length % fallback.block_size == 0)
    chosen = min((chosen, *fitting), key=lambda each: abs(each.bits_per_weight - wanted.bits_per_weight))
    reason = f"rows of {row_length} do not divide into {wanted.name} blocks of {wanted.block_size}: {chosen.name}"
    return chosen, reason


def fits_blocks(row_length: int) -> bool:
    """Return whether rows of this length are whole blocks of any type that is no float."""
    return any(row_length % each.block_size == 0 for each in QUANT_TYPES.values() if not each.is_float)


def candidates_for_row(wanted: QuantType, row_length: int) -> tuple[QuantType, ...]:
    """The types among which a planner may choose where `wanted` is a candidate: itself, or what `fit_to_row` stores
    with and without SMALL_BLOCK_TYPES."""
    stored, with_small_blocks = (fit_to_row(wanted, row_length, others)[0] for others in ((), SMALL_BLOCK_TYPES))
    return tuple(dict.fromkeys((stored, with_small_blocks)))
