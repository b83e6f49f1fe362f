"""`dynquant eval`, and its tables."""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from dynquant.cli.terminal import console
from dynquant.evaluation.options import EvalOptions
from dynquant.options import Flag, Former, Only, Options, Writes
from dynquant.session import Session
from dynquant.storage.atomic import write_atomically
from dynquant.storage.file_names import PLAN_NAME, REPORT_NAME

if TYPE_CHECKING:
    from dynquant.evaluation.report import EvalReport, PictureReport


@dataclass(frozen=True, kw_only=True)
class ResultOptions(Options):
    """The file of a result."""

    output: Annotated[
        Path | None,
        Flag("Also write the result to this JSON file.", ("-o", "--output")),
        Writes(ending=".json"),
        Former("--json"),
    ] = None


def evaluate(
    options: EvalOptions,
    session: Annotated[Session, Only(("device", "threads", "seed"))],
    result: ResultOptions,
) -> None:
    """Compare a quantized model with its original: KL divergence, perplexity, multiple choice; before and after.

    Example: dynquant eval model.gguf --reference ./model --tasks kl,ppl,mmlu --text held-out.txt --mmlu-data test.jsonl

    Example: dynquant eval model.gguf --reference ./model --tasks gsm8k,ifeval --chat --limit 200

    Example: dynquant eval plan/ --reference ./vision-model --tasks kl,vqa --data questions.jsonl

    Example: dynquant eval model.gguf --reference ./vision-model --tasks kl,vqa --data questions.jsonl
    """
    from dynquant.evaluation.evaluate import evaluate as compare

    report = compare(options, session)
    print_report(report)
    if result.output is not None:
        write_atomically(result.output, report.to_json())
        console.note(f"wrote {result.output}")
    candidate = Path(options.candidate)
    directory = candidate if candidate.is_dir() else candidate.parent
    if all((directory / name).is_file() for name in (REPORT_NAME, PLAN_NAME)):
        from dynquant.analysis.report.stage import write_plan_report

        write_plan_report(options.reference, directory, session, measured=_section(report))


def _section(report: "EvalReport | PictureReport") -> str:
    """Return the part of report.html that shows what was measured."""
    from dynquant.analysis.report.pictures import picture_section
    from dynquant.analysis.report.tables import evaluation_table
    from dynquant.evaluation.report import PictureReport

    if not isinstance(report, PictureReport):
        return evaluation_table(report_tree(report))
    answers = report.questions.answers if report.questions else ()
    return picture_section(report.rows(), f"{report.samples} samples of {report.data}", answers)


def print_report(report: "EvalReport | PictureReport") -> None:
    """Show the before/after table, one block a text or question set, and the notes."""
    console.print_table(report.title, ("", "reference", "candidate", "comparison"), report.rows())
    for line in report.notes:
        console.note(line)


def report_tree(report: "EvalReport") -> dict[str, dict[str, str]]:
    """Return section -> metric -> what the table says, for report.html."""

    def words(*sides: str, comparison: str) -> str:
        return "; ".join(part for part in (" to ".join(filter(None, sides)), comparison) if part)

    return {
        section: {metric: words(before, after, comparison=note) for metric, before, after, note in rows}
        for section, rows in report.sections().items()
    }
