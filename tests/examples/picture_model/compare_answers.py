"""Compares the answers of two candidates that `dynquant eval --json` measured on the same pictures, one by one.

    python -m tests.examples.picture_model.compare_answers uniform.json dynamic.json

Prints bytes, KL and exact answers of both, and McNemar's exact test of the questions that only one of them gets right.
"""

import argparse
from pathlib import Path

from dynquant.evaluation.report import PictureReport
from dynquant.evaluation.statistics import mcnemar_exact, only_one
from dynquant.evaluation.tasks.multiple_choice import is_right


def main() -> None:
    """Parse, compare, print."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("reports", type=Path, nargs=2, metavar="FILE")
    first, second = (PictureReport.model_validate_json(path.read_text()) for path in parser.parse_args().reports)
    if first.data_sha256 != second.data_sha256:
        parser.error("the two were measured on different questions")
    for report in (first, second):
        kl, exact = report.kl, report.questions.candidate
        print(
            f"{report.candidate}: {report.candidate_bytes:,} bytes, KL {kl.value:.4f} [{kl.low:.4f}, {kl.high:.4f}], "
            f"{exact.value:.1%} [{exact.low:.1%}, {exact.high:.1%}] exact"
        )
    lost, won = only_one(_right(first), _right(second))
    p = mcnemar_exact(lost, won)
    print(f"only {first.candidate} right: {lost}, only {second.candidate} right: {won}, p = {p:.2g}")


def _right(report: PictureReport) -> list[bool]:
    return [is_right(answer.candidate, answer.right) for answer in report.questions.answers]


if __name__ == "__main__":
    main()
