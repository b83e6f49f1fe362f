"""Times of packed products beside their errors: `python -m dynquant.kernels.bench.gemv --out FILE.json`.

Weights are slices of one pool of random bytes, rotated so that every replay of a CUDA graph reads at least 240 MB that
the L2 cache cannot hold. Times are medians of graph replays (`us`) and of plain calls (`eager_us`), activations
quantized inside; `multiply_us` is the product alone. Up to four rows of activations run `gemv`, more of them whatever
`dispatch` chooses. GB/s counts packed weights, activations and results; the fraction
is of the read bandwidth measured first. Errors are against float64 products of decoded weights of the same K and
tiling, and a replayed graph must give the bits of plain calls: a speed whose result is wrong is not reported.
The file is rewritten after every row. Kernels are compiled ahead by worker processes into Triton's cache.
"""

import argparse
import itertools
import multiprocessing
import time
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path

import torch
import triton
import triton.language as tl
from torch import Tensor

from dynquant.formats import decode
from dynquant.formats.quant_types import QUANT_TYPES
from dynquant.formats.scale_fields import num_scales, with_scales
from dynquant.kernels import ops
from dynquant.kernels.bench import naive
from dynquant.kernels.bench.harness import JsonReport, Row, device_name, eager_time, graph_time, parser
from dynquant.kernels.planes import pack_planes
from dynquant.kernels.triton import gemv
from dynquant.kernels.triton.activations import quantize_activations
from dynquant.kernels.triton.gemv import GemvConfig, gemv_config

PRIORITY = (
    "Q4_K", "IQ2_XXS", "IQ1_S", "TQ2_0", "Q2_K", "Q6_K", "Q5_K", "Q3_K", "IQ4_XS", "Q8_0", "MXFP4", "IQ3_XXS",
    "IQ2_XS", "IQ2_S", "IQ3_S", "IQ1_M", "NVFP4", "IQ4_NL", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "TQ1_0",
)  # fmt: skip
SHAPES = ((14336, 4096), (28672, 8192), (4096, 4096), (8192, 8192))
ERROR_LIMIT = {"bf16": 4e-3, "int8": 1.2e-2}
ROTATED_BYTES = 240_000_000
POOL_BYTES = 1 << 30

_Config = GemvConfig | None
_Job = tuple[str, int, int, str, _Config]
"""type, M, K, act, tiling: what determines a compiled kernel"""


@triton.jit
def _read_kernel(x_ptr, out_ptr, num_words, BLOCK: tl.constexpr, STEPS: tl.constexpr):
    i = tl.program_id(0).to(tl.int64) * BLOCK * STEPS + tl.arange(0, BLOCK)
    total = tl.zeros([BLOCK], tl.int32)
    for step in range(STEPS):
        total += tl.load(x_ptr + i + step * BLOCK)
    tl.store(out_ptr + tl.program_id(0), tl.sum(total, axis=0))


def ceilings() -> Row:
    """Return the measured read bandwidth (GB/s) over 2 GB and bf16 TFLOPS of an 8192^3 product."""
    words = torch.ones(1 << 29, dtype=torch.int32, device="cuda")
    best = 0.0
    for block, steps, warps in itertools.product((2048, 4096), (4, 16), (4, 8)):
        programs = len(words) // (block * steps)
        out = torch.empty(programs, dtype=torch.int32, device="cuda")
        read = partial(_read_kernel[(programs,)], words, out, len(words), block, steps, num_warps=warps)
        us, _ = graph_time([read], replays=5)
        best = max(best, words.numel() * 4 / us / 1e3)
    del words
    a = torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16)
    us, _ = graph_time([lambda: a @ a] * 4, replays=5)
    return {"read_gbps": best, "bf16_tflops": 2 * 8192**3 / us / 1e6, "device": device_name()}


