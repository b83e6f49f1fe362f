"""Analysis: measures what every candidate type does to every tensor, and writes the error table.

A table that is there already is reused, extended by the types that it lacks; an interrupted one goes on.
"""

from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from dynquant import __version__
from dynquant.analysis.errors.measure import ErrorMeter, Measure, Meter, build_error_table, unmeasured_table
from dynquant.analysis.errors.measure_schemes import SchemeMeter, scheme_formats
from dynquant.analysis.errors.options import DEFAULT_TYPES, AnalyzeOptions, TableOptions
from dynquant.analysis.errors.remote import measure_on
from dynquant.analysis.errors.sampling import Sampling
from dynquant.analysis.errors.sums import ErrorJournal, journal_path
from dynquant.analysis.errors.table import ErrorTable
from dynquant.analysis.errors.written import WrittenErrors
from dynquant.calibration.stage import StatsFile
from dynquant.checkpoints.model import Model
from dynquant.encoding.remote import EncoderChoice, StoredFiles
from dynquant.encoding.stream import encoder_version, load_encoder
from dynquant.families.linear_layers import LinearCheckpoint
from dynquant.families.open import open_and_announce
from dynquant.formats.quant_types import quant_type
from dynquant.formats.vllm_schemes import DEFAULT_SCHEMES, SCHEMES
from dynquant.resources import chosen_device
from dynquant.running.cluster import StoredModel, open_ray
from dynquant.session import SILENT, Session
from dynquant.storage.journal import Journal

_FIRST_ROWS_ON_GPU = 512
"""Rows of a tensor that are measured first; encoding a few takes a GPU as long."""


def analyze(options: AnalyzeOptions, session: Session = SILENT) -> ErrorTable:
    """Write errors.json and errors.csv."""
    check_table_name(options.output)
    model = open_and_announce(options.model, session, base_gguf=options.table.base_gguf)
    stats = StatsFile(options.stats).of(model)
    return _measured(_meter(model, stats, options.table, session), stats, options.output, options.table, session)


def check_table_name(path: Path) -> None:
    """Raise WriteError, before any work, for something else that has the name of the journal of a table at `path`."""
    Journal(journal_path(path)).check_own()


def error_table(model: Model, stats: StatsFile, path: Path, options: TableOptions, session: Session) -> ErrorTable:
    """Return the table at `path`, extended by types that it lacks; measure it anew when what it rests on changed."""
    meter = _meter(model, stats, options, session)
    earlier = ErrorTable.load(path) if path.is_file() else None
    if earlier is None or not _is_of(earlier, meter, stats):
        return _measured(meter, stats, path, options, session)
    measured = {(name, stored) for name, rows in earlier.tensors().items() for stored in rows}
    lacks = dict.fromkeys(  # a table of an earlier version may lack what stands in for a type
        name
        for tensor, (_, candidates) in meter.formats(options.types).items()
        for stored, names in candidates.items()
        if (tensor, stored.name) not in measured
        for name in names
    )
    missing = tuple(name for name in options.types if name not in earlier.types or name in lacks)
    exact = "" if earlier.seed is None else f", {earlier.num_exact:,} of {len(earlier.rows):,} errors exact"
    session.note(f"reusing {path}{exact}" + (f", adding {', '.join(missing)}" if missing else ""))
    if missing:
        return _measured(meter, stats, path, replace(options, types=missing), session, earlier)
    return earlier


def _is_of(table: ErrorTable, meter: Meter, stats: StatsFile) -> bool:
    """Return whether the table holds what the meter would find, or exact numbers in place of estimates."""
    return _rests_on(table, meter, stats) and table.seed in (None, meter.origin["seed"])


def _rests_on(table: ErrorTable, meter: Meter, stats: StatsFile) -> bool:
    """Return whether the table was measured on this model with these statistics and by this encoder."""
    return table.origin == (stats.hash, meter.model.fingerprint, meter.origin["encoder"], meter.origin["moments"])


def written_errors(
    path: Path, meter: ErrorMeter, stats: StatsFile, types: Mapping[str, str], output: Path
) -> WrittenErrors | None:
    """Return what measures an export to `output`; None where the table at `path` gains nothing by it.

    `types` maps tensors to the types that are written. Raises PlanError: not an error table.
    """
    table = ErrorTable.load(path) if path.is_file() else None
    if table is None or not _rests_on(table, meter, stats):
        return None
    rows = ((name, table.tensors().get(name, {}).get(stored)) for name, stored in types.items())
    estimated = {name: row.type for name, row in rows if row is not None and row.weighted_error_se is not None}
    journal = output.with_name(f"{output.name}.errors.journal")
    return WrittenErrors(path, table.origin, meter, estimated, journal) if estimated else None


