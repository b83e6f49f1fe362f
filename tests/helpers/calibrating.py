"""Calibration of a model that is loaded whole, on text, in one call."""

from dynquant.calibration.run import Calibration, collect_statistics, provenance_of, text_inputs
from dynquant.running.load import load_hf


def calibrate(model, text=None, *, tokens=131_072, window=512, device="cpu", seed=0, **options) -> Calibration:
    """Measure on a text file, a `datasets` id, or (None) the built-in text."""
    inputs = text_inputs(model, text, tokens=tokens, window=window, seed=seed)
    provenance = provenance_of(model, inputs, tokens=tokens, seed=seed)
    names = {"arch": model.arch, "n_layer": model.hyper.n_layer}
    return collect_statistics(load_hf(model, device=device), inputs, **names, provenance=provenance, **options)
