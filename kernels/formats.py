"""How the blocks of each quant type are laid out for kernels: the same bytes, one plane per field.

A ggml block interleaves scales, codes and high bits, so that fields of neighbouring blocks lie at odd strides and, in
blocks of 50, 66 or 210 bytes, at odd addresses. In a planar tensor all bytes of one field lie together, block after
block; nothing is added or dropped, so a planar tensor is as large as its blocks, and the way back is exact.

    blocks   [ d0 qs0 | d1 qs1 | d2 qs2 | ... ]       block i at i * block_bytes
    planes   [ qs0 qs1 qs2 ... | d0 d1 d2 ... ]       field f of block i at plane_starts(f) + i * num_bytes(f)

Planes are ordered by the power of two that divides their size, largest first: every field is then aligned to that power
(at most 16 bytes) whatever the number of blocks, provided the tensor's first byte is.
"""

from dataclasses import dataclass

from dynquant.formats.quant_types import QUANT_TYPES, QuantType, quant_type


@dataclass(frozen=True)
class Field:
    """One field of a block: `num_bytes` from byte `offset`. The byte maps are in `dynquant.formats`."""

    name: str
    offset: int
    num_bytes: int


_LAYOUTS: dict[str, tuple[tuple[str, int], ...]] = {
    "Q8_0": (("d", 2), ("qs", 32)),
    "Q5_1": (("dm", 4), ("qh", 4), ("qs", 16)),
    "Q5_0": (("d", 2), ("qh", 4), ("qs", 16)),
    "Q4_1": (("dm", 4), ("qs", 16)),
    "Q4_0": (("d", 2), ("qs", 16)),
    "MXFP4": (("e", 1), ("qs", 16)),
    "NVFP4": (("d", 4), ("qs", 32)),
    "Q6_K": (("ql", 128), ("qh", 64), ("scales", 16), ("d", 2)),
    "Q5_K": (("dm", 4), ("scales", 12), ("qh", 32), ("qs", 128)),
    "Q4_K": (("dm", 4), ("scales", 12), ("qs", 128)),
    "Q3_K": (("hmask", 32), ("qs", 64), ("scales", 12), ("d", 2)),
    "Q2_K": (("scales", 16), ("qs", 64), ("dm", 4)),
    "IQ4_NL": (("d", 2), ("qs", 16)),
    "IQ4_XS": (("d", 2), ("scales_h", 2), ("scales_l", 4), ("qs", 128)),
    "IQ3_S": (("d", 2), ("qs", 64), ("qh", 8), ("signs", 32), ("scales", 4)),
    "IQ3_XXS": (("d", 2), ("qs", 64), ("scales", 32)),
    "IQ2_S": (("d", 2), ("qs", 32), ("signs", 32), ("qh", 8), ("scales", 8)),
    "IQ2_XS": (("d", 2), ("qs", 64), ("scales", 8)),
    "IQ2_XXS": (("d", 2), ("qs", 64)),
    "IQ1_M": (("qs", 32), ("qh", 16), ("scales", 8)),
    "IQ1_S": (("d", 2), ("qs", 32), ("qh", 16)),
    "TQ2_0": (("qs", 64), ("d", 2)),
    "TQ1_0": (("qs", 48), ("qh", 4), ("d", 2)),
}
"""Fields in the order in which a block stores them."""


def is_packed(stored: QuantType) -> bool:
    """Whether kernels multiply by this type; F32, F16 and BF16 are left to PyTorch."""
    return stored.name in _LAYOUTS


def _planes_of(name: str) -> tuple[Field, ...]:
    fields, offset = [], 0
    for field_name, num_bytes in _LAYOUTS[name]:
        fields.append(Field(field_name, offset, num_bytes))
        offset += num_bytes
    assert offset == QUANT_TYPES[name].block_bytes, name
    return tuple(sorted(fields, key=lambda field: -min(field.num_bytes & -field.num_bytes, 16)))


PLANES: dict[str, tuple[Field, ...]] = {name: _planes_of(name) for name in _LAYOUTS}
"""Fields of every packed type in the order of their planes."""


def plane_starts(type_name: str, num_blocks: int) -> dict[str, int]:
    """Field name -> byte at which its plane begins in a planar tensor of `num_blocks` blocks.

    Raises:
        ValueError: kernels do not know the type.
    """
    starts, start = {}, 0
    for field in planes(type_name):
        starts[field.name] = start
        start += num_blocks * field.num_bytes
    return starts


def planes(type_name: str) -> tuple[Field, ...]:
    """The planes of a type.

    Raises:
        PlanError: no quant type has this name.
        ValueError: the type is a plain float.
    """
    stored = quant_type(type_name)
    if not is_packed(stored):
        raise ValueError(f"{stored.name} is not a packed type; give kernels one of {', '.join(PLANES)}")
    return PLANES[stored.name]
