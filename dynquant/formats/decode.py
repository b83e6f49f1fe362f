"""`decode`: packed ggml blocks to float32 weights, for every quant type of the registry.

Plain PyTorch on any device, bit-equal to `gguf.quants.dequantize`: float32 products are formed in the same order.
The layouts are in the family modules; this one checks the bytes, picks the decoder and bounds the memory.
Encoding, and multiplying by packed weights without decoding them, live elsewhere.
"""

from collections.abc import Callable
from math import prod

import torch
from torch import Tensor

from dynquant.formats import codebook_quants, k_quants, plain_quants, quant_types
from dynquant.formats.quant_types import QuantType

_BlockDecoder = Callable[[Tensor], Tensor]
"""uint8 [n, block_bytes] -> float32 [n, block_size]"""

_DECODERS: dict[str, _BlockDecoder] = {
    name.removeprefix("decode_").upper(): function
    for module in (plain_quants, k_quants, codebook_quants)
    for name, function in vars(module).items()
    if name.startswith("decode_")
}

_CPU_CHUNK_WEIGHTS = 1 << 18
"""Per thread. Small enough that the allocator reuses the temporaries of a chunk: 2^24 was measured 2-3 times slower."""
_GPU_CHUNK_WEIGHTS = 1 << 24


def decode(quant_type: QuantType | str, packed: Tensor, shape: tuple[int, ...] | None = None) -> Tensor:
    """Return the weights of packed rows.

    Args:
        quant_type: the byte layout, or its name.
        packed: uint8 [..., row_bytes], on any device.
        shape: shape of the result; by default [..., row_length]. Its last dimension is the row.

    Returns:
        A new float32 tensor on the device of `packed`.

    Raises:
        PlanError: no quant type has this name.
        ValueError: `packed` is not uint8, does not hold whole blocks, or does not fill `shape`.
    """
    layout = quant_types.quant_type(quant_type) if isinstance(quant_type, str) else quant_type
    result_shape = _result_shape(layout, packed, shape)
    blocks = packed.reshape(-1, layout.block_bytes)
    decode_blocks = _DECODERS[layout.name]
    weights = torch.empty(blocks.shape[0], layout.block_size, dtype=torch.float32, device=packed.device)
    on_cpu = packed.device.type == "cpu"
    chunk_weights = _CPU_CHUNK_WEIGHTS * torch.get_num_threads() if on_cpu else _GPU_CHUNK_WEIGHTS
    chunk_blocks = max(1, chunk_weights // layout.block_size)
    for start in range(0, blocks.shape[0], chunk_blocks):
        stop = start + chunk_blocks
        weights[start:stop] = decode_blocks(blocks[start:stop])
    return weights.reshape(result_shape)


def _result_shape(layout: QuantType, packed: Tensor, shape: tuple[int, ...] | None) -> tuple[int, ...]:
    if packed.dtype != torch.uint8:
        raise ValueError(f"`packed` of {layout.name} must be uint8, got {packed.dtype}")
    if packed.dim() == 0 or packed.shape[-1] % layout.block_bytes:
        got = packed.shape[-1] if packed.dim() else "a scalar"
        raise ValueError(
            f"rows of {layout.name} are whole blocks of {layout.block_bytes} bytes, got {got} as the last dimension"
        )
    row_length = packed.shape[-1] // layout.block_bytes * layout.block_size
    stored = (*packed.shape[:-1], row_length)
    if shape is None:
        return stored
    if not shape or prod(shape) != prod(stored) or shape[-1] % layout.block_size:
        raise ValueError(
            f"`shape` {tuple(shape)} does not fit {tuple(packed.shape)} bytes of {layout.name}: they hold "
            f"{prod(stored)} weights in blocks of {layout.block_size} weights and {layout.block_bytes} bytes"
        )
    return tuple(shape)
