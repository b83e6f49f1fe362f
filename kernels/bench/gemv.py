"""Times of packed products beside their errors: `python -m dynquant.kernels.bench.gemv --out FILE.json`.

Weights are slices of one pool of random bytes, rotated so that every replay of a CUDA graph reads at least 240 MB that
the L2 cache cannot hold. Times are medians of graph replays (`us`) and of plain calls (`eager_us`), activations
quantized inside; `multiply_us` is the product alone, of `gemv`. The kernel is that which `dispatch` chooses, or `gemv`
for int8 activations and with --tune, both for up to four rows. GB/s counts packed weights, activations and results; the
fraction is of the read bandwidth measured first. Errors are against float64 products of decoded weights of the same
shape, and a replayed graph must give the bits of plain calls: a speed whose result is wrong is not reported.
The file is rewritten after every row. Kernels are compiled ahead by worker processes into Triton's cache.
"""

import functools
import itertools
import time
from argparse import Namespace
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
from dynquant.kernels.bench.harness import (
    JsonReport,
    Row,
    device_name,
    eager_time,
    graph_time,
    numbers,
    options,
    precompile,
)
from dynquant.kernels.planes import pack_planes
from dynquant.kernels.triton import gemv
from dynquant.kernels.triton.activations import quantize_activations
from dynquant.kernels.triton.gemv import GemvConfig, gemv_config

PRIORITY = (
    "Q4_K", "IQ2_XXS", "IQ1_S", "TQ2_0", "Q2_K", "Q6_K", "Q5_K", "Q3_K", "IQ4_XS", "Q8_0", "MXFP4", "IQ3_XXS",
    "IQ2_XS", "IQ2_S", "IQ3_S", "IQ1_M", "NVFP4", "IQ4_NL", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "TQ1_0", "Q2_0", "Q1_0",
)  # fmt: skip
SHAPES = ((14336, 4096), (28672, 8192), (4096, 4096), (8192, 8192))
ERROR_LIMIT = {"bf16": 4e-3, "int8": 1.2e-2}
ROTATED_BYTES = 240_000_000
POOL_BYTES = 1 << 30

_Config = GemvConfig | None
_Job = tuple[str, int, int, int, str, _Config]
_COLUMNS = ("type", "m", "n", "k", "act")  # names of what a job is, in the report; its last part is the tiling


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
        blocks[:, 0] = blocks[:, 0] % 8 + 120  # scales 2^-7 to 1
    elif type_name != "NVFP4":
        scales = torch.rand(num_blocks, num_scales(type_name), device="cuda") * 0.1 + 0.01
        blocks = with_scales(type_name, blocks, scales)
    return blocks.reshape(num_rows, -1)


def product(x: Tensor, weight: Tensor, type_name: str, act: str, config: _Config) -> Tensor:
    """`gemv` with this tiling, or without one the kernel that `dispatch` chooses."""
    if config is None:
        return ops.linear(x, weight, type_name, layout="planes")
    return gemv.linear(x, weight, type_name, act, config)


@functools.lru_cache(maxsize=2)  # jobs of a type take turns with its shapes
def _sample(type_name: str, n: int, k: int) -> tuple[Tensor, Tensor]:
    """Return planar weights and what they decode to, float32 [N, K]."""
    blocks = finite_blocks(type_name, n, k)
    return pack_planes(type_name, blocks), decode(type_name, blocks)


def error_of(job: _Job) -> float:
    """||y - ref|| / ||ref|| for normal activations, by the kernel that is timed, of as many rows of weights."""
    type_name, m, n, k, act, config = job
    planar, dense = _sample(type_name, n, k)
    x = torch.randn(m, k, device="cuda", dtype=torch.bfloat16)
    y, reference = product(x, planar, type_name, act, config).double(), x.double() @ dense.double().T
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


