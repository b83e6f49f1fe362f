"""Hidden states that enter every stage of a model, for all batches, in files: one file a stage, one batch after the
other.

Files are read and written as they are used, so that only one batch is in memory; where there is room, the system keeps
them in its cache. A finished stage can be used again after a kill.
"""

import os
import shutil
from collections.abc import Sequence
from math import prod
from pathlib import Path

import torch
from torch import Tensor

from dynquant.errors import StatsError


class HiddenStates:
    """Tensors [windows, window, channels] of `shapes`, one a batch, of any number of stages.

    Raises:
        StatsError: the directory cannot be written to.
    """

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
                rest = memoryview(data)
                while rest:
                    rest = rest[file.write(rest) :]
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
            os.fsync(file.fileno())

    def forget(self, stage: int) -> None:
        """Give back the space of a stage."""
        self._path(stage).unlink(missing_ok=True)

    def check_space(self, stages: int) -> None:
        """Refuse a directory without room for `stages` at a time.

        Raises:
            StatsError: with both numbers.
        """
        there = sum(path.stat().st_size for path in self._directory.glob(f"{self._name}-*.bin"))
        free = shutil.disk_usage(self._directory).free + there
        if stages * self.stage_bytes > free:
            raise StatsError(
                f"Hidden states of {stages} layers take {stages * self.stage_bytes:,} bytes, but {self._directory} has "
                f"{free:,} free. Name a directory on a larger disk with --spill, or calibrate on fewer --tokens."
            )

    def _path(self, stage: int) -> Path:
        return self._directory / f"{self._name}-{stage:05d}.bin"
