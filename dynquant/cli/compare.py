"""`dynquant compare` and `compare-encoders`: recipes or encoders side by side, measured on the same text and questions.

Everything is exported from the same statistics and scored against the same reference, so that only the types differ, or
at equal types only the blocks. Results are written after every file; a run that was stopped continues where it was.
"""

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from dynquant.calibration.options import CalibrationOptions
from dynquant.cli.export import print_exported
from dynquant.cli.terminal import console
from dynquant.errors import EvaluationError, OptionError
from dynquant.evaluation.options import EvalOptions, Scorings, TaskOptions
from dynquant.exporters.options import ExportOptions
from dynquant.options import ENCODERS, Flag, Former, ModelPath, Only, Options, Writes
from dynquant.planning.options import PlanOptions, SearchOptions
from dynquant.planning.target import Target
from dynquant.session import Session
from dynquant.storage.atomic import write_atomically
from dynquant.storage.file_names import STATS_NAME, files_beside, files_of_plan, path_beside

if TYPE_CHECKING:
    from dynquant.checkpoints.model import Model
    from dynquant.evaluation.report import EvalReport

PLAN_PREFIX = "plan at "
BASE, TUNED = "ggml", "+tune"

Keep = Annotated[bool, Flag("Keep the exported files.")]


def _in_comparison(output: Path, typed: Mapping[str, Any]) -> list[Path]:
    files = [
        output / _file_name(f"{prefix}{recipe}")
        for prefix in ("", PLAN_PREFIX)
        for recipe in typed["presets"].split(",")
    ]
    return [*files, output / "compare.json", output / "compare.md", *files_of_plan(output / "plan")]


def _in_comparison_of_encoders(output: Path, typed: Mapping[str, Any]) -> list[Path]:
    encoders = {variant.removesuffix(TUNED) for variant in typed["variants"].split(",")}
    variants = sorted(f"{encoder}{tuned}" for encoder in encoders for tuned in ("", TUNED))  # a tuned one is from both
    names = product(typed["presets"].split(","), variants)
    stats, files = output / STATS_NAME, [output / f"{recipe}-{variant}.gguf" for recipe, variant in names]
    return [*files, output / "encoders.json", output / "encoders.md", stats, *files_beside(stats)]


def _file_name(name: str) -> str:
    """Return the name of the file of a row of a comparison."""
    return f"{name.replace(' ', '-')}.gguf"


_COMPARISON = Writes("folder", beside=_in_comparison)
_ENCODERS = Writes("folder", beside=_in_comparison_of_encoders)


_TASKS = ("kl", "ppl", "mmlu")
"""Tasks of `eval` whose results have columns here."""
_ASKED = Only(("text", "tasks", "max_tokens", "mmlu_data", "shots", "limit", "scoring"))


@dataclass(frozen=True, kw_only=True)
class RecipeTasks(TaskOptions):
    """Inputs that recipes are compared on: text and questions, no pictures."""

    tasks: Annotated[tuple[str, ...], Flag("Any of kl, ppl, mmlu.", choices=_TASKS)] = ("kl", "ppl")
    max_tokens: Annotated[
        int, Flag("Tokens of each --text; --tokens are those of calibration.", min=2, is_tokens=True)
    ] = 8192


@dataclass(frozen=True, kw_only=True)
class EncoderTasks(RecipeTasks):
    """Inputs that encoders are compared on."""

    tasks: Annotated[tuple[str, ...], Flag("Any of kl, ppl, mmlu.", choices=_TASKS)] = ("kl",)
    scoring: Scorings = ("letter",)


@dataclass(frozen=True, kw_only=True)
class CompareOptions(Options):
    """Recipes that are measured, each with the planner at its bytes."""

    model: ModelPath
    recipes: Annotated[tuple[str, ...], Flag("As llama-iq1_s,r1-iq1_s.", ("--presets",)), Former("--recipes")]
    output: Annotated[Path, Flag("Directory for results and the shared plan.", ("-o", "--output")), _COMPARISON]
    asked: Annotated[RecipeTasks, _ASKED] = field(default_factory=RecipeTasks)
    calibration: Annotated[CalibrationOptions, Only(("text", "tokens"))] = field(default_factory=CalibrationOptions)
    encoder: Annotated[str, Flag("ggml, or dynquant (slower; without its closing pass).", choices=ENCODERS)] = "ggml"
    select: Annotated[bool, Flag("Price plans by the Fisher probe and select each by KL, as plan --select.")] = False
    keep: Keep = False

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_some(self.recipes)
        self.asked.check_text()


