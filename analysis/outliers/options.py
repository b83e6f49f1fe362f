"""Options of the search for super weights."""

from dataclasses import dataclass
from typing import Annotated

from dynquant.options import Flag, ModelPath, Options


@dataclass(frozen=True, kw_only=True)
class SuperWeightOptions(Options):
    """A model, the text that it runs on, and whether the effect of each super weight is measured."""

    model: ModelPath
    text: Annotated[
        str | None, Flag("Text to run, as --calibration of plan takes it. Default: dynquant-mix-2, which ships.")
    ] = None
    tokens: Annotated[int, Flag("Tokens of the text to run.", min=2, is_tokens=True)] = 512
    min_effect: Annotated[
        float, Flag("Least mean change of a token's log-probability, in nats, where a weight is zeroed.", min=0)
    ] = 0.1
    ablation: Annotated[bool, Flag("Measure perplexity with each super weight set to zero.")] = True
