"""Efficiency of encoders, error table and llama.cpp on more and more cores.

    python -m dynquant.analysis.bench.core_scaling --cores 1,2,4,8,16

The same work runs in a process of its own for each number of cores, which is then all that the process may use. A line
for each number, as soon as it is measured: seconds, and in brackets the seconds of one core over seconds times cores.
Encoders get random matrices and experts of 1,024 columns, ours with hessians; the table and llama.cpp get the bundled
model. Start-up is what that process took beside: importing, opening models and statistics, building ggml's search
tables and compiled loops. With less than `--scale 1` sixteen cores have a piece or two each, so that some wait for
others.
"""

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from gguf import GGUFValueType

import dynquant
from dynquant.analysis.costs.measure_machine import random_layer
from dynquant.analysis.errors.options import TableOptions
from dynquant.analysis.errors.stage import error_table
from dynquant.calibration.options import CalibrationOptions
from dynquant.calibration.stage import StatsFile, run_calibration
from dynquant.checkpoints.gguf_source import MetadataField
from dynquant.checkpoints.model import Model
from dynquant.checkpoints.tensor_source import DictSource
from dynquant.encoding.stream import Guidance, TensorEncoder, load_encoder
from dynquant.evaluation.llama_cpp import LlamaCppRunner
from dynquant.exporters.options import ExportOptions
from dynquant.exporters.stage import export
from dynquant.families.open import open_model
from dynquant.formats.quant_types import quant_type
from dynquant.inputs.model_inputs import Batch
from dynquant.kernels.bench.harness import MarkdownTable, measured, options
from dynquant.recipes.build_plan import plan_from_types
from dynquant.resources import let_waiting_threads_sleep
from dynquant.session import Session

BUNDLED = Path(dynquant.__file__).parent / "data" / "textbook-moe-16m"
TABLE_TYPES = ("Q4_K", "Q6_K", "IQ2_XXS", "IQ3_S")
NUM_WINDOWS = 64


def main() -> None:
    """Prepare files, measure each number of cores in a process of its own, print a Markdown table."""
    asked = options(
        __doc__, cores="1,2,4,8,16", scale=(1.0, "Work, times what takes a minute on one core."),
        only=("", "Names of the kinds of work, separated by commas. Default: all."),
        worker=("", "For the process of one number of cores: the folder of prepared files."),
    )  # fmt: skip
    names = asked.only.split(",") if asked.only else list(WORK)
    if asked.worker:
        times = {name: measured(WORK[name](Path(asked.worker), asked.scale), "cpu")[0] for name in names}
        print(json.dumps(times))
        return
    let_waiting_threads_sleep()
    usable = sorted(os.sched_getaffinity(0))
    counts = [count for count in map(int, asked.cores.split(",")) if count <= len(usable)]
    with tempfile.TemporaryDirectory() as folder:
        seconds, _ = measured(lambda: _prepare(Path(folder), names), "cpu")
        versions = f"dynquant {dynquant.__version__}, PyTorch {torch.__version__}"
        print(f"{versions}, {len(usable)} usable cores; files prepared in {seconds:.1f} s\n")
        table, single = MarkdownTable("cores", "start-up, s", *(f"{name}, s" for name in names)), {}
        for count in counts:
            start = time.perf_counter()
            times = _on_cores(usable[:count], "--scale", str(asked.scale), "--only", ",".join(names), folder)
            startup = time.perf_counter() - start - sum(times.values())
            spent = {name: count * seconds for name, seconds in times.items()}
            single = single or spent
            cells = (f"{times[name]:.2f} ({single[name] / spent[name]:.0%})" for name in names)
            table.add(count, f"{startup:.1f}", *cells)


def _prepare(folder: Path, names: list[str]) -> None:
    if "error table" in names:
        run_calibration(
            open_model(BUNDLED), CalibrationOptions(tokens=4096), folder / "stats.safetensors", Session(device="cpu")
        )
    if "llama.cpp" in names:
        export(ExportOptions(model=str(BUNDLED), output=folder / "model.gguf", preset="uniform-q8_0", encoder="ggml"))


