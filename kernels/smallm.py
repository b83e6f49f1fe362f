"""y = x W^T for 5 to 64 rows of activations.

Types of plain bit fields go to int8 tensor cores (`mma`). The others run the kernel of `gemv` in programs of up to
eight rows, those that share weights side by side so that the L2 cache serves all but the first: a quarter of a dp4a
per weight and row (half of one with `act` "bf16"), which stays ahead of bf16 products to about 16 rows.
"""

from torch import Tensor

from dynquant.kernels import gemv, mma
from dynquant.kernels.plans import GemvConfig, MmaConfig, gemv_config, mma_config

MIN_ROWS, MAX_ROWS = 5, 64


def supports(type_name: str, x: Tensor) -> bool:
    """Whether `linear` takes these activations for weights of this type."""
    return gemv.takes(type_name, x) and MIN_ROWS <= x.shape[0] <= MAX_ROWS


def linear(
    x: Tensor, weight: Tensor, type_name: str, act: str = "bf16", config: GemvConfig | MmaConfig | None = None
) -> Tensor:
    """x [M, K] times planar weights uint8 [N, row_bytes], transposed: [M, N]; raises like `gemv.linear`."""
    if not supports(type_name, x):
        raise ValueError(
            f"`x` must be bf16 or fp16 [{MIN_ROWS}-{MAX_ROWS}, 256 * n] for {type_name}, got {x.dtype} {[*x.shape]}"
        )
    gemv.check_weight(x, weight, type_name, act)
    config = config or default_config(type_name, act, x.shape[0], weight.shape[0], x.shape[1])
    if isinstance(config, MmaConfig):
        return mma.linear_of_checked(x, weight, type_name, act, config)
    return gemv.linear_of_checked(x, weight, type_name, act, config)


def default_config(
    type_name: str, act: str, num_x_rows: int, num_outputs: int, row_length: int
) -> GemvConfig | MmaConfig:
    """The planned kernel and tiling."""
    choose = mma_config if type_name in mma.TYPES else gemv_config
    return choose(type_name, act, num_x_rows, num_outputs, row_length)