_VARIANTS = tuple(f"{encoder}{tuned}" for encoder in ENCODERS for tuned in ("", TUNED))


@dataclass(frozen=True, kw_only=True)
class CompareEncodersOptions(Options):
    """Recipes that are measured under each encoder, with and without the closing pass."""

    model: ModelPath
    recipes: Annotated[
        tuple[str, ...], Flag("As r1-iq1_s,experts-q2_k,uniform-iq2_xxs.", ("--presets",)), Former("--recipes")
    ]
    output: Annotated[Path, Flag("Directory for results and statistics.", ("-o", "--output")), _ENCODERS]
    asked: Annotated[EncoderTasks, _ASKED] = field(default_factory=EncoderTasks)
    calibration: Annotated[CalibrationOptions, Only(("text", "tokens", "hessians"))] = field(
        default_factory=CalibrationOptions
    )
    tune: Annotated[int, Flag("Tokens of the closing pass at most.", min=0, is_tokens=True)] = 131072
    variants: Annotated[tuple[str, ...], Flag("Encoders, each also with +tune.", choices=_VARIANTS)] = (
        BASE,
        "dynquant",
        "dynquant+tune",
    )
    keep: Keep = False

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_some(self.recipes)
        self.asked.check_text()


def compare(options: CompareOptions, session: Annotated[Session, Only(("threads",))]) -> None:
    """Measure recipes side by side, and the planner at the bytes of each.

    Example: dynquant compare ./model --presets llama-iq1_s,r1-iq1_s --text held-out.txt -o comparison/
    """
    from dynquant.families.open import open_model

    results = _Results(options.output / "compare.json", options, session)
    _check_readable(options, open_model(options.model))
    for recipe in options.recipes:
        size = _measure_plan(recipe, Target(preset=recipe), options, results)
        _measure_plan(f"{PLAN_PREFIX}{recipe}", Target(size=str(size)), options, results)
    results.show(recipe_table)


def compare_encoders(options: CompareEncodersOptions, session: Annotated[Session, Only(("device", "threads"))]) -> None:
    """Measure encoders side by side: the same types and statistics, so the same bytes.

    Example: dynquant compare-encoders ./model --presets r1-iq1_s,experts-q2_k --text held-out.txt -o encoders/
    """
    from dynquant.calibration.stage import statistics_at
    from dynquant.exporters.closing_pass import check_can_tune
    from dynquant.families.open import open_and_announce

    results = _Results(options.output / "encoders.json", options, session)
    stats, model = options.output / STATS_NAME, open_and_announce(options.model, session)
    _check_readable(options, model)
    if options.tune and any(variant.endswith(TUNED) for variant in options.variants):
        check_can_tune(model, options.tune, options.calibration, session.seed)
    statistics_at(stats, model, options.calibration, session)
    for recipe in options.recipes:
        for encoder in dict.fromkeys(variant.removesuffix(TUNED) for variant in options.variants):
            _measure_encoder(recipe, encoder, stats, options, results)
            if not options.keep:
                for tuned in ("", TUNED):
                    (options.output / f"{recipe}-{encoder}{tuned}.gguf").unlink(missing_ok=True)
    results.show(encoder_table)


def _check_some(recipes: tuple[str, ...]) -> None:
    if not any(recipes):
        raise OptionError("--presets names none; give some, as llama-iq1_s,uniform-q4_k.")


def _check_readable(options: CompareOptions | CompareEncodersOptions, model: "Model") -> None:
    """Refuse presets that are none, and texts or questions that cannot be read, before anything long runs."""
    from dynquant.evaluation.evaluate import check_readable
    from dynquant.recipes.presets import preset_types

    for recipe in options.recipes:
        preset_types(recipe, model)
    check_readable(options.asked)


