"""Compiled loops against the PyTorch form that they stand for: the same words, the same bytes, the same loss."""

import numba
import numpy as np
import pytest
import torch

from dynquant.encoding.dynquant_encoder import DynquantEncoder
from dynquant.encoding.search.compiled import jit, tiles, words
from dynquant.encoding.search.compiled.jit import ROWS
from dynquant.encoding.search.layouts import LAYOUTS
from dynquant.errors import EncodeError
from dynquant.formats import decode
from dynquant.formats.quant_types import QUANT_TYPES
from tests.helpers.representatives import represented_by

QUICK = ("IQ1_S", "IQ2_XXS", "IQ3_S", "Q2_K", "Q6_K", "IQ4_XS", "TQ2_0", "MXFP4", "Q2_0", "Q5_1")
COMPILED, PLAIN = DynquantEncoder("cpu"), DynquantEncoder("cpu", is_plain=True)


def noise(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def correlated(experts: int, columns: int) -> torch.Tensor:
    directions = noise(experts, columns, columns // 4, seed=3)
    return directions @ directions.mT / (columns // 4) + 0.05 * torch.eye(columns)


@numba.njit
def search_words(book, y, metric, work, out):
    words.nearest(book, y, metric, np.ones(y.shape[1], np.bool_), False, work, out)


@pytest.mark.nightly
@pytest.mark.parametrize("name", [name for name, layout in LAYOUTS.items() if layout.codebook.group == 8])
def test_words_are_the_nearest_ones(name):
    book = LAYOUTS[name].codebook
    targets, metric = noise(8, ROWS, seed=1) * book.peak / 2, noise(8, seed=2).abs() + 0.1
    found, arrays = np.zeros((8, ROWS), np.float32), words.as_arrays(book)
    search_words(arrays, targets.numpy(), metric.numpy(), words.workspace(arrays), found)
    plain = book.nearest(targets.T[None].contiguous(), metric[None])[0].T
    assert torch.equal(torch.from_numpy(found), plain)


@pytest.mark.parametrize("name", represented_by(QUICK, LAYOUTS))
@pytest.mark.parametrize("has_hessian", [True, False])
def test_bytes_are_those_of_the_plain_form(name, has_hessian):
    """But for the rounding of sums, which decides a few of the closest choices, and those after them in their rows."""
    weights, hessian = 0.02 * noise(2, 9, 512), correlated(2, 512)
    options = {"hessian": hessian} if has_hessian else {}
    importance = hessian.diagonal(dim1=-2, dim2=-1)
    ours, plain = (e.encode(QUANT_TYPES[name], weights, importance, **options) for e in (COMPILED, PLAIN))
    most = 0.08 if LAYOUTS[name].has_plain_minimum else 0.05  # a sixth of the bytes are last bits of scales there
    assert (ours != plain).double().mean() < most
    metric = hessian if has_hessian else torch.diag_embed(importance)
    errors = [weights - decode(name, packed) for packed in (ours, plain)]
    here, there = (float(((e @ metric) * e).sum()) for e in errors)
    assert here <= there * (1 + 5e-3)  # a choice more or less moves the sum of so few rows by that


def test_scales_of_wide_rows_are_refitted_in_groups(monkeypatch):
    weights, hessian = 0.02 * noise(1, 9, 640), correlated(1, 640)
    losses = []
    for at_once in (1 << 20, 12):
        monkeypatch.setattr(tiles, "_SCALES_AT_ONCE", at_once)
        errors = weights - decode("Q5_1", COMPILED.encode(QUANT_TYPES["Q5_1"], weights, hessian=hessian))
        losses.append(float(((errors @ hessian) * errors).sum()))
    assert losses[0] != losses[1] == pytest.approx(losses[0], rel=0.06)


@pytest.mark.parametrize("name", ["IQ2_XS", "Q4_K"])
def test_neither_threads_nor_batches_change_a_byte(name):
    weights, hessian = 0.02 * noise(2, ROWS + 6, 256), correlated(2, 256)
    whole = COMPILED.encode(QUANT_TYPES[name], weights, threads=1, hessian=hessian)
    assert torch.equal(COMPILED.encode(QUANT_TYPES[name], weights, threads=3, hessian=hessian), whole)
    parts = [COMPILED.encode(QUANT_TYPES[name], part, hessian=hessian) for part in weights.split(11, dim=1)]
    assert torch.equal(torch.cat(parts, dim=1), whole)


def test_numba_that_compiles_nothing_is_refused(monkeypatch):
    monkeypatch.setattr(numba.config, "DISABLE_JIT", 1)
    with pytest.raises(EncodeError, match="NUMBA_DISABLE_JIT is set"):
        DynquantEncoder("cpu")


def test_compiled_code_that_has_no_room_on_disk_stops_nothing(monkeypatch):
    saved = []

    def save(cache, *_):
        saved.append(cache)
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("numba.core.caching.FunctionCache.save_overload", save)
    doubled = jit.compiled(_doubled)
    assert doubled(3) == 6 and saved


def _doubled(x):
    return 2 * x
