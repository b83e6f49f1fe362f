"""Judges how far architectures are supported, each by a tiny random checkpoint; writes a Markdown table.

    python -m dynquant.analysis.bench.architectures [NAME...] --llama-cpp DIR -o DIR

DIR of `-o` gets a folder for every name and architectures.md. Without names all are judged. Every architecture runs in
a process of its own, and every cell alone: a failure is a short reason in its cell, and the others go on. Rows that are
in the folder already are kept; `--again` judges all anew, `--failed` what failed: all of a row whose plan has a fault,
else its failed cells.
"""

import argparse
import copy
import json
import os
import re
import shutil
import sys
import time
import traceback
import warnings
from collections.abc import Callable, Iterable, Sequence
from functools import cached_property
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dynquant.analysis.bench.architectures.checkpoints import ARCHITECTURES, LISTED, write_tiny
from dynquant.calibration.options import CalibrationOptions
from dynquant.calibration.stage import run_calibration
from dynquant.calibration.statistics import CalibrationStats
from dynquant.checkpoints.gguf_layout import write_float32
from dynquant.checkpoints.gguf_source import GGUFSource
from dynquant.checkpoints.model import Model
from dynquant.checkpoints.tensor_roles import Role
from dynquant.evaluation.agreement.likely_causes import KnownDifference, known_differences
from dynquant.evaluation.agreement.same_computation import compare, mean_kl
from dynquant.evaluation.llama_cpp import LlamaCppRunner
from dynquant.evaluation.runners import HuggingFaceRunner
from dynquant.exporters.options import ExportOptions
from dynquant.exporters.stage import export
from dynquant.families.common.config import read_json
from dynquant.families.open import open_model
from dynquant.inputs.text import pack_windows, read_text
from dynquant.planning.options import PlanOptions, SearchOptions
from dynquant.planning.selecting.selection import Selection
from dynquant.planning.stage import make_plan
from dynquant.planning.target import Target
from dynquant.recipes.plan import Plan, PlanEntry
from dynquant.running.live_weights import LiveWeights
from dynquant.running.load import load_directory, load_hf, load_tokenizer
from dynquant.session import Session
from dynquant.storage.file_names import PLAN_NAME, SAME_COMPUTATION_NAME, SELECTION_NAME, STATS_NAME

COLUMNS = (
    "architecture",
    "opens as",
    "F32 in llama.cpp, KL",
    "plan at 4.5 bits",
    "experts calibrated",
    "matrices without statistics",
    "of unknown role",
    "selected KL, and the file's",
    "packed against decoded",
    "LoRA step",
    "streamed statistics",
)
_BITS, _WINDOW, _TOKENS, _SELECTION_TOKENS, _STREAMED_TOKENS = 4.5, 256, 2048, 1024, 512
_TYPES = ("q2_k", "q3_k", "q4_k", "q5_k", "q6_k", "q8_0")
_ROW_NAME = "row.json"
_AFTER_PLAN = COLUMNS.index("packed against decoded")
_SECONDS = 900
_SAME_KL = 0.1
"""Share by which a file's KL may differ from the selected plan's outside the interval: llama.cpp rounds activations."""
_UNJUDGED = (Role.EMBEDDING, Role.PER_LAYER_EMBEDDING, Role.NORM, Role.ROUTER, Role.CONV, Role.SSM_STATE, Role.MIXING)
"""Roles of what multiplies no activations, or is always F32."""