class _Results:
    """Rows of a comparison by name, written to `path` after every file."""

    def __init__(self, path: Path, options: CompareOptions | CompareEncodersOptions, session: Session) -> None:
        from pydantic import TypeAdapter, ValidationError  # here, since `--help` imports this module

        from dynquant.storage.documents import first_fault

        rows = TypeAdapter(dict[str, dict[str, Any]])
        try:
            self.rows = rows.validate_json(path.read_bytes()) if path.is_file() else {}
        except ValidationError as error:
            raise EvaluationError(
                f"{path} is no table of an earlier comparison ({first_fault(error)}). Remove it, or choose "
                "another output."
            ) from error
        self.session = session
        self._path, self._options, self._settings = path, options, _settings(options)
        for name, row in self.rows.items():
            settings = dict(row.get("settings", {}))  # none in files of earlier versions; tasks may be added later
            same = {option: (None, [], value) for option, value in self._settings.items()}
            if others := sorted(option for option in settings.keys() & same if settings[option] not in same[option]):
                raise OptionError(
                    f"`{name}` in {path} was measured with other {' and '.join(others)}. Repeat those, or give another "
                    "--output."
                )

    @property
    def asked(self) -> set[str]:
        """Names of what is measured: tasks, and for questions the ways of scoring them."""
        tasks = {*self._options.asked.tasks}
        return tasks - {"mmlu"} | ({*self._options.asked.scoring} if "mmlu" in tasks else set())

    def export(self, file: Path, encoder: str, **types: Any) -> None:
        """Write a file without the closing pass; `types` are the options that decide them."""
        from dynquant.exporters.stage import export

        options = ExportOptions(model=self._options.model, output=file, encoder=encoder, tune=0, **types)
        print_exported(export(options, self.session))

    def score(self, file: Path) -> "EvalReport":
        """Compare a file with its original, whose own answers are kept beside the results."""
        from dynquant.evaluation.evaluate import evaluate

        asked, cache = self._options.asked, self._path.parent / "reference"
        options = EvalOptions(candidate=str(file), reference=self._options.model, asked=asked, reference_cache=cache)
        return evaluate(options, replace(self.session, device=None))

    def record(self, name: str, row: dict[str, Any]) -> None:
        self.rows[name] = row | {"settings": self._settings}
        write_atomically(self._path, json.dumps(self.rows, indent=1) + "\n")

    def show(self, table: Callable[[dict[str, dict[str, Any]]], str]) -> None:
        """Write the Markdown table and print it."""
        text = table(self.rows)
        write_atomically(self._path.with_suffix(".md"), text)
        console.say(text)


def _settings(options: CompareOptions | CompareEncodersOptions) -> dict[str, Any]:
    """Return options and values of all that decides the numbers of a row."""
    from dynquant.storage.documents import recorded_settings  # here, since `--help` imports this module

    is_tuned = any(variant.endswith(TUNED) for variant in getattr(options, "variants", ()))
    others = {"--presets", "--output", "--keep", "--variants", "--tasks", "--scoring"}
    return recorded_settings(options, others if is_tuned else {*others, "--tune"})


def _measure_plan(name: str, target: Target, options: CompareOptions, results: _Results) -> int:
    """Plan, export and score one recipe unless its row is there; return the file's bytes."""
    from dynquant.planning.stage import make_plans

    row = results.rows.get(name, {"measured": [], "metrics": {}})
    if name in results.rows and results.asked <= {*row["measured"]}:
        return row["bytes"]
    console.note(name)
    folder, search = options.output / "plan", SearchOptions(select=options.select and target.preset is None)
    calibration = replace(options.calibration, hessians="activations" if options.encoder == "dynquant" else "none")
    (plan,) = make_plans(
        PlanOptions(
            model=options.model,
            output=folder,
            target=target,
            calibration=calibration,
            encoder=options.encoder,
            search=search,
        ),
        (target,),
        results.session,
    )
    file = options.output / _file_name(name)
    path = folder / f"{file.stem}.plan.json"
    plan.save(path)
    results.export(file, options.encoder, plan=path)

    report = results.score(file)
    size = {"bytes": plan.predicted_bytes, "bits_per_weight": plan.bits_per_weight}
    facts = {"plan_hash": plan.hash, "histogram": plan.histogram(), "reference": report.reference.name}
    measured = {"measured": sorted({*row["measured"], *results.asked}), "metrics": row["metrics"] | metrics_of(report)}
    results.record(name, size | facts | measured)
    if not options.keep:
        file.unlink()
    return plan.predicted_bytes


def _measure_encoder(
    recipe: str, encoder: str, stats: Path, options: CompareEncodersOptions, results: _Results
) -> None:
    """Export once, measure, tune that file, and measure again; whatever is not there yet."""
    plain = options.output / f"{recipe}-{encoder}.gguf"
    for variant in (encoder, f"{encoder}{TUNED}"):
        is_tuned, name = variant != encoder, f"{recipe} {variant}"
        if variant not in options.variants or name in results.rows or (is_tuned and options.tune <= 0):
            continue
        if not plain.is_file():
            console.note(f"{recipe} {encoder}")
            results.export(plain, encoder, preset=recipe, stats=stats)
        file = _tuned(plain, encoder, stats, options, results.session) if is_tuned else plain
        report = results.score(file)
        facts = {"recipe": recipe, "variant": variant, "bytes": file.stat().st_size, "metrics": metrics_of(report)}
        kl_blocks = {text.name: list(text.kl.block_sums) for text in report.texts if text.kl}
        results.record(name, facts | {"kl_blocks": kl_blocks})


