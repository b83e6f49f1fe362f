"""The way a step runs, apart from what it makes: device, threads, seed, and who hears of its progress."""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import Annotated, Protocol

from dynquant.options import Flag, Options


class Progress(Protocol):
    """Called by a stage when it begins, with 0 or what an earlier run left, and whenever a part of its work is done."""

    def __call__(
        self,
        stage: str,
        done: int,
        total: int,
        /,
        *,
        unit: str = "",
        layer: int | None = None,
        tensor: str | None = None,
        resumed: bool = False,
    ) -> None:
        """Report that `done` of `total` units are finished.

        Args:
            stage: A short text for people; it also identifies the stage.
            unit: What is counted, in the plural: weights, tokens, windows.
            layer: Number of the decoder layer that is being worked on.
            tensor: GGUF name of the tensor that is being worked on; it implies the layer.
            resumed: Whether all that was added since the last report is from an earlier run and so tells no speed; what
                a stage's first report finds done always is.
        """


def ignore_progress(stage: str, done: int, total: int, /, **where: str | int | None) -> None:
    """A `Progress` for callers that want to hear nothing."""


def ignore_note(message: str) -> None:
    """A note for callers that want to hear nothing."""


@contextmanager
def ignore_stages(kept: str) -> Iterator[Progress]:
    """Context manager: yields a `Progress` that nobody hears."""
    yield ignore_progress


@dataclass(frozen=True)
class Session(Options):
    """Argument of every door beside its options. The default one is silent and takes the machine as it is."""

    device: Annotated[str | None, Flag("cpu or cuda. Default: cuda where there is one.")] = None
    """PyTorch's name of a device."""
    threads: Annotated[int | None, Flag("Threads. Default: one per usable core.", min=1, max=512)] = None
    seed: Annotated[int, Flag("Seed of everything that is sampled.", min=0)] = 0
    note: Callable[[str], None] = ignore_note
    """Says one line about what is being done."""
    stage: Callable[[str], AbstractContextManager[Progress]] = ignore_stages
    """Context manager around long work, which yields its `Progress`; the argument says what a stop here would lose."""


SILENT = Session()
"""Session of tests and callers in Python that ask for nothing else."""
