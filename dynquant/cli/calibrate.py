"""`dynquant calibrate`."""

from typing import Annotated

from dynquant.calibration.options import CalibrateOptions
from dynquant.cli.terminal import console
from dynquant.options import Only
from dynquant.session import Session


def calibrate(options: CalibrateOptions, session: Annotated[Session, Only(("seed", "device"))]) -> None:
    """Measure activations: per input channel, per expert, extremes and held-back samples.

    Example: dynquant calibrate ./model --calibration text.jsonl -o stats.safetensors

    Example: dynquant calibrate ./vision-model --data pictures.jsonl -o stats.safetensors
    """
    from dynquant.calibration import stage

    stats = stage.calibrate(options, session).stats
    console.say(f"{options.output}: {stats.provenance.num_tokens:,} tokens, {len(stats.inputs)} inputs")
