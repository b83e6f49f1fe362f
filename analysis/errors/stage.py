"""The stage that measures an error table: goes on where an interrupted run stopped, and writes the table at the end."""

from collections.abc import Callable, Mapping
from pathlib import Path

from dynquant import __version__
from dynquant.analysis.errors.error_journal import ErrorJournal
from dynquant.analysis.errors.table import ErrorTable
from dynquant.checkpoints.model import Model
from dynquant.cli.terminal import console
from dynquant.session import Progress


def measure_table(
    output: Path,
    model: Model,
    stats_hash: str,
    identity: Mapping[str, str],
    measure: Callable[[ErrorJournal, Progress], ErrorTable],
) -> ErrorTable:
    """Write the table that `measure` gives.

    `identity` is what decides its numbers beside model, statistics and version; what an interrupted run measured is
    kept only under an equal one.

    Raises:
        PlanError: the journal cannot be written.
    """
    known = {"tool": __version__, "fingerprint": model.fingerprint, "stats": stats_hash}
    with ErrorJournal(output, {**known, **identity}) as journal:
        if journal.num_found:
            console.note(f"going on with the interrupted {output.name}, {journal.num_found} parts of tensors are there")
        with console.stage_progress("Statistics and the errors measured so far are kept.") as progress:
            table = measure(journal, progress)
        table.save(output)
        journal.remove()
    return table
