"""Forward and backward passes of many batches, one stage of a `LayerStream` after the other.

A stage's weights are loaded once and all batches go through it. What enters each lies in `HiddenStates`, in files: one
a stage, one batch after the other, so that one batch is in memory and a finished stage can be used after a kill.
Backward, a stage runs again from there, takes the gradient of its output and leaves that of its input. Masks and
position embeddings are the model's own: its forward pass is run with stand-ins for the layers, which note what they are
called with. That depends on the shape of a batch alone.
"""

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from math import prod
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dynquant.errors import StatsError
from dynquant.running.linear_hooks import last_logits
from dynquant.running.streaming.chained_layers import StandIn, standing_in
from dynquant.running.streaming.layer_stream import LayerStream
from dynquant.storage.atomic import free_bytes
from dynquant.storage.journal import write_all

BeforeBatch = Callable[[int], None]
"""Called with the index of a batch before it goes through a stage."""


class HiddenStates:
    """Tensors [windows, window, channels] of `shapes`, one a batch, of any number of stages."""

    def __init__(self, directory: Path, name: str, shapes: Sequence[tuple[int, int, int]], dtype: torch.dtype) -> None:
        self._directory, self._name, self._dtype = directory, name, dtype
        self._shapes = tuple(shapes)
        sizes = [prod(shape) * dtype.itemsize for shape in self._shapes]
        self._offsets = [sum(sizes[:index]) for index in range(len(sizes))]
        self.stage_bytes = sum(sizes)

    def write(self, stage: int, index: int, values: Tensor) -> None:
        """Keep what enters `stage` in batch `index`."""
        path = self._path(stage)
        data = values.detach().to("cpu", self._dtype).contiguous().view(-1).view(torch.uint8).numpy()
        try:
            with open(path, "r+b" if path.exists() else "w+b", buffering=0) as file:
                file.seek(self._offsets[index])
                write_all(file, data)  # type: ignore[arg-type]
        except OSError as error:
            raise StatsError(
                f"Hidden states cannot be written to {path} ({error.strerror}). Free some space and run the same "
                "command again to go on, or name another directory with --spill."
            ) from error

    def read(self, stage: int, index: int) -> Tensor:
        """Return what `write` kept, on the CPU."""
        values = torch.empty(self._shapes[index], dtype=self._dtype)
        rest = memoryview(values.view(-1).view(torch.uint8).numpy())
        with self._path(stage).open("rb", buffering=0) as file:
            file.seek(self._offsets[index])
            while rest:
                taken = file.readinto(rest)  # type: ignore[attr-defined]
                if not taken:
                    raise StatsError(f"{self._path(stage)} is cut short. Remove {self._directory} and start again.")
                rest = rest[taken:]
        return values

    def settle(self, stage: int) -> None:
        """Wait until a stage is on the disk."""
        with self._path(stage).open("rb") as file:
            os.fsync(file.fileno())  # the journal's line that follows must not outlive it

    def forget(self, stage: int) -> None:
        """Give back the space of a stage."""
        self._path(stage).unlink(missing_ok=True)

    def check_space(self, stages: int) -> None:
        """Raise StatsError when the directory has no room for `stages` at a time, with both numbers, or as `free_bytes`
        does."""
        there = sum(path.stat().st_size for path in self._directory.glob(f"{self._name}-*.bin"))
        free = free_bytes(self._directory, StatsError) + there
        if stages * self.stage_bytes > free:
            raise StatsError(
                f"Hidden states of {stages} layers take {stages * self.stage_bytes:,} bytes, but {self._directory} has "
                f"{free:,} free. Name a directory on a larger disk with --spill, or calibrate on fewer --tokens."
            )

    def _path(self, stage: int) -> Path:
        return self._directory / f"{self._name}-{stage:05d}.bin"


