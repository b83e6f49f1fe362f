"""Lookup tables of the codebook types, taken from the `gguf` package and kept once per device.

Rows of small integers are stored as one int64 (8 values) or int32 (4 values) each, so that a lookup moves a whole
row as a single element: about four times faster on a CPU than gathering float rows. `lookup` unpacks them again.
"""

import functools

import numpy as np
import torch
from gguf import quants
from torch import Tensor

_PACKED_DTYPE = {4: torch.int32, 8: torch.int64}
_ALL_BYTES = np.arange(256, dtype=np.uint8)


def lookup(table: Tensor, index: Tensor) -> Tensor:
    """Rows of a packed table as int8: [n, k] indices of any integer type -> [n, k * row length]."""
    rows = table.index_select(0, index.reshape(-1).to(torch.int32))
    return rows.view(torch.int8).reshape(index.shape[0], -1)


def lookup_value(table: Tensor, index: Tensor) -> Tensor:
    """Entries of a float table, in the shape of `index`."""
    return table.index_select(0, index.reshape(-1).to(torch.int32)).reshape(index.shape)


@functools.cache
def grid(type_name: str, device: torch.device) -> Tensor:
    """The codebook of an IQ2 or IQ3 type as packed int8 rows of 8 or 4 magnitudes."""
    return _packed(grid_rows(type_name), device)


@functools.cache
def ternary_grid(device: torch.device) -> Tensor:
    """The IQ1 codebook in eighths, with the shift of +1/8 (entries 0-2047) or -1/8 (2048-4095) already added."""
    eighths = 8 * grid_rows("IQ1_S")
    delta = 8 * float(quants.IQ1_S.delta)
    return _packed(np.concatenate((eighths + delta, eighths - delta)), device)


@functools.cache
def bits(device: torch.device) -> Tensor:
    """Byte -> its eight bits, lowest first, as packed int8 0 or 1."""
    return _packed(_byte_bits(), device)


@functools.cache
def signs(device: torch.device) -> Tensor:
    """Byte -> eight signs as packed int8: a set bit is -1, a clear one +1."""
    return _packed(1 - 2 * _byte_bits(), device)


@functools.cache
def even_signs(device: torch.device) -> Tensor:
    """Seven stored sign bits -> eight signs as packed int8; the eighth makes the number of minus signs even."""
    full_bytes = np.frombuffer(quants.IQ2_XXS.ksigns, dtype=np.uint8)
    return _packed((1 - 2 * _byte_bits())[full_bytes], device)


@functools.cache
def values(type_name: str, device: torch.device) -> Tensor:
    """The values of a type whose weights are picked from a few (IQ4_NL, MXFP4: sixteen; Q1_0: two) as float32."""
    picked = (-1, 1) if type_name == "Q1_0" else getattr(quants, type_name).kvalues
    return torch.tensor(picked, dtype=torch.float32, device=device)


@functools.cache
def e8m0_halves(device: torch.device) -> Tensor:
    """E8M0 byte -> half of the power of two it stands for (the values of MXFP4 are doubled)."""
    return torch.from_numpy(quants.MXFP4.e8m0_to_fp32_half(_ALL_BYTES).astype(np.float32)).to(device)


@functools.cache
def ue4m3_halves(device: torch.device) -> Tensor:
    """Unsigned E4M3 byte -> half of the number it stands for (the values of NVFP4 are doubled)."""
    return torch.from_numpy(quants.NVFP4.ue4m3_to_fp32(_ALL_BYTES).astype(np.float32)).to(device)


def grid_rows(type_name: str) -> np.ndarray:
    """Codebook [entries, row length] in float32."""
    layout = getattr(quants, type_name)
    layout.init_grid()
    return layout.grid.reshape(layout.grid_shape)


def _packed(rows: np.ndarray, device: torch.device) -> Tensor:
    row_values = torch.from_numpy(np.ascontiguousarray(rows, dtype=np.int8))
    return row_values.view(_PACKED_DTYPE[rows.shape[1]]).flatten().to(device)


def _byte_bits() -> np.ndarray:
    return np.unpackbits(_ALL_BYTES[:, None], axis=1, bitorder="little").astype(np.int8)
