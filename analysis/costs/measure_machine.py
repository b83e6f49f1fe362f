"""Measures a machine for the cost model: disk, products, encoders, and a small calibration of the bundled model.

Work is timed in CPU seconds over the number of threads, so that a machine with other users is measured as if it were
idle. It takes about two minutes.
"""

import os
import platform
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from importlib import resources
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor

from dynquant.analysis.costs.machine import Machine
from dynquant.analysis.costs.model import MEASURED_FLOAT, TABLE_TYPES, CostOptions, calibration_work
from dynquant.analysis.errors.measure import ErrorMeter, build_error_table
from dynquant.calibration.statistics import CalibrationStats, InputStats, StatsProvenance
from dynquant.checkpoints.model import Model
from dynquant.checkpoints.tensor_source import DictSource
from dynquant.encoding.interface import Encoder
from dynquant.encoding.stream import load_encoder
from dynquant.errors import PlanError
from dynquant.families.common.conversion import Conversion, ConvertedSource
from dynquant.families.open import open_model
from dynquant.formats.quant_types import QUANT_TYPES
from dynquant.recipes.build_plan import plan_from_types
from dynquant.recipes.presets import preset_types
from dynquant.resources import total_memory
from dynquant.session import Progress, ignore_progress

MEASURED_TYPES = (
    "IQ1_S", "IQ1_M", "IQ2_XXS", "IQ2_XS", "IQ2_S", "Q2_K", "IQ3_XXS", "IQ3_S", "Q3_K", "IQ4_XS", "Q4_K", "Q5_K",
    "Q6_K", "Q8_0",
)  # fmt: skip
_WIDTHS = (64, 256, 512, 1024, 2048, 4096)
_DISK_BYTES = 256 << 20
_TOKENS = 8192
_FEWEST_SECONDS = 0.3  # time for which what is quick is repeated
_NAME = "blk.0.ffn_down_exps.weight"


def measure_machine(progress: Progress = ignore_progress) -> Machine:
    """Measure this machine, with PyTorch's number of threads."""
    small = open_model(str(resources.files("dynquant") / "data" / "textbook-moe-16m"))
    parts = (partial(_running, small), _encoding, _error_speeds, _disk_speed)
    measurements: dict[str, Any] = {}
    progress("measure", 0, len(parts), unit="parts")
    for number, measure in enumerate(parts, 1):
        measurements |= measure()
        progress("measure", number, len(parts), unit="parts")
    return Machine(
        name=f"{platform.machine()}, PyTorch {torch.__version__}", threads=torch.get_num_threads(),
        memory_bytes=total_memory(), **measurements,
    )  # fmt: skip


def command_usage(command: list[str]) -> tuple[float, int]:
    """Return CPU seconds and peak resident bytes of one command of dynquant, in a process of its own. Raises PlanError:
    it failed."""
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    process = subprocess.Popen([sys.executable, "-P", "-m", "dynquant", *command], **quiet)
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise PlanError(f"`dynquant {' '.join(command)}` failed; run it alone to see why.")
    return usage.ru_utime + usage.ru_stime, usage.ru_maxrss * 1024


def _seconds(run: Callable[[], object]) -> float:
    """Return CPU seconds of one run, spread over the threads."""
    start = time.process_time()
    run()
    return (time.process_time() - start) / torch.get_num_threads()


def _matmul_flops(width: int) -> float:
    left, right = torch.randn(512, width), torch.randn(width, width)
    left @ right  # warms up
    repeats = max(1, round(2e10 / (2 * 512 * width * width)))  # a fifth of a second at 100 GFLOPS
    return repeats * 2 * 512 * width * width / _seconds(lambda: [left @ right for _ in range(repeats)])


def _running(small: Model) -> dict[str, Any]:
    """Return what a command takes that does next to nothing, products, and a calibration without moments."""
    with TemporaryDirectory() as folder:
        nothing = ["--preset", "f16", "--encoder", "ggml", "-o", f"{folder}/small.gguf"]
        start_seconds, start_bytes = command_usage(["export", str(small.path), *nothing])
        matmul = {width: _matmul_flops(width) for width in _WIDTHS}
        options = ["--tokens", str(_TOKENS), "--hessians", "none", "-o", f"{folder}/stats.safetensors"]
        seconds, peak = command_usage(["calibrate", str(small.path), *options])
    plan = plan_from_types(small, preset_types("bf16", small), recipe="bf16")
    products, channels = calibration_work(small, plan, matmul, _TOKENS, CostOptions.window)
    seconds = max(seconds - start_seconds, 0.01) / torch.get_num_threads()  # CPU seconds, as if all threads were busy
    return {
        "start_seconds": start_seconds, "start_bytes": start_bytes, "matmul_flops": matmul,
        "run_bytes": max(1 << 20, peak - start_bytes - 4 * small.num_weights),
        "element_seconds": max(seconds - products, 0.05 * seconds) / channels,
    }  # fmt: skip


