"""Blocks of every (tensor, type), encoded once and kept on disk, for all plans that are tried.

    DIR/ggml-1f2e3d4c5b6a/blk.3.ffn_down_exps.weight.IQ2_XXS

The folder's name holds a hash of what decides the bytes: checkpoint, statistics, second moments, encoder and its
version, and that of dynquant. A file is a tensor's blocks and nothing else, in the order of GGUF; it appears whole or
not at all; blocks that protect super weights have a name of their own. Float types are not kept: they cost no more to
make than to read.
"""

import hashlib
import json
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import groupby
from operator import attrgetter
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from torch import nn

from dynquant import __version__
from dynquant.calibration.second_moments import SecondMoments
from dynquant.calibration.stage import StatsFile
from dynquant.checkpoints.model import Model
from dynquant.encoding.interface import Encoder
from dynquant.encoding.parts import PartLimits, TensorPart, WeightChecks
from dynquant.encoding.stream import Guidance, TensorEncoder, encoder_version, guidance_of
from dynquant.errors import WriteError
from dynquant.formats import decode
from dynquant.formats.quant_types import QUANT_TYPES, QuantType
from dynquant.resources import count_mapped, free_memory
from dynquant.running.live_weights import LiveWeights
from dynquant.session import Progress, ignore_progress
from dynquant.storage.atomic import write_atomically
from dynquant.workers import side_by_side

ENCODED_NAME = "encoded"
"""The folder of all stores beside a plan."""


class WeightStore(Protocol):
    """Weights of a model in the formats that plans choose among, as the written files have them."""

    @property
    def model(self) -> Model: ...

    @property
    def fixed(self) -> Mapping[str, str]:
        """Formats of tensors that no plan decides, and that differ from the original's."""

    def live(self, hf_model: nn.Module) -> LiveWeights:
        """Return the places of the weights in the running model."""

    def is_float(self, type_name: str) -> bool:
        """Return whether a format has no codes."""

    def original(self, name: str) -> torch.Tensor:
        """Return the weights of a tensor as they were, float32."""

    def fill(self, names_and_types: Iterable[tuple[str, str]], progress: Progress = ignore_progress) -> None:
        """Encode what is not there."""

    def decoded(self, name: str, type_name: str, device: torch.device | str = "cpu") -> torch.Tensor:
        """Return the weights of a tensor in a format, float32 on `device`."""