def _tuned(plain: Path, encoder: str, stats: Path, options: CompareEncodersOptions, session: Session) -> Path:
    """Write the file again after the closing pass, on the tokens of the second moments."""
    from dynquant.calibration.second_moments import SecondMoments
    from dynquant.exporters.closing_pass import tune_file
    from dynquant.exporters.tuning.training import TuneOptions
    from dynquant.families.open import open_and_announce

    windows = SecondMoments.load(path_beside(stats)).tokens
    model = open_and_announce(options.model, session)
    output = plain.with_name(f"{plain.stem}{TUNED}.gguf")
    tuning = TuneOptions(tokens=options.tune)
    return tune_file(model, plain, windows, tuning, output, session, encoder=encoder).files[0]


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
        label, sides = f"{result.scoring} ({result.questions} questions)", (result.reference, result.candidate)
        before, after = (side.accuracy for side in sides)
        paired = {"reference": before.value, "mcnemar_p": result.mcnemar_p}
        metrics[f"{label} accuracy"] = after.model_dump() | paired
        before, after = (side.right_probability_among_choices for side in sides)
        metrics[f"{label} P(right)"] = after.model_dump() | {"reference": before.value}
    return metrics


def recipe_table(rows: dict[str, dict]) -> str:
    """Return one line a recipe, smallest file first, with 95 % intervals."""
    from dynquant.evaluation.report import markdown  # here, since `--help` imports this module

    columns = list(dict.fromkeys(column for row in rows.values() for column in row["metrics"]))
    lines = []
    for name, row in sorted(rows.items(), key=lambda item: (item[1]["bytes"] // 20_000, item[0])):
        shown = f"**{name}**" if name.startswith(PLAN_PREFIX) else name
        cells = [_cell(row["metrics"].get(column), is_kl=column.startswith("KL ")) for column in columns]
        lines.append([shown, f"{row['bytes']:,}", f"{row['bits_per_weight']:.3f}", *cells])
    return markdown(["recipe", "bytes", "bpw", *columns], lines)


def _cell(metric: dict | None, *, is_kl: bool) -> str:
    from dynquant.evaluation.statistics import shown_kl

    if metric is None:
        return ""
    shown = shown_kl if is_kl else "{:.3f}".format
    interval = f" [{shown(metric['low'])}, {shown(metric['high'])}]" if "low" in metric else ""
    return f"{shown(metric['value'])}{interval}"


def encoder_table(rows: dict[str, dict]) -> str:
    """Return one line a file; changes of KL are against ggml's file of the same recipe, with paired 95 % intervals."""
    from dynquant.evaluation.report import markdown  # here, since `--help` imports this module
    from dynquant.evaluation.statistics import shown_kl

    texts = list(dict.fromkeys(name for row in rows.values() for name in row["kl_blocks"]))
    names = dict.fromkeys(name for row in rows.values() for name in row["metrics"])
    others = [name for name in names if name.endswith(("accuracy", "P(right)"))]
    lines = []
    for row in rows.values():
        base, metrics = rows.get(f"{row['recipe']} {BASE}"), row["metrics"]
        cells = [row["recipe"], f"{row['bytes']:,}", row["variant"]]
        for text in texts:
            cells += [shown_kl(metrics[f"KL {text}"]["value"]), _change(row, base, text)]
            cells.append(f"{100 * metrics[f'top-1 {text}']['value']:.1f}")
        lines.append(cells + [f"{100 * metrics[name]['value']:.1f}" if name in metrics else "" for name in others])
    columns = [part for text in texts for part in (f"KL {text}", "change", "top-1 %")]
    return markdown(["recipe", "bytes", "encoder", *columns, *others], lines)


def _change(row: dict, base: dict | None, text: str) -> str:
    if base is None or row is base:
        return ""
    import numpy as np

    from dynquant.evaluation.statistics import bootstrap_ratio

    ratio = bootstrap_ratio(np.array(row["kl_blocks"][text]), np.array(base["kl_blocks"][text]))
    shown = (f"{100 * (value - 1):+.1f}" for value in (ratio.value, ratio.low, ratio.high))
    return "{} % [{}, {}]".format(*shown)
