"""`dynquant calibrate`."""

from typing import Annotated

from dynquant.calibration.options import CalibrateOptions
from dynquant.cli.terminal import console
from dynquant.options import Only
from dynquant.session import Session
from dynquant.storage.atomic import file_hash
from dynquant.storage.file_names import STATS_NAME


def calibrate(options: CalibrateOptions, session: Annotated[Session, Only(("seed", "device"))]) -> None:
    """Measure activations: per input channel, per expert, extremes and held-back samples.

    Example: dynquant calibrate ./model --calibration text.jsonl -o stats.safetensors

    Example: dynquant calibrate ./vision-model --data pictures.jsonl -o stats.safetensors
    """
    from dynquant.calibration import stage
    from dynquant.checkpoints.model import Model
    from dynquant.evaluation.agreement.same_computation import check_computation
    from dynquant.recipes.folder import note_lost_plans

    def check(model: Model) -> None:  # here, since evaluation is a later step than calibration
        how = {"allow_difference": options.allow_difference, "max_memory": options.calibration.max_memory}
        check_computation(model, session, folder=options.output.parent, **how)

    output = options.output
    before = file_hash(output) if output.is_file() else None
    file = stage.calibrate(options, session, check=check)
    if output.name == STATS_NAME:
        note_lost_plans(output.parent, file.hash, session, before=before)
    stats = file.stats
    console.say(f"{output}: {stats.provenance.num_tokens:,} tokens, {len(stats.inputs)} inputs")
