"""Common ground of GGUF types and compressed-tensors schemes, and the words for choosing among them."""

from math import prod
from typing import NamedTuple, Protocol

from dynquant.formats.plain_quants import DTYPE_BYTES


class StoredTensor(NamedTuple):
    """One tensor of a safetensors file; `dtype` is the format's own word. Parts of a layer have a `key` inside it."""

    key: str
    dtype: str
    shape: tuple[int, ...]

    @property
    def num_bytes(self) -> int:
        return prod(self.shape) * DTYPE_BYTES[self.dtype]


class Choice(NamedTuple):
    """The format of one tensor, and why it was taken."""

    type: str
    """Name of a quant type or of a scheme."""
    reason: str
    """For people; it is written into the plan."""


class StorageFormat(Protocol):
    """A way to store a tensor: a quant type of GGUF, or a compressed-tensors scheme with its group size."""

    @property
    def name(self) -> str: ...

    @property
    def block_size(self) -> int:
        """Neighbouring weights of a row that are stored together; it divides every row."""

    def tensor_bytes(self, shape: tuple[int, ...]) -> int:
        """Return the bytes of a tensor whose last dimension is the row."""
