"""`dynquant finetune` and `heal`: the commands that train adapters."""

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from dynquant.cli.terminal import console
from dynquant.options import Only
from dynquant.session import Session
from dynquant.training.options import FinetuneOptions, HealOptions

if TYPE_CHECKING:
    from dynquant.training.run import TrainingReport

SeedAndDevice = Only(("seed", "device"))


def finetune(options: FinetuneOptions, session: Annotated[Session, SeedAndDevice]) -> None:
    """Train a LoRA adapter on a packed model by supervised fine-tuning, and measure it on examples held out.

    Example: dynquant finetune out/ --data chats.jsonl -o adapter/
    """
    from dynquant.training.finetune import finetune as run

    with _without_notices():
        _print(run(options, session), options.output)


def heal(options: HealOptions, session: Annotated[Session, SeedAndDevice]) -> None:
    """Distill the original into a LoRA adapter on its packed model, to win back what quantization took.

    The original runs first and is freed; its distributions (1 kB a token) stay on the disk.

    Example: dynquant heal out/ --reference ./model --data text.jsonl --text held-out.txt -o healed/
    """
    from dynquant.training.heal import heal as run

    with _without_notices():
        _print(run(options, session), options.output)
    cache = options.reference_cache
    console.note(f"the original's distributions are in {cache}, for further runs on the same text; it may be deleted")


@contextmanager
def _without_notices() -> Iterator[None]:
    """Context manager: silences what libraries tell each other's authors, of no use to who trains an adapter."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Could not find a config file")  # PEFT, of GGUF files
        yield


def _print(report: "TrainingReport", output: Path) -> None:
    rows = [(change.name, change.before.shown(".4g"), change.after.shown(".4g")) for change in report.changes]
    rows += [(f"share of the KL closed, {name}", "", share.shown(".4g")) for name, share in report.gap_closed.items()]
    steps = f"step {report.best_step} of {report.steps}"
    console.print_table(f"{report.base}: adapter of {steps}", ("held out", "without adapter", "with adapter"), rows)
    for line in report.notes:
        console.note(line)
    if not report.has_helped:
        console.note("Training did not lower the held-out loss below that of the adapter's start.")
    console.say(f"adapter: {output}\nlosses:  {output / 'loss.png'}")
