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
    from dynquant.evaluation.agreement.same_computation import check_computation
    from dynquant.families.open import open_model

    # Here, since evaluation is a later step than calibration.
    model = open_model(options.model, base_gguf=options.base_gguf)
    check_computation(model, session, allow_difference=options.allow_difference)
    stats = stage.calibrate(options, session).stats
    console.say(f"{options.output}: {stats.provenance.num_tokens:,} tokens, {len(stats.inputs)} inputs")
