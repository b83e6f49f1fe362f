"""The weights being encoded, and what their blocks decode to.

Rows are brought to a largest magnitude between 1/2 and 1 by a power of two, which changes no rounding but that of the
stored scales: squares of subnormal or huge weights would otherwise leave float32.
"""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from dynquant.encoding.search.layouts import SHIFT, BlockLayout, Fields


@dataclass(frozen=True)
class Spread:
    """Scale, its inverse (0 where it is 0), minimum and codeword offset of every weight [E, R, C]."""

    a: Tensor
    inverse: Tensor
    b: Tensor | None
    offsets: Tensor

    def targets(self, x: Tensor, columns: slice) -> Tensor:
        """Return the real-valued codewords of some columns from which `x` would be decoded."""
        shifted = x if self.b is None else x + self.b[..., columns]
        return shifted * self.inverse[..., columns] - self.offsets[..., columns]

    def decoded(self, values: Tensor, columns: slice) -> Tensor:
        """The weights that codewords of some columns stand for."""
        scaled = self.a[..., columns] * (values + self.offsets[..., columns])
        return scaled if self.b is None else scaled - self.b[..., columns]


@dataclass(frozen=True)
class Rows:
    """Normalised weights `x` [E, R, C] of E experts, contiguous; the true ones are `x * unit`, `unit` [E, R, 1]."""

    layout: BlockLayout
    x: Tensor
    unit: Tensor
    is_plain: bool = False
    """Kernels are left out: everything is searched by PyTorch, the reference of the kernels."""

    @classmethod
    def of(cls, layout: BlockLayout, weights: Tensor, *, is_plain: bool = False) -> "Rows":
        """From float32 weights [E, R, C]."""
        peak = weights.abs().amax(-1, keepdim=True)
        unit = torch.exp2(torch.frexp(peak).exponent.to(torch.float32).clamp(-126, 127))  # a normal float32
        return cls(layout, (weights / unit).contiguous(), unit, is_plain)

    @property
    def num_sub_blocks(self) -> int:
        return self.x.shape[-1] // self.layout.sub_block

    def rounded(self, d: Tensor) -> Tensor:
        """Scales [E, R, ...] as they will be stored, in normalised units."""
        unit = self.unit.reshape(*self.unit.shape[:2], *(1,) * (d.dim() - 2))
        return self.layout.round_scale(d * unit) / unit

    def scales(self, fields: Fields) -> Tensor:
        """`a` of every sub-block [E, R, S]."""
        return self._per_sub_block(fields.d, self.layout.multiplier_table(fields.d.device)[fields.scales])

    def minimums(self, fields: Fields) -> Tensor | None:
        """`b` of every sub-block [E, R, S]; None for types without."""
        if fields.mins is None:
            return None
        d = fields.d if fields.dmin is None else fields.dmin
        return self._per_sub_block(d, fields.mins.to(d.dtype))

    def units(self, fields: Fields, values: Tensor) -> list[Tensor]:
        """Return the factors of `d` and, where there is one, of `dmin`, [E, R, C]: decoded weights are their sum."""
        multipliers = self.layout.multiplier_table(self.x.device)[fields.scales]
        units = self.wide(multipliers) * (values + self.offsets(fields.shifts))
        if fields.mins is None:
            return [units]
        minimums = self.wide(fields.mins.to(torch.float32))
        return [units - minimums] if fields.dmin is None else [units, -minimums]

    def _per_sub_block(self, d: Tensor, codes: Tensor) -> Tensor:
        return (d.unsqueeze(-1) * codes.unflatten(-1, (d.shape[-1], -1))).flatten(-2)

    def wide(self, per_sub_block: Tensor) -> Tensor:
        """[..., S] -> [..., C]."""
        return per_sub_block.repeat_interleave(self.layout.sub_block, dim=-1)

    def offsets(self, shifts: Tensor | None) -> Tensor | float:
        """Return what is added to every codeword [E, R, C]; zero but in IQ1."""
        return 0.0 if shifts is None else shifts.repeat_interleave(self.layout.shift_width, dim=-1) * SHIFT

    def spread(self, fields: Fields) -> "Spread":
        """The fields at the width of the weights."""
        a, b = self.wide(self.scales(fields)), self.minimums(fields)
        offsets = torch.zeros_like(self.x) + self.offsets(fields.shifts)
        return Spread(a, torch.where(a != 0, a.reciprocal(), 0.0), None if b is None else self.wide(b), offsets)

    def decoded(self, fields: Fields, values: Tensor) -> Tensor:
        """The weights that the blocks stand for [E, R, C]; `values` are codewords."""
        return self.spread(fields).decoded(values, slice(None))

    def packed(self, fields: Fields, values: Tensor) -> Tensor:
        """Block bytes, uint8 [E, R, row_bytes]."""
        assert self.layout.pack is not None, "compressed-tensors stores codewords and scales apart"
        blocks = values.numel() // self.layout.super_block
        d, dmin = (None if t is None else (t * self.unit).reshape(blocks) for t in (fields.d, fields.dmin))
        stored = replace(fields.map(lambda t: t.reshape(blocks, -1)), d=d, dmin=dmin)
        return self.layout.pack(stored, values.reshape(blocks, -1)).view(*values.shape[:2], -1)
