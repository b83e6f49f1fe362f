"""Report of a real model: what plans and llama.cpp's mixtures of the same bytes lose of its text and its answers.

    .ci/judge-models models
    python -m dynquant.analysis.bench.model_report -o DIR --report reports/NAME.md --model models/NAME.gguf \
        --calibration calibration.jsonl --text heldout.jsonl --text other.txt --questions mmlu.jsonl --prompts 64

Flags are those of `judge`, which measures the methods `default` and `stock` here and goes on after a stop. The report
has divergences, answers with those lost and won by subject, what both write, super weights, and plots beside it.
"""

import json
from argparse import Namespace
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import NamedTuple

import numpy as np

from dynquant.analysis.bench.judge import (
    DEFAULT,
    STOCK,
    Judged,
    judge_options,
    judged_models,
    read_methods,
    write_report,
)
from dynquant.analysis.errors.table import ErrorTable
from dynquant.analysis.outliers.options import SuperWeightOptions
from dynquant.analysis.outliers.stage import look_for_super_weights
from dynquant.analysis.plots import style
from dynquant.analysis.plots.errors import draw_errors
from dynquant.analysis.plots.super_weights import draw_super_weights
from dynquant.calibration.statistics import CalibrationStats
from dynquant.evaluation.report import ChoiceScores, EvalReport, markdown
from dynquant.evaluation.statistics import Estimate, bootstrap_ratio, compare_paired, shown_kl
from dynquant.families.open import open_model
from dynquant.recipes.folder import load_super_weights
from dynquant.recipes.plan import Plan
from dynquant.session import Session
from dynquant.storage.atomic import write_atomically
from dynquant.storage.file_names import ERRORS_NAME, PLAN_NAME, STATS_NAME, SUPER_NAME

_CHANCE = 1 / 4  # of MMLU's four choices
SIDES = {DEFAULT: "dynquant", STOCK: "llama.cpp"}
_LOOKS = {DEFAULT: style.Look(style.VERMILION, "o", "-"), STOCK: style.Look(style.BLUE, "^", "--")}


class Row(NamedTuple):
    """A file of a recipe's bytes."""

    recipe: str
    method: str
    report: EvalReport

    @property
    def labels(self) -> list[str]:
        return [self.recipe, SIDES[self.method]]

    @property
    def size(self) -> int:
        return self.report.candidate.file_bytes

    def is_right(self, number: int) -> list[bool]:
        """Return which answers of one scoring are right."""
        asked = self.report.multiple_choice[number]
        return [said == right for said, right in zip(asked.candidate.predictions, asked.right_answers, strict=True)]


def main() -> None:
    """Have the rows judged, then write report and plots."""
    asked = judge_options(__doc__, super_tokens=(2048, "Tokens that super weights are looked for on."))
    asked.only = ",".join(SIDES)
    methods = read_methods(Path(asked.methods), [*SIDES])
    for judged in judged_models(asked):
        rows = [
            Row(recipe, method.name, EvalReport.model_validate_json(path.read_bytes()))
            for recipe in judged.recipes
            for method in methods
            if (path := judged.report_path(recipe, method)).is_file()
        ]
        if rows:
            report = Path(asked.report or asked.output / f"{judged.folder.name}.md")
            write_report(asked, report.name, judged.folder.name, _content(judged, rows, report, asked))


def _content(judged: Judged, rows: Sequence[Row], report: Path, asked: Namespace) -> str:
    """Return the report, whose plots are written beside it."""
    measured = json.loads((judged.folder / "rows.json").read_text())
    folder = judged.plan_options(read_methods(Path(asked.methods))[0]).output
    weights = open_model(judged.model).num_weights
    plots = report.with_suffix("")
    shown = [f"![{headline}]({plots.name}/{name}.svg)\n" for name, headline in _plots(rows, folder, plots, weights)]
    missing = [name for name, row in measured["rows"].items() if "refused" in row]
    parts = [
        f"```\npython -m dynquant.analysis.bench.model_report {measured['command']}\n```\n",
        f"{measured['device']}, {measured['at_once']} rows side by side. The original has {weights:,} weights and "
        f"{rows[0].report.reference.file_bytes:,} bytes.\n",
        *(f"Not measured: {name}: {measured['rows'][name]['refused']}\n" for name in missing),
        "## Divergence and answers\n",
        _divergences(rows, weights),
        *shown[:1],
        *(part for number in range(len(rows[0].report.multiple_choice)) for part in _answers(rows, number)),
        *(["## What they write\n", *_written(rows)] if rows[0].report.generated else ()),
        "## Super weights and errors\n",
        _super_weights(judged, str(judged.asked.text[0]), asked.super_tokens),
        *shown[1:],
    ]
    return "\n".join(parts)


