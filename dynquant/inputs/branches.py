"""A question after a held prefix as a tree: its tokens, and the answers that each continue them.

One forward pass takes several trees as padded rows, [question | answer 1 | answer 2 | ... | padding], under a mask by
which an answer sees the prefix, the question and itself. Positions go on from the question in every answer.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import takewhile
from typing import TypeVar

import numpy as np
import torch
from torch import Tensor

Item = TypeVar("Item")


@dataclass(frozen=True)
class Branches:
    """Token ids after a held prefix, and of what may follow them."""

    suffix: Sequence[int]
    answers: Sequence[Sequence[int]]

    @property
    def num_tokens(self) -> int:
        """Tokens that are run: the last one of an answer predicts nothing that is scored."""
        return len(self.suffix) + self.num_rows - 1

    @property
    def num_rows(self) -> int:
        """Rows of logits: one after the suffix, for all first tokens, and one before each later token."""
        return 1 + sum(len(answer) - 1 for answer in self.answers)


@dataclass(frozen=True)
class TreeBatch:
    """Trees as rows of one batch, on the CPU."""

    ids: Tensor  # int64 [n, T]
    positions: Tensor  # int64 [n, T]
    branch: Tensor  # int64 [n, T]: 0 in a question, from 1 on in its answers, -1 in the padding
    places: list[tuple[int, int]]  # row and column behind which each row of logits lies, tree by tree

    def mask(self, prefix_length: int, dtype: torch.dtype, device: torch.device) -> Tensor:
        """Return what is added to attention scores, [n, 1, T, prefix + T]: zero or the lowest number."""
        branch = self.branch.to(device)
        count, length = branch.shape
        ours, theirs = branch[:, :, None], branch[:, None, :]
        # Padding lies behind everything, and sees the question: a row that saw nothing would be NaN.
        seen = ((theirs == 0) | (theirs == ours)) & torch.ones(length, length, dtype=torch.bool, device=device).tril()
        added = torch.zeros(count, 1, length, prefix_length + length, dtype=dtype, device=device)
        added[:, 0, :, prefix_length:].masked_fill_(~seen, torch.finfo(dtype).min)
        return added


def tree_batch(trees: Sequence[Branches], start: int) -> TreeBatch:
    """Lay out trees that begin at position `start`."""
    shape = len(trees), max(tree.num_tokens for tree in trees)
    ids, positions, branch = np.zeros(shape, np.int64), np.full(shape, start), np.full(shape, -1)
    places = []
    for row, tree in enumerate(trees):
        end = len(tree.suffix)
        ids[row, :end], positions[row, :end], branch[row, :end] = tree.suffix, range(start, start + end), 0
        places.append((row, end - 1))
        column = end
        for number, answer in enumerate(tree.answers, start=1):
            part = slice(column, column + len(answer) - 1)
            ids[row, part], branch[row, part] = answer[:-1], number
            positions[row, part] = range(start + end, start + end + len(answer) - 1)
            places += [(row, place) for place in range(part.start, part.stop)]
            column = part.stop
    return TreeBatch(*map(torch.from_numpy, (ids, positions, branch)), places)


def groups_within(trees: Sequence[Branches], *, tokens: int, rows: int, at_most: int) -> Iterator[list[Branches]]:
    """Yield consecutive trees whose padded tokens and rows of logits stay within bounds, or a larger one alone."""

    def fits(group: list[Branches]) -> bool:
        longest = max(tree.num_tokens for tree in group)
        num_rows = sum(tree.num_rows for tree in group)
        return len(group) <= at_most and longest * len(group) <= tokens and num_rows <= rows

    return neighbours_that(fits, trees)


def num_shared(prompts: Sequence[Sequence[int]]) -> int:
    """Count the tokens that all prompts begin with; one is left of each, which the first logits come from."""
    columns = zip(*(prompt[:-1] for prompt in prompts), strict=False)
    return sum(1 for _ in takewhile(lambda column: len({*column}) == 1, columns))


def neighbours_that(fits: Callable[[list[Item]], bool], items: Iterable[Item]) -> Iterator[list[Item]]:
    """Yield groups of consecutive items, each as large as `fits` allows, and at least one item."""
    group: list[Item] = []
    for item in items:
        if group and not fits([*group, item]):
            yield group
            group = []
        group.append(item)
    if group:
        yield group