def measure(job: _Job, pool: Tensor, *, is_quick: bool) -> Row:
    """Return what a row of the report says of a job; `is_quick` leaves out eager times and the product alone."""
    type_name, m, n, k, act, config = job
    row: Row = {"config": asdict(config) if config else "dispatch", "error": error_of(job)}
    if not row["error"] <= ERROR_LIMIT[act]:  # refuses NaN too
        return row | {"refused": f"error above {ERROR_LIMIT[act]}"}
    row_bytes = QUANT_TYPES[type_name].row_bytes(k)
    weights = [part.view(n, row_bytes) for part in slices(pool, n * row_bytes, m)]
    x = torch.randn(m, k, device="cuda", dtype=torch.bfloat16)
    calls = [lambda w=w: product(x, w, type_name, act, config) for w in weights]
    us, results = graph_time(calls)
    for call, result in zip(calls, results, strict=True):
        if not torch.equal(call().view(torch.int16), result.view(torch.int16)):
            return row | {"refused": "graph replay and plain calls differ"}
    row |= {"us": us, "gbps": (n * row_bytes + 2 * m * (n + k)) / us / 1e3}
    if is_quick:
        return row
    row["eager_us"] = eager_time(calls)
    if config is not None:
        integers = quantize_activations(x, act, padded_rows=-(-m // config.rows) * config.rows)
        calls = [lambda w=w: gemv.multiply(integers, w, type_name, x.new_empty(m, n), config, None) for w in weights]
        row["multiply_us"], _ = graph_time(calls)
    return row


def _compile(job: _Job) -> None:
    type_name, m, n, k, act, config = job
    if config is None:
        weight = torch.zeros(n, QUANT_TYPES[type_name].row_bytes(k), dtype=torch.uint8, device="cuda")
        product(torch.zeros(m, k, dtype=torch.bfloat16, device="cuda"), weight, type_name, act, None)
        return
    planes = 1 + (act == "bf16")
    f32, dtype = torch.float32, torch.float32 if config.split > 1 else torch.bfloat16
    constants = gemv.kernel_constants(type_name, planes, k, config)
    gemv.gemv_kernel.warmup(
        torch.uint8, torch.int32, f32, torch.int32, dtype, f32, 4096, 1, 1, 1, grid=(1,), **constants
    )


def kernels_of(jobs: list[_Job]) -> list[_Job]:
    """Return a job for every kernel. Those of `gemv` do not depend on the rows of W. Jobs of one kernel differ in rows
    of activations and are far apart, so that two processes do not compile it at once."""
    every = dict.fromkeys((name, m, n if c is None else 1024, k, act, c) for name, m, n, k, act, c in jobs)
    return sorted(every, key=lambda job: (job[2], job[1]))


def add_row(report: JsonReport, row: Row, bf16_us: float) -> None:
    """Add a row with its speed beside bfloat16 and as a share of the read bandwidth."""
    row["bf16_us"] = bf16_us
    if "us" in row:
        row |= {"speedup": bf16_us / row["us"], "fraction": row["gbps"] / report.head["read_gbps"]}
    report.add(row)


def best_configs(rows: list[Row]) -> list[str]:
    """Return the fastest tiling of every (type, M, N, K, act), as lines for `gemv_config`."""
    best: dict[tuple, Row] = {}
    for row in sorted((row for row in rows if "us" in row and "config" in row), key=lambda row: row["us"]):
        best.setdefault(tuple(row[name] for name in _COLUMNS), row)
    return [
        f"{key}: {row['config']},  # {row['us']:.2f} us, {row['fraction']:.2f} of peak"
        for key, row in sorted(best.items())
    ]


def main() -> None:
    """Parse, compile, measure, write JSON after every row."""
    asked = options(
        __doc__, out=Path, types=",".join(PRIORITY), m=("1", "rows of activations; above 4 without int8 and --tune"),
        acts="int8,bf16", shapes=",".join(f"{n}x{k}" for n, k in SHAPES), workers=12,
        tune=(False, "sweep tilings instead of using `gemv_config`"), pdl=(int, "1, 0: force dependent launch on, off"),
        seconds=(300.0, "stop measuring after this time"),
    )  # fmt: skip
    rows = numbers(asked.m)
    shapes = [tuple(int(side) for side in shape.split("x")) for shape in asked.shapes.split(",")]
    jobs = [
        (name, m, n, k, act, config)
        for name, act, m, (n, k) in itertools.product(asked.types.split(","), asked.acts.split(","), rows, shapes)
        for config in _configs(name, act, m, asked)
    ]
    precompile(_compile, kernels_of(jobs), asked.workers)
    began = time.perf_counter()
    report = JsonReport(asked.out, ceilings())
    pool = torch.randint(0, 256, (POOL_BYTES,), dtype=torch.uint8, device="cuda")
    dense = bf16_times(pool, shapes, rows)
    for (m, n, k), us in dense.items():
        row = dict(zip(_COLUMNS, ("BF16", m, n, k, "torch"), strict=True))
        add_row(report, row | {"us": us, "gbps": 2e-3 * n * k / us}, us)
    for job in jobs:
        if time.perf_counter() - began > asked.seconds:
            print("time is up", flush=True)
            break
        row = dict(zip(_COLUMNS, job[:-1], strict=True))
        try:
            row |= measure(job, pool, is_quick=asked.tune)
        except (RuntimeError, triton.errors.TritonError) as error:
            row["failed"] = str(error)
        add_row(report, row, dense[job[1:4]])
    if asked.tune:
        print("\n".join(best_configs(report.rows)))
    print(f"{time.perf_counter() - began:.0f} s")


def _configs(type_name: str, act: str, m: int, asked: Namespace) -> list[_Config]:
    """Return the tilings to time; None stands for the kernel that `dispatch` chooses."""
    if act == "bf16" and not asked.tune:
        return [None]
    if m > gemv.MAX_ROWS:
        return []
    configs = [gemv_config(type_name, m)]
    if asked.tune:
        is_codebook = configs[0].warps > 1
        sizes = ((2, 8), (4, 8), (2, 16), (4, 16)) if is_codebook else ((2, 1), (4, 1), (8, 1), (2, 2), (4, 2))
        configs = [GemvConfig(bn, warps, rows=m, pdl=True) for bn, warps in sizes] + [replace(configs[0], pdl=False)]
    return configs if asked.pdl is None else [replace(config, pdl=bool(asked.pdl)) for config in configs]


if __name__ == "__main__":
    main()
