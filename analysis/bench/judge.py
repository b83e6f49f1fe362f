"""Methods against today's default at the same bytes: the one command behind reports/damage.md.

    python -m dynquant.analysis.bench.judge -o DIR --report reports/damage.md --model M --model N \
        --calibration calibration.jsonl --text heldout.jsonl --text other.txt --questions test.jsonl --shots dev.jsonl

A method is flags of `plan` and `export` (methods.toml beside this file, or `--methods FILE`). Each is planned at the
bytes of every stock recipe, exported, and scored in memory against the original. Methods share the calibration, the
blocks that plans were tried with, the plan where they add no flags of `plan`, and the file before the closing pass
where they differ in that alone. What is there already (plans, files, rows) is not made again, unless the flags, the
texts or the model of a row are others. Runs with other models or questions add to the report of the same DIR.
"""

import fcntl
import hashlib
import json
import os
import shlex
import shutil
import sys
import time
import tomllib
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import product
from multiprocessing import get_context
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import typer

from dynquant.cli.compare import markdown, metrics_of
from dynquant.cli.terminal.parameters import command_class, from_options
from dynquant.encoding.store import ENCODED_NAME
from dynquant.errors import DynquantError, OptionError
from dynquant.evaluation.evaluate import evaluate
from dynquant.evaluation.options import EvalOptions, QuestionOptions
from dynquant.evaluation.reference_cache import model_fingerprint
from dynquant.evaluation.statistics import Estimate, bootstrap_ratio, compare_paired
from dynquant.exporters.options import ClosingPassOptions, ExportOptions
from dynquant.exporters.stage import export
from dynquant.families.open import locate_model, open_model
from dynquant.kernels.bench.harness import device_name, options
from dynquant.planning.options import PlanOptions
from dynquant.planning.stage import make_plan
from dynquant.recipes.build_plan import plan_from_types
from dynquant.recipes.presets import preset_types
from dynquant.resources import chosen_device
from dynquant.session import Session
from dynquant.storage.atomic import file_hash, write_atomically
from dynquant.storage.file_names import PLAN_NAME, STATS_NAME, SUPER_NAME

RECIPES = "llama-iq1_s,llama-iq2_xxs,llama-q2_k,r1-iq1_s,llama-q4_k_m"
DEFAULT, STOCK = "default", "stock"
SAME_BYTES = 1e-3
_SECONDS_NAME = "seconds.json"
_MARK = "<!-- What follows is written by dynquant.analysis.bench.judge. -->\n"


class Method(NamedTuple):
    """Words of the command line, beside model, size and files."""

    name: str
    plan: tuple[str, ...]
    export: tuple[str, ...]


@dataclass(frozen=True, kw_only=True)
class Judged:
    """One model, and all that its methods share."""

    model: str
    folder: Path
    recipes: Mapping[str, int]
    """Stock recipes and their bytes."""
    calibration: tuple[str, ...]
    """Words for `plan`."""
    questions: QuestionOptions
    runner: str
    device: str | None
    threads: int
    settings: Mapping[str, Any]
    """Identity of model, texts and questions."""

    def plan_options(self, method: Method) -> PlanOptions:
        words = (*self.calibration, *method.plan)
        return parsed(PlanOptions, (self.model, "-o", str(self.folder / f"plan-{_digest(words)}"), *words))

    def planned(self, method: Method, recipe: str) -> Path:
        return self.folder / f"{self.plan_options(method).output.name}-{recipe}"

    def row_settings(self, method: Method) -> dict[str, Any]:
        """Return what a row depends on; another makes it stale."""
        return {**self.settings, "plan": list(method.plan), "export": list(method.export)}


class Row(NamedTuple):
    """A method at the bytes of a recipe, on its way to being measured."""

    judged: Judged
    recipe: str
    method: Method
    stats: Path

    @property
    def name(self) -> str:
        return f"{self.recipe} {self.method.name}"

    def export_options(self) -> ExportOptions:
        judged, output = self.judged, self.judged.folder / f"{self.recipe}-{self.method.name}.gguf"
        if self.method.name == STOCK:
            types = ("--preset", self.recipe)
        else:
            types = ("--plan", str(judged.planned(self.method, self.recipe) / PLAN_NAME))
        words = (judged.model, "-o", str(output), "--stats", str(self.stats), *types, *self.method.export)
        return parsed(ExportOptions, words)


