"""Encoders side by side: the same types from the same statistics, so that the bytes are equal and only blocks differ.

Each recipe is written by ggml's encoder, by dynquant's, and by dynquant's with the closing pass, and every file is
scored against the same reference on the same tokens. KL is compared pair by pair on blocks of 64 tokens. Results are
written after every file; a run that was stopped continues where it was.
"""

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from dynquant import console, export_workflow, workflow
from dynquant.compare import Questions, metrics_of
from dynquant.eval_statistics import bootstrap_ratio
from dynquant.evaluate import evaluate
from dynquant.plan import write_atomically
from dynquant.plan_report import STATS_NAME

BASE = "ggml"
VARIANTS = ("ggml", "dynquant", "dynquant+tune")


def compare_encoders(
    model: str,
    recipes: Sequence[str],
    questions: Questions,
    options: workflow.CalibrationOptions,
    directory: Path,
    *,
    tune_tokens: int,
    variants: Sequence[str] = VARIANTS,
    threads: int | None = None,
    keep: bool = False,
) -> Path:
    """Measure every recipe under every variant; returns the Markdown table."""
    result = directory / "encoders.json"
    rows: dict[str, dict] = json.loads(result.read_text()) if result.is_file() else {}
    stats = directory / STATS_NAME
    if not stats.is_file():
        workflow.calibrate(model, options, stats)
    for recipe in recipes:
        for variant in variants:
            key = f"{recipe} {variant}"
            if key in rows:
                continue
            console.note(f"[bold]{key}[/]")
            file = directory / f"{recipe}-{variant}.gguf"
            encoder, _, tuned = variant.partition("+")
            export_workflow.export(
                model, file, preset=recipe, stats_path=stats, encoder=encoder, device=options.device,
                tune_tokens=tune_tokens if tuned else 0, threads=threads,
            )  # fmt: skip
            rows[key] = _measured(model, file, questions, directory, threads) | {"recipe": recipe, "variant": variant}
            if not keep:
                file.unlink()
            write_atomically(result, json.dumps(rows, indent=1) + "\n")
    table = directory / "encoders.md"
    write_atomically(table, markdown(rows))
    console.out.print(table.read_text(), markup=False)
    return table


def _measured(model: str, file: Path, questions: Questions, directory: Path, threads: int | None) -> dict:
    with console.stage_progress() as progress:
        report = evaluate(
            file, model, progress=progress, threads=threads, cache_dir=directory / "reference",
            tasks=questions.tasks, text=questions.text, max_tokens=questions.max_tokens,
            mmlu_data=questions.mmlu_data, shots=questions.shots, limit=questions.limit, scoring=questions.scoring,
        )  # fmt: skip
    blocks = {text.name: list(text.kl.block_sums) for text in report.texts if text.kl}
    return {"bytes": file.stat().st_size, "metrics": metrics_of(report), "kl_blocks": blocks}


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