class StagedPasses:
    """Batches of token ids [windows, window] through the stages of `stream`, with files in `directory`.

    Stages are numbered as in `LayerStream`: 0 embeds, `head` makes logits, and `ahead` those of another token ahead. To
    be used inside `stream.running()`.
    """

    def __init__(self, stream: LayerStream, batches: Sequence[Tensor], directory: Path) -> None:
        self.stream = stream
        self.batches = tuple(batches)
        channels = stream.hf_model.get_input_embeddings().embedding_dim
        shapes = [(*batch.shape, channels) for batch in self.batches]
        self.states = HiddenStates(directory, "states", shapes, stream.dtype)
        self.gradients = HiddenStates(directory, "gradients", shapes, stream.dtype)
        self._calls: dict[torch.Size, list[dict[str, Any]]] = {}

    @property
    def head(self) -> int:
        """Number of the last stage."""
        return self.stream.num_layers + 1

    @property
    def ahead(self) -> int | None:
        """Number of the stage that predicts a token ahead; it takes what enters the head."""
        return None if self.stream.ahead is None else self.head + 1

    def forward(self, stage: int, before_batch: BeforeBatch = lambda _: None) -> None:
        """Run one stage on all batches and keep what enters the next; the head computes each window's last logits."""
        with torch.no_grad(), self._loaded(stage, stage + 1 if stage < self.head else None):
            for index in range(len(self.batches)):
                before_batch(index)
                out = self.output(stage, index)
                if stage < self.head:
                    self.states.write(stage + 1, index, out)

    def output(self, stage: int, index: int) -> Tensor:
        """Run a loaded stage on one batch: return what enters the next, or the last logits of each window."""
        if stage == self.ahead:
            return self._logits_ahead(index)
        if stage == self.head:
            with last_logits(self.stream.hf_model):
                return self._logits(self._entering(stage, index))
        return self._layer(stage, self._entering(stage, index)) if stage else self._embedded(self.batches[index])

    def backward(
        self,
        stage: int,
        loss: Callable[[Tensor], Tensor] | None = None,
        before_batch: BeforeBatch = lambda _: None,
        *,
        num_batches: int | None = None,
    ) -> None:
        """Run one stage again on the first batches (all), then back from the gradients that the stage above it left.

        The head takes `loss`, a scalar made of a batch's logits [windows, window, vocabulary], instead. So does the
        stage `ahead`, which leaves no gradients.
        """
        embedding = self.stream.hf_model.get_input_embeddings()
        with torch.enable_grad(), self._loaded(stage, stage - 1 if stage else None):
            for index, batch in enumerate(self.batches[:num_batches]):
                before_batch(index)
                if stage == 0:
                    with embedding.register_forward_hook(lambda *call: call[-1].requires_grad_(True), prepend=True):
                        self._embedded(batch).backward(self._flowing(1, index))
                    continue
                if stage == self.ahead:
                    assert loss is not None
                    loss(self._logits_ahead(index)).backward()
                    continue
                hidden = self._entering(stage, index).requires_grad_(True)
                if stage == self.head:
                    assert loss is not None
                    loss(self._logits(hidden)).backward()
                else:
                    self._layer(stage, hidden).backward(self._flowing(stage + 1, index))
                assert hidden.grad is not None
                self.gradients.write(stage, index, hidden.grad)

    @contextmanager
    def _loaded(self, stage: int, then: int | None) -> Iterator[None]:
        """Context manager: a stage has its weights, and that ahead those of the embedding and the head too."""
        with ExitStack() as stages:
            for other in (self.head, 0) if stage == self.ahead else ():
                stages.enter_context(self.stream.stage(other))
            stages.enter_context(self.stream.stage(stage, then=then))
            yield

    def _entering(self, stage: int, index: int) -> Tensor:
        return self.states.read(stage, index).to(self.stream.device)

    def _flowing(self, stage: int, index: int) -> Tensor:
        return self.gradients.read(stage, index).to(self.stream.device)

    def _layer(self, stage: int, hidden: Tensor) -> Tensor:
        out = self.stream.layers[stage - 1](hidden, **self._others(hidden.shape)[stage - 1])
        return out[0] if isinstance(out, tuple) else out

    def _logits(self, hidden: Tensor) -> Tensor:
        # Not what enters the first stand-in, which models may have scaled.
        with self._standing_in(lambda _states, _others: hidden):
            return self.stream.hf_model(inputs_embeds=hidden, use_cache=False).logits

    def _logits_ahead(self, index: int) -> Tensor:
        assert self.stream.ahead is not None
        with self.stream.not_loading():
            states = self.stream.hf_model.get_decoder().norm(self._entering(self.head, index))
            return self.stream.ahead.logits(self.batches[index].to(self.stream.device), states)

    def _embedded(self, batch: Tensor) -> Tensor:
        """Return what enters the first layer; models may scale the embedding's output."""
        return self._entries(input_ids=batch.to(self.stream.device))[0][0]

    def _others(self, shape: torch.Size) -> list[dict[str, Any]]:
        """Return the arguments of each layer beside hidden states of `shape`."""
        if shape not in self._calls:
            zeros = torch.zeros(shape, dtype=self.stream.dtype, device=self.stream.device)
            with torch.no_grad():
                self._calls[shape] = [others for _, others in self._entries(inputs_embeds=zeros)]
        return self._calls[shape]

    def _entries(self, **inputs: Tensor) -> list[tuple[Tensor, dict[str, Any]]]:
        """Return the hidden states and other arguments that each layer is called with when none of them runs."""
        entries: list[tuple[Tensor, dict[str, Any]]] = []

        def note(hidden: Tensor, others: dict[str, Any]) -> Tensor:
            entries.append((hidden, others))
            return hidden

        with self._standing_in(note):
            self.stream.hf_model.base_model(**inputs, use_cache=False)
        return entries

    @contextmanager
    def _standing_in(self, stand_in: StandIn) -> Iterator[None]:
        """Context manager: decoder layers return `stand_in(hidden, other arguments)` and do not run."""

        def given(hidden: Tensor, others: dict[str, Any]) -> Any:
            states = stand_in(hidden, others)
            return (states,) if self.stream.gives_tuples else states

        with standing_in(self.stream.layers, given), self.stream.not_loading():
            yield
