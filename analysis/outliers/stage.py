"""Searches a model for super weights, and measures what its perplexity is without each."""

from dataclasses import dataclass

from dynquant.analysis.outliers.options import SuperWeightOptions
from dynquant.analysis.outliers.super_weights import Ablation, Criteria, ablation, find_super_weights
from dynquant.families.open import open_and_announce
from dynquant.inputs.model_inputs import check_context
from dynquant.inputs.text import pack_windows, read_text
from dynquant.recipes.folder import SuperWeight
from dynquant.resources import chosen_device
from dynquant.running.load import load_hf, load_tokenizer, probing_type
from dynquant.running.weight_inputs import weight_inputs
from dynquant.session import Session


@dataclass(frozen=True)
class SuperWeightFindings:
    """Super weights of a model, each with the effect of zeroing it where that was measured."""

    model: str
    num_tokens: int
    weights: list[tuple[SuperWeight, Ablation | None]]


def look_for_super_weights(options: SuperWeightOptions, session: Session) -> SuperWeightFindings:
    """Run the model on a text and return the single weights that it cannot do without."""
    model = open_and_announce(options.model, session)
    text = read_text(options.text, max_tokens=options.tokens)
    window = pack_windows(text, load_tokenizer(model), window=options.tokens, max_tokens=options.tokens)[0]
    check_context(model, len(window))
    device = chosen_device(session.device)
    hf_model = load_hf(model, dtype=probing_type(model, device), device=device)
    criteria = Criteria(min_effect=options.min_effect)
    weights = find_super_weights(hf_model, weight_inputs(model, hf_model), window, criteria=criteria)
    effects = [ablation(hf_model, weight, window) if options.ablation else None for weight in weights]
    return SuperWeightFindings(model.name, len(window), list(zip(weights, effects, strict=True)))