def main() -> None:
    """Parse, judge, write the table after every row."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", help="architectures; all without")
    parser.add_argument("--llama-cpp", type=Path, required=True, help="source tree of llama.cpp")
    parser.add_argument("-o", "--output", type=Path, required=True)
    parser.add_argument("--threads", type=int, default=None)
    parser.add_argument("--again", action="store_true", help="judge what is judged already, too")
    parser.add_argument("--failed", action="store_true", help="judge what failed again")
    asked = parser.parse_args()
    names = asked.names or list(ARCHITECTURES)
    if unknown := [name for name in names if name not in ARCHITECTURES]:
        parser.error(f"there is no {unknown[0]}; there are {', '.join(ARCHITECTURES)}")
    os.environ["LLAMA_CPP_DIR"] = str(asked.llama_cpp.resolve())
    if asked.threads is not None:
        torch.set_num_threads(asked.threads)
    for name in names:
        folder = asked.output / name
        row = {} if asked.again else _row(folder)
        kept = {column: cell for column, cell in row.items() if _passes(cell)} if asked.failed else row
        if any(column not in kept for column in COLUMNS[1:_AFTER_PLAN]) and (asked.failed or not row):
            kept = {}
        if not row or len(kept) < len(row):
            _judge_apart(name, folder, kept, asked.threads)
        print(_line(name, _row(folder)), flush=True)
        (asked.output / "architectures.md").write_text(_report(asked.output, ARCHITECTURES))


def _judge_apart(name: str, folder: Path, kept: dict[str, str], threads: int | None) -> None:
    """Judge one architecture in a process of its own, whose end is the reason of the cell in which it came.

    It is forked: importing everything anew would take as long as the cells do.
    """
    if not kept:
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
    _save(folder, kept)
    process = get_context("fork").Process(target=_judge, args=(name, folder, threads))
    process.start()
    process.join(_SECONDS)
    ended = f"not done after {_SECONDS} s" if process.is_alive() else f"the process ended with {process.exitcode}"
    process.kill()
    process.join()
    if process.exitcode:
        row = _row(folder)
        column = next(column for column in COLUMNS[1:] if column not in row)
        _save(folder, row | {column: f"✗ {ended}"})


def _judge(name: str, folder: Path, threads: int | None) -> None:
    """Fill the row of one architecture, cell by cell; what libraries say goes to log.txt."""
    with (folder / "log.txt").open("w") as log:  # of C code, too
        os.dup2(log.fileno(), sys.stdout.fileno())
        os.dup2(log.fileno(), sys.stderr.fileno())
    warnings.simplefilter("ignore")
    row, started, directory = _row(folder), time.process_time(), folder / "model"
    candidate = _Candidate(directory, Session(threads=threads, device="cpu"))
    for column, fill in candidate.cells().items():
        if column in row:
            continue
        try:
            if not directory.is_dir():
                write_tiny(name, directory)
            row[column] = fill()
        except Exception as error:  # any failure is a finding
            row[column] = _reason(error)
            print(f"{column}:", *traceback.format_exception(error), file=sys.stderr, flush=True)
        _save(folder, row)
        if column == "opens as" and row[column].startswith("✗"):
            break
    _save(folder, row | {"seconds": f"{time.process_time() - started:.0f}"})


class _Candidate:
    """One checkpoint, and what its cells make of it in turn."""

    def __init__(self, directory: Path, session: Session) -> None:
        self.directory, self.folder, self.session = directory, directory.parent, session

    def cells(self) -> dict[str, Callable[[], str]]:
        """Return the functions that fill the columns."""
        fill = (
            self.opens,
            self.f32,
            self.plan,
            self.experts,
            self.statistics,
            self.roles,
            self.selection,
            self.packed,
            self.adapter,
            self.streamed,
        )
        return dict(zip(COLUMNS[1:], fill, strict=True))

    @cached_property
    def model(self) -> Model:
        return open_model(self.directory)

    @cached_property
    def known(self) -> list[KnownDifference]:
        """Differences of llama.cpp that the configuration shows."""
        return known_differences(read_json(self.directory / "config.json"))

    @property
    def known_kl(self) -> float:
        """The most that this explains."""
        return 2 * sum(difference.kl for difference in self.known)

    @cached_property
    def decided(self) -> Plan:
        """The plan, with its statistics and selection in the folder."""
        text = self.folder / "selection.txt"
        documents = read_text(None, seed=1, max_tokens=4 * _SELECTION_TOKENS).documents
        text.write_text("\n\n".join(documents)[: 16 * _SELECTION_TOKENS])
        search = SearchOptions(select=True, methods=("closed-form",), text=text, selection_tokens=_SELECTION_TOKENS)
        target = Target(bpw=_BITS, types=_TYPES)
        options = {"calibration": _calibration(_TOKENS), "encoder": "ggml", "allow_difference": True}
        output = self.folder / "plan"
        if (output / PLAN_NAME).is_file():
            return Plan.load(output / PLAN_NAME)
        return make_plan(
            PlanOptions(model=str(self.directory), output=output, target=target, search=search, **options), self.session
        )

    @cached_property
    def stats(self) -> CalibrationStats:
        """Statistics of the plan."""
        return CalibrationStats.load(self.folder / "plan" / STATS_NAME)

    def exported(self, name: str, **options: Any) -> Path:
        """Export into a file or folder and return it."""
        path = self.folder / name
        options |= {"encoder": "ggml", "allow_difference": True, "resume": False}
        export(ExportOptions(model=str(self.directory), output=path, **options), self.session)
        return path

    @cached_property
    def quantized(self) -> Path:
        """The GGUF file of the plan."""
        assert self.decided
        path = self.folder / "plan.gguf"
        return path if path.is_file() else self.exported("plan.gguf", plan=self.folder / "plan" / PLAN_NAME, tune=0)

    @cached_property
    def decoded(self) -> torch.nn.Module:
        """Transformers' model with the weights of that file."""
        hf_model, file = load_hf(self.model, dtype=torch.float32), GGUFSource(self.quantized)
        live = LiveWeights(self.model, hf_model)
        live.check(name for name in file.names() if file.info(name).dtype not in ("F32", "F16", "BF16"))
        for name in live.names():
            live.write(name, file.load(name))
        return hf_model

    def windows(self) -> Tensor:
        """Return the windows on which the plan was selected."""
        text = read_text(self.folder / "selection.txt", seed=self.session.seed, max_tokens=_SELECTION_TOKENS)
        return pack_windows(text, load_tokenizer(self.model), window=_WINDOW, max_tokens=_SELECTION_TOKENS)

    def opens(self) -> str:
        return f"{self.model.arch}, {len(self.model.source.names())} tensors"

    def f32(self) -> str:
        file = write_float32(self.model, self.folder / "f32.gguf")
        compared = compare(self.model, file, self.session, logits=self._llama_logits)
        file.unlink()
        if self.model.is_converted:  # the plan need not compare again
            (self.folder / "plan").mkdir(exist_ok=True)
            compared.save(self.folder / "plan" / SAME_COMPUTATION_NAME)
        kl = compared.kl
        reasons = [] if kl < 1e-9 else [difference.reason for difference in self.known]
        return f"{'' if kl < max(1e-9, self.known_kl) else '✗ '}{'; '.join([f'{kl:.1e}', *reasons])}"

    def plan(self) -> str:
        return f"{self.decided.bits_per_weight:.2f}"

    def experts(self) -> str:
        stacks = [entry for entry in self.decided.entries if entry.is_expert_stack]
        if not stacks:
            return "none"
        counts = {entry.name: self.stats.input_of(entry.name) for entry in stacks}
        unseen = {name: entry.shape[0] for name, entry in zip(counts, stacks, strict=True) if counts[name] is None}
        unseen |= {name: int((seen.counts == 0).sum()) for name, seen in counts.items() if seen is not None}
        total, lost = sum(entry.shape[0] for entry in stacks), sum(unseen.values())
        return f"✗ {lost} of {total} never ran" if lost else f"all {total}"

    def statistics(self) -> str:
        lost = [
            entry.name
            for entry in self.decided.entries
            if _is_matrix(entry) and entry.role not in _UNJUDGED and self.stats.input_of(entry.name) is None
        ]
        return _listed(lost)

    def roles(self) -> str:
        return _listed(entry.name for entry in filter(_is_matrix, self.decided.entries) if entry.role == Role.OTHER)

    def selection(self) -> str:
        assert self.decided
        selection = Selection.load(self.folder / "plan" / SELECTION_NAME)
        assert selection is not None and selection.winner.kl is not None
        selected = selection.winner.kl
        running, original = LlamaCppRunner(self.quantized, threads=self.session.threads), self._running(self.model)
        parts = [
            mean_kl(original.window_logits(window), running.window_logits(window)) for window in self.windows().tolist()
        ]
        running.close()
        kl = sum(parts) / len(parts)
        is_same = (
            selected.low <= kl <= selected.high or abs(kl - selected.value) < _SAME_KL * selected.value + self.known_kl
        )
        return f"{'' if is_same else '✗ '}{selected.value:.4g} [{selected.low:.3g}, {selected.high:.3g}], {kl:.4g}"

    def packed(self) -> str:
        folder = self.exported("packed", plan=self.folder / "plan" / PLAN_NAME, format="safetensors", tune=0)
        tokens = self.windows()[0].tolist()
        logits = HuggingFaceRunner(load_directory(folder, torch.float32).eval()).window_logits(tokens)
        expected = HuggingFaceRunner(self.decoded.eval()).window_logits(tokens)
        difference = float((logits - expected).abs().max() / expected.std())
        if difference < 1e-5:
            return f"{difference:.1e}"
        exact = copy.deepcopy(self.decoded).double()
        exact.set_experts_implementation("eager")  # grouped products know no float64
        rounding = float((HuggingFaceRunner(exact).window_logits(tokens) - expected).abs().max() / expected.std())
        # Both sides round: two results that are each off by so much differ by twice as much.
        return f"{'' if difference < 2 * rounding else '✗ '}{difference:.1e}, float32 rounds by {rounding:.1e}"

    def adapter(self) -> str:
        from dynquant.lora import add_adapter

        torch.manual_seed(0)
        adapted = add_adapter(load_directory(self.folder / "packed", torch.float32), rank=4)
        trained = [parameter for parameter in adapted.parameters() if parameter.requires_grad]
        optimizer, tokens = torch.optim.AdamW(trained, lr=3e-3), self.windows()[:1, :64]
        losses = []
        for _ in range(4):
            loss = adapted(input_ids=tokens, labels=tokens, use_cache=False).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses.append(float(loss))
        return f"{'' if losses[-1] < losses[0] else '✗ '}loss {losses[0]:.3f} to {losses[-1]:.3f}"

    def streamed(self) -> str:
        whole, streamed = (
            run_calibration(self.model, _calibration(_STREAMED_TOKENS, limit), self.folder / name, self.session).stats
            for name, limit in (("whole.safetensors", None), ("streamed.safetensors", "6GiB"))
        )
        if whole.inputs.keys() != streamed.inputs.keys():
            return f"{_listed(whole.inputs.keys() ^ streamed.inputs.keys())} in one alone"
        differences = [
            float(
                (streamed.inputs[key].in_sum2 - stats.in_sum2).abs().max() / stats.in_sum2.abs().max().clamp(min=1e-30)
            )
            for key, stats in whole.inputs.items()
        ]
        worst = max(differences)
        return "equal" if worst == 0 else f"{'' if worst < 1e-5 else '✗ '}{worst:.1e}"

    @staticmethod
    def _llama_logits(file: Path, tokens: Sequence[int], threads: int | None) -> Tensor:
        runner = LlamaCppRunner(file, threads=threads)  # in this process: it is the architecture's own
        try:
            return runner.window_logits(tokens)
        finally:
            runner.close()

    def _running(self, model: Model) -> HuggingFaceRunner:
        return HuggingFaceRunner(load_hf(model, dtype=torch.float32))


