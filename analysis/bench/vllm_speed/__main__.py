"""Tokens a second that vLLM decodes, and GPU memory of the weights, by scheme, in models of a shape.

    python -m dynquant.analysis.bench.vllm_speed 8b --vocabulary 32768
    python -m dynquant.analysis.bench.vllm_speed 30b-a3b --scheme W4A16 --scheme FP8/W4A16 --scheme BF16/W2A16

A scheme is that of all linear layers, or LAYERS/EXPERTS; each has the configuration that `export` would write, and vLLM
fills the model with weights of its own ("dummy"), so that no checkpoint is needed. Schemes run one after another, each
in a process of its own of the Python that has vLLM: `--python`, or what `.ci/readers` set up in .readers or
DYNQUANT_READERS. What vLLM refuses is a row with its words.
"""

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

from dynquant.analysis.bench.random_models import SHAPES, write_headers
from dynquant.analysis.bench.readers import interpreter
from dynquant.checkpoints import checkpoint_directory as directory
from dynquant.checkpoints.model import Model
from dynquant.errors import DynquantError
from dynquant.exporters.compressed_config import served_config
from dynquant.families.linear_layers import linear_checkpoint
from dynquant.families.open import open_model
from dynquant.formats.storage_format import Choice
from dynquant.formats.vllm_schemes import DEFAULT_SCHEMES, vllm_scheme
from dynquant.kernels.bench.harness import MarkdownTable, options
from dynquant.recipes.build_plan import plan_for_vllm

PROGRAM = Path(__file__).with_name("generation.py")


def main() -> None:
    """Parse, measure, print a Markdown table."""
    asked = options(
        __doc__, "shape", SHAPES, scheme=([], "may be repeated; without it all that need no zero points"),
        batch=([], "may be repeated; without it 1, 16 and 64"), layers=(int, "decoder layers, where fewer will do"),
        vocabulary=(int, "tokens, where fewer will do"), python=(str, "the interpreter that has vLLM"),
    )  # fmt: skip
    changed = {"num_hidden_layers": asked.layers, "vocab_size": asked.vocabulary}
    batches = asked.batch or ["1", "16", "64"]
    try:
        python = str(interpreter("vllm", asked.python))
        with tempfile.TemporaryDirectory() as folder:
            checkpoint = Path(folder) / "checkpoint"
            write_headers(asked.shape, checkpoint, **{key: value for key, value in changed.items() if value})
            model = open_model(checkpoint)
            configs = {name: scheme_config(model, name) for name in asked.scheme or DEFAULT_SCHEMES}
            table = MarkdownTable("scheme", "weights, GiB", *(f"tokens/s at batch {batch}" for batch in batches))
            for name, config in configs.items():
                (Path(folder) / "config.json").write_bytes(directory.as_json(config))
                table.add(name, *cells(run_vllm(python, folder, batches), len(batches)))
    except DynquantError as error:
        sys.exit(f"error: {error}")


def scheme_config(model: Model, name: str) -> dict[str, object]:
    """Return config.json of the model in a scheme, "W4A16", or in one for linear layers and one for routed experts,
    "FP8/W4A16". Raises PlanError: vLLM has no such scheme."""
    layers, experts = (vllm_scheme(part).name for part in (name.split("/", 1) * 2)[:2])
    checkpoint = linear_checkpoint(model)
    choices = {linear.name: Choice(experts if linear.is_expert else layers, name) for linear in checkpoint.linears}
    plan = plan_for_vllm(model, checkpoint, choices, recipe=name, mixed_experts=True)
    return served_config(plan, checkpoint, model)


def run_vllm(python: str, folder: str, batches: list[str]) -> dict[str, object]:
    """Return the answer of `generation`; a process that dies without one gives its last words."""
    command, environment = [python, str(PROGRAM), folder, *batches], os.environ | {"PYTHONSAFEPATH": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    answers = [line for line in done.stdout.splitlines() if line.startswith('{"')]
    return json.loads(answers[-1]) if answers else {"problem": done.stderr.strip().rpartition("\n")[2]}


def cells(answer: dict[str, object], num_batches: int) -> list[str]:
    """Return the cells of a row beside its name."""
    if "problem" in answer:
        return [f"refused: {' '.join(answer['problem'].split())[:300]}", *[""] * num_batches]
    memory = "" if answer["gib"] is None else f"{answer['gib']:.2f}"
    return [memory, *(f"{speed:,.0f}" for speed in answer["speeds"])]


if __name__ == "__main__":
    main()
