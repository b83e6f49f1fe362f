"""The same products with what one would install instead: bitsandbytes NF4 and gemlite, beside torch in bf16.

    python -m dynquant.kernels.bench.peers --out FILE.json

Weights rotate over 256 MiB so that no cache holds them; a CUDA graph is replayed, the median of its times is reported.
A peer that is not installed or fails is listed with its reason. llama.cpp is measured by `bench_llama.cpp`.
"""

import itertools
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from dynquant.kernels.bench.harness import JsonReport, Row, device_name, graph_time, options

ROTATED_BYTES = 256 << 20
SHAPES = ((14336, 4096), (8192, 8192), (28672, 8192))
Product = Callable[[Tensor], Tensor]
Maker = Callable[[int, int], tuple[Product, int]]  # N, K -> the product by random weights, and their bytes


def main() -> None:
    """Parse, measure, write JSON after every line."""
    asked = options(__doc__, out=Path, m="1,16,4096")
    report = JsonReport(asked.out, {"device": device_name()})
    for (n, k), (name, make), m in itertools.product(SHAPES, PEERS.items(), map(int, asked.m.split(","))):
        row = {"peer": name, "n": n, "k": k, "m": m}
        try:
            row |= _measured(make, n, k, m)
        except Exception as error:  # a peer's failure is a result, not ours to fix
            row["failed"] = f"{type(error).__name__}: {str(error).partition(chr(10))[0][:120]}"
        report.add(row)


def _measured(make: Maker, n: int, k: int, m: int) -> Row:
    first, num_bytes = make(n, k)
    copies = max(4, -(-ROTATED_BYTES // num_bytes))
    products = [first, *(make(n, k)[0] for _ in range(copies - 1))]
    x = torch.randn(m, k, device="cuda", dtype=torch.bfloat16)
    us, _ = graph_time([partial(product, x) for product in products], replays=20)
    sizes = {"bits_per_weight": round(8 * num_bytes / n / k, 3), "gb_per_s": round(num_bytes / us / 1e3, 1)}
    return {"us": round(us, 2), **sizes}


def _torch_bf16(n: int, k: int) -> tuple[Product, int]:
    weight = torch.randn(n, k, device="cuda", dtype=torch.bfloat16)
    return lambda x: torch.nn.functional.linear(x, weight), 2 * n * k


def _bitsandbytes_nf4(n: int, k: int) -> tuple[Product, int]:
    import bitsandbytes

    layer = bitsandbytes.nn.Linear4bit(k, n, bias=False, compute_dtype=torch.bfloat16, quant_type="nf4")
    layer = layer.to(torch.bfloat16).cuda()
    state = layer.weight.quant_state
    return layer, layer.weight.numel() * layer.weight.element_size() + 4 * state.absmax.numel()


def _gemlite(bits: int) -> Maker:
    def make(n: int, k: int) -> tuple[Product, int]:
        from gemlite.helper import A16Wn_HQQ_INT

        codes = torch.randint(0, 1 << bits, (n, k), device="cuda", dtype=torch.uint8)
        scales = torch.full((n, k // 64), 1e-3, device="cuda", dtype=torch.bfloat16)
        zeros = torch.full((n, k // 64), float(1 << (bits - 1)), device="cuda", dtype=torch.bfloat16)
        layer = A16Wn_HQQ_INT(dtype=torch.bfloat16, W_nbits=bits).from_weights(codes, scales, zeros)
        return layer, n * k * bits // 8 + 2 * 2 * n * k // 64

    return make


PEERS: dict[str, Maker] = {
    "torch bf16": _torch_bf16,
    "bitsandbytes NF4": _bitsandbytes_nf4,
    "gemlite A16W4, groups of 64": _gemlite(4),
    "gemlite A16W2, groups of 64": _gemlite(2),
}


if __name__ == "__main__":
    main()