def _on_cores(cores: list[int], *arguments: str) -> dict[str, float]:
    """Return the seconds of each kind of work in a new process, whose libraries see no other cores."""
    *flags, folder = arguments
    call = [sys.executable, "-m", "dynquant.analysis.bench.core_scaling", *flags, "--worker", folder]
    # The child inherits what this process may use, so that OpenMP finds it when it is loaded.
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, cores)
    try:
        done = subprocess.run(call, stdout=subprocess.PIPE, text=True, check=True)
    finally:
        os.sched_setaffinity(0, before)
    return json.loads(done.stdout.splitlines()[-1])


def _encode(name: str, type_names: tuple[str, ...], num_matrices: int, _: Path, scale: float) -> Callable[[], None]:
    """Return the encoding of two million weights each, in turn a stack of 8 experts and a matrix."""
    stack, importance, hessian = random_layer(8, 256, 1024)
    kinds = (("exps.weight", stack.bfloat16()), ("weight", stack.bfloat16().reshape(-1, 1024)))
    count = max(1, round(num_matrices * scale))
    tensors = {f"blk.{i}.ffn_up_{kinds[i % 2][0]}": kinds[i % 2][1] for i in range(count)}
    fields = (
        MetadataField("general.architecture", "llama", GGUFValueType.STRING),
        MetadataField("llama.block_count", count, GGUFValueType.UINT32),
        MetadataField("llama.embedding_length", 1024, GGUFValueType.UINT32),
        MetadataField("tokenizer.ggml.tokens", ["a"], GGUFValueType.ARRAY, GGUFValueType.STRING),
    )
    model = Model(Path("random"), DictSource(tensors), fields, lambda name: (name,))
    types = {tensor: (type_names[i // 2 % len(type_names)], "random") for i, tensor in enumerate(tensors)}
    guidance = Guidance(
        lambda _, shape: importance if len(shape) == 3 else importance[:1],
        lambda _, shape, experts: hessian[experts] if len(shape) == 3 else hessian[:1],
    )
    encoder, plan = load_encoder(name, "cpu"), plan_from_types(model, types, recipe="preset random")
    for type_name in type_names:  # builds ggml's tables, compiles loops
        encoder.encode(quant_type(type_name), stack[:1, :8], importance[:1], 1, hessian=hessian[:1])
    return lambda: [None for _ in TensorEncoder(model, guidance, encoder).quantize(plan)] and None


def _table(folder: Path, scale: float) -> Callable[[], None]:
    """Return the measurement of the bundled model's table in some types."""
    model, stats = open_model(BUNDLED), StatsFile(folder / "stats.safetensors")
    names = TABLE_TYPES[: max(1, round(len(TABLE_TYPES) * scale))]
    encoder, (weights, importance, hessian) = load_encoder(TableOptions().encoder, "cpu"), random_layer(1, 64, 256)
    for name in names:
        encoder.encode(quant_type(name), weights, importance, 1, hessian=hessian)
    output = folder / f"errors-{os.getpid()}.json"
    assert stats.moments is not None  # read here, with the statistics
    return lambda: error_table(model, stats, output, TableOptions(types=names), Session(device="cpu")) and None


def _score(folder: Path, scale: float) -> Callable[[], None]:
    """Return the logits of windows of 512 tokens in llama.cpp."""
    runner, num_windows = LlamaCppRunner(folder / "model.gguf"), max(1, round(NUM_WINDOWS * scale))
    windows = torch.randint(8000, (num_windows, 1, 512), generator=torch.Generator().manual_seed(0))
    runner.window_logits(windows[0, 0].tolist())
    return lambda: [None for _ in runner.scored_logits(map(Batch.of_tokens, windows))] and None


WORK: dict[str, Callable[[Path, float], Callable[[], None]]] = {
    "ggml encoder": partial(_encode, "ggml", ("IQ3_XXS", "Q4_K"), 12),
    "dynquant encoder": partial(_encode, "dynquant", ("IQ2_XXS", "Q4_K"), 8),
    "error table": _table,
    "llama.cpp": _score,
}
"""Name -> preparation in a folder, which returns what is timed."""


if __name__ == "__main__":
    main()
