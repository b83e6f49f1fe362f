"""Calibration of a model that is loaded whole, on text, in one call; and text like it that it does not see."""

import json
from importlib import resources
from pathlib import Path

from dynquant.calibration.run import Calibration, collect_statistics, provenance_of, text_inputs
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
    """Write prose like that of demo_text.txt, on which `calibrated_16m` calibrates: the novels of the mix."""
    lines = resources.files("dynquant").joinpath("data/dynquant-mix-2.jsonl").read_text("utf-8").splitlines()
    prose = [record["text"] for record in map(json.loads, lines) if record["domain"] == "prose"]
    text = folder / "unseen.txt"
    text.write_text("\n\n".join(prose), encoding="utf-8")
    return text
