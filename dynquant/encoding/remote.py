"""Encodes parts on a Ray cluster: every part is one task, and its blocks come back as bytes.

    from storage    workers open checkpoint, statistics and second moments by path, which every node must see
    shipped         this process reads them, and sends a worker what its part needs

Parts are those of a local export, and so are their bytes; a node that reads another checkpoint, or runs another version
of dynquant or PyTorch, is refused.
"""

import socket
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from dynquant import __version__
from dynquant.calibration.second_moments import SecondMoments, load_beside
from dynquant.calibration.statistics import CalibrationStats
from dynquant.checkpoints.model import Model
from dynquant.encoding import stream
from dynquant.encoding.interface import Encoder, ProtectedWeight
from dynquant.encoding.parts import SummedRows, TensorPart, WeightChecks, WeightSums
from dynquant.errors import ClusterError, DynquantError
from dynquant.running.cluster import RayPool, StoredModel, TaskNeeds


@dataclass(frozen=True)
class EncoderChoice:
    """An encoder that workers make for themselves, of the versions of the driver."""

    name: str
    device: str
    threads: int
    version: str
    tool_version: str = __version__

    @classmethod
    def of(cls, encoder: Encoder, device: str, threads: int) -> "EncoderChoice":
        return cls(encoder.name, device, threads, stream.encoder_version(encoder))


@dataclass(frozen=True)
class StoredFiles:
    """Files that workers encode a part from, and the protected weights by tensor; hashable, for `open_stored`."""

    model: StoredModel
    stats: Path | None = None
    use_moments: bool = False
    protected: tuple[tuple[str, tuple[ProtectedWeight, ...]], ...] = ()


@dataclass(frozen=True)
class RemoteEncoding:
    """Encodes parts on `pool`; a `PartStream`. With `shipped`, from what this process reads for them."""

    pool: RayPool
    choice: EncoderChoice
    needs: TaskNeeds
    files: StoredFiles
    shipped: stream.TensorEncoder | None = None
    checks: WeightChecks | None = None
    """Compare the weights that workers read; those that are shipped were compared when this process read them."""

    def __call__(self, parts: Iterable[TensorPart]) -> Iterator[tuple[TensorPart, torch.Tensor]]:
        if self.shipped is None:
            sums = self.checks is not None and self.checks.is_needed
            encode = partial(_encode_from_storage, self.choice, self.files, sums)
            for part, (blocks, rows) in self.pool.run(encode, parts, self.needs):
                if self.checks is not None and rows is not None:
                    self.checks.take(part.name, part.shape, rows)
                yield part, _tensor(blocks)
        else:
            unstored = []
            for part in parts:
                if self.shipped.is_stored(part):
                    yield part, self.shipped.part(part)
                else:
                    unstored.append(part)
            encode, load = partial(_encode_shipped, self.choice), self.shipped.arguments
            for part, blocks in self.pool.run(encode, unstored, self.needs, load=load):
                yield part, _tensor(blocks)


def _tensor(blocks: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(np.array(blocks))  # Ray's array is a read-only view of its store


def _encode_from_storage(
    choice: EncoderChoice, files: StoredFiles, sums: bool, part: TensorPart
) -> tuple[np.ndarray, SummedRows | None]:
    """Return the blocks of a part and, with `sums`, the checksum of the weights that they were made from."""
    model, stats, moments = open_stored(files)
    guidance, seen = stream.guidance_of(stats, moments, dict(files.protected)), WeightSums() if sums else None
    encoder = stream.TensorEncoder(model, guidance, worker_encoder(choice), choice.threads, seen)
    return encoder.part(part).numpy(), seen and seen.rows


def _encode_shipped(choice: EncoderChoice, arguments: Mapping[str, Any]) -> np.ndarray:
    return worker_encoder(choice).encode(**arguments, threads=choice.threads).numpy()


@cache
def worker_encoder(choice: EncoderChoice) -> Encoder:
    """Return the encoder of a worker process. Raises ClusterError: it would be of other versions than the driver's."""
    encoder = stream.load_encoder(choice.name, choice.device)
    version = stream.encoder_version(encoder)
    if (__version__, version) != (choice.tool_version, choice.version):
        raise ClusterError(
            f"{socket.gethostname()} has dynquant {__version__} with the {choice.name} encoder's library {version}, "
            f"but the command runs with {choice.tool_version} and {choice.version}; their bytes may differ. Install "
            "the same versions on all nodes."
        )
    return encoder


@cache
def open_stored(files: StoredFiles) -> tuple[Model, CalibrationStats | None, SecondMoments | None]:
    """Open them, once in each worker process; weights are read when a part needs them.

    Raises:
        ClusterError: they cannot be read there, or are others.
    """
    way_out = "Put it on storage that every node has at the same path, or give --ship-weights."
    model = files.model.open(way_out)
    where = f"{socket.gethostname()} cannot read what the command works on"
    try:
        stats = CalibrationStats.load(files.stats) if files.stats else None
        moments = load_beside(files.stats, stats) if files.stats and stats and files.use_moments else None
    except DynquantError as error:
        raise ClusterError(f"{where}: {error} {way_out}") from error
    if files.use_moments and moments is None:
        raise ClusterError(f"{where}: the files of its calibration have other second moments. {way_out}")
    return model, stats, moments
