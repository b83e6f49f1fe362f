"""The stage of `plan` that runs the model: what a `PlanSearch` needs, from a model on disk and its calibration."""

from pathlib import Path

import torch

from dynquant.analysis.errors.table import ErrorTable
from dynquant.calibration.stage import StatsFile
from dynquant.calibration.statistics import CalibrationStats
from dynquant.checkpoints.model import Model
from dynquant.encoding.store import ENCODED_NAME, EncodedStore, open_store
from dynquant.encoding.stream import load_encoder
from dynquant.errors import StatsError
from dynquant.inputs.text import pack_windows, read_text
from dynquant.planning.chooser import Chooser
from dynquant.planning.frontier import fixed_recipes
from dynquant.planning.search import PlanSearch, SearchOptions
from dynquant.planning.selection import Selection
from dynquant.resources import chosen_device
from dynquant.running.load import load_hf, load_tokenizer
from dynquant.session import Session


def encoded_store(model: Model, stats: StatsFile, directory: Path, encoder_name: str, session: Session) -> EncodedStore:
    """Blocks of this model beside the plan, encoded as `export` will."""
    return open_store(
        model, stats.stats, stats.path, load_encoder(encoder_name),
        stats_hash=stats.hash, parent=directory / ENCODED_NAME, threads=session.threads,
    )  # fmt: skip


def search_plans(
    model: Model,
    stats: CalibrationStats,
    table: ErrorTable,
    store: EncodedStore,
    options: SearchOptions,
    choose: Chooser,
    session: Session,
    *,
    text: str | None,
) -> tuple[ErrorTable, Selection]:
    """Price, propose and select; `text` is the calibration source, None for the built-in one.

    Raises:
        StatsError: too little text is left to select on.
        CheckpointError: transformers cannot run the model, or it is a GGUF file.
    """
    tokenizer = load_tokenizer(model)
    used, window = stats.provenance.max_tokens or 0, stats.provenance.window or 512
    wanted = used + window + options.selection_tokens
    documents = read_text(text, seed=session.seed, max_tokens=wanted)
    windows = pack_windows(documents, tokenizer, window=window, max_tokens=wanted)
    calibrated = windows[: max(1, used // window)]
    if options.text is not None:
        name = options.text.name
        other = read_text(options.text, seed=session.seed, max_tokens=options.selection_tokens)
        selection = pack_windows(other, tokenizer, window=window, max_tokens=options.selection_tokens)
    else:
        name = f"{documents.name}, behind the calibrated tokens"
        selection = windows[used // window + 1 :]
    if options.select and selection.numel() < min(options.selection_tokens, 4 * window):
        raise StatsError(
            f"{documents.name} has {selection.numel():,} tokens left behind the {used:,} that calibration used; "
            f"selection wants {options.selection_tokens:,}. Give --selection-text FILE, a longer text or less --tokens."
        )
    fixed = fixed_recipes(model) if options.frontier is not None else {}
    recipes = {label: choose.stored(wanted, table) for label, wanted in fixed.items()}
    hf_model = load_hf(model, dtype=torch.float32, device=chosen_device(session.device))
    with session.stage("Errors and encoded tensors are kept; what the search measured is lost.") as progress:
        return PlanSearch(
            hf_model=hf_model, store=store, options=options, choose=choose, file_bytes=choose.file_bytes,
            probe_windows=_cut(calibrated, options.probes, options.probe_window),
            unit_windows=calibrated[: max(1, options.unit_tokens // window)],
            selection_windows=selection if len(selection) else calibrated[:1],
            selection_text=name, num_weights=model.num_weights, recipes=recipes, seed=session.seed, progress=progress,
        ).run(table)  # fmt: skip


def _cut(windows: torch.Tensor, count: int, length: int) -> torch.Tensor:
    """The beginnings of evenly spaced windows; [at most `count`, at most `length`]."""
    step = max(1, len(windows) // count)
    return windows[::step][:count, :length]
