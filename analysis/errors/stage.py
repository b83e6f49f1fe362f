"""Analysis: measures what every candidate type does to every tensor, and writes the error table.

A table that is there already is reused, extended by the types that it lacks; an interrupted one goes on.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import torch

from dynquant import __version__
from dynquant.analysis.errors.measure import ErrorMeter, Meter, build_error_table
from dynquant.analysis.errors.measure_schemes import ENCODER, SchemeMeter
from dynquant.analysis.errors.options import DEFAULT_TYPES, AnalyzeOptions, TableOptions
from dynquant.analysis.errors.remote import RemoteErrors
from dynquant.analysis.errors.sums import ErrorJournal
from dynquant.analysis.errors.table import ErrorTable
from dynquant.calibration.stage import StatsFile
from dynquant.checkpoints.model import Model
from dynquant.encoding.interface import Encoder
from dynquant.encoding.remote import EncoderChoice, StoredFiles
from dynquant.encoding.store import EncodedStore
from dynquant.encoding.stream import encoder_version, load_encoder
from dynquant.families.linear_layers import LinearCheckpoint
from dynquant.families.open import open_and_announce
from dynquant.formats.quant_types import quant_type
from dynquant.formats.vllm_schemes import SCHEMES
from dynquant.resources import chosen_device
from dynquant.running.cluster import StoredModel, open_ray
from dynquant.session import SILENT, Session


def analyze(options: AnalyzeOptions, session: Session = SILENT) -> ErrorTable:
    """Write errors.json and errors.csv."""
    model = open_and_announce(options.model, session, base_gguf=options.table.base_gguf)
    return _measured(model, StatsFile(options.stats), options.output, options.table, session)


def error_table(
    model: Model,
    stats: StatsFile,
    path: Path,
    options: TableOptions,
    session: Session,
    store: EncodedStore | None = None,
) -> ErrorTable:
    """Return the table at `path`, extended by types that it lacks; measure it anew when the statistics changed.

    With `store`, blocks are kept there, encoded once for the table and for everything that renders them later.
    """
    known = ErrorTable.load(path) if path.is_file() else None
    inputs = (stats.hash, options.encoder, model.fingerprint)
    if known is None or (known.stats_hash, known.encoder, known.fingerprint) != inputs:
        return _measured(model, stats, path, options, session, store)
    missing = tuple(name for name in options.types if name not in known.types)
    session.note(f"reusing {path}" + (f", adding {', '.join(missing)}" if missing else ""))
    if missing:
        return _measured(model, stats, path, replace(options, types=missing), session, store, known)
    return known


def scheme_table(
    model: Model, checkpoint: LinearCheckpoint, stats: StatsFile, path: Path, session: Session
) -> ErrorTable:
    """Return the table of all schemes that vLLM reads at `path`; measure it anew when the statistics changed."""
    known = ErrorTable.load(path, known_types=SCHEMES) if path.is_file() else None
    if known is not None and (known.stats_hash, known.fingerprint) == (stats.hash, model.fingerprint):
        session.note(f"reusing {path}")
        return known
    device = chosen_device(session.device)
    identity = {"encoder": f"{ENCODER}, torch {torch.__version__}", "device": device}
    candidates = checkpoint.candidates(SCHEMES, mixed_experts=True)
    meter = SchemeMeter(model, checkpoint, stats.stats, candidates, torch.device(device))
    return _written(path, meter, tuple(SCHEMES), stats.hash, identity, session)


def _measured(
    model: Model,
    stats: StatsFile,
    output: Path,
    options: TableOptions,
    session: Session,
    store: EncodedStore | None = None,
    known: ErrorTable | None = None,
) -> ErrorTable:
    """Write the table, with the rows of `known` for other types."""
    names, encoder = [quant_type(name).name for name in options.types or DEFAULT_TYPES], load_encoder(options.encoder)
    identity = {
        "encoder": f"{encoder.name} {encoder_version(encoder)}", "store": store.directory.name if store else "",
    }  # fmt: skip
    meter = ErrorMeter(model, stats.stats, encoder, session.threads, store)
    with _cluster(model, stats, encoder, options, session) as elsewhere:
        return _written(output, meter, names, stats.hash, identity, session, elsewhere, known)


@contextmanager
def _cluster(
    model: Model, stats: StatsFile, encoder: Encoder, options: TableOptions, session: Session
) -> Iterator[RemoteErrors | None]:
    """Context manager: the Ray cluster that measures, or None where this machine does."""
    if options.ray is None:
        yield None
        return
    files = StoredFiles(StoredModel.of(model, options.base_gguf), stats.path.resolve())
    with open_ray(options.ray) as pool:
        yield RemoteErrors(pool, EncoderChoice.of(encoder, "cpu", session.threads or 1), files)


def _written(
    output: Path,
    meter: Meter,
    type_names: Sequence[str],
    stats_hash: str,
    identity: Mapping[str, str],
    session: Session,
    elsewhere: RemoteErrors | None = None,
    known: ErrorTable | None = None,
) -> ErrorTable:
    """Measure and write a table, with the rows of `known`; what an interrupted run measured is used again.

    `identity` is what decides its numbers beside types, model, statistics and version; what an interrupted run
    measured is kept only under an equal one.

    Raises:
        PlanError: the journal cannot be written.
    """
    origin = {"tool": __version__, "fingerprint": meter.model.fingerprint, "stats": stats_hash}
    with ErrorJournal(output, {**origin, "types": " ".join(type_names), **identity}) as journal:
        if journal.num_parts:
            session.note(f"going on with the interrupted {output.name}, {journal.num_parts} parts of tensors are there")
        with session.stage("Statistics and the errors measured so far are kept.") as progress:
            table = build_error_table(
                meter, type_names, stats_hash=stats_hash, journal=journal, elsewhere=elsewhere, progress=progress
            )
        table = known.extended_by(table) if known else table
        table.save(output)
        journal.remove()
    return table
