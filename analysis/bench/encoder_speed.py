"""Speed and memory of the encoders, on random weights of a real layer's shape.

    python -m dynquant.analysis.encoder_speed --device cuda --experts 42 --rows 768 --columns 2048 --project 29e9

A line for each type and encoder: millions of weights per second with and without error feedback, peak memory of the
GPU, and the time for `--project` weights at that speed. Weights are gaussian, hessians those of inputs that live mostly
in a quarter of the directions; the search takes as long on others.
"""

import argparse
import time
from collections.abc import Callable

import torch

from dynquant.encoding.interface import Encoder
from dynquant.encoding.stream import load_encoder
from dynquant.formats.quant_types import quant_type

TYPES = "iq1_s,iq1_m,iq2_xxs,iq2_xs,iq2_s,iq3_xxs,iq3_s,q2_k,q3_k,q4_k,iq4_xs,tq1_0,tq2_0,mxfp4"


def main() -> None:
    """Parse, measure, print a Markdown table."""
    options = _options()
    generator = torch.Generator().manual_seed(0)
    weights = 0.02 * torch.randn(options.experts, options.rows, options.columns, generator=generator)
    directions = torch.randn(options.experts, options.columns, options.columns // 4, generator=generator)
    hessian = directions @ directions.transpose(1, 2) / directions.shape[-1] + 0.05 * torch.eye(options.columns)
    importance = hessian.diagonal(dim1=-2, dim2=-1).contiguous()
    shape = f"{options.experts} x {options.rows} x {options.columns}"
    threads = options.threads or torch.get_num_threads()
    print(f"{shape} weights, {_device_name(options.device)}, {threads} CPU threads, PyTorch {torch.__version__}\n")
    print("| type | encoder | M weights/s | peak GPU memory, GiB |" + (" projected, min |" if options.project else ""))
    print("|---|---|---|---|" + ("---|" if options.project else ""))
    for name in options.types.split(","):
        stored = quant_type(name)
        for label, encoder, extra in _variants(options, hessian):

            def run(experts: slice, encoder: Encoder = encoder, extra: dict = extra, stored=stored) -> None:
                parts = {key: value[experts] for key, value in extra.items()}
                encoder.encode(stored, weights[experts], importance[experts], options.threads, **parts)

            run(slice(0, 1))  # builds ggml's tables, loads the GPU's libraries
            seconds, peak = _measured(lambda: run(slice(None)), options.device)
            speed = weights.numel() / seconds
            line = f"| {stored.name} | {label} | {speed / 1e6:.2f} | {peak / 2**30:.2f} |"
            print(line + (f" {options.project / speed / 60:.1f} |" if options.project else ""), flush=True)


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--types", default=TYPES)
    parser.add_argument("--experts", type=int, default=4)
    parser.add_argument("--rows", type=int, default=256)
    parser.add_argument("--columns", type=int, default=512)
    parser.add_argument("--threads", type=int)
    parser.add_argument("--project", type=float, help="Also state the time for this many weights.")
    parser.add_argument("--no-ggml", action="store_true", help="Leave out ggml's encoder, which runs on the CPU.")
    return parser.parse_args()


def _variants(options: argparse.Namespace, hessian: torch.Tensor) -> list[tuple[str, Encoder, dict]]:
    ours = load_encoder("dynquant", options.device)
    found = [("dynquant", ours, {"hessian": hessian}), ("dynquant, without feedback", ours, {})]
    return found if options.no_ggml else [("ggml (CPU)", load_encoder("ggml"), {}), *found]


def _measured(run: Callable[[], None], device: str) -> tuple[float, int]:
    """Seconds of a run, and the most GPU memory it held."""
    is_cuda = device.startswith("cuda")
    if is_cuda:
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
    start = time.perf_counter()
    run()
    if is_cuda:
        torch.cuda.synchronize()
    return time.perf_counter() - start, torch.cuda.max_memory_allocated() if is_cuda else 0


def _device_name(device: str) -> str:
    return torch.cuda.get_device_name(device) if device.startswith("cuda") else "CPU"


if __name__ == "__main__":
    main()
