"""Times what decides the constants of `dispatch`, `two_pass`, `tiles` and `grouped`, on the GPU at hand.

    python -m dynquant.kernels.bench.products dequantize|linear|tiles [--types Q4_K,IQ2_XXS]

Every line is one JSON object. Times are microseconds of CUDA-graph replays, without launch overhead; weights are as
large as those of real models, but a single matrix may stay in the L2 cache between replays.
"""

import itertools
import json
from collections.abc import Callable, Iterator
from unittest import mock

import torch
import triton
from torch import Tensor

from dynquant.formats.quant_types import QUANT_TYPES
from dynquant.kernels.bench.harness import device_name, options
from dynquant.kernels.planes import PLANES
from dynquant.kernels.triton import grouped, tiles, two_pass
from dynquant.kernels.triton.dequantize import dequantize

_ROWS = (8, 16, 32, 64, 128, 256, 512, 1024, 4096)
_MATRICES = ((4096, 4096), (14336, 4096), (4096, 14336))
_EXPERTS, _SLOTS, _EXPERT_ROWS, _EXPERT_LENGTH = 128, 8, 1536, 2048  # gate and up projection of Qwen3-30B-A3B


def packed(name: str, *shape: int) -> Tensor:
    """Return random blocks; what the bytes say does not change how long decoding takes."""
    row_bytes = QUANT_TYPES[name].row_bytes(shape[-1])
    return torch.randint(0, 256, (*shape[:-1], row_bytes), dtype=torch.uint8, device="cuda") & 0x3F  # no NaN


def microseconds(call: Callable[..., object], *arguments: object) -> float:
    """Return the median time of one call."""
    call(*arguments)
    time = triton.testing.do_bench_cudagraph(lambda: call(*arguments), rep=30, return_mode="median")
    return round(1000 * time, 2)


def bench_dequantize(name: str) -> Iterator[dict[str, object]]:
    """Yield times of whole matrices to bfloat16; `gb_s` counts the bytes read and written."""
    weight, out = packed(name, 14336, 8192), torch.empty(14336, 8192, dtype=torch.bfloat16, device="cuda")
    time = microseconds(dequantize, weight, name, out)
    yield {"type": name, "us": time, "gb_s": round((weight.numel() + 2 * out.numel()) / time / 1000)}


def bench_linear(name: str) -> Iterator[dict[str, object]]:
    """Yield times of `tiles` and `two_pass` with slices of several sizes, forward and backward, beside bfloat16."""
    for (rows, length), m in itertools.product(_MATRICES, _ROWS):
        weight = packed(name, rows, length)
        dense = torch.randn(rows, length, dtype=torch.bfloat16, device="cuda")
        x, dy = torch.randn(m, length, device="cuda").bfloat16(), torch.randn(m, rows, device="cuda").bfloat16()
        line = {"type": name, "n": rows, "k": length, "m": m}
        line["bf16"] = microseconds(torch.matmul, x, dense.T)
        line["bf16 grad"] = microseconds(torch.matmul, dy, dense)
        if m <= 1024:
            line["tiles"] = microseconds(tiles.linear, x, weight, name)
        for mega in (24, 48, 96):
            with mock.patch.object(two_pass, "_SLICE_BYTES", mega << 20):
                line[f"two_pass {mega}"] = microseconds(two_pass.linear, x, weight, name)
                line[f"two_pass {mega} grad"] = microseconds(two_pass.input_grad, dy, weight, name)
        yield line


def routed_inputs(tokens: int) -> tuple[Tensor, Tensor]:
    """Return activations, and the experts that every token goes to."""
    x = torch.randn(tokens, _EXPERT_LENGTH, device="cuda").bfloat16()
    return x, torch.rand(tokens, _EXPERTS, device="cuda").topk(_SLOTS).indices


def bench_tiles(name: str) -> Iterator[dict[str, object]]:
    """Yield times by constants of the forward tile kernel for experts with many rows and with few."""
    weight = packed(name, _EXPERTS, _EXPERT_ROWS, _EXPERT_LENGTH)
    for tokens, rows_per_tile in ((4096, (64, 128)), (1024, (32, 64)), (128, (16,))):
        x, ids = routed_inputs(tokens)
        for bm, (bn, warps), slices, stages in itertools.product(rows_per_tile, ((64, 4), (128, 8)), (1, 2), (1, 2, 3)):
            ahead = slices == stages == 1
            config = {"BM": bm, "BN": bn, "WARPS": warps, "SLICES": slices, "STAGES": stages, "AHEAD": ahead}
            line = {"type": name, "tokens": tokens, **config}
            with mock.patch.object(tiles, "linear_config", lambda *_, config=config: config):
                try:
                    line["us"] = microseconds(grouped.linear, x, weight, ids, name)
                except triton.runtime.errors.OutOfResources:
                    line["us"] = None
            yield line


def main() -> None:
    """Read the arguments and print the lines."""
    benches = {"dequantize": bench_dequantize, "linear": bench_linear, "tiles": bench_tiles}
    asked = options(__doc__, "what", benches, types=",".join(PLANES))
    print(json.dumps({"device": device_name(), "torch": torch.__version__}), flush=True)
    for name in asked.types.split(","):
        for line in benches[asked.what](name):
            print(json.dumps(line), flush=True)


if __name__ == "__main__":
    main()
