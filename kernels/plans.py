"""How each product is tiled: measured choices as data, no search at run time."""

from dataclasses import dataclass


@dataclass(frozen=True)
class GemvConfig:
    """Rows of a program, its warps (each 32 chunks wide), programs that share a row, dependent launch (Hopper)."""

    bn: int
    warps: int
    split: int = 1
    pdl: bool = False


def gemv_config(type_name: str, num_rows: int, num_outputs: int, row_length: int) -> GemvConfig:
    """The tiling of a product of `num_rows` activation rows with weights [num_outputs, row_length]."""
    del type_name, num_rows, num_outputs, row_length
    return GemvConfig(bn=4, warps=1)
