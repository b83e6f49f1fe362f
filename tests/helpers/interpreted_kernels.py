"""Runs Triton kernels of the named types on the CPU and prints a JSON object of findings; a program of its own.

Triton decides at import whether it interprets, and a test process may have imported it already: start this with
TRITON_INTERPRET=1. Activations are float32, since the interpreter's bfloat16 products and roundings are wrong.
"""

import json
import sys

import torch

import tests.helpers.interpreter  # noqa: F401
from dynquant.formats import decode
from dynquant.formats.quant_types import QUANT_TYPES
from dynquant.kernels.planes import pack_planes
from dynquant.kernels.triton import activations, grouped, tiles, two_pass
from dynquant.kernels.triton.dequantize import dequantize
from tests.helpers.packed_weights import experts_truth, normal, packed_weights, relative_error

PARTS_TYPES = ("Q8_0", "Q4_K", "NVFP4")
PRODUCT_TYPES = ("Q5_1", "IQ3_S")
"""What differs between types is in `unpack` and `fragments`, and tested for all; these stand for the block sizes."""


def same_bits(actual: torch.Tensor, expected: torch.Tensor) -> bool:
    bits = torch.int32 if actual.dtype == torch.float32 else torch.int16
    return torch.equal(actual.view(bits), expected.to(actual.dtype).view(bits))


def poisoned(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.full(shape, float("nan"), dtype=dtype)


def whole(name: str) -> bool:
    weight = packed_weights(name, 3, 512)
    return same_bits(dequantize(pack_planes(name, weight), name, poisoned(3, 512)), decode(name, weight))


def parts(name: str) -> dict[str, bool]:
    length = 256 + QUANT_TYPES[name].block_size  # not whole tiles of 256 columns where blocks are smaller
    weight = packed_weights(name, 19, length)
    planar, dense = pack_planes(name, weight), decode(name, weight)
    ids = torch.tensor([18, 0, 7, 7])
    rows = dequantize(planar, name, poisoned(5, length), row_ids=torch.cat((ids, torch.tensor([19]))))
    return {
        "float16": same_bits(dequantize(planar, name, poisoned(19, length, dtype=torch.float16)), dense),
        "some rows": same_bits(dequantize(planar, name, poisoned(2, length), first_row=17), dense[17:]),
        "some columns": same_bits(
            dequantize(planar, name, poisoned(19, length - 256), first_column=256), dense[:, 256:].contiguous()
        ),
        "rows by index": same_bits(rows[:4], dense[ids]) and bool(rows[4].isnan().all()),
    }


def single_pairs(name: str) -> dict[str, float]:
    weight = packed_weights(name, 3, 9, 256)
    ids = torch.tensor([[2, 3, 0]])
    x = normal(1, 256)
    planar, matrix, dense = pack_planes(name, weight), pack_planes(name, weight[1]), decode(name, weight[1]).double()
    y = grouped.linear(x, planar, ids, name)
    return {
        "pairs": relative_error(y, experts_truth(x, weight, ids, name)),
        "sentinels": float(y[0, 1].abs().max()),
        "fragments": relative_error(tiles.linear(x, matrix, name), x.double() @ dense.T),
        "arranged": relative_error(two_pass.linear(x, matrix, name), x.double() @ dense.T),
    }


def products(name: str) -> dict[str, float]:
    length = 256 + QUANT_TYPES[name].block_size % 256
    weight = packed_weights(name, 4, 70, length)
    planar = pack_planes(name, weight)
    ids = torch.tensor([[3, 4], [0, -1]]).repeat(9, 1)  # experts 1 and 2 have no token
    ids[4] = 3
    x, dy = normal(18, length), normal(18, 2, 70)
    few = ids[:2].int()
    matrix, dense = pack_planes(name, weight[0]), decode(name, weight[0]).double()
    return {
        "tiles": relative_error(grouped.linear(x, planar, ids, name), experts_truth(x, weight, ids, name)),
        "tiles transposed": relative_error(
            grouped.input_grad(dy, planar, ids, name), experts_truth(dy, weight, ids, name, transposed=True)
        ),
        "pairs transposed": relative_error(
            grouped.input_grad(dy[:2], planar, few, name), experts_truth(dy[:2], weight, few, name, transposed=True)
        ),
        "matrix": relative_error(tiles.linear(x, matrix, name), x.double() @ dense.T),
        "two passes": relative_error(two_pass.linear(x, matrix, name), x.double() @ dense.T),
        "two passes transposed": relative_error(two_pass.input_grad(dy[:, 0], matrix, name), dy[:, 0].double() @ dense),
    }


def is_sorted(num_experts: int, num_pairs: int, block_m: int) -> bool:
    """Tell whether pairs come in the order of their experts, and tiles cover them all."""
    ids = torch.randint(-2, num_experts + 2, (num_pairs,), generator=torch.Generator().manual_seed(num_pairs))
    order, tiles = grouped.sorted_tiles(ids.view(-1, 1), num_experts, block_m)
    kept, expected = ids.clamp(-1, num_experts).sort(stable=True)
    rows = []
    for expert in range(-1, num_experts + 1):
        first, stop = (kept < expert).sum().item(), (kept <= expert).sum().item()
        number = expert if expert < num_experts else -1
        rows += [[number, at, min(at + block_m, stop)] for at in range(first, stop, block_m)]
    found = tiles.T.tolist()
    is_covered = found[: len(rows)] == rows and all(row[:2] == [-2, len(rows)] for row in found[len(rows) :])
    return torch.equal(order, expected) and is_covered and len(rows) < len(found)


def zeroes(num_words: int) -> bool:
    """Tell whether arranging activations zeroes so many words, and none beyond."""
    words = torch.full((num_words + 8,), 7, dtype=torch.int32)
    activations.arrange(torch.ones(3, 256), "Q4_K", 3, zeros=words[:num_words])
    return not words[:num_words].any() and bool((words[num_words:] == 7).all())


def main() -> None:
    two_pass._SLICE_BYTES = 40 * 320 * 4
    two_pass._ROW_STEP = 16
    names = sys.argv[1:]
    found = {
        "whole": {name: whole(name) for name in names},
        "parts": {name: parts(name) for name in names if name in PARTS_TYPES},
        "single_pairs": {name: single_pairs(name) for name in names},
        "products": {name: products(name) for name in names if name in PRODUCT_TYPES},
        "zeroed": [zeroes(num_words) for num_words in (132 * 2, 132 * 3, 132 * 4)],
        "sorted": [is_sorted(*sizes) for sizes in ((1, 5, 16), (8, 40, 16), (6, 777, 32), (126, 2500, 128))],
    }
    json.dump(found, sys.stdout)


if __name__ == "__main__":
    main()
