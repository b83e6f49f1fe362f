"""The encoder's knowledge of each type: how its blocks make weights of codewords, scales and minimums.

    weight = a * (codeword + shift) - b        a = d * multiplier[scale], b = dmin * min

`d` and `dmin` are stored once for a super-block, `scale` and `min` for a sub-block. IQ1 alone has a shift: +1/8 or -1/8
of every codeword in a run of `shift_width` weights. Everything else about a type follows from these numbers, so search,
scale fitting and error feedback are written once, for all types.

The schemes that vLLM reads have one scale `d` for a group of weights, in a number format of their own: bfloat16 for
integers and E4M3 codewords (compressed-tensors multiplies in the model's own type), E4M3 over one number for the tensor
for NVFP4, powers of two for MXFP4. Those with zero points have b = d * min.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

from dynquant.encoding.search.codebooks import Codebook, Grid, Integers, SignedWords, TernaryWords, Values
from dynquant.formats import codebook_quants, k_quants, plain_quants, tables
from dynquant.formats.quant_types import QUANT_TYPES, QuantType
from dynquant.formats.vllm_schemes import Scheme

SHIFT = 0.125
"""IQ1S_DELTA of ggml."""

E4M3_MAX = 448.0
E2M1_MAX = 6.0
_E4M3_TINY = 2.0**-9
_BF16_MAX = torch.finfo(torch.bfloat16).max
_FP16_MAX = 65504.0
_FP16_TINY = torch.tensor(2.0**-24)


@dataclass(frozen=True)
class Fields:
    """Numbers that blocks store beside the codewords. In a tensor [E, R, C] with B super-blocks and S sub-blocks a row:

    `d` [E, R, B] as float32; `scales` [E, R, S] indices of the layout's multipliers; `shifts` [E, R, C / shift_width]
    signs as +1 or -1; `dmin` and `mins` as `d` and `scales`, for types with minimums, and without `dmin` zero points.
    """

    d: Tensor
    scales: Tensor
    shifts: Tensor | None = None
    dmin: Tensor | None = None
    mins: Tensor | None = None

    def map(self, function: Callable[..., Tensor], *others: "Fields") -> "Fields":
        """Return what `function` makes of each tensor and its counterparts; those that a type lacks stay None."""
        rows = zip(*(vars(fields).values() for fields in (self, *others)), strict=True)
        return Fields(*(None if any(tensor is None for tensor in row) else function(*row) for row in rows))


@dataclass(frozen=True)
class BlockLayout:
    """The encoder's view of one quant type."""

    name: str
    codebook: Codebook
    sub_block: int
    multipliers: tuple[float, ...]
    pack: Callable[[Fields, Tensor], Tensor] | None = None
    """Block bytes from the fields of n super-blocks and their values [n, C]; None for schemes, which have no blocks."""
    num_mins: int = 0
    """Stored minimums run from 0 to this, exclusive; 0 for a type without minimums."""
    has_zero_points: bool = False
    """There is no `dmin`: minimums count in `d`."""
    shift_width: int = 0
    has_power_of_two_scale: bool = False
    """There is no `d`: the scale code itself is an exponent."""
    fractions: tuple[float, float] = (0.85, 1.05)
    """Range of the best scale of a sub-block, as a share of the one that lets its largest weight be met."""
    line_fractions: tuple[float, float] = (0.6, 1.0)
    """Range of the shares of both ends of a sub-block's weights that lines with a minimum are tried from."""
    tries_negative_scales: bool = False
    """`d` is tried with both signs, where codewords reach farther on one side."""

    @property
    def quant_type(self) -> QuantType:
        return QUANT_TYPES[self.name]

    @property
    def super_block(self) -> int:
        return self.quant_type.block_size

    @property
    def has_signed_scales(self) -> bool:
        return self.tries_negative_scales or self.multipliers[0] < 0

    @property
    def has_plain_minimum(self) -> bool:
        """Tell whether the minimum is `dmin` itself, as the scale is `d`: the code of each is 1."""
        return self.num_mins > 0 and not self.has_zero_points and len(self.multipliers) == 1

    @property
    def largest_weight(self) -> float:
        """Beyond this no scale that fits in fp16 reaches."""
        return _FP16_MAX * max(abs(m) for m in self.multipliers) * self.codebook.peak

    def multiplier_table(self, device: torch.device) -> Tensor:
        """Multipliers, ascending."""
        return numbers(self.multipliers, device)

    def round_scale(self, d: Tensor) -> Tensor:
        """The nearest number that a block can store as its scale.

        Where codewords may be 0, a scale too small for fp16 becomes the smallest one instead of 0.
        """
        if self.has_power_of_two_scale:
            return torch.ones_like(d)
        stored = d.clamp(-_FP16_MAX, _FP16_MAX).to(torch.float16).to(torch.float32)
        if isinstance(self.codebook, Integers):
            return torch.where((stored == 0) & (d != 0), torch.copysign(_FP16_TINY, d), stored)
        return stored


