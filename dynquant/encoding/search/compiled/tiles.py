"""The search of blocks on a CPU: rows in tiles, tiles side by side, each through all steps while it is in the cache.

The steps are those of `dynquant_encoder.Loss.blocks` and find the same blocks up to the rounding of sums. Between
compiled passes only small arrays are touched here, those of scales.
"""

from dataclasses import dataclass, replace
from functools import cache
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dynquant.encoding.search.codebooks import Codebook, Integers, SignedWords, TernaryWords, Values
from dynquant.encoding.search.compiled import columns, fits, products, trials, words
from dynquant.encoding.search.compiled.jit import ROWS
from dynquant.encoding.search.feedback import upper_factor
from dynquant.encoding.search.layouts import SHIFT, BlockLayout, Fields
from dynquant.encoding.search.rows import Rows
from dynquant.encoding.search.scales import zero_points
from dynquant.workers import side_by_side

_TINY = np.float32(1e-30)
_KEPT = 8
"""Super-blocks in a row up to which products are kept from one step to the next: memory grows with their square."""
_SCALES_AT_ONCE = 128
"""Scales of a row that are solved for together, beside the others as they are: even twelve lose 0 to 4 % by that.
All of a row of 32-wide blocks would be a thousand equations, `ROWS` times: a gigabyte for each thread."""
_NONE = np.empty((0, ROWS), np.float32)

Array = np.ndarray


def serves(rows: Rows) -> bool:
    """Tell whether compiled loops find the blocks of these rows."""
    layout = rows.layout
    fits_chunks = len(layout.multipliers) == 1 or layout.sub_block <= 64
    is_known = isinstance(layout.codebook, Integers | Values | TernaryWords | SignedWords)
    return not rows.is_plain and rows.x.device.type == "cpu" and is_known and fits_chunks and rows.x.shape[-1] % 4 == 0


def tile_losses(
    layout: BlockLayout, metric: Tensor, hessian: Tensor | None = None, factor: Tensor | None = None
) -> "list[TileLoss]":
    """Return the loss of each expert under metrics [E, C], and hessians and their factors [E, C, C]."""
    if hessian is None or factor is None:
        return [TileLoss(layout, m) for m in metric]
    if hessian.stride(0) == 0:
        return [TileLoss(layout, metric[0], hessian[0], factor[0])] * len(metric)
    return [TileLoss(layout, *parts) for parts in zip(metric, hessian, factor, strict=True)]


def blocks(rows: Rows, losses: "list[TileLoss]") -> tuple[Fields, Tensor]:
    """Fields and values of all rows; as many threads as PyTorch has here work on them."""
    experts, num_rows, _ = rows.x.shape
    results = _Results(rows)
    _links()  # compiled before threads wait for each other

    def encode(place: tuple[int, int]) -> None:
        expert, start = place
        part = slice(start, min(start + ROWS, num_rows))
        tile = _Tile(rows, losses[expert], expert, part)
        results.take(expert, part, *tile.found())

    places = [(expert, start) for expert in range(experts) for start in range(0, num_rows, ROWS)]
    for _ in side_by_side(encode, places, torch.get_num_threads()):
        pass
    return results.fields, results.values


@cache
def _book(codebook: Codebook) -> tuple[Any, ...]:
    return words.as_arrays(codebook)


@cache
def _links() -> tuple[int, ...]:
    """Addresses of the functions that others call, each in its place."""
    linked = words.linked_nearest, products.linked_product, products.linked_push, columns.linked_feed_block
    return tuple(function.address for function in (*linked, fits.linked_search_block))


