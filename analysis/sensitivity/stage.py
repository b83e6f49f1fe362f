"""Findings of a backward pass and of ablations about the original: sensitivities and super weights.

The model is loaded whole where it fits, and streamed layer by layer where it does not or a limit is given.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

from dynquant.analysis.outliers.super_weights import find_super_weights
from dynquant.analysis.sensitivity.closed_form import output_sensitivity, streamed_sensitivity
from dynquant.calibration.options import CalibrationOptions
from dynquant.calibration.stage import calibration_inputs, streaming_limit
from dynquant.checkpoints.model import Model
from dynquant.recipes.folder import SuperWeight
from dynquant.resources import chosen_device
from dynquant.running.load import load_hf, probing_type
from dynquant.running.streaming.layer_stream import LayerStream
from dynquant.running.streaming.staged_passes import StagedPasses
from dynquant.running.streaming.stream_memory import (
    MOST_TOKENS_AT_ONCE,
    Workload,
    fit_within,
    free_memory_of,
    windows_at_once,
)
from dynquant.running.weight_inputs import weight_inputs
from dynquant.session import Session
from dynquant.storage.journal import Journal
from dynquant.storage.work_files import check_folder, remove_folder

PROBE_TOKENS = 4096  # tokens of the backward pass that measures sensitivities

_MOST_LOGITS = 1 << 28  # at a time in a model that is streamed through a GPU: a gigabyte, several times
_PROBE_KEEPS = "Errors are kept; the sensitivities measured so far are lost."


def run_probe(
    model: Model, options: CalibrationOptions, directory: Path, session: Session, *, finds_super_weights: bool = True
) -> tuple[list[SuperWeight], dict[str, float], dict[str, float]]:
    """Return super weights, and the output's sensitivity to every tensor with its error.

    A GPU runs several windows at a time, and models that are large for it in the type of the checkpoint.

    Raises:
        CheckpointError: transformers cannot load the model.
        StatsError: a memory limit that is too small for it.
    """
    inputs = calibration_inputs(model, replace(options, tokens=PROBE_TOKENS), session)
    finds_super_weights = finds_super_weights and not inputs.has_pictures
    device = chosen_device(session.device)
    dtype = probing_type(model, device)
    limit = streaming_limit(model, options, device, session, weight_bytes=dtype.itemsize)
    if limit is None:
        hf_model = load_hf(model, dtype=dtype, device=device)
        at_once = 1
        if device != "cpu" and not inputs.has_pictures:
            at_once = windows_at_once(hf_model, inputs.longest, free_memory_of(device))
        inputs = replace(inputs, batch_size=at_once)
        names = weight_inputs(model, hf_model)
        supers = find_super_weights(hf_model, names, inputs.windows[0]) if finds_super_weights else []
        with session.stage(_PROBE_KEEPS) as progress:
            return supers, *output_sensitivity(hf_model, names, inputs, seed=session.seed, progress=progress)
    windows = inputs.windows
    stream, at_once = LayerStream(model, dtype=dtype, device=device), 1
    if device != "cpu":
        tokens = min(MOST_TOKENS_AT_ONCE, _MOST_LOGITS // stream.hf_model.get_output_embeddings().out_features)
        at_once = max(1, tokens // windows.shape[1])
    fit_within(stream, limit, Workload(at_once * windows.shape[1], is_backward=True))
    with stream.running(), _scratch((options.spill or directory) / ".probe.streaming") as scratch:
        supers, names = [], weight_inputs(model, stream.hf_model)
        if finds_super_weights:
            supers = find_super_weights(stream.hf_model, names, windows[0], zeroed=stream.zeroed)
        passes = StagedPasses(stream, windows.split(at_once), scratch)
        with session.stage(_PROBE_KEEPS) as progress:
            return supers, *streamed_sensitivity(passes, names, seed=session.seed, progress=progress)


@contextmanager
def _scratch(directory: Path) -> Iterator[Path]:
    """Context manager: yields a directory for work that is deleted on exit, as is what a kill has left of it.

    Raises:
        WriteError: something else has its name.
    """
    check_folder(directory)
    remove_folder(directory)
    try:
        with Journal(directory / "run.json") as journal:
            journal.start({"run": "probe"}, ())
        yield directory
    finally:
        remove_folder(directory)
