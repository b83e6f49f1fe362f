"""Encoders side by side: the same types from the same statistics, so that the bytes are equal and only blocks differ.

Each recipe is written by ggml's encoder, by dynquant's, and by dynquant's with the closing pass, and every file is
scored against the same reference on the same tokens. KL is compared pair by pair on blocks of 64 tokens. Results are
written after every file; a run that was stopped continues where it was.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from dynquant.calibration.second_moments import SecondMoments, path_beside
from dynquant.calibration.stage import CalibrationOptions, calibrate_model
from dynquant.cli.commands import export
from dynquant.cli.compare import Questions, metrics_of, score
from dynquant.cli.terminal import console
from dynquant.evaluation.statistics import bootstrap_ratio
from dynquant.exporters.closing_pass import TuneOptions
from dynquant.exporters.stage import tune_file
from dynquant.families.open import open_and_announce
from dynquant.recipes.folder import STATS_NAME
from dynquant.session import Session
from dynquant.storage.atomic import write_atomically

BASE, TUNED = "ggml", "+tune"
VARIANTS = ("ggml", "dynquant", "dynquant+tune")
RESULT_NAME = "encoders.json"


def compare_encoders(
    model: str,
    recipes: Sequence[str],
    questions: Questions,
    options: CalibrationOptions,
    directory: Path,
    *,
    tune_tokens: int,
    variants: Sequence[str] = VARIANTS,
    session: Session,
    keep: bool = False,
) -> Path:
    """Measure every recipe under every variant; returns the Markdown table."""
    result = directory / RESULT_NAME
    rows: dict[str, dict] = json.loads(result.read_text()) if result.is_file() else {}
    stats = directory / STATS_NAME
    if not stats.is_file():
        calibrate_model(model, options, stats, session)
    run = _Run(model, questions, options, directory, stats, session, rows)
    for recipe in recipes:
        for encoder in dict.fromkeys(variant.removesuffix(TUNED) for variant in variants):
            run.measure(recipe, encoder, encoder in variants, tune_tokens if f"{encoder}{TUNED}" in variants else 0)
            if not keep:
                for file in directory.glob(f"{recipe}-{encoder}*.gguf"):
                    file.unlink()
    table = directory / "encoders.md"
    write_atomically(table, markdown(rows))
    console.out.print(table.read_text(), markup=False)
    return table


@dataclass
class _Run:
    """One reference and its statistics; `rows` grows, and is written after every file."""

    model: str
    questions: Questions
    options: CalibrationOptions
    directory: Path
    stats: Path
    session: Session
    rows: dict[str, dict]

    def measure(self, recipe: str, encoder: str, as_encoded: bool, tune_tokens: int) -> None:
        """Export once, measure, tune that file, and measure again; whatever is not known yet."""
        plain, tuned = (self.directory / f"{recipe}-{encoder}{suffix}.gguf" for suffix in ("", TUNED))
        wants_plain = as_encoded and f"{recipe} {encoder}" not in self.rows
        wants_tuned = tune_tokens > 0 and f"{recipe} {encoder}{TUNED}" not in self.rows
        if (wants_plain or wants_tuned) and not plain.is_file():
            console.note(f"{recipe} {encoder}")
            export(
                self.model, plain, self.session, preset=recipe, stats_path=self.stats, encoder=encoder, tune_tokens=0
            )
        if wants_plain:
            self._record(recipe, encoder, plain)
        if wants_tuned:
            moments = SecondMoments.load(path_beside(self.stats))
            tune_file(
                open_and_announce(self.model, self.session), plain, moments.tokens, TuneOptions(tokens=tune_tokens),
                tuned, self.session, encoder=encoder,
            )  # fmt: skip
            self._record(recipe, f"{encoder}{TUNED}", tuned)

    def _record(self, recipe: str, variant: str, file: Path) -> None:
        report = score(file, self.model, self.questions, self.directory, self.session.threads)
        self.rows[f"{recipe} {variant}"] = {
            "recipe": recipe,
            "variant": variant,
            "bytes": file.stat().st_size,
            "metrics": metrics_of(report),
            "kl_blocks": {text.name: list(text.kl.block_sums) for text in report.texts if text.kl},
        }
        write_atomically(self.directory / RESULT_NAME, json.dumps(self.rows, indent=1) + "\n")


def markdown(rows: dict[str, dict]) -> str:
    """One line a file; the change of KL is against ggml's file of the same recipe, with a paired 95 % interval."""
    texts = list(dict.fromkeys(name for row in rows.values() for name in row["kl_blocks"]))
    others = list(dict.fromkeys(m for row in rows.values() for m in row["metrics"] if _is_accuracy(m)))
    columns = [part for text in texts for part in (f"KL {text}", "change", "top-1 %")] + others
    lines = ["| recipe | bytes | encoder | " + " | ".join(columns) + " |", "|---|---|---|" + "---|" * len(columns)]
    for row in rows.values():
        base = rows.get(f"{row['recipe']} {BASE}")
        cells = []
        for text in texts:
            metrics = row["metrics"]
            cells += [f"{metrics[f'KL {text}']['value']:.4f}", _change(row, base, text)]
            cells.append(f"{100 * metrics[f'top-1 {text}']['value']:.1f}")
        cells += [f"{100 * row['metrics'][name]['value']:.1f}" if name in row["metrics"] else "" for name in others]
        lines.append(f"| {row['recipe']} | {row['bytes']:,} | {row['variant']} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def _is_accuracy(metric: str) -> bool:
    return metric.endswith(("accuracy", "P(right)"))


def _change(row: dict, base: dict | None, text: str) -> str:
    if base is None or row is base:
        return ""
    ratio = bootstrap_ratio(np.array(row["kl_blocks"][text]), np.array(base["kl_blocks"][text]))
    shown = (f"{100 * (one - 1):+.1f}" for one in (ratio.value, ratio.low, ratio.high))
    return "{} % [{}, {}]".format(*shown)