def _divergences(rows: Sequence[Row], weights: int) -> str:
    """Return a line a file: its divergence from the original on each text, and against the other side's file."""
    texts = [text.name for text in rows[0].report.texts]
    titles = [title for name in texts for title in (f"KL {name}", "% of llama.cpp's", "top-1 %")]
    lines = []
    for row in rows:
        cells = [*row.labels, f"{row.size:,}", f"{8 * row.size / weights:.2f}"]
        other = _stock(rows, row)
        for text, base in zip(row.report.texts, other.report.texts, strict=True):
            ratio = bootstrap_ratio(np.array(text.kl.block_sums), np.array(base.kl.block_sums))
            cells += [text.kl.mean.shown(shown_kl), "" if row is other else _percent(ratio)]
            cells.append(_percent(text.kl.top1_agreement))
        lines.append(cells)
    tokens = ", ".join(f"{text.scored_tokens:,} of {text.name}" for text in rows[0].report.texts)
    note = (
        f"Scored: {tokens}. KL in nats per token; intervals are of 95 %, those of shares of llama.cpp's KL paired.\n\n"
    )
    return note + markdown(["bytes of", "made by", "bytes", "bits", *titles], lines)


def _answers(rows: Sequence[Row], number: int) -> Iterator[str]:
    """Yield the table of right answers under one scoring, and the one by subject."""
    asked = rows[0].report.multiple_choice[number]
    before = asked.reference.accuracy
    lines = []
    for row in rows:
        result, other = row.report.multiple_choice[number], _stock(rows, row)
        accuracy = result.candidate.accuracy
        kept = (accuracy.value - _CHANCE) / (before.value - _CHANCE) if before.low > _CHANCE else float("nan")
        lost, won = result.only_reference_right, result.only_candidate_right
        cells = [
            *row.labels,
            _percent(accuracy),
            f"{lost:,}",
            f"{won:,}",
            f"{result.mcnemar_p:.2g}",
            f"{kept:.0%}".replace("nan%", ""),
        ]
        cells += [_chosen(result.candidate), f"{100 * result.same_prediction:.1f}"]
        if row is not other:
            paired = compare_paired(other.is_right(number), row.is_right(number))
            only = paired["only_candidate_right"], paired["only_reference_right"]
            cells.append(f"+{only[0]:,} -{only[1]:,} (p {paired['mcnemar_p']:.2g})")
        lines.append([*cells, *[""] * (10 - len(cells))])
    columns = ["bytes of", "made by", "right %", "lost", "won", "p", "kept", "chosen %", "same answer %"]
    yield (
        f"{asked.questions:,} questions, {asked.scoring} scoring, {rows[0].report.options['num_shots']} shots; the "
        f"original has {_percent(before)} % right\nand chooses the first to last answer in {_chosen(asked.reference)} "
        f"% of them. Lost and won are against it, p is McNemar's; kept is what is left of right\nanswers above chance "
        f"({100 * _CHANCE:.0f} %).\n\n" + markdown([*columns, "against llama.cpp's"], lines)
    )
    yield "### By subject\n\nRight answers of the original, and those that each file lost and won.\n"
    files = [f"{row.recipe.removeprefix('llama-')} {row.labels[1]}" for row in rows]
    subjects = []
    for name, first in sorted(asked.subjects.items(), key=lambda item: -item[1].reference):
        of_files = [row.report.multiple_choice[number].subjects[name] for row in rows]
        changes = [
            "" if each.only_reference_right is None else f"-{each.only_reference_right} +{each.only_candidate_right}"
            for each in of_files
        ]
        subjects.append([name, f"{first.questions}", f"{100 * first.reference:.0f}", *changes])
    yield markdown(["subject", "questions", "right %", *files], subjects)


def _chosen(scores: ChoiceScores) -> str:
    """Return how often each place among the choices was taken, in percent."""
    return " ".join(f"{100 * share:.0f}" for share in np.bincount(scores.predictions) / len(scores.predictions))


def _written(rows: Sequence[Row]) -> Iterator[str]:
    """Yield a table a text of what files write after the same prompts."""
    columns = [
        "bytes of",
        "made by",
        "tokens until they part",
        "median",
        "never part %",
        "loops %",
        "p",
        "ends %",
        "tokens",
    ]
    for number, said in enumerate(rows[0].report.generated):
        before = said.reference
        lines = []
        for row in rows:
            result = row.report.generated[number]
            after = result.candidate
            cells = [result.shared_tokens.shown(".1f"), f"{result.quartiles[1]:.0f}", _percent(result.never_part)]
            cells += [
                _percent(after.loops),
                f"{result.mcnemar_p:.2g}",
                _percent(after.ends),
                f"{after.length.value:.1f}",
            ]
            lines.append([*row.labels, *cells])
        yield (
            f"{said.prompts} starts of {said.name}, {said.prompt_tokens} tokens each, {said.new_tokens} tokens written "
            f"greedily. The original: {_percent(before.loops)} % end in a loop, {_percent(before.ends)} % come to an "
            f"end, {before.length.value:.1f} tokens.\n\n" + markdown(columns, lines)
        )


