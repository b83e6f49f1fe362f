"""Runs the passes of the search by Triton's kernels and by PyTorch, and prints how far they agree.

Start it with TRITON_INTERPRET=1, which Triton reads at import, so that the kernels run on the CPU.
"""

import json
from collections.abc import Callable
from contextlib import ExitStack
from unittest.mock import patch

import torch

import tests.helpers.interpreter  # noqa: F401
from dynquant.encoding.search import descent, feedback, scales
from dynquant.encoding.search.layouts import LAYOUTS, Fields
from dynquant.encoding.search.rows import Rows

TYPES = ("Q4_K", "IQ4_XS", "IQ1_M", "IQ2_XXS", "IQ3_XXS", "Q2_0", "Q5_1")
"""With minimums, with signed scales and a table, with shifts, words of eight and of four, and without sub-blocks, then
with minimums that have no codes."""


def main() -> None:
    generator = torch.Generator().manual_seed(0)
    weights = 0.02 * torch.randn(1, 5, 256, generator=generator)
    directions = torch.randn(1, 256, 64, generator=generator)
    hessian = directions @ directions.transpose(1, 2) / 64 + 0.05 * torch.eye(256)
    print(json.dumps({name: compared(name, weights, hessian) for name in TYPES}))


def compared(name: str, weights: torch.Tensor, hessian: torch.Tensor) -> dict[str, dict[str, float]]:
    """Of each pass: the share of codewords that are the same, and the loss in PyTorch's; what both changed."""
    rows = Rows.of(LAYOUTS[name], weights)
    metric = hessian.diagonal(dim1=-2, dim2=-1).contiguous()
    fields, rounded = scales.fit(rows, metric, candidates=4, rounds=0)
    factor = feedback.upper_factor(hessian)
    passes: dict[str, Callable[[], tuple[Fields, torch.Tensor]]] = {
        "fit": lambda: scales.fit(rows, metric, candidates=2, rounds=1),
        "feedback": lambda: (fields, feedback.feed_back(rows, fields, factor)),
        "descent": lambda: (fields, descent.descend(rows, fields, rounded, hessian)),
        "scales": lambda: descent.descend_scales(rows, fields, rounded, hessian),
        "refit": lambda: (descent.refit(rows, fields, rounded, hessian), rounded),
    }
    if len(rows.layout.multipliers) == 1:
        del passes["scales"]
    found = {}
    for label, run in passes.items():
        by_torch = run()
        with ExitStack() as stack:
            for module in (feedback, descent, scales):
                stack.enter_context(patch.object(module, "has_kernels", lambda _: True))
            by_triton = run()
        there, here, before = (
            descent.loss(rows, *result, hessian).sum() for result in (by_triton, by_torch, (fields, rounded))
        )
        same = (by_triton[1] == by_torch[1]).double().mean()
        found[label] = {"same": float(same), "loss": float(there / here), "changed": float((here / before - 1).abs())}
    return found


if __name__ == "__main__":
    main()
