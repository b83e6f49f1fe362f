"""Inputs that a model is run on: token windows of a text, or samples with pictures. Every step iterates the same
batches."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from dynquant.checkpoints.model import Model
from dynquant.errors import StatsError


@dataclass(frozen=True)
class Batch:
    """Keyword arguments of a model, and which positions hold text."""

    arguments: Mapping[str, Tensor]
    is_text: Tensor  # bool [n, T]
    pictures: tuple[Path, ...] = ()
    """Files of the pictures, in the order of their places."""
    place: str = ""
    """File and line that a sample came from."""

    @classmethod
    def of_tokens(cls, ids: Tensor) -> "Batch":
        """Return a batch of text from token ids int64 [n, T]."""
        return cls({"input_ids": ids}, torch.ones(ids.shape, dtype=torch.bool))

    @property
    def ids(self) -> Tensor:
        """Token ids int64 [n, T]; those of pictures are placeholders."""
        return self.arguments["input_ids"]

    @property
    def num_tokens(self) -> int:
        return self.is_text.numel()

    @property
    def scored(self) -> Tensor:
        """Positions of text tokens that are followed by one, in a batch of one sequence. Pictures predict nothing."""
        (is_text,) = self.is_text
        return (is_text[:-1] & is_text[1:]).nonzero().flatten()

    @property
    def targets(self) -> Tensor:
        """Token ids that follow the scored positions."""
        return self.ids[0, self.scored + 1]

    def on(self, device: torch.device | str) -> dict[str, Tensor]:
        """Return the keyword arguments on a device."""
        return {name: value.to(device) for name, value in self.arguments.items()}

    def with_gradients(self) -> "Batch":
        """Return the same arguments, of which those that are no integers (pixels) ask for gradients."""
        pixels = {
            name: value.clone().requires_grad_(True)
            for name, value in self.arguments.items()
            if value.is_floating_point()
        }
        return replace(self, arguments={**self.arguments, **pixels})


@dataclass(frozen=True)
class ModelInputs:
    """Token windows int64 [n, T], run `batch_size` at a time, or batches of one, run one by one.

    Such batches are samples with pictures, or windows of a text that differ in length.
    """

    samples: Tensor | tuple[Batch, ...]
    batch_size: int = 1
    name: str = ""
    sha256: str = ""
    skipped: tuple[str, ...] = ()
    """Faults of the samples that were left out, or of the conversations that are plain text, one each."""

    def __len__(self) -> int:
        """Return the number of windows or samples."""
        return len(self.samples)

    def __getitem__(self, part: slice) -> "ModelInputs":
        return replace(self, samples=self.samples[part])

    def __iter__(self) -> Iterator[Batch]:
        if isinstance(self.samples, Tensor):
            # An empty tensor would be split into one empty batch.
            yield from map(Batch.of_tokens, self.samples.split(self.batch_size) if len(self) else ())
        else:
            yield from self.samples

    @property
    def has_pictures(self) -> bool:
        return not isinstance(self.samples, Tensor) and any(len(batch.arguments) > 1 for batch in self.samples)

    @property
    def unit(self) -> str:
        """Name of what `len` counts, in the plural."""
        return "samples" if self.has_pictures else "windows"

    @property
    def num_batches(self) -> int:
        return -(-len(self) // self.batch_size) if isinstance(self.samples, Tensor) else len(self)

    @property
    def num_tokens(self) -> int:
        return sum(batch.num_tokens for batch in self)

    @property
    def longest(self) -> int:
        """Length of the longest sequence, in tokens."""
        return max((batch.is_text.shape[1] for batch in self), default=0)

    @property
    def windows(self) -> Tensor:
        """Token ids [n, T]; none of samples with pictures."""
        return self.samples if isinstance(self.samples, Tensor) else torch.empty(0, 0, dtype=torch.int64)

    def hold_back(self, share: float) -> tuple["ModelInputs", "ModelInputs"]:
        """Return what comes first, and the last `share` of the windows or samples, of which nothing is summed."""
        first = len(self) - num_held_back(len(self), share)
        return self[:first], self[first:]


def check_context(model: Model, num_tokens: int) -> None:
    """Raise StatsError when a sequence is longer than the model's context: positions beyond it mean nothing to it."""
    if 0 < model.hyper.n_ctx < num_tokens:
        raise StatsError(
            f"{num_tokens:,} tokens at once do not fit the context of {model.name}, {model.hyper.n_ctx:,} tokens; give "
            "a smaller --window, or shorter samples."
        )


def num_held_back(count: int, share: float) -> int:
    """Return how many of `count` inputs are held back: at least one, and not the only one unless all are."""
    return 0 if share <= 0 or (count == 1 and share < 1) else max(1, round(count * share))
