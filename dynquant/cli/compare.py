"""Recipes side by side, measured: each preset, and the planner at exactly its bytes, on the same text and questions.

Everything is exported with the same encoder and statistics and scored against the same reference, so that only the
types differ. Results are written after every recipe; a run that was stopped continues where it was.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from dynquant.calibration.stage import CalibrationOptions
from dynquant.cli.commands import export
from dynquant.cli.terminal import console
from dynquant.evaluation.evaluate import evaluate
from dynquant.evaluation.report import EvalReport
from dynquant.planning.search import SearchOptions
from dynquant.planning.stage import plan as make_plan
from dynquant.planning.target import Target
from dynquant.recipes.folder import PLAN_NAME, STATS_NAME
from dynquant.recipes.plan import Plan
from dynquant.session import Session
from dynquant.storage.atomic import write_atomically

PLAN_PREFIX = "plan at "


@dataclass(frozen=True)
class Questions:
    """Questions that each candidate is scored on."""

    tasks: tuple[str, ...]
    text: tuple[Path, ...] = ()
    max_tokens: int = 8192
    mmlu_data: str | None = None
    shots: str | None = None
    limit: int | None = None
    scoring: tuple[str, ...] = ("letter", "cloze")


def score(file: Path, model: str, questions: Questions, directory: Path, threads: int | None) -> EvalReport:
    """Measure a file's loss against its original, whose own answers are kept in `directory`."""
    with console.stage_progress("Finished files and the original's answers are kept.") as progress:
        return evaluate(
            file, model, progress=progress, threads=threads, cache_dir=directory / "reference",
            tasks=questions.tasks, text=questions.text, max_tokens=questions.max_tokens,
            mmlu_data=questions.mmlu_data, shots=questions.shots, limit=questions.limit, scoring=questions.scoring,
        )  # fmt: skip


def compare(
    model: str,
    recipes: Sequence[str],
    questions: Questions,
    options: CalibrationOptions,
    directory: Path,
    *,
    encoder: str = "ggml",
    search: SearchOptions | None = None,
    session: Session,
    keep: bool = False,
) -> Path:
    """Measure every recipe and the planner at its bytes, without a closing pass; returns the Markdown table."""
    result = directory / "compare.json"
    rows: dict[str, dict] = json.loads(result.read_text()) if result.is_file() else {}
    run = _Run(model, questions, options, directory, encoder, search, session, keep, rows)
    for recipe in recipes:
        size = run.measure(recipe, Target(preset=recipe))
        run.measure(f"{PLAN_PREFIX}{recipe}", Target(size=str(size)))
    table = directory / "compare.md"
    write_atomically(table, markdown(rows))
    console.out.print(table.read_text(), markup=False)
    return table


@dataclass(frozen=True)
class _Run:
    """State that all recipes share; `rows` grows, and is written after every file."""

    model: str
    questions: Questions
    options: CalibrationOptions
    directory: Path
    encoder: str
    search: SearchOptions | None
    session: Session
    keep: bool
    rows: dict[str, dict]

    def measure(self, name: str, target: Target) -> int:
        """Plan, export and score one recipe unless its row is there; returns the file's bytes."""
        asked = self.questions
        wanted = {*asked.tasks} - {"mmlu"} | ({*asked.scoring} if "mmlu" in asked.tasks else set())
        if name in self.rows and wanted <= {*self.rows[name]["measured"]}:
            return self.rows[name]["bytes"]
        console.note(name)
        folder = self.directory / "plan"
        plan = make_plan(self.model, target, self.options, folder, self.session, search=self.search)
        file = self.directory / f"{name.replace(' ', '-')}.gguf"
        plan.save(self.directory / f"{file.stem}.plan.json")
        export(
            self.model, file, self.session, plan_path=folder / PLAN_NAME, stats_path=folder / STATS_NAME,
            encoder=self.encoder, tune_tokens=0,
        )  # fmt: skip
        report = score(file, self.model, asked, self.directory, self.session.threads)
        if not self.keep:
            file.unlink()
        before = self.rows.get(name, {"measured": [], "metrics": {}})
        self.rows[name] = _row(plan, report) | {
            "measured": sorted({*before["measured"], *wanted}),
            "metrics": before["metrics"] | metrics_of(report),
        }
        write_atomically(self.directory / "compare.json", json.dumps(self.rows, indent=1) + "\n")
        return plan.predicted_bytes


def _row(plan: Plan, report: EvalReport) -> dict:
    return {
        "bytes": plan.predicted_bytes,
        "bits_per_weight": plan.bits_per_weight,
        "plan_hash": plan.hash,
        "histogram": plan.histogram(),
        "reference": report.reference.name,
    }


def metrics_of(report: EvalReport) -> dict[str, dict]:
    """Column -> value and interval; paired comparisons with the original carry McNemar's p."""
    found: dict[str, dict] = {}
    for text in report.texts:
        if text.kl:
            found[f"KL {text.name}"] = text.kl.mean.model_dump()
            found[f"top-1 {text.name}"] = text.kl.top1_agreement.model_dump()
            found[f"KL 99.9 % {text.name}"] = {"value": text.kl.p99_9}
        found[f"perplexity ratio {text.name}"] = text.perplexity_ratio.model_dump()
    for result in report.multiple_choice:
        label = f"{result.scoring} ({result.questions} questions)"
        found[f"{label} accuracy"] = result.candidate.accuracy.model_dump() | {
            "reference": result.reference.accuracy.value,
            "mcnemar_p": result.mcnemar_p,
        }
        found[f"{label} P(right)"] = result.candidate.right_probability_among_choices.model_dump() | {
            "reference": result.reference.right_probability_among_choices.value
        }
    return found


def markdown(rows: dict[str, dict]) -> str:
    """One line a recipe, smallest file first, with 95 % intervals."""
    columns = list(dict.fromkeys(column for row in rows.values() for column in row["metrics"]))
    lines = [
        "| recipe | bytes | bpw | " + " | ".join(columns) + " |",
        "|---|---|---|" + "---|" * len(columns),
    ]
    for name, row in sorted(rows.items(), key=lambda item: (item[1]["bytes"] // 20_000, item[0])):
        cells = [_cell(row["metrics"].get(column)) for column in columns]
        shown = f"**{name}**" if name.startswith(PLAN_PREFIX) else name
        lines.append(f"| {shown} | {row['bytes']:,} | {row['bits_per_weight']:.3f} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def _cell(metric: dict | None) -> str:
    if metric is None:
        return ""
    interval = f" [{metric['low']:.3f}, {metric['high']:.3f}]" if "low" in metric else ""
    return f"{metric['value']:.3f}{interval}"
