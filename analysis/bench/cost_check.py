"""Predicted against measured: runs calibrate, analyze, plan and export on a model and compares with `costs.model`.

    python -m dynquant.analysis.bench.cost_check MODEL --machine machine.json --preset r1-iq1_s -o DIR

`plan` finds statistics and errors in DIR, so that sensitivities are what it measures.
Measured seconds are CPU seconds of the command over the machine file's threads, so that other users of the machine do
not count; measured memory is the command's largest resident set. Set OMP_NUM_THREADS as for `measure-machine`.
"""

from pathlib import Path

from dynquant.analysis.costs.machine import Machine
from dynquant.analysis.costs.measure_machine import command_usage
from dynquant.analysis.costs.model import CostOptions, predict
from dynquant.families.open import open_model
from dynquant.kernels.bench.harness import MarkdownTable, options
from dynquant.recipes.build_plan import plan_from_types
from dynquant.recipes.presets import preset_types


def main() -> None:
    """Parse, run, print a Markdown table."""
    asked = options(
        __doc__, "model", machine=Path, preset="r1-iq1_s", calibration=str, tokens=16_384, hessians="activations",
        encoder="ggml", types="iq1_s,iq2_xxs,q2_k,iq3_xxs,q4_k,q6_k", max_memory=(int, "bytes; streams the model"),
        output=Path,
    )  # fmt: skip
    machine, model = Machine.load(asked.machine), open_model(asked.model)
    plan = plan_from_types(model, preset_types(asked.preset, model), recipe=f"preset {asked.preset}")
    types, limit = tuple(asked.types.upper().split(",")), asked.max_memory
    work = CostOptions(asked.tokens, hessians=asked.hessians, encoder=asked.encoder, types=types, limit_bytes=limit)
    folder, stats = asked.output, ["--stats", asked.output / "stats.safetensors"]
    folder.mkdir(parents=True, exist_ok=True)
    text = ["--calibration", asked.calibration] if asked.calibration else []
    within = ["--max-memory", limit] if limit else []
    candidates, encoder = ["--types", asked.types], ["--preset", asked.preset, "--encoder", asked.encoder]
    commands = [
        ["calibrate", *text, *within, "--tokens", asked.tokens, "--hessians", asked.hessians, "-o", stats[1]],
        ["analyze", *stats, *candidates, "-o", folder / "errors.json"],
        ["plan", *text, *within, *stats, *candidates, "--no-report", "-o", folder],
        ["export", *within, *stats, *encoder, "--tune", 0, "-o", folder / "model.gguf"],
    ]
    table = MarkdownTable("stage", "predicted s", "measured s", "", "predicted MB", "measured MB", "")
    for cost, (command, *flags) in zip(predict(model, plan, machine, work), commands, strict=True):
        seconds, memory = command_usage([command, asked.model, *map(str, flags)])
        seconds /= machine.threads
        table.add(
            cost.stage, f"{cost.seconds:.1f}", f"{seconds:.1f}", f"{cost.seconds / seconds - 1:+.0%}",
            f"{cost.memory_bytes / 1e6:.0f}", f"{memory / 1e6:.0f}", f"{cost.memory_bytes / memory - 1:+.0%}",
        )  # fmt: skip


if __name__ == "__main__":
    main()
