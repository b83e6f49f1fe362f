"""Calibration of a model that is loaded whole, on text, in one call; and text like it that it does not see."""

from pathlib import Path

from dynquant.calibration.run import Calibration, collect_statistics, provenance_of, text_inputs
from dynquant.inputs.text import read_text
from dynquant.running.load import load_hf
from dynquant.running.weight_inputs import weight_inputs


def calibrate(model, text=None, *, tokens=131_072, window=512, device="cpu", seed=0, **options) -> Calibration:
    """Measure on a text file, a `datasets` id, or (None) the mix that ships."""
    inputs = text_inputs(model, text, tokens=tokens, window=window, seed=seed)
    provenance = provenance_of(model, inputs, tokens=tokens, seed=seed)
    hf_model = load_hf(model, device=device)
    names = weight_inputs(model, hf_model)
    return collect_statistics(hf_model, inputs, names=names, provenance=provenance, **options)


def unseen_text(folder: Path) -> Path:
    """Write a text of all domains of the mix, from its last documents: calibration on few tokens does not get there."""
    text = folder / "unseen.txt"
    text.write_text("\n\n".join(document[:400] for document in read_text(None).documents[-48:]), encoding="utf-8")
    return text
