"""Weights as a safetensors file holds them: floats, or FP8 values with one float32 scale for each block.

FP8 checkpoints (DeepSeek V3, R1) store a matrix as F8_E4M3 beside `NAME_scale_inv`, float32 [rows / b, columns / b]
rounded up; a weight is its value times the scale of its block. Kept as stored, a layer takes a quarter of its float32.
"""

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from dynquant.checkpoints.safetensors_format import read_header

TORCH_DTYPES = {
    "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "F8_E4M3": torch.float8_e4m3fn,
    "F64": torch.float64, "I64": torch.int64, "I32": torch.int32,
}  # fmt: skip


@dataclass(frozen=True)
class StoredValues:
    """`data` [..., rows, columns]; FP8 comes with `scale` [..., block rows, block columns], `block` (rows, columns)."""

    data: Tensor
    scale: Tensor | None = None
    block: tuple[int, int] = (128, 128)

    @property
    def num_bytes(self) -> int:
        return self.data.nbytes + (0 if self.scale is None else self.scale.nbytes)

    def to(self, dtype: torch.dtype) -> Tensor:
        """The values; FP8 is scaled in float32 and rounded once."""
        if self.scale is None:
            return self.data.to(dtype)
        return self._scaled(self.data.to(torch.float32)).to(dtype)

    def write_to(self, out: Tensor) -> None:
        """Give a tensor of the same shape the values, as `to` its type."""
        if self.scale is None:
            out.copy_(self.data)
        elif out.dtype == torch.float32:
            self._scaled(out.copy_(self.data))
        else:
            out.copy_(self.to(out.dtype))

    def _scaled(self, values: Tensor) -> Tensor:
        """Multiplies float32 values of `data` with their scales, in place."""
        assert self.scale is not None
        block_rows, block_columns = self.block
        columns = values.shape[-1]
        for number in range(self.scale.shape[-2]):
            scales = self.scale[..., number, :].repeat_interleave(block_columns, -1)[..., :columns]
            values.narrow(-2, number * block_rows, min(block_rows, values.shape[-2] - number * block_rows)).mul_(
                scales.unsqueeze(-2)
            )
        return values

    def moved(self, device: torch.device | str) -> "StoredValues":
        """The same on another device."""
        return StoredValues(self.data.to(device), None if self.scale is None else self.scale.to(device), self.block)


@dataclass(frozen=True)
class FileSpan:
    """Where a tensor lies: `offset` bytes from the start of a file."""

    path: Path
    offset: int
    dtype: str
    shape: tuple[int, ...]

    @property
    def row_values(self) -> int:
        """Values of one slice of the first dimension."""
        return 1 if not self.shape else torch.Size(self.shape[1:]).numel()

    def read(self, index: int | slice | None = None, *, count: int | None = None) -> Tensor:
        """The tensor, slice or range `index` of its first dimension, or the first `count` values of that.

        Bytes go from the file into memory that the tensor owns; mapped pages would count as this process's memory for
        as long as the file is open. Safe to call from several threads.

        Raises:
            OSError: the file is gone, or ends early.
        """
        dtype = TORCH_DTYPES[self.dtype]
        first = 0
        shape = self.shape
        if isinstance(index, slice):
            first, stop, _ = index.indices(shape[0])
            shape = (max(0, stop - first), *shape[1:])
        elif index is not None:
            first, shape = index, shape[1:]
        total = torch.Size(shape).numel()
        if count is not None and count < total:
            shape, total = (count,), count
        start = first * self.row_values
        buffer = torch.empty(total * dtype.itemsize, dtype=torch.uint8)
        _read_into(self.path, self.offset + start * dtype.itemsize, buffer)
        return buffer.view(dtype).reshape(shape)


def spans_of(path: Path) -> dict[str, FileSpan]:
    """Where each tensor of a safetensors file lies.

    Raises:
        CheckpointError: not a complete safetensors file.
    """
    header = read_header(path)
    with path.open("rb") as file:
        start = 8 + int.from_bytes(file.read(8), "little")
    return {
        name: FileSpan(path, start + entry["data_offsets"][0], entry["dtype"], tuple(entry["shape"]))
        for name, entry in header.items()
    }


def _read_into(path: Path, offset: int, buffer: Tensor) -> None:
    rest = memoryview(buffer.numpy())
    with path.open("rb", buffering=0) as file:
        file.seek(offset)
        while rest:
            taken = file.readinto(rest[: 1 << 28])  # type: ignore[attr-defined]
            if not taken:
                raise OSError(f"{path} ends {len(rest):,} bytes early")
            rest = rest[taken:]