class TileLoss:
    """The loss under one metric [C], and one hessian and its factor [C, C], with the inverses that passes need."""

    def __init__(
        self, layout: BlockLayout, metric: Tensor, hessian: Tensor | None = None, factor: Tensor | None = None
    ) -> None:
        self.metric, group = metric.contiguous().numpy(), layout.codebook.group
        self.hessian: Array | None = None
        if hessian is None or factor is None:
            return
        self.hessian, self.factor = hessian.contiguous().numpy(), factor.contiguous().numpy()
        self.transposed = factor.T.contiguous().numpy()
        self.inverses, self.group_metric = _of_groups(factor, group)
        self.solvers = _inverses(_diagonal_blocks(hessian, group))
        self.folded = np.zeros((0, 0), np.float32)
        """The hessian [C, S] with its columns summed over sub-blocks, for types with minimums."""
        if layout.num_mins and not layout.has_zero_points:
            self.folded = hessian.unflatten(-1, (-1, layout.sub_block)).sum(-1).numpy()
        if len(layout.multipliers) > 1:
            cut = _diagonal_blocks(hessian, layout.sub_block)
            factors = upper_factor(cut)
            self.sub_blocks = _inverses(cut), factors.contiguous().numpy(), *_of_groups(factors, group)
            """For each sub-block of the hessian: inverse, factor, inverses of the factor's groups, their metric."""


def _diagonal_blocks(matrix: Tensor, width: int) -> Tensor:
    """[..., C / width, width, width] of matrices [..., C, C]."""
    tiles = matrix.unflatten(-1, (-1, width)).unflatten(-3, (-1, width))
    return tiles.diagonal(dim1=-4, dim2=-2).movedim(-1, -3)


def _of_groups(factor: Tensor, group: int) -> tuple[Array, Array]:
    """Inverses [..., C / group, group, group] of an upper factor's groups, and the metric [..., C] of each."""
    blocks = _diagonal_blocks(factor, group)
    return _inverses(blocks), blocks.square().sum(-1).flatten(-2).numpy()


def _inverses(blocks: Tensor) -> Array:
    blocks = blocks.to(torch.float64)
    inverses = blocks.reciprocal() if blocks.shape[-1] == 1 else torch.linalg.inv(blocks)
    return inverses.to(torch.float32).contiguous().numpy()


@dataclass(frozen=True)
class _Fields:
    """As `layouts.Fields`, of a tile: [B, ROWS] and [S, ROWS]; empty where a type has none."""

    d: Array
    scales: Array
    shifts: Array
    dmin: Array
    mins: Array

    def copy(self) -> "_Fields":
        """Return fields that can be changed without these."""
        return _Fields(*(array.copy() for array in vars(self).values()))


