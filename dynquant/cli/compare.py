"""`dynquant compare` and `compare-encoders`: recipes or encoders side by side, measured on the same text and questions.

Everything is exported from the same statistics and scored against the same reference, so that only the types differ, or
at equal types only the blocks. Results are written after every file; a run that was stopped continues where it was.
"""

import json
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from dynquant.calibration.options import CalibrateOptions, CalibrationOptions
from dynquant.cli.export import print_exported
from dynquant.cli.terminal import console
from dynquant.evaluation.options import EvalOptions, QuestionOptions
from dynquant.exporters.options import ExportOptions
from dynquant.options import Flag, ModelPath, Only
from dynquant.planning.options import PlanOptions, SearchOptions
from dynquant.planning.target import Target
from dynquant.session import Session
from dynquant.storage.atomic import write_atomically

if TYPE_CHECKING:
    from dynquant.evaluation.report import EvalReport

PLAN_PREFIX = "plan at "
BASE, TUNED = "ggml", "+tune"

Keep = Annotated[bool, Flag("Keep the exported files.")]
QUESTIONS = Only(("text", "tasks", "max_tokens", "mmlu_data", "shots", "limit", "scoring"))


@dataclass(frozen=True, kw_only=True)
class RecipeQuestions(QuestionOptions):
    """Inputs that recipes are compared on: text and questions, no pictures."""

    tasks: Annotated[tuple[str, ...], Flag("Any of kl, ppl, mmlu.")] = ("kl", "ppl")


@dataclass(frozen=True, kw_only=True)
class EncoderQuestions(RecipeQuestions):
    """Inputs that encoders are compared on."""

    tasks: Annotated[tuple[str, ...], Flag("Any of kl, ppl, mmlu.")] = ("kl",)
    scoring: Annotated[tuple[str, ...], Flag("letter, cloze or both.")] = ("letter",)


@dataclass(frozen=True, kw_only=True)
class CompareOptions:
    """Recipes that are measured, each with the planner at its bytes."""

    model: ModelPath
    recipes: Annotated[tuple[str, ...], Flag("Presets, as llama-iq1_s,r1-iq1_s.")]
    output: Annotated[Path, Flag("Directory for results and the shared plan.", ("-o", "--output"))]
    questions: Annotated[RecipeQuestions, QUESTIONS] = field(default_factory=RecipeQuestions)
    calibration: Annotated[CalibrationOptions, Only(("text", "tokens"))] = field(default_factory=CalibrationOptions)
    encoder: Annotated[str, Flag("ggml, or dynquant (slower; without its closing pass).")] = "ggml"
    select: Annotated[bool, Flag("Price plans by the Fisher probe and select each by KL, as plan --select.")] = False
    keep: Keep = False


@dataclass(frozen=True, kw_only=True)
class CompareEncodersOptions:
    """Recipes that are measured under each encoder, with and without the closing pass."""

    model: ModelPath
    recipes: Annotated[tuple[str, ...], Flag("Presets, as r1-iq1_s,experts-q2_k,uniform-iq2_xxs.")]
    output: Annotated[Path, Flag("Directory for results and statistics.", ("-o", "--output"))]
    questions: Annotated[EncoderQuestions, QUESTIONS] = field(default_factory=EncoderQuestions)
    calibration: Annotated[CalibrationOptions, Only(("text", "tokens", "hessians"))] = field(
        default_factory=CalibrationOptions
    )
    tune: Annotated[int, Flag("Tokens of the closing pass.")] = 16384
    variants: Annotated[tuple[str, ...], Flag("Encoders, each also with +tune.")] = (BASE, "dynquant", "dynquant+tune")
    keep: Keep = False


def compare(options: CompareOptions, session: Annotated[Session, Only(("threads",))]) -> None:
    """Measure recipes side by side, and the planner at the bytes of each.

    Example: dynquant compare ./model --recipes llama-iq1_s,r1-iq1_s --text held-out.txt -o comparison/
    """
    results = _Results(options.output / "compare.json", options.model, options.questions, session)
    for recipe in options.recipes:
        size = _measure_plan(recipe, Target(preset=recipe), options, results)
        _measure_plan(f"{PLAN_PREFIX}{recipe}", Target(size=str(size)), options, results)
    results.show(options.output / "compare.md", recipe_table)