def slices(pool: Tensor, num_bytes: int, m: int) -> list[Tensor]:
    """Return parts of the pool that together exceed what a cache can keep; they only overlap if the pool is too small.

    Three for many rows of activations, whose products wait for arithmetic: the longer they run, the lower the clock.
    """
    step = (num_bytes + 255) // 256 * 256
    count = max(2, -(-ROTATED_BYTES // step)) if m < 256 else 3
    room = (len(pool) - num_bytes) // 256 * 256
    starts = [i * step % (room + 256) for i in range(count)]
    return [pool[start : start + num_bytes] for start in starts]


def finite_blocks(type_name: str, num_rows: int, row_length: int) -> Tensor:
    """Return random blocks whose fp16 scales are ordinary numbers, on the GPU: uint8 [rows, row_bytes]."""
    layout = QUANT_TYPES[type_name]
    num_blocks = num_rows * row_length // layout.block_size
    blocks = torch.randint(0, 256, (num_blocks, layout.block_bytes), dtype=torch.uint8, device="cuda")
    if type_name == "MXFP4":
        blocks[:, 0] = blocks[:, 0] % 8 + 120
    elif type_name != "NVFP4":
        scales = torch.rand(num_blocks, num_scales(type_name), device="cuda") * 0.1 + 0.01
        blocks = with_scales(type_name, blocks, scales)
    return blocks.reshape(num_rows, -1)


def product(x: Tensor, weight: Tensor, type_name: str, act: str, config: _Config) -> Tensor:
    """`gemv` with this tiling, or without one the kernel that `dispatch` chooses."""
    if config is None:
        return ops.linear(x, weight, type_name, layout="planes")
    return gemv.linear_of_checked(x, weight, type_name, act, config)


def error_of(type_name: str, m: int, row_length: int, act: str, config: _Config) -> float:
    """||y - ref|| / ||ref|| over 1040 rows of weights and 8 normal activations, by the kernel that is timed."""
    blocks = finite_blocks(type_name, 1040, row_length)
    planar = pack_planes(type_name, blocks)
    x = torch.randn(8, m, row_length, device="cuda", dtype=torch.bfloat16)
    y = torch.stack([product(part, planar, type_name, act, config) for part in x]).double()
    reference = x.double() @ decode(type_name, blocks).double().T
    return ((y - reference).norm() / reference.norm()).item()


def bf16_times(pool: Tensor, shapes: list[tuple[int, int]], rows: list[int]) -> dict[tuple[int, int, int], float]:
    """Return microseconds of torch's own product by bf16 weights, for (M, N, K)."""
    times = {}
    values = torch.empty(len(pool) // 2, dtype=torch.bfloat16, device="cuda").normal_(0, 0.02)
    for (n, k), m in itertools.product(shapes, rows):
        weights = [part.view(n, k) for part in slices(values, n * k, m)]
        x = torch.randn(m, k, device="cuda", dtype=torch.bfloat16)
        times[m, n, k], _ = graph_time([partial(torch.nn.functional.linear, x, w) for w in weights])
    return times


def measure(
    type_name: str, m: int, n: int, k: int, act: str, config: _Config, pool: Tensor, *, is_quick: bool = False
) -> Row:
    """Return one row of the report; `is_quick` leaves out eager times and the product alone."""
    row: Row = {"type": type_name, "m": m, "n": n, "k": k, "act": act}
    row["config"] = asdict(config) if config else "dispatch"
    row["error"] = error_of(type_name, m, k, act, config)
    if not row["error"] <= ERROR_LIMIT[act]:
        return row | {"refused": f"error above {ERROR_LIMIT[act]}"}
    row_bytes = QUANT_TYPES[type_name].row_bytes(k)
    weights = [part.view(n, row_bytes) for part in slices(pool, n * row_bytes, m)]
    x = torch.randn(m, k, device="cuda", dtype=torch.bfloat16)
    calls = [lambda w=w: product(x, w, type_name, act, config) for w in weights]
    us, results = graph_time(calls)
    for call, result in zip(calls, results, strict=True):
        if not torch.equal(call().view(torch.int16), result.view(torch.int16)):
            return row | {"refused": "graph replay and plain calls differ"}
    row["us"] = us
    row["gbps"] = (n * row_bytes + 2 * m * (n + k)) / us / 1e3
    if not is_quick:
        row["eager_us"] = eager_time(calls)
        if config is None:
            return row
        xq, xd = quantize_activations(x, act, padded_rows=-(-m // config.rows) * config.rows)
        calls = [lambda w=w: gemv.multiply(xq, xd, w, type_name, m, x.dtype, config) for w in weights]
        row["multiply_us"], _ = graph_time(calls)
    return row


def naive_row(type_name: str, n: int, k: int, pool: Tensor) -> Row:
    """Return a row of the first-attempt kernel, and decoding to bf16 before torch's product, at M = 1."""
    blocks = finite_blocks(type_name, 1024, k)
    x = torch.randn(1, k, device="cuda", dtype=torch.bfloat16)
    weights = decode(type_name, blocks)
    reference = x.double() @ weights.double().T
    error = ((naive.linear(x, blocks, type_name).double() - reference).norm() / reference.norm()).item()
    row: Row = {"type": type_name, "m": 1, "n": n, "k": k, "act": "naive", "error": error}
    if not error <= ERROR_LIMIT["bf16"]:
        return row | {"refused": "error"}
    parts = [part.view(n, -1) for part in slices(pool, n * blocks.shape[1], 1)]
    row["us"], _ = graph_time([lambda w=w: naive.linear(x, w, type_name) for w in parts])
    row["decode_mm_us"] = eager_time([lambda: x @ decode(type_name, parts[0]).to(x.dtype).T] * 2)
    return row


def tune_space(m: int) -> list[GemvConfig]:
    """Return tilings of `gemv` worth trying for M rows of activations."""
    sizes = ((2, 1), (4, 1), (8, 1), (2, 2), (4, 2))
    return [GemvConfig(bn, warps, rows=m, pdl=True) for bn, warps in sizes] + [GemvConfig(4, 1, rows=m)]


def _compile(job: _Job) -> None:
    type_name, m, k, act, config = job
    if config is None:
        weight = torch.zeros(1024, QUANT_TYPES[type_name].row_bytes(k), dtype=torch.uint8, device="cuda")
        product(torch.zeros(m, k, dtype=torch.bfloat16, device="cuda"), weight, type_name, act, None)
        return
    planes = 1 + (act == "bf16")
    f32, dtype = torch.float32, torch.float32 if config.split > 1 else torch.bfloat16
    constants = gemv.kernel_constants(type_name, planes, k, config)
    gemv.gemv_kernel.warmup(
        torch.uint8, torch.int32, f32, torch.int32, dtype, f32, 4096, 1, 1, 1, grid=(1,), **constants
    )


def precompile(jobs: list[_Job], workers: int) -> None:
    """Compile kernels in processes of their own; they are read back from Triton's cache."""
    began, done = time.perf_counter(), 0
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(workers, mp_context=context) as executor:
        pending = {executor.submit(_compile, job): job for job in dict.fromkeys(jobs)}
        for future in as_completed(pending):
            done += 1
            if future.exception() is not None:
                print(f"compiling {pending[future]} failed: {future.exception()}", flush=True)
    print(f"compiled {done} kernels in {time.perf_counter() - began:.0f} s", flush=True)


def add_row(report: JsonReport, row: Row, bf16_us: float | None) -> None:
    """Add a row with its speed beside bfloat16 and as a share of the read bandwidth."""
    if bf16_us is not None:
        row["bf16_us"] = bf16_us
        if "us" in row:
            row["speedup"] = bf16_us / row["us"]
    if "gbps" in row:
        row["fraction"] = row["gbps"] / report.head["read_gbps"]
    report.add(row)


def best_configs(rows: list[Row]) -> list[str]:
    """Return the fastest tiling of every (type, M, N, K, act), as lines for `gemv_config`."""
    best: dict[tuple, Row] = {}
    for row in rows:
        key = tuple(row[name] for name in ("type", "act", "m", "n", "k"))
        if "us" in row and "config" in row and (key not in best or row["us"] < best[key]["us"]):
            best[key] = row
    return [
        f"{key}: {row['config']},  # {row['us']:.2f} us, {row.get('fraction', 0):.2f} of peak"
        for key, row in best.items()
    ]


def main() -> None:
    """Parse, compile, measure, write JSON after every row."""
    options, began = _options(), time.perf_counter()
    types, acts = options.types.split(","), options.acts.split(",")
    rows = [int(m) for m in options.m.split(",")]
    shapes = [tuple(int(side) for side in shape.split("x")) for shape in options.shapes.split(",")]
    jobs = [
        (name, m, n, k, act, config)
        for name, act, m, (n, k) in itertools.product(types, acts, rows, shapes)
        for config in _configs(options, name, act, m)
    ]
    precompile([(name, m, k, act, config) for name, m, n, k, act, config in jobs], options.workers)

    report = JsonReport(options.out, ceilings())
    pool = torch.randint(0, 256, (POOL_BYTES,), dtype=torch.uint8, device="cuda")
    dense = bf16_times(pool, shapes, rows)
    for (m, n, k), us in dense.items():
        row = {"type": "BF16", "m": m, "n": n, "k": k, "act": "torch", "us": us, "gbps": 2e-3 * n * k / us}
        add_row(report, row, us)
    for name, m, n, k, act, config in jobs:
        if time.perf_counter() - began > options.seconds:
            print("time is up", flush=True)
            break
        try:
            row = measure(name, m, n, k, act, config, pool, is_quick=options.tune)
        except (RuntimeError, triton.errors.TritonError) as error:
            row = {"type": name, "m": m, "n": n, "k": k, "act": act, "failed": str(error)}
        add_row(report, row, dense[m, n, k])
    if options.naive:
        for name, (n, k) in itertools.product(naive.TYPES, shapes[:1]):
            add_row(report, naive_row(name, n, k, pool), dense.get((1, n, k)))
    if options.tune:
        print("\n".join(best_configs(report.rows)))
    print(f"{time.perf_counter() - began:.0f} s")


def _options() -> argparse.Namespace:
    flags = parser(__doc__)
    flags.add_argument("--out", type=Path, required=True)
    flags.add_argument("--types", default=",".join(PRIORITY))
    flags.add_argument("--m", default="1", help="rows of activations; above 4 only bf16 is timed")
    flags.add_argument("--acts", default="int8,bf16")
    flags.add_argument("--shapes", default=",".join(f"{n}x{k}" for n, k in SHAPES))
    flags.add_argument("--tune", action="store_true", help="sweep tilings instead of using `gemv_config`")
    flags.add_argument("--pdl", type=int, choices=(0, 1), help="force dependent launch on or off")
    flags.add_argument("--naive", action="store_true", help="also time the naive kernel and decoding before torch.mm")
    flags.add_argument("--workers", type=int, default=12)
    flags.add_argument("--seconds", type=float, default=300.0, help="stop measuring after this time")
    return flags.parse_args()


def _configs(options: argparse.Namespace, type_name: str, act: str, m: int) -> list[_Config]:
    """Return the tilings to time; None stands for the kernel that `dispatch` chooses."""
    if m > gemv.MAX_ROWS:
        return [None] if act == "bf16" else []
    configs = tune_space(m) if options.tune else [gemv_config(type_name, m)]
    return configs if options.pdl is None else [replace(config, pdl=bool(options.pdl)) for config in configs]


if __name__ == "__main__":
    main()
