"""dynquant: measured dynamic low-bit quantization of language models.

After `import dynquant`, transformers' `from_pretrained` loads packed checkpoints; `dynquant.load` loads GGUF files.

Each step begins in one function, which `cli` calls with the options that stand beside it and a `session.Session`:

    calibrate    `calibration.stage.calibrate`       export      `exporters.stage.export`
    analyze      `analysis.errors.stage.analyze`     eval        `evaluation.evaluate.evaluate`
    plan         `planning.stage.make_plan`          release     `publishing.stage.release`
    heal         `training.heal.heal`                finetune    `training.finetune.finetune`

The docstring of a folder says which module does what. Those of `formats`, `families` and `evaluation.tasks` say where a
new quant type, architecture or task is written.
"""

from typing import TYPE_CHECKING, Any

from dynquant.former_names import import_former_names
from dynquant.registration import register_when_imported

if TYPE_CHECKING:
    from dynquant.packed.load_gguf import load

__version__ = "0.1.0"
__all__ = ["load"]

import_former_names()
register_when_imported()


def __getattr__(name: str) -> Any:
    if name == "load":
        from dynquant.packed.load_gguf import load

        return load
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
