"""Speed and memory of the encoders on random weights of a real layer's shape.

    python -m dynquant.analysis.bench.encoder_speed --device cuda --experts 42 --rows 768 --columns 2048 --project 29e9

A line for each type and encoder: millions of weights per second with and without error feedback, the same for each
second of a core's work, peak memory of the GPU, and the time for `--project` weights at that speed. Weights are
gaussian, hessians those of inputs that live mostly in a quarter of the directions; the search takes as long on others.
"""

import itertools
import time
from functools import partial

import torch

from dynquant.analysis.costs.measure_machine import random_layer
from dynquant.encoding.stream import load_encoder
from dynquant.formats.quant_types import quant_type
from dynquant.kernels.bench.harness import MarkdownTable, device_name, measured, options

TYPES = "iq1_s,iq1_m,iq2_xxs,iq2_xs,iq2_s,iq3_xxs,iq3_s,q2_k,q3_k,q4_k,iq4_xs,tq1_0,tq2_0,mxfp4"


def main() -> None:
    """Parse, measure, print a Markdown table."""
    asked = options(
        __doc__, device="cuda" if torch.cuda.is_available() else "cpu", types=TYPES, experts=4, rows=256, columns=512,
        threads=int, project=(float, "Also state the time for this many weights."),
        ggml=(True, "Time ggml's encoder too, which runs on the CPU."),
    )  # fmt: skip
    weights, importance, hessian = random_layer(asked.experts, asked.rows, asked.columns)
    shape, threads = " x ".join(map(str, weights.shape)), asked.threads or torch.get_num_threads()
    print(f"{shape} weights, {device_name(asked.device)}, {threads} CPU threads, PyTorch {torch.__version__}\n")
    projected = ["projected, min"] if asked.project else []
    table = MarkdownTable("type", "encoder", "M weights/s", "by a core", "peak GPU memory, GiB", *projected)
    ours = load_encoder("dynquant", asked.device)
    encoders = [("dynquant", ours, {"hessian": hessian}), ("dynquant, without feedback", ours, {})]
    if asked.ggml:
        encoders.insert(0, ("ggml (CPU)", load_encoder("ggml"), {}))
    for stored, (label, encoder, extra) in itertools.product(map(quant_type, asked.types.split(",")), encoders):
        # one expert first: it builds ggml's tables, loads the GPU's libraries
        encoder.encode(stored, weights[:1], importance[:1], asked.threads, **{k: v[:1] for k, v in extra.items()})
        run = partial(encoder.encode, stored, weights, importance, asked.threads, **extra)
        work = time.process_time()
        seconds, peak = measured(run, asked.device)
        work = time.process_time() - work
        if asked.project:
            projected = [f"{asked.project * seconds / weights.numel() / 60:.1f}"]
        speed, by_core = weights.numel() / seconds / 1e6, weights.numel() / work / 1e6
        table.add(stored.name, label, f"{speed:.2f}", f"{by_core:.2f}", f"{peak / 2**30:.2f}", *projected)


if __name__ == "__main__":
    main()
