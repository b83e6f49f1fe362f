"""What every encoder offers, and the refusals that all of them share.

An encoder turns float weights into the packed blocks of a quant type. `check_request` is what can be told from shapes
and the importance matrix alone; whether the weights themselves are finite is for the encoder to see while it reads
them, so that a tensor larger than the cache is not walked twice.
"""

from typing import Protocol

import torch

from dynquant.errors import EncodeError
from dynquant.quant_types import QuantType


class Encoder(Protocol):
    """Weights to packed blocks. Equal inputs give equal bytes, whatever `threads` is."""

    name: str

    def encode(
        self,
        quant_type: QuantType,
        weights: torch.Tensor,
        importance: torch.Tensor | None = None,
        threads: int | None = None,
        *,
        name: str = "tensor",
    ) -> torch.Tensor:
        """Encode all rows of `weights`.

        Args:
            quant_type: The byte layout to produce.
            weights: [rows, row_length], or [experts, rows, row_length]; any floating dtype, read as float32.
            importance: E[x^2] per input channel, [row_length] or [experts, row_length]; None where the type allows it.
            threads: How many threads to use; None for one per core.
            name: The tensor's name, for error messages.

        Returns:
            uint8 [..., rows, row_bytes].

        Raises:
            EncodeError: see `check_request`; NaN, Inf or weights too large for the type.
        """


def check_request(
    quant_type: QuantType, weights: torch.Tensor, importance: torch.Tensor | None, *, name: str
) -> torch.Tensor | None:
    """Refuse what no encoder can do; otherwise give the importance as float32 [experts, row_length], or None.

    A 2-D tensor counts as one expert; an importance without an expert dimension holds for every expert.

    Raises:
        EncodeError: not a 2-D or 3-D floating tensor, a row length that the block size does not divide, a type that
            needs an importance matrix without one, or an importance of the wrong shape or with NaN, Inf or negative
            values.
    """
    if weights.dim() not in (2, 3) or not weights.is_floating_point():
        raise EncodeError(
            f"`{name}` is {weights.dtype} of shape {tuple(weights.shape)}; only floating tensors [rows, row_length] or "
            "[experts, rows, row_length] can be encoded. Keep it as F32."
        )
    row_length = weights.shape[-1]
    if row_length % quant_type.block_size:
        raise EncodeError(
            f"`{name}` has rows of {row_length}, which blocks of {quant_type.block_size} ({quant_type.name}) do not "
            f"divide. Use a type with smaller blocks, such as {quant_type.fallback or 'F16'}."
        )
    if importance is not None:
        return _checked_importance(weights, importance, name=name)
    if quant_type.needs_imatrix:
        raise EncodeError(
            f"`{name}` cannot be encoded as {quant_type.name} without an importance matrix. Calibrate the model first, "
            "or choose a type that does not need one."
        )
    return None


def _checked_importance(weights: torch.Tensor, importance: torch.Tensor, *, name: str) -> torch.Tensor:
    experts = weights.shape[0] if weights.dim() == 3 else 1
    row_length = weights.shape[-1]
    if tuple(importance.shape) not in ((row_length,), (experts, row_length)):
        raise EncodeError(
            f"The importance matrix of `{name}` has shape {tuple(importance.shape)}, but the weights "
            f"{tuple(weights.shape)} need [{row_length}] or [{experts}, {row_length}]. The statistics are of another "
            "model; calibrate this one."
        )
    importance = importance.detach().to(device="cpu", dtype=torch.float32)
    if not torch.isfinite(importance).all() or (importance < 0).any():
        raise EncodeError(
            f"The importance matrix of `{name}` holds NaN, Inf or negative values, but it is a mean of squares. "
            "Calibrate again; if that repeats, the model's activations overflow."
        )
    return importance.expand(experts, row_length).contiguous()