def random_layer(experts: int, rows: int, columns: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return gaussian weights, importance and hessians of inputs that live mostly in a quarter of the directions."""
    generator = torch.Generator().manual_seed(0)
    weights = 0.02 * torch.randn(experts, rows, columns, generator=generator)
    directions = torch.randn(experts, columns, columns // 4, generator=generator)
    hessian = directions @ directions.transpose(1, 2) / (columns // 4) + 0.05 * torch.eye(columns)
    return weights, hessian.diagonal(dim1=-2, dim2=-1).contiguous(), hessian


def _encoding() -> dict[str, Any]:
    """Return seconds of ggml's types for their search tables, and speeds of both encoders without them."""
    ggml, ours, threads = load_encoder("ggml"), load_encoder("dynquant", "cpu"), torch.get_num_threads()
    weights, importance, hessian = random_layer(4, 256, 512)

    def seconds(encoder: Encoder, name: str, *layer: Tensor, **extra: Tensor) -> float:
        return _seconds(lambda: encoder.encode(QUANT_TYPES[name], *layer, threads, **extra))

    block = torch.randn(1, 1, 256), torch.ones(1, 256)
    tables = {name: seconds(ggml, name, *block) for name in TABLE_TYPES}  # before what would build them unseen
    layer, size = (weights, importance), weights.numel()
    speeds = {
        "ggml": {name: size / seconds(ggml, name, *layer) for name in MEASURED_TYPES},
        "dynquant": {name: size / seconds(ours, name, *layer, hessian=hessian) for name in MEASURED_TYPES},
    }
    return {"table_seconds": tables, "encode": speeds}


def _error_speeds() -> dict[str, Any]:
    """Return weights per second of each type of the error table: experts of a checkpoint in BF16 with samples."""
    weights = (0.02 * torch.randn(4, 1024, 1024, generator=torch.Generator().manual_seed(0))).bfloat16()
    stored = DictSource({f"{expert}": matrix for expert, matrix in enumerate(weights)})
    source = ConvertedSource(stored, [Conversion(_NAME, tuple(stored.names()), tuple(weights.shape), MEASURED_FLOAT)])
    model = Model(Path("random"), source, (), source.checkpoint_names)
    squares, counts = torch.ones(4, 1024, dtype=torch.float64), torch.full((4,), 64)
    inputs = InputStats(squares, counts, torch.randn(4, 64, 1024).bfloat16(), counts)
    provenance = StatsProvenance(fingerprint=source.fingerprint, text_hash="0", text_name="random")
    stats = CalibrationStats(provenance, {_NAME: inputs})
    encoder = load_encoder("ggml")

    def seconds(types: tuple[str, ...]) -> float:
        taken: list[float] = []
        while sum(taken) < _FEWEST_SECONDS:
            taken.append(_seconds(lambda: build_error_table(ErrorMeter(model, stats, encoder), types, stats_hash="")))
        return sum(taken) / len(taken)

    seconds(())  # memory is taken from the system once
    nothing = seconds(())
    speeds = {name: weights.numel() / max(seconds((name,)) - nothing, 1e-4) for name in MEASURED_TYPES}
    return {"errors": speeds | {MEASURED_FLOAT: weights.numel() / max(nothing, 1e-4)}}


def _disk_speed() -> dict[str, Any]:
    """Return bytes per second of a file that is not in the page cache."""
    with TemporaryDirectory(dir=".") as folder:
        path = Path(folder) / "probe"
        with path.open("wb") as file:
            for _ in range(_DISK_BYTES >> 20):
                file.write(os.urandom(1 << 20))
            file.flush()
            os.fsync(file.fileno())
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)  # only what is on disk can be dropped
        start = time.perf_counter()
        with path.open("rb", buffering=0) as file:
            while file.read(1 << 22):
                pass
        return {"disk_bytes_per_s": _DISK_BYTES / (time.perf_counter() - start)}
