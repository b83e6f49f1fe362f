"""A part of a checkpoint under other names, as a tensor source: a language model, or vision tower and projector."""

from collections.abc import Mapping

import torch

from dynquant.checkpoints.tensor_source import TensorInfo, TensorSource


class RenamedSource:
    """Tensors of another source. `names` maps a name here to the stored one; `rows` to one row of a stored matrix."""

    def __init__(
        self, source: TensorSource, names: Mapping[str, str], rows: Mapping[str, tuple[str, int]] | None = None
    ) -> None:
        self._source = source
        self._names = dict(names)
        self._rows = dict(rows or {})

    @property
    def fingerprint(self) -> str:
        """Fingerprint of the whole checkpoint."""
        return self._source.fingerprint

    def names(self) -> list[str]:
        return [*self._names, *self._rows]

    def stored_name(self, name: str) -> str:
        """Return the checkpoint's own name of a tensor."""
        return self._rows[name][0] if name in self._rows else self._names[name]

    def info(self, name: str) -> TensorInfo:
        info = self._source.info(self.stored_name(name))
        return TensorInfo(name, info.shape[1:] if name in self._rows else info.shape, info.dtype)

    def load(self, name: str, index: int | slice | None = None) -> torch.Tensor:
        if name not in self._rows:
            return self._source.load(self._names[name], index)
        stored, row = self._rows[name]
        values = self._source.load(stored, slice(row, row + 1))[0]
        return values if index is None else values[index]
