"""Joins safetensors files into one, a tensor in memory at a time. The bytes are those that the library would write."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from dynquant.checkpoints.fp8_values import TORCH_DTYPES, spans_of
from dynquant.checkpoints.safetensors_format import StoredTensor, lay_out
from dynquant.storage.atomic import writing

_ORDER = ["I64", "F64", "F32", "I32", "BF16", "F16", "F8_E4M3"]
"""The library's order of types: larger elements first."""
_NAME_OF = {dtype: name for name, dtype in TORCH_DTYPES.items()}


def merge_tensor_files(
    path: Path, parts: Sequence[Path], tensors: Mapping[str, Tensor], header: Mapping[str, object]
) -> None:
    """Write all tensors of `parts`, and `tensors`, to `path`, whole or not at all.

    Raises:
        WriteError: no space or no permission.
    """
    spans = {name: span for part in parts for name, span in spans_of(part).items()}
    entries = [StoredTensor(name, span.dtype, span.shape) for name, span in spans.items()]
    entries += [StoredTensor(name, _NAME_OF[tensor.dtype], tuple(tensor.shape)) for name, tensor in tensors.items()]
    entries.sort(key=lambda entry: (_ORDER.index(entry.dtype), entry.key))
    layout = lay_out(entries, {"dynquant": json.dumps(header, sort_keys=True)})
    with writing(path) as temporary, temporary.open("wb") as file:
        file.write(layout.header)
        for entry in entries:
            values = spans[entry.key].read() if entry.key in spans else tensors[entry.key]
            file.write(memoryview(values.contiguous().view(-1).view(torch.uint8).numpy()))
