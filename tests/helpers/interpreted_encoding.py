"""Runs the passes over columns by Triton's kernels and by PyTorch, and prints how far they agree; a program of its own.

Start it with TRITON_INTERPRET=1, which Triton reads at import, so that the kernels run on the CPU.
"""

import json
from unittest.mock import patch

import torch

from dynquant.encoding.search import column_kernels, descent, feedback
from dynquant.encoding.search.layouts import LAYOUTS
from dynquant.encoding.search.rows import Rows
from dynquant.encoding.search.scales import fit

TYPES = ("Q4_K", "Q6_K")
"""With minimums, and with signed scales."""


def main() -> None:
    generator = torch.Generator().manual_seed(0)
    weights = 0.02 * torch.randn(2, 5, 256, generator=generator)
    directions = torch.randn(2, 256, 64, generator=generator)
    hessian = directions @ directions.transpose(1, 2) / 64 + 0.05 * torch.eye(256)
    print(json.dumps({name: compared(name, weights, hessian) for name in TYPES}))


def compared(name: str, weights: torch.Tensor, hessian: torch.Tensor) -> dict[str, dict[str, float]]:
    """Of each pass: the share of codewords that are the same, and the loss in PyTorch's."""
    rows = Rows.of(LAYOUTS[name], weights)
    fields, rounded = fit(rows, hessian.diagonal(dim1=-2, dim2=-1), candidates=4, rounds=0)
    factor = feedback.upper_factor(hessian)
    passes = {
        "feedback": lambda: feedback.feed_back(rows, fields, factor),
        "descent": lambda: descent.descend(rows, fields, rounded, hessian),
    }
    found = {}
    for name, values_of in passes.items():
        by_torch = values_of()
        with (
            patch.object(feedback, "kernels_for", lambda _: column_kernels),
            patch.object(descent, "kernels_for", lambda _: column_kernels),
        ):
            values = values_of()
        there, here = (descent.loss(rows, fields, v, hessian).sum() for v in (values, by_torch))
        changed = (by_torch != rounded).double().mean()
        same = (values == by_torch).double().mean()
        found[name] = {"same": float(same), "changed": float(changed), "loss": float(there / here)}
    return found


if __name__ == "__main__":
    main()