@cache
def numbers(values: tuple[float, ...], device: torch.device) -> Tensor:
    """Return a few float32 numbers, brought to a device once: a GPU is waited for meanwhile."""
    return torch.tensor(values, dtype=torch.float32, device=device)


def _half_steps(step: float) -> tuple[float, ...]:
    return tuple((i + 0.5) * step for i in range(16))


def _range(low: int, high: int, step: int = 1) -> tuple[float, ...]:
    return tuple(map(float, range(low, high, step)))


def _ternary(name: str, sub_block: int, shift_width: int, write: Callable[..., Tensor]) -> BlockLayout:
    book = TernaryWords()

    def pack(f: Fields, values: Tensor) -> Tensor:
        assert f.shifts is not None
        return write(f.d, f.scales, (f.shifts < 0).to(torch.int64), _indices(book.grid, values))

    return BlockLayout(name, book, sub_block, _range(1, 16, 2), pack, shift_width=shift_width, fractions=(0.35, 0.95))


def _signed(
    name: str, sub_block: int, multipliers: tuple[float, ...], write: Callable[..., Tensor], *, even_signs: bool
) -> BlockLayout:
    book = SignedWords(name, even_signs)

    def pack(f: Fields, values: Tensor) -> Tensor:
        return write(f.d, f.scales, _indices(book.grid, values.abs()), _sign_bytes(values))

    return BlockLayout(name, book, sub_block, multipliers, pack, fractions=(0.6, 1.1))


def _affine(name: str, sub_block: int, num_scales: int, high: int, write: Callable[..., Tensor]) -> BlockLayout:
    def pack(f: Fields, values: Tensor) -> Tensor:
        return write(f.d, f.dmin, f.scales, f.mins, values.to(torch.int64))

    return BlockLayout(name, Integers(0, high), sub_block, _range(0, num_scales), pack, num_mins=num_scales)


def _symmetric(name: str, half_scales: int, half_range: int, write: Callable[..., Tensor]) -> BlockLayout:
    def pack(f: Fields, values: Tensor) -> Tensor:
        return write(f.d, f.scales - half_scales, values.to(torch.int64))

    fractions = (0.6, 1.1) if half_range < 8 else (0.9, 1.02)
    multipliers = _range(-half_scales, half_scales)
    return BlockLayout(name, Integers(-half_range, half_range - 1), 16, multipliers, pack, fractions=fractions)


def _plain(
    name: str, low: int, high: int, width: int, fractions: tuple[float, float], write: Callable[..., Tensor]
) -> BlockLayout:
    def pack(f: Fields, values: Tensor) -> Tensor:
        return write(f.d, values.to(torch.int64))

    is_lopsided = low != -high
    return BlockLayout(
        name, Integers(low, high), width, (1.0,), pack, fractions=fractions, tries_negative_scales=is_lopsided
    )