def scheme_table(
    model: Model, checkpoint: LinearCheckpoint, schemes: Sequence[str], stats: StatsFile, path: Path, session: Session
) -> ErrorTable:
    """Return the table of schemes that vLLM reads at `path`; measure it anew where it lacks one, or is of other
    statistics, second moments or groups, or was not encoded as `export` does."""
    schemes = [name for name in SCHEMES if name in schemes or name in DEFAULT_SCHEMES]
    candidates = checkpoint.candidates(schemes, mixed_experts=True)
    unmeasured = unmeasured_table(model, scheme_formats(checkpoint, candidates), ())
    sizes = {(row.name, row.type): row.bytes for row in unmeasured.rows}
    place = torch.device(chosen_device(session.device))
    how = {"moments": stats.moments, "sampling": _sampling(session, place), "threads": session.threads}
    meter = SchemeMeter(model, stats.stats, checkpoint, candidates, place, **how)
    earlier = ErrorTable.load(path, known_types=SCHEMES) if path.is_file() else None
    has_these = earlier and sizes.items() <= {(row.name, row.type): row.bytes for row in earlier.rows}.items()
    if earlier and has_these and _is_of(earlier, meter, stats):
        session.note(f"reusing {path}")
        return earlier
    identity = {
        "encoder": f"{meter.origin['encoder']}, torch {torch.__version__}",
        "moments": str(meter.origin["moments"]),
        "sampling": str(meter.sampling),
        "device": place.type,
        "bytes": str(sum(sizes.values())),
    }
    return _written(path, meter, tuple(schemes), stats, identity, session)


def _meter(model: Model, stats: StatsFile, options: TableOptions, session: Session) -> ErrorMeter:
    encoder = load_encoder(options.encoder, chosen_device(session.device))
    moments = stats.moments if encoder.uses_hessians else None
    sampling = None if options.exact else _sampling(session, encoder.device)
    return ErrorMeter(model, stats.stats, encoder, moments, sampling, threads=session.threads)


def _sampling(session: Session, device: torch.device) -> Sampling:
    first = {} if device.type == "cpu" else {"first_rows": _FIRST_ROWS_ON_GPU}
    return Sampling(session.seed, **first)


def _measured(
    meter: ErrorMeter,
    stats: StatsFile,
    output: Path,
    options: TableOptions,
    session: Session,
    earlier: ErrorTable | None = None,
) -> ErrorTable:
    """Write the table, with the rows of `earlier` for other types."""
    names, encoder = [quant_type(name).name for name in options.types or DEFAULT_TYPES], meter.encoder
    if not options.ray:
        stored = dict.fromkeys(each for _, candidates in meter.formats(names).values() for each in candidates)
        with session.stage("Kernels that were compiled are kept.") as progress:
            encoder.prepare(stored, progress)
    identity = {
        "encoder": f"{encoder.name} {encoder_version(encoder)} {encoder.device.type}",
        "moments": str(meter.origin["moments"]),
        "sampling": str(meter.sampling),
    }
    with open_ray(options.ray) if options.ray else nullcontext() as pool:
        elsewhere = None
        if pool is not None:
            files = StoredFiles(StoredModel.of(meter.model), stats.path.resolve(), meter.moments is not None)
            choice = EncoderChoice.of(encoder, "cpu", session.threads or 1)
            elsewhere = measure_on(pool, choice, files, meter.sampling)
        return _written(output, meter, names, stats, identity, session, elsewhere, earlier)


def _written(
    output: Path,
    meter: Meter,
    type_names: Sequence[str],
    stats: StatsFile,
    identity: Mapping[str, str],
    session: Session,
    elsewhere: Measure | None = None,
    earlier: ErrorTable | None = None,
) -> ErrorTable:
    """Measure and write a table, with the rows of `earlier`; what an interrupted run measured is used again.

    `identity` is what decides its numbers beside types, model, statistics and version.
    """
    origin = {"tool": __version__, "fingerprint": meter.model.fingerprint, "stats": stats.hash}
    with ErrorJournal(output, {**origin, "types": " ".join(type_names), **identity}) as journal:
        if journal.num_parts:
            session.note(f"going on with the interrupted {output.name}, {journal.num_parts} parts of tensors are there")
        with session.stage("Statistics and the errors measured so far are kept.") as progress:
            sources = {"journal": journal, "elsewhere": elsewhere}

            def checked(*args: Any, **kwargs: Any) -> None:
                stats.check()  # hours of measuring would be followed by a failure that is known now
                progress(*args, **kwargs)

            table = build_error_table(meter, type_names, stats_hash=stats.hash, **sources, progress=checked)
        table = earlier.extended_by(table) if earlier else table
        table.save(output)
        journal.remove()
    return table
