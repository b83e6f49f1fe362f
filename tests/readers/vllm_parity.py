"""vLLM on the CPU beside our decoded weights: `python -m tests.readers.vllm_parity FOLDER` prints a table.

Checkpoints are exported with one scheme for all linear layers, and another for routed experts where that is named.
"""

import json
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from tokenizers import Tokenizer

from dynquant.formats.vllm_schemes import SCHEMES
from tests.exporters.test_compressed_tensors import export
from tests.helpers.compressed_models import filled, logits
from tests.helpers.tiny_models import save_tiny
from tests.readers.programs import interpreter, program

REPOSITORY = Path(__file__).resolve().parents[2]
SMALL_MOE = REPOSITORY / "dynquant" / "data" / "textbook-moe-16m"
TEXTS, TOKENS = 3, 65
BUNDLED = SMALL_MOE.name


@dataclass(frozen=True)
class Case:
    """A model, and the schemes of its linear layers and of its routed experts."""

    model: str
    layers: str
    experts: str

    @property
    def name(self) -> str:
        return f"{self.model}-{self.layers}-{self.experts}"


@dataclass(frozen=True)
class Parity:
    """KL(ours || vLLM's) in nats per token and equal top tokens, or why vLLM has no log-probabilities."""

    case: Case
    kl: float = float("nan")
    top1: float = float("nan")
    problem: str | None = None


CASES = (
    *(Case("llama", scheme, scheme) for scheme in SCHEMES),
    *(Case(BUNDLED, "W4A16", name) for name, scheme in SCHEMES.items() if scheme.holds_experts),
)


def measure(folder: Path, cases: tuple[Case, ...] = CASES) -> list[Parity]:
    """Export every case into `folder` and compare; raises `Missing` without vLLM."""
    python = interpreter("vllm")
    tokens, _ = bundled_tokens()
    texts = [tokens[start : start + TOKENS] for start in range(0, TEXTS * TOKENS, TOKENS)]
    references = {case.name: _reference(case, folder, texts) for case in cases}
    models = {case.name: str(folder / case.name) for case in cases}
    (folder / "request.json").write_text(json.dumps({"tokens": texts, "models": models}))
    command = [python, program("vllm_logprobs.py"), folder / "request.json", folder]
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, timeout=1800)
    lines = [json.loads(line) for line in done.stdout.splitlines() if line.startswith('{"name"')]
    problems = {line["name"]: line["problem"] for line in lines}
    assert problems.keys() == models.keys(), done.stderr[-4000:]
    parities = []
    for case in cases:
        if problems[case.name] is not None:
            parities.append(Parity(case, problem=problems[case.name]))
            continue
        ours = references[case.name].double().log_softmax(-1)
        theirs = torch.from_numpy(np.load(folder / f"{case.name}.npy")).double()
        kl = float((ours.exp() * (ours - theirs)).sum(-1).mean())
        parities.append(Parity(case, kl, float((ours.argmax(-1) == theirs.argmax(-1)).double().mean())))
    return parities


def bundled_tokens() -> tuple[list[int], Callable[[list[int]], str]]:
    """Return the bundled text as token ids, and what turns ids into text; random models have the same vocabulary."""
    tokenizer = Tokenizer.from_file(str(SMALL_MOE / "tokenizer.json"))
    return tokenizer.encode((SMALL_MOE.parent / "demo_text.txt").read_text()).ids, tokenizer.decode


def _reference(case: Case, folder: Path, texts: list[list[int]]) -> torch.Tensor:
    """Export a case; returns float32 logits of an ordinary model that is filled with the decoded weights."""
    original = SMALL_MOE if case.model == BUNDLED else folder / case.model
    if not original.is_dir():
        save_tiny(case.model, original, SMALL_MOE)
    output = folder / case.name
    choose = lambda _, linears: case.experts if linears[0].is_expert else case.layers  # noqa: E731
    plan = export(original, output, choose, mixed_experts=True)
    ordinary = filled(output, plan, folder / f"{case.name}-decoded", torch.float32)
    return torch.cat([logits(ordinary, torch.float32, torch.tensor([text]))[:-1] for text in texts])


def table(parities: list[Parity]) -> str:
    """Return the rows in Markdown."""
    lines = ["| model | linear layers | routed experts | KL(ours, vLLM's) | top token equal |", "|---|---|---|---|---|"]
    for parity in parities:
        case, experts = parity.case, "" if parity.case.model == "llama" else parity.case.experts
        measured = f"{parity.kl:.1e} | {parity.top1:.1%}" if parity.problem is None else f"refused: {parity.problem} |"
        lines.append(f"| {case.model} | {case.layers} | {experts} | {measured} |")
    return "\n".join(lines)


if __name__ == "__main__":
    folder = Path(sys.argv[1])
    folder.mkdir(parents=True)
    print(table(measure(folder)))
