"""Selections move entries as they say, in every form, on slices, in automatic differentiation and through files."""

from types import SimpleNamespace

import pytest
import torch

from dynquant.families.common.conversion import Conversion
from dynquant.families.common.strided_maps import whole
from dynquant.families.common.traced_tensor import TracedTensor
from dynquant.families.converter.selection import Selection, as_record, from_record, selection_of_positions

STORED = torch.randn(6, 8, generator=torch.Generator().manual_seed(0))
ORDER = torch.tensor([4, 0, 3, 1, 5, 2])
COLUMNS = torch.tensor([6, 1, 0, 7, 2, 3, 5, 4])
FORMS = {
    "all": STORED,
    "rows of a range": STORED[2:5],
    "columns of a range": STORED[:, 3:7],
    "every second row": STORED[1::2],
    "transposed": STORED.T,
    "another shape": STORED.reshape(3, 2, 8),
    "rows in another order": STORED[ORDER],
    "columns in another order": STORED[:, COLUMNS],
    "both in another order": STORED[ORDER][:, COLUMNS],
    "halves side by side": torch.stack([STORED[:3], STORED[3:]], dim=1).reshape(6, 8),
    "diagonals": STORED.flatten().roll(3).reshape(6, 8)[:, [0, 5]],
    "a row": STORED[2],
}


def selection_of(expected: torch.Tensor, added: float = 0.0) -> Selection:
    """The selection whose positions are found by value: no two entries are alike."""
    flat = STORED.flatten()
    positions = torch.tensor([int((flat == value).nonzero()) for value in expected.flatten()]).reshape(expected.shape)
    selection = selection_of_positions(positions, tuple(STORED.shape), added)
    assert selection is not None and torch.equal(selection.positions(), positions)
    return selection


@pytest.mark.parametrize("form", FORMS)
def test_each_form_gives_the_entries(form: str) -> None:
    selection = selection_of(FORMS[form])
    assert torch.equal(selection(STORED), FORMS[form])
    assert selection.is_identity == (form == "all")


@pytest.mark.parametrize("form", FORMS)
def test_a_stack_is_selected_slice_by_slice(form: str) -> None:
    stack = torch.stack([STORED, STORED + 100, STORED - 100])
    expected = torch.stack([FORMS[form], FORMS[form] + 100, FORMS[form] - 100])
    assert torch.equal(selection_of(FORMS[form])(stack), expected)


@pytest.mark.parametrize("form", FORMS)
def test_the_gradient_goes_back_to_the_entries(form: str) -> None:
    selection, stored = selection_of(FORMS[form], added=1.0), STORED.clone().requires_grad_(True)
    selection(stored).sum().backward()
    assert set(stored.grad.unique().tolist()) <= {0.0, 1.0}
    assert stored.grad.sum() == FORMS[form].numel()


@pytest.mark.parametrize("form", FORMS)
def test_a_selection_survives_its_record(form: str) -> None:
    tensors: dict[str, torch.Tensor] = {}
    selection = from_record(as_record(selection_of(FORMS[form], added=1.0), "key", tensors), tensors)
    assert torch.equal(selection(STORED), FORMS[form] + 1)


def test_rows_of_zeros_come_behind() -> None:
    selection = Selection((6, 8), (7, 8), strides=(8, 1), padding=1)
    assert torch.equal(selection(STORED), torch.cat([STORED, torch.zeros(1, 8)]))
    assert selection.of_slice() is None and not selection.is_identity


def test_a_view_of_a_larger_tensor_is_selected_alike() -> None:
    pair = torch.stack([STORED + 1, STORED])
    assert torch.equal(selection_of(STORED.T)(pair[1]), STORED.T)


def test_slices_of_a_stack_are_selected_alone() -> None:
    fused = torch.randn(3, 8, 4)
    gate = Selection((3, 8, 4), (3, 4, 4), 0, (32, 4, 1))
    up = Selection((3, 8, 4), (3, 4, 4), 16, (32, 4, 1))
    turned = Selection((3, 8, 4), (3, 4, 8), 0, (32, 1, 4))
    for selection, expected in ((gate, fused[:, :4]), (up, fused[:, 4:]), (turned, fused.transpose(1, 2))):
        of_slice = selection.of_slice()
        assert of_slice is not None
        assert torch.equal(selection(fused), expected)
        assert torch.equal(of_slice(fused[2]), expected[2])
        assert torch.equal(of_slice(fused[1:]), expected[1:])
    crossing = Selection((3, 8, 4), (3, 4, 4), 20, (32, 4, 1))
    assert crossing.of_slice() is None


def test_another_shape_is_no_input() -> None:
    with pytest.raises(ValueError, match="none of"):
        selection_of(STORED.T)(STORED.T)


def test_rows_of_a_range_need_their_stored_rows_alone() -> None:
    padded = Selection((6, 8), (9, 8), strides=(8, 1), padding=3)
    reversed_halves = Selection((6, 8), (3, 8), 24, (8, 1), added=1.0)
    transposed = Selection((6, 8), (8, 6), strides=(1, 8))
    for selection in (padded, reversed_halves, transposed):
        expected = selection(STORED)
        for rows in (slice(0, 2), slice(1, 20), slice(5, 8), slice(7, 9), slice(2, 2), slice(None)):
            stored, part = selection.of_rows(rows)
            assert torch.equal(part(STORED[stored]), expected[rows])
    assert padded.of_rows(slice(1, 3))[0] == slice(1, 3)
    assert padded.of_rows(slice(0, 6, 2)) is None
    assert selection_of(FORMS["diagonals"]).of_rows(slice(0, 2)) is None


def test_rows_of_zeros_have_no_entries_in_a_map() -> None:
    padded = Selection((6, 8), (7, 8), strides=(8, 1), padding=1)
    traced = padded(TracedTensor(whole("table", (6, 8)))).map
    assert traced.shape == (7, 8) and sum(piece.numel for piece in traced.pieces) == 48
    assert torch.equal(traced.gather(lambda _: STORED), padded(STORED))


def test_a_conversion_reads_the_rows_that_it_needs() -> None:
    asked = []
    source = SimpleNamespace(load=lambda name, index: asked.append((name, index)) or STORED[index])
    padded = Selection((6, 8), (9, 8), strides=(8, 1), padding=3)
    conversion = Conversion("token_embd", ("embed",), (9, 8), "F32", padded, of_rows=padded.of_rows)
    assert torch.equal(conversion.load(source, slice(4, 8)), padded(STORED)[4:8])
    assert asked == [("embed", slice(4, 6))]
