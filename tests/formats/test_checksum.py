"""Checksums of weights: those of parts add up, and no change goes unseen."""

import pytest
import torch

from dynquant.formats.checksum import checksum

WEIGHTS = torch.randn(4, 30, 37, generator=torch.Generator().manual_seed(0))


def test_parts_add_up_to_the_whole():
    whole = checksum(WEIGHTS)
    of_experts = sum(checksum(WEIGHTS[expert], 30 * expert) for expert in range(4))
    of_rows = sum(checksum(WEIGHTS.reshape(120, 37)[start : start + 7], start) for start in range(0, 120, 7))
    assert whole == of_experts % (1 << 64) == of_rows % (1 << 64)
    assert checksum(torch.tensor(1.5)) == checksum(torch.tensor([1.5])) != checksum(torch.tensor(2.5))
    assert checksum(WEIGHTS.bfloat16()) == checksum(WEIGHTS.bfloat16().float())


@pytest.mark.parametrize(
    "change",
    [
        lambda w: w[2, 3].__setitem__(5, w[2, 3, 5] + 1e-6),
        lambda w: w.neg_(),
        lambda w: w.mul_(2),
        lambda w: w[1, :2].copy_(WEIGHTS[1, :2].flip(0)),
        lambda w: w[:2].copy_(WEIGHTS[:2].flip(0)),
        lambda w: w[0, 0, :2].neg_(),
    ],
)
def test_a_change_is_seen(change):
    changed = WEIGHTS.clone()
    change(changed)
    assert checksum(changed) != checksum(WEIGHTS)


def test_the_value_is_that_of_the_plans_that_were_written():
    assert checksum(torch.tensor([[1.0, -2.0, 0.5], [0.0, 3.0, -1.0]])) == 0xFB578D2EBD400000
