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


@dataclass(frozen=True)
class MmaConfig:
    """A tiling of `mma`: weight rows and warps of a program, programs that share a row (a divisor of K / 256), stages
    of the load pipeline, and dependent launch.
    """

    bn: int
    warps: int
    split: int = 1
    stages: int = 3
    pdl: bool = False


def gemv_config(type_name: str, act: str, num_x_rows: int, num_outputs: int, row_length: int) -> GemvConfig:
    """The tiling of `num_x_rows` rows of activations times weights [num_outputs, row_length]."""
    del type_name, act, num_outputs, row_length
    if num_x_rows <= 4:
        return GemvConfig(bn=4, warps=1, rows=num_x_rows)
    return GemvConfig(bn=4, warps=1, rows=min(num_x_rows, 8))


def mma_config(type_name: str, act: str, num_x_rows: int, num_outputs: int, row_length: int) -> MmaConfig:
    """The tiling of the same product on tensor cores: enough programs to fill the device."""
    del type_name, act, num_x_rows
    split = 1
    while split < 8 and num_outputs // 32 * split < 1024 and row_length // 256 % (2 * split) == 0:
        split *= 2
    return MmaConfig(bn=32, warps=2, split=split)
