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
    from dynquant.checkpoints.model import Model
    from dynquant.evaluation.agreement.same_computation import check_computation

    def check(model: Model) -> None:  # here, since evaluation is a later step than calibration
        how = {"allow_difference": options.allow_difference, "max_memory": options.calibration.max_memory}
        check_computation(model, session, folder=options.output.parent, **how)

    stats = stage.calibrate(options, session, check=check).stats
    console.say(f"{options.output}: {stats.provenance.num_tokens:,} tokens, {len(stats.inputs)} inputs")
