"""Feedback across rows: the loss is the sum that the targets are derived from, and goes down under both sides."""

import pytest
import torch

from dynquant.encoding.dynquant_encoder import DynquantEncoder
from dynquant.encoding.interface import Sides
from dynquant.encoding.search.feedback import encode_in_turn, upper_factor
from dynquant.errors import EncodeError
from dynquant.formats import decode
from dynquant.formats.quant_types import QUANT_TYPES


def noise(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def moments(experts: int, width: int, seed: int) -> torch.Tensor:
    """Second moments of vectors that live mostly in a quarter of the directions."""
    directions = noise(experts, width, width // 4, seed=seed)
    return directions @ directions.mT / (width // 4) + 0.05 * torch.eye(width)


def loss(error: torch.Tensor, inputs: torch.Tensor, outputs: torch.Tensor) -> float:
    return float((outputs.double() @ error.double() @ inputs.double() * error.double()).sum())


def test_losses_of_groups_under_their_targets_add_up_to_the_whole_loss():
    weights, inputs, outputs = noise(2, 40, 6), moments(2, 6, 1), moments(2, 40, 2)
    factor, errors, total = upper_factor(outputs), torch.zeros_like(weights), 0.0

    def encode(rows: slice, target: torch.Tensor) -> torch.Tensor:
        nonlocal total
        rounded = (2 * target).round() / 2
        errors[:, rows] = weights[:, rows] - rounded
        own = factor[:, rows, rows]
        total += loss(target - rounded, inputs, own @ own.mT)
        return rounded

    encode_in_turn(weights, outputs, encode)
    assert total == pytest.approx(loss(errors, inputs, outputs), rel=1e-4)


@pytest.mark.parametrize("name", ["IQ2_XXS", "Q2_K"])
def test_both_sides_lose_less_than_one(name):
    weights, inputs, outputs = noise(2, 160, 256), moments(2, 256, 1), moments(2, 160, 2)
    encoder, quant_type = DynquantEncoder("cpu"), QUANT_TYPES[name]

    def encoded(hessian: torch.Tensor | Sides) -> torch.Tensor:
        return encoder.encode(quant_type, weights, threads=1, hessian=hessian)

    one, two = encoded(inputs), encoded(Sides(inputs, outputs))
    assert torch.equal(encoded(Sides(inputs, torch.eye(160)[None])), one), "outputs that are independent change nothing"
    losses = [loss(weights - decode(name, packed, tuple(weights.shape)), inputs, outputs) for packed in (one, two)]
    assert losses[1] < 0.98 * losses[0]


def test_output_moments_of_another_height_are_refused():
    with pytest.raises(EncodeError, match=r"output hessian of `w` has shape \(1, 5, 5\)"):
        DynquantEncoder("cpu").encode(
            QUANT_TYPES["Q2_K"], noise(4, 256), name="w", hessian=Sides(None, torch.eye(5)[None])
        )
