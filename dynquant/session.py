"""How long work tells others how far it is: one call signature for every stage of the package."""

from typing import Protocol


class Progress(Protocol):
    """Called by a stage whenever a part of its work is done, and possibly before the first."""

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
    ) -> None:
        """Tell that `done` of `total` are done.

        Args:
            stage: A short text for people; it also identifies the stage.
            unit: What is counted, in the plural: weights, tokens, windows.
            layer: Number of the decoder layer that is being worked on.
            tensor: GGUF name of the tensor that is being worked on; it implies the layer.
        """


def ignore_progress(stage: str, done: int, total: int, /, **where: str | int | None) -> None:
    """A `Progress` for callers that want to hear nothing."""