def main() -> None:
    """Parse, measure what is missing, write the report."""
    asked = options(
        __doc__, model=[], output=(Path("judge"), "Plans, files and rows, a folder a model."),
        report=(str, "The Markdown file; what stands in it before the judge's mark stays. Default: in the output."),
        methods=(str(Path(__file__).with_name("methods.toml")), "Flags by method."),
        only=("", "Methods to measure, as default,routers; all without any."),
        recipes=(RECIPES, "Stock recipes whose bytes are taken."),
        calibration=(str, "Text; the built-in one without any."), tokens=(131072, "Tokens of calibration."),
        text=([], "Text that files are scored on."), score=(16384, "Tokens of each text."),
        questions=(str, "Multiple-choice questions."), shots=(str, "Examples for them."),
        limit=(0, "Questions at most."), runner=("transformers", "What runs the files; or llama.cpp."),
        device=(str, "cpu or cuda."), side_by_side=(0, "Rows at a time; a quarter of the cores with a GPU, else one."),
    )  # fmt: skip
    methods = read_methods(Path(asked.methods), [name for name in asked.only.split(",") if name])
    tasks = ("kl", "mmlu") if asked.questions else ("kl",)
    questions = QuestionOptions(
        text=tuple(map(Path, asked.text)), tasks=tasks, max_tokens=asked.score, mmlu_data=asked.questions,
        shots=asked.shots, limit=asked.limit, scoring=("letter",),
    )  # fmt: skip
    questions.check_text()
    cores, on_gpu = len(os.sched_getaffinity(0)), chosen_device(asked.device) != "cpu"
    at_once = asked.side_by_side or (max(1, cores // 4) if on_gpu else 1)
    calibration = ("--tokens", str(asked.tokens), *(("--calibration", asked.calibration) if asked.calibration else ()))
    files = [*asked.text, asked.questions, asked.shots, asked.calibration]
    settings = {"texts": [file_hash(Path(file)) for file in files if file], "runner": asked.runner}
    settings |= {"score": asked.score, "tokens": asked.tokens, "limit": asked.limit}
    for model in asked.model:
        path = locate_model(model)
        judged = Judged(
            model=model, folder=asked.output / path.name.removesuffix(".gguf"), calibration=calibration,
            recipes=_stock_bytes(path, asked.recipes.split(",")), questions=questions, runner=asked.runner,
            device=asked.device, threads=max(1, cores // at_once),
            settings=settings | {"model": model_fingerprint(path)},
        )  # fmt: skip
        judge(judged, methods, at_once)
    report = Path(asked.report) if asked.report else asked.output / "damage.md"
    before = report.read_text().partition(_MARK)[0] if report.is_file() else "# Damage by method, at the same bytes\n\n"
    write_atomically(report, f"{before}{_MARK}\n{report_of(asked.output)}")
    print(f"{report} has the table")


def read_methods(path: Path, only: Sequence[str] = ()) -> list[Method]:
    """Return the methods of a file, the default first and llama.cpp's mixture behind it. Raises OptionError: a method
    that is not there, or a flag that no command has."""
    tables = tomllib.loads(path.read_text())
    default = tables.pop(DEFAULT, {})

    def words(table: Mapping[str, Any], command: str) -> tuple[str, ...]:
        parts = [default, *(tables[name] for name in table.get("of", ())), table]
        return tuple(word for part in parts for word in shlex.split(part.get(command, "")))

    methods = [Method(DEFAULT, words({}, "plan"), words({}, "export"))]
    methods.append(Method(STOCK, methods[0].plan, ("--encoder", "ggml", "--tune", "0")))  # by the plan's statistics
    methods += [Method(name, words(table, "plan"), words(table, "export")) for name, table in tables.items()]
    if unknown := {*only} - {method.name for method in methods}:
        raise OptionError(f"{path} has no method {' and '.join(sorted(unknown))}.")
    for method in methods:
        try:
            parsed(PlanOptions, ("model", *method.plan))
            parsed(ExportOptions, ("model", "-o", "file.gguf", *method.export))
        except Exception as error:  # typer's own, which is no public class
            raise OptionError(f"{path}, method {method.name}: {getattr(error, 'message', error)}") from error
    return [method for method in methods if not only or method.name in (DEFAULT, *only)]


def parsed(kind: type, words: Sequence[str]) -> Any:
    """Return the options that a command makes of the words behind its name."""
    taken: list[Any] = []

    def command(options: Any) -> None:
        taken.append(options)

    command.__annotations__["options"] = kind
    function, app = from_options(command), typer.Typer()
    app.command(cls=command_class(function))(function)
    app(args=list(words), standalone_mode=False)
    return taken[0]


def judge(judged: Judged, methods: Sequence[Method], at_once: int) -> None:
    """Measure the rows of a model that are missing, plan by plan; a refusal is entered in the place of a row."""
    path = judged.folder / "rows.json"
    content = json.loads(path.read_text()) if path.is_file() else {"rows": {}}
    rows, tokens = content["rows"], judged.questions.max_tokens
    content |= {"recipes": judged.recipes, "score": tokens, "at_once": at_once, "command": shlex.join(sys.argv[1:])}
    content["device"] = device_name(chosen_device(judged.device))
    shared = judged.plan_options(methods[0])

    def enter(row: Row, measured: dict[str, Any]) -> None:
        rows[row.name] = measured | {"settings": judged.row_settings(row.method)}
        write_atomically(path, json.dumps(content) + "\n")
        print(f"{judged.folder.name} {row.name}: {measured.get('refused') or _in_short(measured)}", flush=True)

    for words in dict.fromkeys(method.plan for method in methods):
        todo = []
        for method, recipe in product((method for method in methods if method.plan == words), judged.recipes):
            row, before = Row(judged, recipe, method, Path()), rows.get(f"{recipe} {method.name}", {})
            if "bytes" in before and before["settings"] == judged.row_settings(method):
                continue
            try:
                todo.append(row._replace(stats=_planned(judged, method, recipe, shared)))
            except DynquantError as refusal:
                enter(row, {"refused": str(refusal)})
        for row in todo[: 1 if at_once > 1 else None]:  # the first one leaves what the original says to the others
            enter(row, _measured(row))
        if at_once > 1 and todo[1:]:
            with ProcessPoolExecutor(at_once, mp_context=get_context("spawn")) as pool:
                futures = {pool.submit(_measured, row): row for row in todo[1:]}
                for future in as_completed(futures):
                    enter(futures[future], future.result())
    write_atomically(path, json.dumps(content) + "\n")


def _planned(judged: Judged, method: Method, recipe: str, shared: PlanOptions) -> Path:
    """Plan a method at a recipe's bytes, unless that was done before; return the statistics behind it."""
    options, folder = judged.plan_options(method), judged.planned(method, recipe)
    stats = (shared if options.calibration == shared.calibration else options).output / STATS_NAME
    if (folder / _SECONDS_NAME).is_file():
        return stats
    work, first = options.output, shared.output / ENCODED_NAME
    if work != shared.output and not (work / ENCODED_NAME).exists():
        for made in (work, first):
            made.mkdir(parents=True, exist_ok=True)
        (work / ENCODED_NAME).symlink_to(first.resolve())
    if stats.is_file() and stats.parent != work:
        options = replace(options, stats=stats)
    start = time.perf_counter()
    target = replace(options.target, size=str(judged.recipes[recipe]))
    make_plan(replace(options, target=target), Session(device=judged.device))
    folder.mkdir(exist_ok=True)
    for name in (PLAN_NAME, SUPER_NAME):
        if (work / name).is_file():
            shutil.copy(work / name, folder)
    write_atomically(folder / _SECONDS_NAME, json.dumps(time.perf_counter() - start))
    return work / STATS_NAME if options.stats is None else stats


def _measured(row: Row) -> dict[str, Any]:
    """Export and score a row; return its figures, or why there are none."""
    judged, notes, seconds = row.judged, list[str](), dict[str, float]()
    torch.set_num_threads(judged.threads)
    session = Session(device=judged.device, threads=judged.threads, note=notes.append)
    if row.method.name != STOCK:
        seconds["plan"] = json.loads((judged.planned(row.method, row.recipe) / _SECONDS_NAME).read_text())
    options = row.export_options()
    try:
        file, seconds["encode"] = _untuned(options, judged.folder, session)
        if options.tune != 0 and options.encoder == "dynquant":
            start = time.perf_counter()
            file = export(options, session, untuned=file).files[0]
            seconds["tune"] = time.perf_counter() - start
        scored = EvalOptions(
            candidate=str(file), reference=judged.model, questions=judged.questions, runner=judged.runner,
            reference_cache=judged.folder / "reference",
        )  # fmt: skip
        report = evaluate(scored, session)
    except DynquantError as refusal:
        return {"refused": str(refusal)}
    finally:
        options.output.unlink(missing_ok=True)
    blocks = {text.name: list(text.kl.block_sums) for text in report.texts if text.kl}
    measured = {"bytes": report.candidate.file_bytes, "metrics": metrics_of(report), "kl_blocks": blocks}
    measured |= {"seconds": seconds, "notes": notes}
    for result in report.multiple_choice:
        pairs = zip(result.candidate.predictions, result.right_answers, strict=True)
        measured["is_right"] = [int(predicted == right) for predicted, right in pairs]
    return measured


def _untuned(options: ExportOptions, folder: Path, session: Session) -> tuple[Path, float]:
    """Export without the closing pass, once for all methods that do not differ before it; return file and seconds."""
    alike = replace(options, output=folder, tune=0, closing=ClosingPassOptions())
    file = folder / f"untuned-{_digest(repr(alike))}.gguf"
    took = file.with_suffix(".json")
    with _waiting_for(file):
        if not took.is_file():
            start = time.perf_counter()
            export(replace(alike, output=file), session)
            write_atomically(took, json.dumps(time.perf_counter() - start))
    return file, json.loads(took.read_text())


@contextmanager
def _waiting_for(file: Path) -> Iterator[None]:
    """Context manager: no other process of the judge makes the file."""
    with file.with_suffix(".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _digest(content: object) -> str:
    return hashlib.sha256(repr(content).encode()).hexdigest()[:8]


def _stock_bytes(path: Path, recipes: Sequence[str]) -> dict[str, int]:
    model = open_model(str(path))
    plans = {name: plan_from_types(model, preset_types(name, model), recipe=name) for name in recipes}
    return {name: plan.predicted_bytes for name, plan in plans.items()}


def _in_short(measured: Mapping[str, Any]) -> str:
    values = [f"{name} {metric['value']:.4f}" for name, metric in measured["metrics"].items() if "KL 99" not in name]
    return f"{measured['bytes']:,} bytes, {', '.join(values)}, {sum(measured['seconds'].values()):.1f} s"


def report_of(folder: Path) -> str:
    """Return the tables of all models that were judged in a folder: methods over all rows, then a table a model."""
    parts = []
    compared: dict[str, list[_Compared]] = {}
    for path in sorted(folder.glob("*/rows.json")):
        content = json.loads(path.read_text())
        rows = content["rows"]
        parts.append(_section(path.parent.name, content))
        for name, row in rows.items():
            recipe, method = name.split()
            base = rows.get(f"{recipe} {DEFAULT}", {})
            if "bytes" in row and "bytes" in base:
                compared.setdefault(method, []).append(_compared(row, base))
    return "\n".join([_summary(compared), *parts])


class _Compared(NamedTuple):
    """A row against the default's at the same bytes."""

    ratios: dict[str, Estimate]
    """By text, of the mean KL."""
    letters: float | None
    """Change of the share of right answers."""
    p: float | None
    seconds: tuple[float, float]


def _compared(row: dict[str, Any], base: dict[str, Any]) -> _Compared:
    ratios = {
        text: bootstrap_ratio(np.array(blocks), np.array(base["kl_blocks"][text]))
        for text, blocks in row["kl_blocks"].items()
        if len(blocks) == len(base["kl_blocks"].get(text, ()))
    }
    letters, p = None, None
    if len(row.get("is_right", ())) == len(base.get("is_right", ())) > 0:
        letters = float(np.mean(row["is_right"]) - np.mean(base["is_right"]))
        p = compare_paired([*map(bool, base["is_right"])], [*map(bool, row["is_right"])])["mcnemar_p"]
    return _Compared(ratios, letters, p, (_total(row), _total(base)))


def _summary(compared: Mapping[str, list[_Compared]]) -> str:
    """Return one line a method: over all models, sizes and texts."""
    lines = []
    for method, sides in compared.items():
        ratios = [ratio for side in sides for ratio in side.ratios.values()]
        letters = [side.letters for side in sides if side.letters is not None]
        if method == DEFAULT or not ratios:
            continue
        values = np.array([ratio.value for ratio in ratios])
        better, worse = sum(ratio.high < 1 for ratio in ratios), sum(ratio.low > 1 for ratio in ratios)
        ours, theirs = np.sum([side.seconds for side in sides], axis=0)
        lines.append(
            [method, str(len(ratios)), _percent(np.exp(np.log(values).mean())), _percent(values.max()), f"{better}",
             f"{worse}", f"{100 * np.mean(letters):+.1f}" if letters else "", f"{100 * min(letters):+.1f}" if letters
             else "", f"{ours / theirs:.2f}"]
        )  # fmt: skip
    return (
        "Against the default at the same bytes, over all models, sizes and texts below: the geometric mean of the "
        "changes of mean\nKL, the worst one, and the numbers of those whose paired 95 % interval lies below and above "
        "none; the change of right\nletters in points; the time of planning, encoding and closing pass as a multiple."
        "\n\n" + markdown(["method", "rows", "KL", "worst", "better", "worse", "letters", "worst", "time"], lines)
    )


def _section(name: str, content: Mapping[str, Any]) -> str:
    rows, recipes, lines, refused = content["rows"], content["recipes"], [], []
    measured = [row for row in rows.values() if "bytes" in row]
    texts = list(dict.fromkeys(text for row in measured for text in row["kl_blocks"]))
    others = list(dict.fromkeys(m for row in measured for m in row["metrics"] if m.endswith(("accuracy", "P(right)"))))
    for recipe, method in product(recipes, dict.fromkeys(name.split()[1] for name in rows)):
        row, base = rows.get(f"{recipe} {method}", {}), rows.get(f"{recipe} {DEFAULT}", {})
        if "refused" in row:
            refused.append(f"{recipe} {method}: {row['refused']}\n")
        if "bytes" not in row:
            continue
        change = row["bytes"] / recipes[recipe] - 1
        cells = [recipe, method, f"{row['bytes']:,}" + f" ({change:+.2%})" * (abs(change) > SAME_BYTES)]
        side = _compared(row, base) if "bytes" in base and method != DEFAULT else None
        for text in texts:
            kl, ratio = row["metrics"][f"KL {text}"], side and side.ratios.get(text)
            cells.append(f"{kl['value']:.4f} [{kl['low']:.4f}, {kl['high']:.4f}]")
            cells.append(f"{_percent(ratio.value)} [{_percent(ratio.low)}, {_percent(ratio.high)}]" if ratio else "")
        for metric in others:
            cells.append(f"{100 * row['metrics'][metric]['value']:.1f}")
            if metric.endswith("accuracy") and side and side.p is not None:
                cells[-1] += f" (p {side.p:.2g})"
        lines.append([*cells, f"{_total(row):.1f}"])
    titles = [title for text in texts for title in (f"KL {text}", "change")]
    before = [f"{metric} {100 * row['metrics'][metric]['reference']:.1f}" for row in measured[:1] for metric in others]
    return (
        f"## {name}\n\n```\npython -m dynquant.analysis.bench.judge {content['command']}\n```\n\n"
        f"{content['score']:,} tokens of each text, {content['device']}, {content['at_once']} rows side by side. "
        f"{'The original: ' + ', '.join(before) + '. ' if before else ''}Seconds are those of planning, encoding and "
        "closing\npass; the first recipe's include calibration and error table. Changes are paired with the default's "
        "row; p is McNemar's.\n\n"
        + markdown(["recipe", "method", "bytes", *titles, *others, "s"], lines)
        + "".join(f"\nNot measured: {reason}" for reason in refused)
    )


def _total(row: Mapping[str, Any]) -> float:
    return sum(row["seconds"].values())


def _percent(ratio: float) -> str:
    return f"{100 * (ratio - 1):+.1f} %"


if __name__ == "__main__":
    main()