class _Results:
    """Fields and values of all rows, filled tile by tile."""

    def __init__(self, rows: Rows) -> None:
        layout, (experts, num_rows, width) = rows.layout, rows.x.shape

        def empty(per: int, dtype: torch.dtype = torch.float32) -> Tensor:
            return torch.empty(experts, num_rows, width // per, dtype=dtype)

        self.values = empty(1)
        self.fields = Fields(empty(layout.super_block), empty(layout.sub_block, torch.int64))
        if layout.shift_width:
            self.fields = replace(self.fields, shifts=empty(layout.shift_width))
        if layout.num_mins:
            dmin = None if layout.has_zero_points else empty(layout.super_block)
            self.fields = replace(self.fields, dmin=dmin, mins=empty(layout.sub_block, torch.int64))

    def take(self, expert: int, part: slice, fields: _Fields, values: Array) -> None:
        """Write what was found for some rows of an expert."""
        count = part.stop - part.start
        pairs = [(self.values, values)]
        pairs += zip(vars(self.fields).values(), vars(fields).values(), strict=True)
        for there, here in pairs:
            if there is not None:
                there[expert, part].numpy()[:] = here[:, :count].T


class _Tile:
    """Up to `ROWS` rows of an expert on their way through the search; arrays are [columns, ROWS]."""

    def __init__(self, rows: Rows, loss: TileLoss, expert: int, part: slice) -> None:
        self._layout, self._loss = rows.layout, loss
        count = part.stop - part.start
        self._active = np.arange(ROWS) < count
        self._x = np.zeros((rows.x.shape[-1], ROWS), np.float32)
        self._x[:, :count] = rows.x[expert, part].numpy().T
        self._unit = np.ones(ROWS, np.float32)
        self._unit[:count] = rows.unit[expert, part, 0].numpy()
        self._book, self._links = _book(rows.layout.codebook), _links()
        self._multipliers = np.array(rows.layout.multipliers, np.float32)

    def found(self) -> tuple[_Fields, Array]:
        """Fields and values of the rows."""
        layout, loss = self._layout, self._loss
        if loss.hessian is None:
            return self._fit(candidates=8, rounds=4)
        is_scalar = layout.codebook.group == 1
        fields, _ = self._fit(candidates=8 if is_scalar else 4, rounds=1 if is_scalar else 0)
        values = np.zeros_like(self._x)
        spread, of_factor = self._spread(fields), (loss.factor, loss.inverses, loss.group_metric)
        columns.feed_back(self._links, self._book, self._x, of_factor, loss.transposed, spread, self._active, values)
        slope = columns.slopes(self._links, self._x, spread, values, loss.hessian)
        fields = self._refit_all(fields, values, slope)
        self._descend(fields, values, slope)
        if len(layout.multipliers) > 1:
            fields = self._descend_scales(fields, values, slope)
        fields = self._refit_all(fields, values, slope)
        self._descend(fields, values, slope, is_last=True)
        return fields, values

    def _descend(self, fields: _Fields, values: Array, slope: Array, *, is_last: bool = False) -> None:
        loss, spread = self._loss, self._spread(fields)
        of_hessian = loss.hessian, loss.solvers, loss.metric
        columns.descend(self._links, self._book, of_hessian, spread, self._active, slope, values, is_last)

    def _descend_scales(self, fields: _Fields, values: Array, slope: Array) -> _Fields:
        fields, offsets = fields.copy(), fields.shifts * np.float32(SHIFT)
        loss = self._loss.hessian, *self._loss.sub_blocks
        changed = fields.d, fields.dmin, fields.scales, fields.mins, offsets
        trials.descend_scales(self._links, self._book, self._plan, loss, changed, self._active, slope, values)
        return replace(fields, shifts=offsets / np.float32(SHIFT))

    @property
    def _widths(self) -> tuple[int, int, int]:
        """Columns of a super-block, a sub-block and a run of one shift (0 where there is none)."""
        return self._layout.super_block, self._layout.sub_block, self._layout.shift_width

    @property
    def _plan(self) -> tuple[Any, ...]:
        """The layout, as compiled functions take it."""
        return self._multipliers, self._layout.num_mins, *self._widths

    def _wide(self, fields: _Fields, d: Array) -> Array:
        """[B, ROWS] -> [S, ROWS]."""
        return d.repeat(len(fields.scales) // len(fields.d), axis=0)

    def _scales(self, fields: _Fields) -> Array:
        return self._wide(fields, fields.d) * self._multipliers[fields.scales]

    def _minimums(self, fields: _Fields) -> Array:
        d = fields.d if self._layout.has_zero_points else fields.dmin
        return self._wide(fields, d) * fields.mins.astype(np.float32)

    def _spread(self, fields: _Fields) -> tuple[Any, ...]:
        a = self._scales(fields)
        inverse = np.divide(1, a, out=np.zeros_like(a), where=a != 0)
        offsets = fields.shifts * np.float32(SHIFT)
        return a, inverse, self._minimums(fields), offsets, *self._spread_widths

    @property
    def _spread_widths(self) -> tuple[int, int]:
        return self._layout.sub_block, max(1, self._layout.shift_width)

    def _rounded(self, d: Array) -> Array:
        """Scales [B, ROWS] as they will be stored, in normalised units."""
        return self._layout.round_scale(torch.from_numpy(d * self._unit)).numpy() / self._unit

    def _units(self, fields: _Fields, values: Array) -> tuple[Array, Array]:
        """Factors of `d`, [C, ROWS], and of `dmin` where there is one, [S, ROWS]: what decoded weights are sums of."""
        offsets, minimums = fields.shifts * np.float32(SHIFT), fields.mins.astype(np.float32)
        in_d, apart = (minimums, _NONE) if self._layout.has_zero_points else (_NONE, -minimums)
        spread = self._multipliers[fields.scales], _NONE, in_d, offsets, *self._spread_widths
        return columns.decoded(spread, values), apart

    def _refit_all(self, fields: _Fields, values: Array, slope: Array) -> _Fields:
        """All `d` (and `dmin`) of each row by least squares under the hessian, where that is better once stored."""
        if self._layout.has_power_of_two_scale:
            return fields
        units, count = self._units(fields, values), len(fields.d)
        at_once = _SCALES_AT_ONCE // (2 if len(fields.dmin) else 1)
        for first in range(0, count, at_once):
            fields = self._refit_blocks(fields, units, slope, first, min(first + at_once, count))
        return fields

    def _refit_blocks(
        self, fields: _Fields, units: tuple[Array, Array], slope: Array, first: int, stop: int
    ) -> _Fields:
        """Refit the scales of some super-blocks beside the others as they are."""
        hessian, folded, count = self._loss.hessian, self._loss.folded, len(fields.d)
        width, sub_block, _ = self._widths
        here = slice(first * width, stop * width)
        sub_blocks = slice(here.start // sub_block, here.stop // sub_block)
        matrices = hessian, folded
        if stop - first < count:
            matrices = np.ascontiguousarray(hessian[here, here]), np.ascontiguousarray(folded[here, sub_blocks])
        units_here = units[0][here], units[1][sub_blocks]
        matrix, right, pulled = columns.scale_terms(
            self._links, units_here, slope[here], *matrices, width, sub_block, count <= _KEPT
        )
        scales = np.concatenate((fields.d, fields.dmin))
        places = np.concatenate([np.arange(first, stop) + start for start in range(0, len(scales), count)])
        present = scales[places]
        new = self._rounded(present + columns.solved_scales(matrix, right))
        columns.keep_better_scales(matrix, right, present, new)
        changes = np.zeros_like(scales)
        scales[places], changes[places] = new, new - present
        widths, blocks = (width, sub_block), (first, stop)
        columns.follow_scales(self._links, units, pulled, changes, slope, (hessian, folded), widths, blocks)
        return replace(fields, d=scales[:count], dmin=scales[count:])

    def _fit(self, *, candidates: int, rounds: int) -> tuple[_Fields, Array]:
        """As `scales.fit`; without rounds values are found only where shifts depend on them."""
        fields = (self._fit_affine if self._layout.num_mins else self._fit_scales)(candidates)
        if not rounds and not self._layout.shift_width:
            return fields, self._x
        # A super-block that a round does not improve would go through the next one as it did through this.
        active = np.tile(self._active, (len(fields.d), 1))
        fields, values, least = self._search(fields, active)
        for _ in range(rounds):
            trial, trial_values = self._neighbours(fields, values, active)
            trial, trial_values, error = self._search(self._refit(trial, trial_values), active)
            active &= error < least
            if not active.any():
                break

            def merged(new: Array, old: Array, better: Array = active) -> Array:
                return np.where(better.repeat(len(new) // len(better), axis=0), new, old) if len(new) else new

            fields = _Fields(*map(merged, vars(trial).values(), vars(fields).values()))
            values, least = merged(trial_values, values), np.where(active, error, least)
        return fields, values

    def _search(self, fields: _Fields, active: Array) -> tuple[_Fields, Array, Array]:
        """The fields with the better shifts, the nearest values, and the error of each super-block."""
        a, b, metric = self._scales(fields), self._minimums(fields), self._loss.metric
        searched = fits.search(self._links, self._book, self._x, metric, a, b, self._widths, active)
        values, shifts, errors = searched
        return replace(fields, shifts=shifts), values, errors

    def _neighbours(self, fields: _Fields, values: Array, active: Array) -> tuple[_Fields, Array]:
        if len(self._multipliers) == 1:
            return fields, values
        fields, values = fields.copy(), values.copy()
        changed, metric = (fields.d, fields.dmin, fields.scales, fields.mins, fields.shifts), self._loss.metric
        fits.neighbours(self._links, self._book, self._x, metric, self._plan, changed, values, active)
        return fields, values

    def _refit(self, fields: _Fields, values: Array) -> _Fields:
        """`d` (and `dmin`) by weighted least squares over each super-block, as they will be stored."""
        width = self._layout.sub_block
        (units, _), x = self._units(fields, values), self._x
        if len(fields.dmin):
            x = x + self._minimums(fields).repeat(width, axis=0)
        fields = replace(fields, d=self._rounded(self._least_squares(x, units, fields.d)))
        if not len(fields.dmin):
            return fields
        ups = self._scales(fields).repeat(width, axis=0) * values - self._x
        dmin = self._least_squares(ups, fields.mins.astype(np.float32).repeat(width, axis=0), fields.dmin)
        return replace(fields, dmin=self._rounded(dmin if self._layout.has_plain_minimum else np.maximum(dmin, 0)))

    def _least_squares(self, x: Array, units: Array, otherwise: Array) -> Array:
        product, square = fits.moments(x, units, self._loss.metric, self._layout.super_block)
        return np.where(square > 0, product / np.maximum(square, _TINY), otherwise)

    def _fit_scales(self, candidates: int) -> _Fields:
        layout = self._layout
        fractions = torch.linspace(*layout.fractions, candidates).numpy() / np.float32(layout.codebook.peak)
        if layout.has_signed_scales:
            fractions = np.stack((fractions, -fractions), axis=1).ravel()
        _, width, run = self._widths
        free, curvature = fits.fit_scales(
            self._links, self._book, self._x, self._loss.metric, width, run, fractions, self._active
        )
        shifts = np.ones((len(self._x) // run, ROWS), np.float32) if run else _NONE
        return _Fields(*self._round_scales(free, curvature), shifts, _NONE, _NONE.astype(np.int32))

    def _fit_affine(self, candidates: int) -> _Fields:
        layout, metric = self._layout, self._loss.metric
        width, high = layout.sub_block, np.float32(layout.codebook.peak)
        fractions = torch.linspace(*layout.line_fractions, max(2, candidates // 2)).numpy()
        x, apart = self._x, _NONE
        if layout.has_plain_minimum:  # lines are those of ranges around zero: weights of one sign are brought there
            blocks = x.reshape(-1, width, ROWS)
            low, top = blocks.min(1), blocks.max(1)
            apart = np.where((low > 0) | (top < 0), (low + top) / 2, np.float32(0))
            x = x - apart.repeat(width, axis=0)
        a, b, curvature = fits.fit_affine(x, metric, width, high, fractions)
        if layout.has_zero_points:
            groups = (torch.from_numpy(t).unflatten(0, (-1, width)) for t in (self._x, metric[:, None]))
            lines = (torch.from_numpy(t) for t in (a, b))
            a, zeros = (t.numpy() for t in zero_points(*(t.movedim(1, -1) for t in groups), *lines, float(high)))
            return _Fields(*self._round_scales(a, curvature), _NONE, _NONE, zeros.astype(np.int32))
        fields = _Fields(*self._round_scales(a, curvature), _NONE, _NONE, _NONE.astype(np.int32))
        weights = fits.fit_minimums(x, metric, width, high, self._scales(fields), b)
        if layout.has_plain_minimum:
            return replace(fields, dmin=self._rounded(b - apart), mins=np.ones(b.shape, np.int32))
        dmin, mins = self._round_scales(b, np.repeat(weights[:, None], ROWS, axis=1))
        return replace(fields, dmin=dmin, mins=mins)

    def _round_scales(self, free: Array, curvature: Array) -> tuple[Array, Array]:
        """Super-block scales and codes that stand for free scales [S, ROWS], as `scales.round_scales` finds them."""
        layout, table = self._layout, self._multipliers
        if len(table) == 1:
            return self._rounded(free), np.zeros(free.shape, np.int32)
        if layout.has_power_of_two_scale:
            d = self._rounded(free)
            return d, np.searchsorted((table[1:] + table[:-1]) / 2, free / d).astype(np.int32)
        per_block, is_never_zero = layout.super_block // layout.sub_block, isinstance(layout.codebook, Integers)
        return fits.round_scales(free, curvature, table, self._unit, per_block, is_never_zero)