def _is_matrix(entry: PlanEntry) -> bool:
    return len(entry.shape) > 1 and entry.name.endswith(".weight")  # biases of stacks have two dimensions


def _calibration(tokens: int, limit: str | None = None) -> CalibrationOptions:
    return CalibrationOptions(tokens=tokens, window=_WINDOW, hessians="none", max_memory=limit)


def _listed(names: Iterable[str]) -> str:
    """Return how many there are, with the first, as a fault; "0" for none."""
    listed = sorted(names)
    return f"✗ {len(listed)} ({listed[0].removesuffix('.weight')})" if listed else "0"


def _reason(error: Exception) -> str:
    text = re.sub(r"/\S*/", "", " ".join(str(error).split())).replace("|", "/")  # without folders
    kind = "" if type(error).__module__.startswith("dynquant") else f"{type(error).__name__}: "
    return f"✗ {kind}{text[:150]}"


def _save(folder: Path, row: dict[str, str]) -> None:
    (folder / _ROW_NAME).write_text(json.dumps(row, indent=1, ensure_ascii=False) + "\n")


def _row(folder: Path) -> dict[str, str]:
    path = folder / _ROW_NAME
    return json.loads(path.read_text()) if path.is_file() else {}


def _line(name: str, row: dict[str, str]) -> str:
    return f"| {' | '.join([name, *(row.get(column, '') for column in COLUMNS[1:])])} |"


def _report(output: Path, names: Iterable[str]) -> str:
    """Return the table of all rows that are there, and how many pass each column."""
    rows = {name: row for name in names if (row := _row(output / name))}
    lines = [f"| {' | '.join(COLUMNS)} |", "|---" * len(COLUMNS) + "|", *(_line(*item) for item in rows.items())]
    for title, group in (("listed", LISTED), ("others", ARCHITECTURES.keys() - LISTED.keys())):
        judged = [row for name, row in rows.items() if name in group]
        passed = [sum(_passes(row.get(column, "")) for row in judged) for column in COLUMNS[1:]]
        lines.append(f"| **{title}: {len(judged)}** | {' | '.join(f'**{count}**' for count in passed)} |")
    return "\n".join(lines) + "\n"


def _passes(cell: str) -> bool:
    return bool(cell) and not cell.startswith("✗")


if __name__ == "__main__":
    main()
