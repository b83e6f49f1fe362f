"""How each product is tiled: measured choices as data, no search at run time."""

from dataclasses import dataclass


@dataclass(frozen=True)
class GemvConfig:
    """A tiling of `gemv`: weight rows and warps (each 32 chunks wide) of a program, programs that share a row, rows of
    activations of a program, and dependent launch, which overlaps the start of a kernel with the end of the last one.
    """

    bn: int
    warps: int
    split: int = 1
    rows: int = 1
    pdl: bool = False


def gemv_config(type_name: str, act: str, num_x_rows: int, num_outputs: int, row_length: int) -> GemvConfig:
    """The tiling of `num_x_rows` rows of activations times weights [num_outputs, row_length]."""
    del act, num_outputs, row_length
    is_wide = num_x_rows == 1 and type_name in ("Q4_K", "Q5_K")
    return GemvConfig(bn=2 if is_wide else 4, warps=1, rows=min(num_x_rows, 4), pdl=True)