@dataclass(frozen=True)
class EncodedStore:
    """Encodes tensors of `model` on demand: a `WeightStore` of quant types.

    `directory` is this store's own, from `store_directory`.
    """

    model: Model
    guidance: Guidance
    encoder: Encoder
    directory: Path
    threads: int | None = None
    checks: WeightChecks | None = None
    """Are told of the weights of tensors that are encoded, not of those whose blocks are there."""
    limits: PartLimits = field(default_factory=PartLimits)

    @property
    def fixed(self) -> Mapping[str, str]:
        return {}

    @cached_property
    def _tensors(self) -> TensorEncoder:
        return TensorEncoder(self.model, self.guidance, self.encoder, self.threads, self.checks, self.limits)

    def live(self, hf_model: nn.Module) -> LiveWeights:
        """Return the places of GGUF tensors in the running model."""
        return LiveWeights(self.model, hf_model)

    def is_float(self, type_name: str) -> bool:
        """Return whether a quant type is a float type."""
        return QUANT_TYPES[type_name].is_float

    def original(self, name: str) -> torch.Tensor:
        """Return a tensor of the original, float32."""
        return self.model.source.load(name)

    def packed(self, name: str, type_name: str) -> torch.Tensor:
        """Blocks of a tensor, uint8 [..., rows, row_bytes], from disk where they were encoded before.

        Only what is used of them is read.

        Raises:
            EncodeError: NaN or Inf weights, or a type that needs statistics the tensor has none of.
            WriteError: the disk is full or cannot be written to.
        """
        stored = QUANT_TYPES[type_name]
        shape = tuple(self.model.source.info(name).shape)
        file = self._file(name, stored)
        if self.is_there(name, stored):
            content = np.memmap(file, dtype=np.uint8, mode="c")  # copy on write: torch wants writable memory
            count_mapped(content.size)
            return torch.from_numpy(content).view(*shape[:-1], stored.row_bytes(shape[-1]))
        packed = self._tensors.tensor(name, stored)
        if not stored.is_float:
            write_atomically(file, packed.contiguous().numpy().tobytes())
        return packed.view(*shape[:-1], -1)

    def parts(self, parts: Iterable[TensorPart]) -> Iterator[tuple[TensorPart, torch.Tensor]]:
        """Yield parts of tensors with their blocks, in order: a `stream.PartStream`. Tensors are encoded whole, side by
        side."""
        tensors = {name: list(of_tensor) for name, of_tensor in groupby(parts, key=attrgetter("name"))}
        blocks = self._side_by_side([(name, of_tensor[0].quant_type) for name, of_tensor in tensors.items()])
        for of_tensor, packed in zip(tensors.values(), blocks, strict=True):
            for part in of_tensor:
                yield part, packed.reshape(-1)[part.offset : part.offset + part.num_bytes]

    def fill(self, names_and_types: Iterable[tuple[str, str]], progress: Progress = ignore_progress) -> None:
        """Encode tensors, side by side, in types in which they are not on disk; raises as `packed`."""
        pairs = [(name, QUANT_TYPES[type_name]) for name, type_name in names_and_types]
        missing = [(name, stored) for name, stored in pairs if not (stored.is_float or self.is_there(name, stored))]
        if missing:
            progress("encoding", 0, len(missing), unit="tensors")
        for done, _ in enumerate(self._side_by_side(missing), 1):
            progress("encoding", done, len(missing), unit="tensors", tensor=missing[done - 1][0])

    def _side_by_side(self, pairs: Sequence[tuple[str, QuantType]]) -> Iterator[torch.Tensor]:
        """Yield the blocks of tensors in types, in order."""
        self.encoder.prepare(dict.fromkeys(stored for name, stored in pairs if not self.is_there(name, stored)))

        def cost(pair: tuple[str, QuantType]) -> int:
            packed = pair[1].tensor_bytes(tuple(self.model.source.info(pair[0]).shape))
            if self.is_there(*pair):
                return packed
            return packed + max(map(encoder.needed_bytes, encoder.parts_of(*pair)))

        encoder, budget = self._tensors, free_memory() // 2 if self.limits.memory is None else self.limits.memory
        packing = {"cost": cost, "budget": budget}
        return side_by_side(lambda pair: self.packed(pair[0], pair[1].name), pairs, encoder.workers, **packing)

    def _file(self, name: str, stored: QuantType) -> Path:
        protected = self.guidance.protected.get(name)
        ending = f"-{hashlib.sha256(repr(protected).encode()).hexdigest()[:8]}" if protected else ""
        return self.directory / f"{name}.{stored.name}{ending}"

    def is_there(self, name: str, stored: QuantType) -> bool:
        """Return whether a tensor's blocks are on disk."""
        file, size = self._file(name, stored), stored.tensor_bytes(tuple(self.model.source.info(name).shape))
        return file.is_file() and file.stat().st_size == size

    def decoded(self, name: str, type_name: str, device: torch.device | str = "cpu") -> torch.Tensor:
        """The tensor as a runtime sees it, float32 in its own shape, decoded on `device`."""
        shape = tuple(self.model.source.info(name).shape)
        return decode(type_name, self.packed(name, type_name).to(device), shape)


def open_store(
    model: Model, stats: StatsFile | None, encoder: Encoder, parent: Path, threads: int | None = None
) -> EncodedStore:
    """Return the store below `parent` of what `encoder` makes under statistics and the second moments beside them.

    Raises:
        StatsError: the second moments are damaged, or of another calibration.
        WriteError: the directory cannot be made.
    """
    moments = stats.moments if stats is not None and encoder.uses_hessians else None
    directory = store_directory(parent, model, "" if stats is None else stats.hash, encoder, moments)
    return EncodedStore(model, guidance_of(stats and stats.stats, moments), encoder, directory, threads)


def store_directory(
    parent: Path, model: Model, stats_hash: str, encoder: Encoder, moments: SecondMoments | None = None
) -> Path:
    """Return the directory for blocks of this checkpoint, these statistics and second moments, and this encoder.

    Raises:
        WriteError: the directory cannot be made.
    """
    content = [model.fingerprint, stats_hash, encoder.name, encoder_version(encoder)]
    if moments is not None:
        content.append(moments.identity)
    return folder_of(parent, encoder.name, content)


def folder_of(parent: Path, name: str, content: Sequence[str]) -> Path:
    """Make and return the directory of a store below `parent`, named by a hash of what decides its bytes:
    `content`, and the version of dynquant.

    Raises:
        WriteError: it cannot be made.
    """
    directory = parent / f"{name}-{hashlib.sha256(json.dumps([__version__, *content]).encode()).hexdigest()[:12]}"
    make_directory(directory)
    return directory


def make_directory(directory: Path) -> None:
    """Make the directory of a store; raise WriteError when it cannot be made."""
    try:
        directory.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise WriteError(f"{directory} cannot be made: {error.strerror or os.strerror(error.errno or 0)}.") from error