def _plain_affine(name: str, high: int, shares: tuple[float, float], write: Callable[..., Tensor]) -> BlockLayout:
    def pack(f: Fields, values: Tensor) -> Tensor:
        assert f.dmin is not None
        return write(f.d, -f.dmin, values.to(torch.int64))

    return BlockLayout(name, Integers(0, high), 32, (1.0,), pack, num_mins=2, line_fractions=shares)


def _iq4_nl() -> BlockLayout:
    def pack(f: Fields, values: Tensor) -> Tensor:
        return codebook_quants.pack_iq4_nl(f.d, _table_indices("IQ4_NL", values))

    return BlockLayout("IQ4_NL", Values("IQ4_NL"), 32, (1.0,), pack, tries_negative_scales=True)


def _iq4_xs() -> BlockLayout:
    def pack(f: Fields, values: Tensor) -> Tensor:
        return codebook_quants.pack_iq4_xs(f.d, f.scales - 32, _table_indices("IQ4_NL", values))

    return BlockLayout("IQ4_XS", Values("IQ4_NL"), 32, _range(-32, 32), pack)


MXFP4_FIRST = 2
"""The first E8M0 byte whose halved value is a normal float32."""


def _mxfp4() -> BlockLayout:
    def pack(f: Fields, values: Tensor) -> Tensor:
        return plain_quants.pack_mxfp4(f.scales.squeeze(1) + MXFP4_FIRST, _table_indices("MXFP4", values))

    powers = tuple(2.0 ** (e - 128) for e in range(MXFP4_FIRST, 255))  # the stored values are doubled
    return BlockLayout("MXFP4", Values("MXFP4"), 32, powers, pack, has_power_of_two_scale=True, fractions=(0.6, 1.1))


def _q1_0() -> BlockLayout:
    def pack(f: Fields, values: Tensor) -> Tensor:
        return plain_quants.pack_q1_0(f.d, values)

    return BlockLayout("Q1_0", Values("Q1_0"), 128, (1.0,), pack)


def _indices(grid: Grid, values: Tensor) -> Tensor:
    """[n, 256] -> index of each word in the grid."""
    return grid.index_of(values.reshape(len(values), -1, grid.width))


def _sign_bytes(values: Tensor) -> Tensor:
    """[n, 256] -> [n, 32]: a set bit for each negative weight."""
    bits = (values.reshape(len(values), -1, 8) < 0).to(torch.int64)
    return (bits << torch.arange(8, device=values.device)).sum(-1)


@cache
def _places(type_name: str) -> tuple[int, Tensor]:
    """Return the lowest integer of a type's table, and the place in it of each integer from there on."""
    table = tables.values(type_name, torch.device("cpu")).to(torch.int64)
    lowest = int(table.min())
    places = torch.full((int(table.max()) - lowest + 1,), len(table))
    return lowest, places.scatter_reduce(0, table - lowest, torch.arange(len(table)), "amin")  # the first zero


def _table_indices(type_name: str, values: Tensor) -> Tensor:
    """[n, C] values -> their places in the type's own table, which need not ascend."""
    lowest, places = _places(type_name)
    return places.to(values.device)[values.to(torch.int64) - lowest]


