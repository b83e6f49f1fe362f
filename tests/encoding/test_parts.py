"""Parts of tensors: they cover every byte once, keep to the limit, and carry the bytes of whole encodes."""

from math import prod

import pytest
import torch

from dynquant.encoding.interface import ProtectedWeight
from dynquant.encoding.parts import FEWEST_ROWS, PART_WEIGHTS, PartLimits, TensorPart, WeightChecks, load_part
from dynquant.encoding.stream import Guidance, TensorEncoder, load_encoder
from dynquant.errors import ExportError
from dynquant.formats.checksum import checksum
from dynquant.formats.quant_types import QUANT_TYPES
from tests.encoding.test_stream import tiny_model

Q2_K = QUANT_TYPES["Q2_K"]


@pytest.mark.parametrize("shape", [(256,), (100, 512), (7, 100, 512), (1, 300, 256)], ids=str)
@pytest.mark.parametrize("memory", [None, 512 * 70 * 12, 512 * 350 * 12, 1 << 40])
def test_parts_cover_every_byte_once(shape, memory):
    parts = PartLimits(memory).parts("x", shape, Q2_K)
    assert [part.offset for part in parts] == [sum(p.num_bytes for p in parts[:i]) for i in range(len(parts))]
    assert sum(part.num_bytes for part in parts) == Q2_K.tensor_bytes(shape)
    assert sum(part.num_weights for part in parts) == prod(shape)
    assert len({part.key for part in parts}) == len(parts)
    assert memory is None or all(12 * part.num_weights <= memory for part in parts)


def test_the_largest_models_stacks_are_cut_without_being_asked():
    parts = PartLimits().parts("x", (256, 2048, 7168), Q2_K)
    assert len(parts) == 64 and all(part.num_weights <= PART_WEIGHTS for part in parts)
    assert parts[1].key == "x experts 4-7" and parts[1].offset == 4 * Q2_K.tensor_bytes((2048, 7168))
    rows = PartLimits().parts("e", (129_280, 7168), Q2_K)
    assert all(part.num_weights <= PART_WEIGHTS for part in rows) and rows[1].key == "e rows 9362-18723"


def test_memory_counts_hessians_and_too_little_is_refused():
    shape = (8, 64, 1024)
    without = PartLimits(80 << 20).parts("x", shape, Q2_K)
    under = PartLimits(80 << 20).parts("x", shape, Q2_K, hessians=True)
    assert len(without) == 1 and [len(part.experts) for part in under] == [2, 2, 2, 2]
    with pytest.raises(ExportError, match=f"`x` of shape .* {FEWEST_ROWS} of its rows under .*--hessians none"):
        PartLimits(30 << 20).parts("x", shape, Q2_K, hessians=True)


def test_parts_share_the_memory_where_they_can():
    limits, under = PartLimits(64 << 20), {"hessians": True, "at_once": 4}
    assert [len(part.rows) for part in PartLimits(1 << 20).parts("x", (64, 1024), Q2_K, at_once=4)] == [21, 21, 21, 1]
    (alone,) = limits.parts("x", (64, 1024), Q2_K, **under)
    assert 16 << 20 < alone.needed_bytes(hessians=True) <= 64 << 20


def test_the_dynquant_encoders_parts_equal_whole_tensors():
    """Under hessians, with super weights: parts of experts and of rows, each in another process's order."""
    encoder, name, shape = load_encoder("dynquant", "cpu"), "blk.0.ffn_down_exps.weight", (3, 40, 256)
    generator = torch.Generator().manual_seed(3)
    weights = torch.randn(shape, generator=generator)
    model = tiny_model(**{name: weights})
    inputs = torch.randn(3, 400, 256, generator=generator)
    hessians = inputs.transpose(1, 2) @ inputs / 400
    guidance = Guidance(
        lambda _name, _shape: hessians.diagonal(dim1=1, dim2=2),
        lambda _name, _shape, experts: hessians[experts],
        {name: (ProtectedWeight(33, 7, 1), ProtectedWeight(2, 200, 2))},
    )
    tensors = TensorEncoder(model, guidance, encoder, threads=1)
    whole = tensors.part(TensorPart.whole(name, shape, Q2_K))
    plain = TensorEncoder(model, Guidance(guidance.importance, guidance.hessian), encoder)
    assert not torch.equal(whole, plain.part(TensorPart.whole(name, shape, Q2_K)))
    for experts, rows in [(range(1, 2), range(40)), (range(1, 2), range(30, 40)), (range(1, 3), range(40))]:
        part = TensorPart(name, shape, Q2_K, experts, rows)
        assert torch.equal(load_part(model.source, part), weights[experts.start : experts.stop, rows.start : rows.stop])
        assert torch.equal(tensors.part(part), whole[experts.start : experts.stop, rows.start : rows.stop])


def test_weights_are_compared_in_whatever_parts_they_are_read():
    weights = torch.randn(6, 10, 32, generator=torch.Generator().manual_seed(0))
    shape, expected = tuple(weights.shape), {"w": f"{checksum(weights):016x}"}
    checks = WeightChecks(expected, "model")
    for first, last in ((2, 4), (0, 2), (4, 6), (0, 3), (3, 6), (0, 6)):  # out of order, then again in other parts
        checks.add("w", shape, range(first, last), weights[first:last])
    for start in range(0, 10, 3):
        rows = range(start, min(start + 3, 10))
        for expert in range(6):
            checks.add("w", shape, range(expert, expert + 1), weights[expert, start : rows.stop], rows)
    changed = weights.clone()
    changed[5, 9, 31] += 1
    checks.add("w", shape, range(5), changed[:5])
    with pytest.raises(ExportError, match="changed since the plan was made"):
        checks.add("w", shape, range(5, 6), changed[5:])
    checks.add("other", shape, range(6), changed)
