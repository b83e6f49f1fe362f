"""Benchmarks of kernels: the truth that experts are compared with, and tables of what was written."""

import json
import sys

import pytest
import torch

from dynquant.formats import decode
from dynquant.formats.quant_types import QUANT_TYPES
from dynquant.kernels.bench import tables
from tests.helpers.gemv_checks import finite_blocks

experts = pytest.importorskip("dynquant.kernels.bench.experts", reason="Triton is not installed")


@pytest.mark.parametrize("is_grad", [False, True])
@pytest.mark.parametrize("part", ["gate_up", "down"])
def test_three_products_of_experts_agree(part: str, is_grad: bool) -> None:
    stack = experts.Stack(8, 2, part, 512, 256)
    call = experts.routed_calls(stack, 12, 2, "cpu")[1]
    blocks = torch.stack([finite_blocks("Q4_K", stack.n, stack.k) for _ in range(stack.experts)])
    assert blocks.shape[-1] == QUANT_TYPES["Q4_K"].row_bytes(stack.k)
    dense = decode("Q4_K", blocks)
    truth = experts.truth(call, dict(enumerate(dense)), is_grad)
    packed = experts.ops.experts_input_grad if is_grad else experts.ops.experts_linear
    product = packed(call.dy if is_grad else call.x, blocks, call.ids, "Q4_K")
    assert float((product[: len(truth)] - truth).norm() / truth.norm()) < 4e-3
    by_expert = experts.bf16_call(call, dense.bfloat16(), is_grad)()
    ours = product.reshape(len(by_expert), -1)[call.ids.flatten().argsort()]
    assert float((by_expert - ours).norm() / ours.norm()) < 1e-2


def test_tokens_that_are_checked_go_to_the_same_experts_in_every_call() -> None:
    stack = experts.Stack(64, 8, "down", 32, 256)
    ids = [experts.routed_calls(stack, tokens, 2, "cpu")[0].ids[:3] for tokens in (3, 5, 100)]
    assert torch.equal(ids[0], ids[1]) and torch.equal(ids[0], ids[2])


def test_tables_have_a_row_for_every_type(tmp_path, monkeypatch, capsys) -> None:
    common = {"n": 512, "k": 256, "act": "bf16"}
    rows = [
        {**common, "type": "BF16", "m": 1, "act": "torch", "us": 8.0},
        {**common, "type": "Q4_K", "m": 1, "us": 4.0, "bf16_us": 8.0, "speedup": 2.0, "fraction": 0.71},
        {**common, "type": "Q4_K", "m": 64, "us": 10.0, "bf16_us": 9.0, "speedup": 0.9, "fraction": 0.1},
        {**common, "type": "Q6_K", "m": 1, "refused": "error above 0.004", "bf16_us": 8.0},
    ]
    (tmp_path / "gemv.json").write_text(json.dumps({"read_gbps": 4500, "rows": rows}))
    monkeypatch.setattr(sys, "argv", ["tables", str(tmp_path / "gemv.json")])
    tables.main()
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "read_gbps 4500" and lines[2] == "[512, 256], bf16"
    assert lines[4:] == [
        "| type | 1 | 64 |", "|---|---|---|", "| bf16 | 8.0 | 9.0 |", "| Q4_K | 4.0, 2.00, 71 % | 10.0, 0.90 |",
        "| Q6_K | refused |  |",
    ]  # fmt: skip