LAYOUTS: dict[str, BlockLayout] = {
    layout.name: layout
    for layout in (
        _ternary("IQ1_S", 32, 32, codebook_quants.pack_iq1_s),
        _ternary("IQ1_M", 16, 8, codebook_quants.pack_iq1_m),
        _signed("IQ2_XXS", 32, _half_steps(0.25), codebook_quants.pack_iq2_xxs, even_signs=True),
        _signed("IQ2_XS", 16, _half_steps(0.25), codebook_quants.pack_iq2_xs, even_signs=True),
        _signed("IQ2_S", 16, _half_steps(0.25), codebook_quants.pack_iq2_s, even_signs=False),
        _signed("IQ3_XXS", 32, _half_steps(0.5), codebook_quants.pack_iq3_xxs, even_signs=True),
        _signed("IQ3_S", 32, _range(1, 32, 2), codebook_quants.pack_iq3_s, even_signs=False),
        _affine("Q2_K", 16, 16, 3, k_quants.pack_q2_k),
        _affine("Q4_K", 32, 64, 15, k_quants.pack_q4_k),
        _affine("Q5_K", 32, 64, 31, k_quants.pack_q5_k),
        _symmetric("Q3_K", 32, 4, k_quants.pack_q3_k),
        _symmetric("Q6_K", 128, 32, k_quants.pack_q6_k),
        _iq4_xs(),
        _plain("TQ1_0", -1, 1, 256, (0.15, 0.8), codebook_quants.pack_tq1_0),
        _plain("TQ2_0", -1, 1, 256, (0.15, 0.8), codebook_quants.pack_tq2_0),
        _plain("Q4_0", -8, 7, 32, (0.8, 1.15), plain_quants.pack_q4_0),
        _plain("Q5_0", -16, 15, 32, (0.8, 1.05), plain_quants.pack_q5_0),
        _plain_affine("Q4_1", 15, (0.8, 1.075), plain_quants.pack_q4_1),
        _plain_affine("Q5_1", 31, (0.9, 1.04), plain_quants.pack_q5_1),
        _iq4_nl(),
        _plain("Q2_0", -1, 2, 64, (0.5, 1.0), plain_quants.pack_q2_0),
        _q1_0(),
        _mxfp4(),
    )
}
"""Types that this encoder searches. Floats, Q8_0 and NVFP4 are left to ggml's encoder."""


@dataclass(frozen=True)
class Float8:
    """E4M3 numbers, one weight at a time."""

    group: int = 1
    peak: float = E4M3_MAX

    def nearest(self, y: Tensor, metric: Tensor) -> Tensor:
        return y.clamp(-E4M3_MAX, E4M3_MAX).to(torch.float8_e4m3fn).to(torch.float32)

    scan = nearest


@dataclass(frozen=True)
class SchemeLayout(BlockLayout):
    """Groups of one scale. `global_scale` is what NVFP4's scales are multiplied with before they are stored."""

    global_scale: float | None = None

    @property
    def super_block(self) -> int:
        return self.sub_block

    @property
    def largest_weight(self) -> float:
        return _BF16_MAX

    def round_scale(self, d: Tensor) -> Tensor:
        if self.global_scale is None:
            return d.to(torch.bfloat16).to(torch.float32)
        # The codewords are ggml's doubled E2M1 numbers.
        stored = (2 * self.global_scale * d).clamp(_E4M3_TINY, E4M3_MAX).to(torch.float8_e4m3fn)
        return stored.to(torch.float32) / (2 * self.global_scale)


_FRACTIONS = {2: (0.5, 1.0), 3: (0.6, 1.1), 4: (0.6, 1.1), 5: (0.8, 1.05)}
"""Fractions of symmetric integers of few bits."""


def scheme_layout(scheme: Scheme, columns: int, global_scale: float | None = None) -> BlockLayout:
    """Return the layout of rows of `columns` weights in a scheme that vLLM reads."""
    codebook: Codebook
    count = 1 << scheme.num_bits
    if scheme.strategy == "tensor_group":
        codebook, fractions = Values("MXFP4"), (0.6, 1.1)
    elif scheme.has_zero_points:
        codebook, fractions = Integers(0, count - 1), (0.6, 1.0)
    elif scheme.kind == "int":
        codebook, fractions = Integers(-count // 2, count // 2 - 1), _FRACTIONS.get(scheme.num_bits, (0.9, 1.02))
    elif scheme.num_bits == 8:
        codebook, fractions = Float8(), (1.0, 1.9)
    else:
        return LAYOUTS["MXFP4"]
    return SchemeLayout(
        scheme.name, codebook, scheme.group_size or columns, (1.0,), fractions=fractions, global_scale=global_scale,
        num_mins=count * scheme.has_zero_points, has_zero_points=scheme.has_zero_points,
        tries_negative_scales=isinstance(codebook, Integers) and not scheme.has_zero_points,
    )  # fmt: skip