def _super_weights(judged: Judged, text: str, tokens: int) -> str:
    """Return the table of super weights of the original, which are looked for once."""
    path = judged.folder / "super_weights.json"
    if not path.is_file():
        context = open_model(judged.model).hyper.n_ctx or tokens
        options = SuperWeightOptions(model=judged.model, text=text, tokens=min(tokens, context), min_effect=_MIN_EFFECT)
        search = look_for_super_weights(options, Session(device=judged.device))
        weights = [[weight.model_dump(), effect and effect.model_dump()] for weight, effect in search.weights]
        write_atomically(path, json.dumps(asdict(search) | {"weights": weights}) + "\n")
    search = json.loads(path.read_text())
    lines = []
    for weight, effect in search["weights"]:
        place = f"{weight['name'].removesuffix('.weight')} [{weight['row']}, {weight['col']}]"
        cells = [place, *(f"{weight[name]:.{digits}f}" for name, digits in _DIGITS.items())]
        lines.append([*cells, *(f"{effect[name]:.3f}" for name in _EFFECTS)])
    columns = ["weight", *_DIGITS, "perplexity", "with it zeroed", "with the 1,000 next-largest zeroed"]
    note = (
        "Single weights that make a spike of a down projection, and whose loss changes the log-probabilities of "
        f"{search['num_tokens']:,} tokens of {Path(text).name} by {_MIN_EFFECT} nats or more"
    )
    return f"{note}.\n\n{markdown(columns, lines)}" if lines else f"{note}: none.\n"


_MIN_EFFECT = 0.01  # a tenth of what plans protect a weight for
_DIGITS = {"value": 3, "max_in": 1, "max_out": 1, "effect": 3}
_EFFECTS = ("perplexity", "without_super_weight", "without_next_largest")


def _plots(rows: Sequence[Row], folder: Path, output: Path, weights: int) -> Iterator[tuple[str, str]]:
    """Write plots of the rows and of the smallest plan; yield name and headline of each."""
    plan = next((Plan.load(path) for row in rows if (path := folder / row.recipe / PLAN_NAME).is_file()), None)
    drawings: dict[str, Callable[[], style.Drawn]] = {
        "damage": lambda: _draw_damage(rows, weights),
        "error_by_layer": lambda: draw_errors(ErrorTable.load(folder / ERRORS_NAME), plan, "activation_error"),
        "super_weights": lambda: draw_super_weights(
            plan, CalibrationStats.load(folder / STATS_NAME), load_super_weights(folder / SUPER_NAME).super_weights
        ),
    }
    for name, draw in drawings.items() if plan else [*drawings.items()][:1]:
        with style.plot_settings():
            if (drawn := draw()) is not None:
                style.save_figure(drawn[0], output, name, drawn[1]).png.unlink()
                yield name, drawn[1]


def _draw_damage(rows: Sequence[Row], weights: int) -> style.Drawn:
    """Figure and headline of KL on each text and right answers over bits per weight."""
    texts, asks = rows[0].report.texts, bool(rows[0].report.multiple_choice)
    headline = f"{rows[0].report.reference.name}: what is lost at the same bytes"
    figure = style.new_figure(4.5 * (len(texts) + asks), 3.9, headline, "bars are 95 % intervals", legend_rows=1)
    style.header_legend(figure, [style.legend_line(SIDES[side], **_LOOKS[side].line) for side in SIDES], columns=2)
    panels = [
        (f"KL, {text.name}", lambda row, n=number: row.report.texts[n].kl.mean) for number, text in enumerate(texts)
    ]
    if asks:
        panels.append(("right answers", lambda row: row.report.multiple_choice[0].candidate.accuracy))
    for number, (title, estimate) in enumerate(panels, start=1):
        axes = figure.add_subplot(1, len(panels), number, title=title, xlabel="bits per weight")
        for side, look in _LOOKS.items():
            of_side = sorted((row for row in rows if row.method == side), key=lambda row: row.size)
            values = [estimate(row) for row in of_side]
            bars = [[value.value - value.low for value in values], [value.high - value.value for value in values]]
            bits = [8 * row.size / weights for row in of_side]
            axes.errorbar(bits, [value.value for value in values], bars, elinewidth=0.8, **look.line)
        if title != "right answers":
            axes.set_yscale("log")
            style.number_axis(axes.yaxis)
        else:
            axes.axhline(rows[0].report.multiple_choice[0].reference.accuracy.value, color=style.GREY, linestyle=":")
    return figure, headline


def _stock(rows: Sequence[Row], row: Row) -> Row:
    """Return the mixture of a row's bytes, or the row itself where there is none."""
    return next((other for other in rows if other.recipe == row.recipe and other.method == STOCK), row)


def _percent(share: Estimate) -> str:
    return f"{100 * share.value:.1f} [{100 * share.low:.1f}, {100 * share.high:.1f}]"


if __name__ == "__main__":
    main()