def compare_encoders(options: CompareEncodersOptions, session: Annotated[Session, Only(("device", "threads"))]) -> None:
    """Measure encoders side by side: the same types and statistics, so the same bytes.

    Example: dynquant compare-encoders ./model --recipes r1-iq1_s,experts-q2_k --text held-out.txt -o encoders/
    """
    from dynquant.calibration.stage import calibrate

    results = _Results(options.output / "encoders.json", options.model, options.questions, session)
    stats = options.output / "stats.safetensors"
    if not stats.is_file():
        calibrate(CalibrateOptions(model=options.model, output=stats, calibration=options.calibration), session)
    for recipe in options.recipes:
        for encoder in dict.fromkeys(variant.removesuffix(TUNED) for variant in options.variants):
            _measure_encoder(recipe, encoder, stats, options, results)
            if not options.keep:
                for file in options.output.glob(f"{recipe}-{encoder}*.gguf"):
                    file.unlink()
    results.show(options.output / "encoders.md", encoder_table)


class _Results:
    """Rows of a comparison by name, written to `path` after every file."""

    def __init__(self, path: Path, model: str, questions: QuestionOptions, session: Session) -> None:
        self.rows: dict[str, dict[str, Any]] = json.loads(path.read_text()) if path.is_file() else {}
        self.questions, self.session = questions, session
        self._path, self._model = path, model

    @property
    def asked(self) -> set[str]:
        """Names of what is measured: tasks, and for questions the ways of scoring them."""
        tasks = {*self.questions.tasks}
        return tasks - {"mmlu"} | ({*self.questions.scoring} if "mmlu" in tasks else set())

    def score(self, file: Path) -> "EvalReport":
        """Compare a file with its original, whose own answers are kept beside the results."""
        from dynquant.evaluation.evaluate import evaluate

        cache = self._path.parent / "reference"
        options = EvalOptions(
            candidate=str(file), reference=self._model, questions=self.questions, reference_cache=cache
        )
        return evaluate(options, replace(self.session, device=None))

    def record(self, name: str, row: dict[str, Any]) -> None:
        self.rows[name] = row
        write_atomically(self._path, json.dumps(self.rows, indent=1) + "\n")

    def show(self, path: Path, table: Callable[[dict[str, dict[str, Any]]], str]) -> None:
        """Write the Markdown table and print it."""
        write_atomically(path, table(self.rows))
        console.say(path.read_text())


def _measure_plan(name: str, target: Target, options: CompareOptions, results: _Results) -> int:
    """Plan, export and score one recipe unless its row is there; return the file's bytes."""
    from dynquant.exporters.stage import export
    from dynquant.planning.stage import make_plan

    row = results.rows.get(name, {"measured": [], "metrics": {}})
    if name in results.rows and results.asked <= {*row["measured"]}:
        return row["bytes"]
    console.note(name)
    folder, session = options.output / "plan", results.session
    hessians = "activations" if options.encoder == "dynquant" else "none"
    plan = make_plan(
        PlanOptions(
            model=options.model,
            output=folder,
            target=target,
            calibration=replace(options.calibration, hessians=hessians),
            search=SearchOptions(select=options.select),
        ),
        session,
    )
    file = options.output / f"{name.replace(' ', '-')}.gguf"
    plan.save(options.output / f"{file.stem}.plan.json")
    exported = ExportOptions(
        model=options.model, output=file, plan=folder / "plan.json", encoder=options.encoder, tune=0
    )
    print_exported(export(exported, session))
    report = results.score(file)
    if not options.keep:
        file.unlink()
    results.record(
        name,
        {
            "bytes": plan.predicted_bytes,
            "bits_per_weight": plan.bits_per_weight,
            "plan_hash": plan.hash,
            "histogram": plan.histogram(),
            "reference": report.reference.name,
            "measured": sorted({*row["measured"], *results.asked}),
            "metrics": row["metrics"] | metrics_of(report),
        },
    )
    return plan.predicted_bytes


