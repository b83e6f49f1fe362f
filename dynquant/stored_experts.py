"""The matrices of a layer's routed experts as the checkpoint stores them, converted one at a time where they are used.

They stand in for transformers' fused parameters [E, rows, columns] in `expert_hooks`. In memory are the stored bytes
(half of float32 for bfloat16, a quarter for FP8) and the one matrix that is multiplied with; a layer larger than
the memory reads each matrix again for every batch. A backward pass converts again instead of keeping float32 copies.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from dynquant.stored_values import StoredValues

ReadExpert = Callable[[int], tuple[StoredValues, ...]]
"""Expert -> its parts, which follow each other as rows: (gate, up), or (down,)."""


class StoredExperts:
    """Experts `shape` [E, rows, columns] given as `dtype` on `device`.

    `kept` holds stacks [E, rows of the part, columns]; without it every access calls `read`.
    """

    def __init__(
        self,
        shape: tuple[int, ...],
        dtype: torch.dtype,
        device: torch.device | str,
        read: ReadExpert,
        kept: tuple[StoredValues, ...] | None = None,
    ) -> None:
        self.shape = torch.Size(shape)
        self._dtype, self._device, self._read, self._kept = dtype, device, read, kept
        self.zeroed: list[tuple[int, int, int]] = []
        """Expert, row and column of weights that are to read as zero."""

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, expert: int) -> Tensor:
        """The matrix [rows, columns] of one expert."""
        if self._kept is None:
            parts = tuple(part.moved(self._device) for part in self._read(expert))
        else:
            parts = tuple(
                StoredValues(stack.data[expert], None if stack.scale is None else stack.scale[expert], stack.block)
                for stack in self._kept
            )
        matrix = parts[0].to(self._dtype) if len(parts) == 1 else torch.cat([part.to(self._dtype) for part in parts])
        for of, row, column in self.zeroed:
            if of == expert:
                matrix = matrix.clone()
                matrix[row, column] = 0
        return matrix

    def product(self, x: Tensor, expert: int) -> Tensor:
        """x [T, columns] -> [T, rows], differentiable in x."""
        return _Product.apply(x, self, expert)


class _Product(torch.autograd.Function):
    """A product with a matrix that is made again for the backward pass."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, experts: StoredExperts, expert: int) -> Tensor:
        ctx.experts, ctx.expert = experts, expert
        return functional.linear(x, experts[expert])

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        return gradients[0].mm(ctx.experts[ctx.expert]), None, None
