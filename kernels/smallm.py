"""y = x W^T for 5 to 64 rows of activations: the kernel of `gemv`, in programs of up to eight rows side by side.

Programs that share weights run next to each other and read them from the L2 cache. Per weight and row it spends a
quarter of a dp4a (half of one with `act` "bf16"), so that it beats bf16 products to about 16 rows.
"""

from torch import Tensor

from dynquant.kernels import gemv
from dynquant.kernels.plans import GemvConfig

MIN_ROWS, MAX_ROWS = 5, 64


def supports(type_name: str, x: Tensor) -> bool:
    """Whether `linear` takes these activations for weights of this type."""
    return gemv.takes(type_name, x) and MIN_ROWS <= x.shape[0] <= MAX_ROWS


def linear(x: Tensor, weight: Tensor, type_name: str, act: str = "bf16", config: GemvConfig | None = None) -> Tensor:
    """x [M, K] times planar weights uint8 [N, row_bytes], transposed: [M, N]; raises like `gemv.linear`."""
    if not supports(type_name, x):
        raise ValueError(
            f"`x` must be bf16 or fp16 [{MIN_ROWS}-{MAX_ROWS}, 256 * n] for {type_name}, got {x.dtype} {[*x.shape]}"
        )
    gemv.check_weight(x, weight, type_name, act)
    return gemv.linear_of_checked(x, weight, type_name, act, config)
