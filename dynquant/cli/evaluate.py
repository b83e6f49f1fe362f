"""`dynquant eval`, and its tables."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from dynquant.cli.terminal import console
from dynquant.evaluation.options import EvalOptions
from dynquant.options import Only, Writes
from dynquant.session import Session
from dynquant.storage.atomic import write_atomically

if TYPE_CHECKING:
    from dynquant.evaluation.report import EvalReport, PictureReport


def evaluate(
    options: EvalOptions,
    session: Annotated[Session, Only(("device", "threads", "seed"))],
    json_file: Annotated[
        Path | None, typer.Option("--json", help="Also write the result to this file."), Writes()
    ] = None,
) -> None:
    """Compare a quantized model with its original: KL divergence, perplexity, multiple choice; before and after.

    Example: dynquant eval model.gguf --reference ./model --tasks kl,ppl,mmlu --text held-out.txt --mmlu-data test.jsonl

    Example: dynquant eval plan/ --reference ./vision-model --tasks kl,vqa --data questions.jsonl

    Example: dynquant eval model.gguf --reference ./vision-model --tasks kl,vqa --data questions.jsonl
    """
    from dynquant.evaluation.evaluate import evaluate as compare
    from dynquant.evaluation.report import EvalReport

    report = compare(options, session)
    if isinstance(report, EvalReport):
        print_report(report)
        _write(json_file, report.to_json())
        return
    candidate = Path(options.candidate)
    title = f"{candidate} against {report.reference}: {report.samples} samples of {report.data}"
    console.print_table(title, ("", "reference", "candidate", "comparison"), report.rows())
    for reason in report.skipped:
        console.note(f"skipped: {reason}")
    _write(json_file, report.to_json())
    directory = candidate if candidate.is_dir() else candidate.parent
    if (directory / "report.html").is_file() and (directory / "plan.json").is_file():
        _draw_pictures(report, options.reference, directory, session)


def _draw_pictures(report: "PictureReport", reference: str, directory: Path, session: Session) -> None:
    from dynquant.analysis.report.pictures import picture_section
    from dynquant.analysis.report.stage import write_plan_report

    title = f"{report.samples} samples of {report.data}"
    answers = report.questions.answers if report.questions else ()
    write_plan_report(reference, directory, session, measured=picture_section(report.rows(), title, answers))


def _write(json_file: Path | None, text: str) -> None:
    if json_file is not None:
        write_atomically(json_file, text)
        console.note(f"wrote {json_file}")


def print_report(report: "EvalReport") -> None:
    """Show the before/after table, one block a text or question set."""
    from dynquant.evaluation.report import summary_rows

    rows = []
    section = None
    for row in summary_rows(report):
        if row.section != section:
            section = row.section
            rows.append((section, "", "", ""))
        rows.append((f"  {row.metric}", row.reference, row.candidate, row.comparison))
    title = f"{report.candidate.name} against {report.reference.name}"
    console.print_table(title, ("", "reference", "candidate", "comparison"), rows)
    for line in report.notes:
        console.note(line)


def report_tree(report: "EvalReport") -> dict[str, dict[str, str]]:
    """Return section -> metric -> what the table says, for report.html."""
    from dynquant.evaluation.report import summary_rows

    tree: dict[str, dict[str, str]] = {}
    for row in summary_rows(report):
        change = " to ".join(part for part in (row.reference, row.candidate) if part)
        tree.setdefault(row.section, {})[row.metric] = "; ".join(part for part in (change, row.comparison) if part)
    return tree
