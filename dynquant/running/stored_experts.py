"""The matrices of a layer's routed experts as the checkpoint stores them, converted one at a time where they are used.

They stand in for transformers' fused parameters [E, rows, columns] in `expert_hooks`. In memory are the stored bytes
(half of float32 for bfloat16, a quarter for FP8) and the one matrix that is multiplied with; a layer larger than
the memory reads each matrix again for every batch. A backward pass converts again instead of keeping float32 copies.

Products use one piece of memory for all matrices. Allocated anew among what a backward pass keeps, each would leave a
hole that the next one does not fit into: 1.1 GB of them in a layer of 64 experts of 25 MB.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from dynquant.checkpoints.safetensors_source import StoredValues

ReadExpert = Callable[[int], tuple[StoredValues, ...]]
"""Expert -> its parts, which follow each other as rows: (gate, up), or (down,)."""


class StoredExperts:
    """Experts `shape` [E, rows, columns], given in the type and on the device of `scratch`.

    `kept` holds stacks [E, rows of the part, columns]; without it every access calls `read`. `scratch`, which is flat,
    holds the matrix of one product at a time and has room for the largest.
    """

    def __init__(
        self, shape: tuple[int, ...], read: ReadExpert, scratch: Tensor, kept: tuple[StoredValues, ...] | None = None
    ) -> None:
        self.shape = torch.Size(shape)
        self._read, self._scratch, self._kept = read, scratch, kept
        self.zeroed: list[tuple[int, int, int]] = []
        """Expert, row and column of weights that are to read as zero."""

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, expert: int) -> Tensor:
        """The matrix [rows, columns] of one expert."""
        return self._write(expert, self._scratch.new_empty(self.shape[1:]))

    def matrix_of_product(self, expert: int) -> Tensor:
        """The same in the scratch memory, where it lies until any other product."""
        return self._write(expert, self._scratch[: self.shape[1:].numel()].view(self.shape[1:]))

    def product(self, x: Tensor, expert: int, *, is_transposed: bool = False) -> Tensor:
        """x [T, columns] -> [T, rows], differentiable in x; a transposed matrix is [columns, rows]."""
        return _Product.apply(x, self, expert, is_transposed)

    def _write(self, expert: int, matrix: Tensor) -> Tensor:
        parts = self._parts(expert)
        for part, rows in zip(parts, matrix.split([len(part.data) for part in parts]), strict=True):
            part.write_to(rows)
        for of, row, column in self.zeroed:
            if of == expert:
                matrix[row, column] = 0
        return matrix

    def _parts(self, expert: int) -> tuple[StoredValues, ...]:
        if self._kept is None:
            return tuple(part.moved(self._scratch.device) for part in self._read(expert))
        return tuple(
            StoredValues(stack.data[expert], None if stack.scale is None else stack.scale[expert], stack.block)
            for stack in self._kept
        )


class _Product(torch.autograd.Function):
    """A product with a matrix that is made again for the backward pass."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, experts: StoredExperts, expert: int, is_transposed: bool) -> Tensor:
        # Not the matrix, which would stay in memory until then.
        ctx.experts, ctx.expert, ctx.is_transposed = experts, expert, is_transposed
        matrix = experts.matrix_of_product(expert)
        return x @ matrix if is_transposed else functional.linear(x, matrix)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None, None]:
        matrix = ctx.experts.matrix_of_product(ctx.expert)
        return gradients[0].mm(matrix.T if ctx.is_transposed else matrix), None, None, None
