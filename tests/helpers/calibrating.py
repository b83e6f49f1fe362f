"""Calibration of a model that is loaded whole, on text, in one call."""

from dynquant.calibration.run import Calibration, collect_statistics, provenance_of, text_inputs
from dynquant.running.load import load_hf
from dynquant.running.weight_inputs import weight_inputs


def calibrate(model, text=None, *, tokens=131_072, window=512, device="cpu", seed=0, **options) -> Calibration:
    """Measure on a text file, a `datasets` id, or (None) the built-in text."""
    inputs = text_inputs(model, text, tokens=tokens, window=window, seed=seed)
    provenance = provenance_of(model, inputs, tokens=tokens, seed=seed)
    hf_model = load_hf(model, device=device)
    names = weight_inputs(model, hf_model)
    return collect_statistics(hf_model, inputs, names=names, provenance=provenance, **options)
