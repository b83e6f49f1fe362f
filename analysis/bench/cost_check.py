"""Predicted against measured: runs calibrate, analyze, plan and export on a model and compares with `costs.model`.

    python -m dynquant.analysis.bench.cost_check MODEL --machine machine.json --preset r1-iq1_s -o DIR

`plan` finds statistics and errors in DIR, so that sensitivities are what it measures.
Measured seconds are CPU seconds of the command over the machine file's threads, so that other users of the machine do
not count; measured memory is the command's largest resident set. Set OMP_NUM_THREADS as for `measure-machine`.
"""

import argparse
from pathlib import Path

from dynquant.analysis.costs.machine import Machine
from dynquant.analysis.costs.measure_machine import command_usage
from dynquant.analysis.costs.model import CostOptions, predict
from dynquant.families.open import open_model
from dynquant.kernels.bench.harness import MarkdownTable, parser
from dynquant.recipes.build_plan import plan_from_types
from dynquant.recipes.presets import preset_types


def main() -> None:
    """Parse, run, print a Markdown table."""
    options = _options()
    machine, model = Machine.load(options.machine), open_model(options.model)
    plan = plan_from_types(model, preset_types(options.preset, model), recipe=f"preset {options.preset}")
    types = tuple(name.upper() for name in options.types.split(","))
    work = CostOptions(
        tokens=options.tokens, hessians=options.hessians, encoder=options.encoder, types=types,
        limit_bytes=options.max_memory,
    )  # fmt: skip
    options.output.mkdir(parents=True, exist_ok=True)
    stats = str(options.output / "stats.safetensors")
    text = ["--calibration", options.calibration] if options.calibration else []
    limit = ["--max-memory", str(options.max_memory)] if options.max_memory else []
    commands = [
        ["calibrate", options.model, *text, *limit, "--tokens", str(options.tokens), "--hessians", options.hessians,
         "-o", stats],
        ["analyze", options.model, "--stats", stats, "--types", options.types,
         "-o", str(options.output / "errors.json")],
        ["plan", options.model, *text, *limit, "--stats", stats, "--types", options.types, "--no-report",
         "-o", str(options.output)],
        ["export", options.model, *limit, "--preset", options.preset, "--stats", stats, "--encoder", options.encoder,
         "--tune", "0", "-o", str(options.output / "model.gguf")],
    ]  # fmt: skip
    table = MarkdownTable("stage", "predicted s", "measured s", "", "predicted MB", "measured MB", "")
    for cost, command in zip(predict(model, plan, machine, work), commands, strict=True):
        seconds, memory = command_usage(command)
        seconds /= machine.threads
        table.add(
            cost.stage, f"{cost.seconds:.1f}", f"{seconds:.1f}", f"{cost.seconds / seconds - 1:+.0%}",
            f"{cost.memory_bytes / 1e6:.0f}", f"{memory / 1e6:.0f}", f"{cost.memory_bytes / memory - 1:+.0%}",
        )  # fmt: skip


def _options() -> argparse.Namespace:
    flags = parser(__doc__)
    flags.add_argument("model")
    flags.add_argument("--machine", type=Path, required=True)
    flags.add_argument("--preset", default="r1-iq1_s")
    flags.add_argument("--calibration")
    flags.add_argument("--tokens", type=int, default=16_384)
    flags.add_argument("--hessians", default="activations")
    flags.add_argument("--encoder", default="ggml")
    flags.add_argument("--types", default="iq1_s,iq2_xxs,q2_k,iq3_xxs,q4_k,q6_k")
    flags.add_argument("--max-memory", type=int, help="bytes; streams the model")
    flags.add_argument("-o", "--output", type=Path, required=True)
    return flags.parse_args()


if __name__ == "__main__":
    main()
