"""Selections move entries as they say, in every form, on slices, in automatic differentiation and through files."""

import json
from dataclasses import asdict
from types import SimpleNamespace

import pytest
import torch
from pydantic import TypeAdapter

from dynquant.families.common.conversion import Conversion
from dynquant.families.common.selection import Selection, selection_of_positions, selection_of_strides

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
    assert selection is not None
    return selection


@pytest.mark.parametrize("form", FORMS)
def test_each_form_gives_the_entries(form: str) -> None:
    selection = selection_of(FORMS[form])
    assert torch.equal(selection(STORED), FORMS[form])
    assert selection.is_identity == (form == "all")


@pytest.mark.parametrize("form", FORMS)
def test_the_gradient_goes_back_to_the_entries(form: str) -> None:
    selection, stored = selection_of(FORMS[form], added=1.0), STORED.clone().requires_grad_(True)
    selection(stored).sum().backward()
    assert set(stored.grad.unique().tolist()) <= {0.0, 1.0}
    assert stored.grad.sum() == FORMS[form].numel()


@pytest.mark.parametrize("form", FORMS)
def test_a_selection_survives_its_record(form: str) -> None:
    record = json.loads(json.dumps(asdict(selection_of(FORMS[form], added=1.0))))
    selection = TypeAdapter(Selection).validate_python(record)
    assert torch.equal(selection(STORED), FORMS[form] + 1)


def test_rows_of_zeros_come_behind() -> None:
    selection = selection_of(STORED).with_zeros(1)
    assert torch.equal(selection(STORED), torch.cat([STORED, torch.zeros(1, 8)]))
    assert not selection.is_identity


def test_a_view_of_a_larger_tensor_is_selected_alike() -> None:
    pair = torch.stack([STORED + 1, STORED])
    assert torch.equal(selection_of(STORED.T)(pair[1]), STORED.T)


def test_slices_of_a_stack_are_read_alone() -> None:
    fused, asked = torch.randn(3, 8, 4), []
    source = SimpleNamespace(load=lambda name, index: asked.append(index) or fused[index])
    for expected in (fused[:, :4], fused[:, 4:], fused.transpose(1, 2), fused[:, 1::2]):
        selection = selection_of_strides(expected, (3, 8, 4))
        conversion = Conversion("stack", ("fused",), tuple(expected.shape), "F32", selection)
        assert torch.equal(selection(fused), expected)
        assert torch.equal(conversion.load(source, 2), expected[2])
        assert torch.equal(conversion.load(source, slice(1, 3)), expected[1:])
        assert [asked.pop(), asked.pop()] == [slice(1, 3), slice(2, 3)]
    crossing = selection_of_strides(torch.empty(128).as_strided((3, 4, 4), (32, 4, 1), 20), (4, 8, 4))
    assert crossing.of_rows(slice(1, 2))[0] == slice(1, 3)


def test_another_shape_is_no_input() -> None:
    with pytest.raises(ValueError, match="none of"):
        selection_of(STORED.T)(STORED.T)


def test_rows_of_a_range_need_their_stored_rows_alone() -> None:
    padded = selection_of(STORED).with_zeros(3)
    second_half, diagonals = selection_of(STORED[3:], added=1.0), selection_of(FORMS["diagonals"])
    for selection in (padded, second_half, selection_of(STORED.T), diagonals):
        expected = selection(STORED)
        for rows in (slice(0, 2), slice(1, 20), slice(5, 8), slice(7, 9), slice(2, 2), slice(0, 6, 2), slice(None)):
            stored, part = selection.of_rows(rows)
            assert torch.equal(part(STORED[stored]), expected[rows])
    assert padded.of_rows(slice(1, 3))[0] == slice(1, 3)


def test_rows_of_zeros_have_no_entries_in_a_map() -> None:
    padded = selection_of(STORED).with_zeros(1)
    traced = padded.entries
    assert traced.shape == (7, 8) and sum(piece.numel for piece in traced.pieces) == 48
    assert torch.equal(traced.gather(lambda _: STORED), padded(STORED))


def test_a_conversion_reads_the_rows_that_it_needs() -> None:
    asked = []
    source = SimpleNamespace(load=lambda name, index: asked.append((name, index)) or STORED[index])
    padded = selection_of(STORED).with_zeros(3)
    conversion = Conversion("token_embd", ("embed",), (9, 8), "F32", padded)
    assert torch.equal(conversion.load(source, slice(4, 8)), padded(STORED)[4:8])
    assert asked == [("embed", slice(4, 6))]
