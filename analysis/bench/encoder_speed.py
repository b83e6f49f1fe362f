"""Speed and memory of the encoders on random weights of a real layer's shape.

    python -m dynquant.analysis.bench.encoder_speed --device cuda --experts 42 --rows 768 --columns 2048 --project 29e9

A line for each type and encoder: millions of weights per second with and without error feedback, peak memory of the
GPU, and the time for `--project` weights at that speed. Weights are gaussian, hessians those of inputs that live mostly
in a quarter of the directions; the search takes as long on others.
"""

import argparse

import torch

from dynquant.encoding.interface import Encoder
from dynquant.encoding.stream import load_encoder
from dynquant.formats.quant_types import quant_type
from dynquant.kernels.bench.harness import MarkdownTable, device_name, measured, parser

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
    print(f"{shape} weights, {device_name(options.device)}, {threads} CPU threads, PyTorch {torch.__version__}\n")
    table = MarkdownTable(
        "type", "encoder", "M weights/s", "peak GPU memory, GiB", *(["projected, min"] if options.project else [])
    )
    for name in options.types.split(","):
        stored = quant_type(name)
        for label, encoder, extra in _variants(options, hessian):

            def run(experts: slice, encoder: Encoder = encoder, extra: dict = extra, stored=stored) -> None:
                parts = {key: value[experts] for key, value in extra.items()}
                encoder.encode(stored, weights[experts], importance[experts], options.threads, **parts)

            run(slice(0, 1))  # builds ggml's tables, loads the GPU's libraries
            seconds, peak = measured(lambda: run(slice(None)), options.device)
            speed = weights.numel() / seconds
            projected = [f"{options.project / speed / 60:.1f}"] if options.project else []
            table.add(stored.name, label, f"{speed / 1e6:.2f}", f"{peak / 2**30:.2f}", *projected)


def _options() -> argparse.Namespace:
    flags = parser(__doc__)
    flags.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    flags.add_argument("--types", default=TYPES)
    flags.add_argument("--experts", type=int, default=4)
    flags.add_argument("--rows", type=int, default=256)
    flags.add_argument("--columns", type=int, default=512)
    flags.add_argument("--threads", type=int)
    flags.add_argument("--project", type=float, help="Also state the time for this many weights.")
    flags.add_argument("--no-ggml", action="store_true", help="Leave out ggml's encoder, which runs on the CPU.")
    return flags.parse_args()


def _variants(options: argparse.Namespace, hessian: torch.Tensor) -> list[tuple[str, Encoder, dict]]:
    ours = load_encoder("dynquant", options.device)
    variants = [("dynquant", ours, {"hessian": hessian}), ("dynquant, without feedback", ours, {})]
    return variants if options.no_ggml else [("ggml (CPU)", load_encoder("ggml"), {}), *variants]


if __name__ == "__main__":
    main()