def _measure_encoder(
    recipe: str, encoder: str, stats: Path, options: CompareEncodersOptions, results: _Results
) -> None:
    """Export once, measure, tune that file, and measure again; whatever is not there yet."""
    from dynquant.exporters.stage import export

    names = [name for name in (encoder, f"{encoder}{TUNED}") if name in options.variants]
    names = [name for name in names if options.tune > 0 or not name.endswith(TUNED)]
    missing = [name for name in names if f"{recipe} {name}" not in results.rows]
    plain = options.output / f"{recipe}-{encoder}.gguf"
    if missing and not plain.is_file():
        console.note(f"{recipe} {encoder}")
        export_options = ExportOptions(
            model=options.model, output=plain, preset=recipe, stats=stats, encoder=encoder, tune=0
        )
        print_exported(export(export_options, results.session))
    for name in missing:
        file = _tuned(plain, encoder, stats, options, results.session) if name.endswith(TUNED) else plain
        report = results.score(file)
        results.record(
            f"{recipe} {name}",
            {
                "recipe": recipe,
                "variant": name,
                "bytes": file.stat().st_size,
                "metrics": metrics_of(report),
                "kl_blocks": {text.name: list(text.kl.block_sums) for text in report.texts if text.kl},
            },
        )


def _tuned(plain: Path, encoder: str, stats: Path, options: CompareEncodersOptions, session: Session) -> Path:
    """Write the file again after the closing pass, on the tokens of the second moments."""
    from dynquant.calibration.second_moments import SecondMoments, path_beside
    from dynquant.exporters.closing_pass import TuneOptions, tune_file
    from dynquant.families.open import open_and_announce

    windows = SecondMoments.load(path_beside(stats)).tokens
    model = open_and_announce(options.model, session)
    output = plain.with_name(f"{plain.stem}{TUNED}.gguf")
    (file,) = tune_file(model, plain, windows, TuneOptions(tokens=options.tune), output, session, encoder=encoder)
    return file


def metrics_of(report: "EvalReport") -> dict[str, dict]:
    """Return column -> value and interval; paired comparisons with the original carry McNemar's p."""
    metrics: dict[str, dict] = {}
    for text in report.texts:
        if text.kl:
            metrics[f"KL {text.name}"] = text.kl.mean.model_dump()
            metrics[f"top-1 {text.name}"] = text.kl.top1_agreement.model_dump()
            metrics[f"KL 99.9 % {text.name}"] = {"value": text.kl.p99_9}
        metrics[f"perplexity ratio {text.name}"] = text.perplexity_ratio.model_dump()
    for result in report.multiple_choice:
        label = f"{result.scoring} ({result.questions} questions)"
        metrics[f"{label} accuracy"] = result.candidate.accuracy.model_dump() | {
            "reference": result.reference.accuracy.value,
            "mcnemar_p": result.mcnemar_p,
        }
        metrics[f"{label} P(right)"] = result.candidate.right_probability_among_choices.model_dump() | {
            "reference": result.reference.right_probability_among_choices.value
        }
    return metrics


def recipe_table(rows: dict[str, dict]) -> str:
    """Return one line a recipe, smallest file first, with 95 % intervals."""
    columns = list(dict.fromkeys(column for row in rows.values() for column in row["metrics"]))
    lines = ["| recipe | bytes | bpw | " + " | ".join(columns) + " |", "|---|---|---|" + "---|" * len(columns)]
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


def encoder_table(rows: dict[str, dict]) -> str:
    """Return one line a file; changes of KL are against ggml's file of the same recipe, with paired 95 % intervals."""
    texts = list(dict.fromkeys(name for row in rows.values() for name in row["kl_blocks"]))
    names = dict.fromkeys(name for row in rows.values() for name in row["metrics"])
    others = [name for name in names if name.endswith(("accuracy", "P(right)"))]
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


def _change(row: dict, base: dict | None, text: str) -> str:
    if base is None or row is base:
        return ""
    import numpy as np

    from dynquant.evaluation.statistics import bootstrap_ratio

    ratio = bootstrap_ratio(np.array(row["kl_blocks"][text]), np.array(base["kl_blocks"][text]))
    shown = (f"{100 * (value - 1):+.1f}" for value in (ratio.value, ratio.low, ratio.high))
    return "{} % [{}, {}]".format(*shown)
