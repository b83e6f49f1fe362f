"""Scales, minimums and shifts for weights that are rounded on their own, under a diagonal metric.

Every sub-block first gets a free scale: several fractions of its largest weight are tried, each followed by the
least-squares scale of the codewords found. The free scales are then rounded together to the fields of their
super-block. From there on everything is judged on stored fields: neighbouring scale codes and both shifts are tried
by a full search, and `d` is refitted by weighted least squares, until the error stops falling.
"""

from dataclasses import replace
from functools import partial
from itertools import product
from types import ModuleType

import torch
from torch import Tensor

from dynquant.encoding.search.feedback import has_kernels
from dynquant.encoding.search.layouts import Fields
from dynquant.encoding.search.rows import Rows

_TINY = 1e-30
_SUPER_SCALES = 24
"""Candidates for `d`, from the largest scale over the largest multiplier to 2.5 times that."""
_ZERO_SHARES = (0.8, 0.9, 1.0, 1.1, 1.25)
"""Shares of the scale of a free line that are tried beside each zero point near its own."""


def fit(rows: Rows, metric: Tensor, *, candidates: int, rounds: int) -> tuple[Fields, Tensor]:
    """Fields and values [E, R, C] of small weighted error; `metric` [E, C] weighs the square of each column's error.

    `candidates` free scales are tried for each sub-block, `rounds` times the stored ones are improved.
    """
    fields = (_fit_affine if rows.layout.num_mins else _fit_scales)(rows, metric, candidates)
    best = _search(rows, metric, fields)
    least = _sum(_error(rows, metric, *best), rows.layout.super_block)
    for _ in range(rounds):
        fields, values = _neighbours(rows, metric, *best)
        trial = _search(rows, metric, _refit(rows, metric, fields, values))
        error = _sum(_error(rows, metric, *trial), rows.layout.super_block)
        better = error < least
        if not better.any():
            break
        best, least = merged(better, trial, best), torch.where(better, error, least)
    return best


def _kernels_for(rows: Rows) -> ModuleType | None:
    """`fit_kernels` where Triton's kernels take these rows, else None."""
    if not has_kernels(rows):
        return None
    from dynquant.encoding.search import fit_kernels

    return fit_kernels if fit_kernels.serves(rows) else None


def merged(better: Tensor, new: tuple[Fields, Tensor], old: tuple[Fields, Tensor]) -> tuple[Fields, Tensor]:
    """`new` in the super-blocks that are marked in `better` [E, R, B], `old` elsewhere."""
    choose = partial(_where, better)
    return new[0].map(choose, old[0]), choose(new[1], old[1])


def _where(wins: Tensor, new: Tensor, old: Tensor) -> Tensor:
    """`new` where it wins, else `old`; each entry of `wins` stands for a run of neighbours."""
    return torch.where(wins.repeat_interleave(new.shape[-1] // wins.shape[-1], dim=-1), new, old)


def _lower(best: tuple[Tensor, ...] | None, trial: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """The tensors of `trial` where its first is lower than that of `best`."""
    if best is None:
        return trial
    wins = trial[0] < best[0]
    return tuple(torch.where(wins, new, old) for new, old in zip(trial, best, strict=True))


def _values(
    rows: Rows, metric: Tensor, a: Tensor, b: Tensor | None, offsets: Tensor | float, *, scan: bool = False
) -> Tensor:
    """Codewords [E, R, C] for the weights under scales `a`, `b` [E, R, S]: the nearest, or those of a scan."""
    inverse = rows.wide(torch.where(a != 0, a.reciprocal(), 0.0))
    y = (rows.x if b is None else rows.x + rows.wide(b)) * inverse - offsets
    experts, num_rows, columns = y.shape
    book = rows.layout.codebook
    find = book.scan if scan else book.nearest
    if book.group == 1:
        return find(y, metric)
    grouped = y.view(experts, num_rows, -1, book.group).transpose(1, 2).reshape(-1, num_rows, book.group)
    values = find(grouped, metric.reshape(-1, book.group))
    return values.view(experts, -1, num_rows, book.group).transpose(1, 2).reshape(experts, num_rows, columns)


def _search(rows: Rows, metric: Tensor, fields: Fields) -> tuple[Fields, Tensor]:
    """The fields with the better shift of each run, and the nearest values."""
    a, b = rows.scales(fields), rows.minimums(fields)
    if (kernels := _kernels_for(rows)) is not None:
        shifts, values = kernels.search(rows, metric, a, b)
        return replace(fields, shifts=shifts), values
    if not rows.layout.shift_width:
        return fields, _values(rows, metric, a, b, 0.0)
    shifts, values = _best_shifts(rows, metric, a)
    return replace(fields, shifts=shifts), values


def _best_shifts(rows: Rows, metric: Tensor, a: Tensor, *, scan: bool = False) -> tuple[Tensor, Tensor]:
    """Shifts [E, R, C / shift_width] and values."""
    width = rows.layout.shift_width
    best = None
    for sign in (1.0, -1.0):
        shifts = torch.full((*rows.x.shape[:2], rows.x.shape[2] // width), sign, device=rows.x.device)
        offsets = rows.offsets(shifts)
        values = _values(rows, metric, a, None, offsets, scan=scan)
        error = _sum(_squares(rows.x - rows.wide(a) * (values + offsets), metric), width)
        if best is None:
            best = error, shifts, values
    wins = error < best[0]
    return torch.where(wins, shifts, best[1]), _where(wins, values, best[2])


def _fit_scales(rows: Rows, metric: Tensor, candidates: int) -> Fields:
    """Types without minimums."""
    layout = rows.layout
    fractions = torch.linspace(*layout.fractions, candidates).tolist()
    signs = (1, -1) if layout.has_signed_scales else (1,)
    fractions = [sign * share / layout.codebook.peak for share in fractions for sign in signs]
    if (kernels := _kernels_for(rows)) is not None:
        return Fields(*round_scales(rows, *kernels.free_scales(rows, metric, fractions)))
    peak = rows.x.unflatten(-1, (-1, layout.sub_block)).abs().amax(-1)  # [E, R, S]
    best = None
    for fraction in fractions:
        a = peak * fraction
        shifts = None
        if layout.shift_width:
            shifts, values = _best_shifts(rows, metric, a, scan=True)
        else:
            values = _values(rows, metric, a, None, 0.0, scan=True)
        units, w = values + rows.offsets(shifts), metric.unsqueeze(1)
        moment, square = (_sum(w * t * units, layout.sub_block) for t in (rows.x, units))
        a = moment / square.clamp_min(_TINY)
        best = _lower(best, (-moment * a, a, square))  # the first is what the squared error grows by
    return Fields(*round_scales(rows, *best[1:]))


def _fit_affine(rows: Rows, metric: Tensor, candidates: int) -> Fields:
    """Types with minimums: free lines are rounded to stored scales, and then minimums fitted to these."""
    layout = rows.layout
    x = rows.x.unflatten(-1, (-1, layout.sub_block))  # [E, R, S, n]
    w = metric.unflatten(-1, (-1, layout.sub_block)).unsqueeze(1)  # [E, 1, S, n]
    fractions = torch.linspace(*layout.line_fractions, max(2, candidates // 2)).tolist()
    apart = torch.zeros_like(x[..., 0])
    if layout.has_plain_minimum:  # lines are those of ranges around zero: weights of one sign are brought there
        low, top = x.amin(-1), x.amax(-1)
        apart = torch.where((low > 0) | (top < 0), (low + top) / 2, 0.0)
        x = x - apart.unsqueeze(-1)
        rows = replace(rows, x=x.flatten(-2))
    if (kernels := _kernels_for(rows)) is not None:
        a, b, curvature = kernels.free_lines(rows, metric, fractions)
    else:
        a, b, curvature = _free_lines(x, w, fractions, layout.codebook.peak)
    if layout.has_zero_points:
        a, zeros = zero_points(x, w, a, b, layout.codebook.peak)
        return Fields(*round_scales(rows, a, curvature), mins=zeros)
    d, scales = round_scales(rows, a, curvature)
    fields = Fields(d, scales)
    a = rows.scales(fields).unsqueeze(-1)
    for _ in range(2):
        q = torch.where(a != 0, (x + b.unsqueeze(-1)) / a, 0.0).round_().clamp_(0, layout.codebook.peak)
        b = ((w * (a * q - x)).sum(-1) / w.sum(-1).clamp_min(_TINY)).clamp_min(0)
    if layout.has_plain_minimum:
        return replace(fields, dmin=rows.rounded(b - apart), mins=torch.ones_like(scales))
    dmin, mins = round_scales(rows, b, w.sum(-1).expand_as(b))
    return replace(fields, dmin=dmin, mins=mins)


def _free_lines(x: Tensor, w: Tensor, fractions: list[float], levels: float) -> tuple[Tensor, Tensor, Tensor]:
    """Scale and minimum of each sub-block [E, R, S, n], and the curvature of the scale [E, R, S].

    Both ends of the range are tried, then scale and minimum fitted together.
    """
    low, high = x.amin(-1).clamp_max(0), x.amax(-1).clamp_min(0)

    def nearest(a: Tensor, b: Tensor) -> Tensor:
        return ((x + b.unsqueeze(-1)) / a.unsqueeze(-1)).round_().clamp_(0, levels)

    best = None
    for below, above in product(fractions, repeat=2):
        a = ((above * high - below * low) / levels).clamp_min(_TINY)
        b = -below * low
        for _ in range(2):
            a, b = _line(x, w, nearest(a, b))
        error = ((x - a.unsqueeze(-1) * nearest(a, b) + b.unsqueeze(-1)).square_() * w).sum(-1)
        best = _lower(best, (error, a, b))
    _, a, b = best
    return a, b, (w * nearest(a, b).square()).sum(-1)


def zero_points(x: Tensor, w: Tensor, a: Tensor, b: Tensor, levels: float) -> tuple[Tensor, Tensor]:
    """Scales and integer zero points near the free lines x = a q - b of groups [..., n], all [...]."""
    best, middle = None, (b / a).round_()
    for step, share in product((-1, 0, 1), _ZERO_SHARES):
        zeros, d = (middle + step).clamp_(0, levels), a * share
        for _ in range(2):
            wide = zeros.unsqueeze(-1)
            units = (x / d.unsqueeze(-1) + wide).round_().clamp_(0, levels).sub_(wide)
            moment, square = (w * x * units).sum(-1), (w * units * units).sum(-1)
            d = (moment / square.clamp_min(_TINY)).clamp_min(_TINY)
        best = _lower(best, (-moment * d, d, zeros))  # the first is what the squared error grows by
    return best[1], best[2].to(torch.int64)


def _line(x: Tensor, w: Tensor, q: Tensor) -> tuple[Tensor, Tensor]:
    """Weighted least squares of x = a q - b with b >= 0; all [..., n] -> [...]."""
    sw, sq, sqq = w.sum(-1), (w * q).sum(-1), (w * q * q).sum(-1)
    sx, sxq = (w * x).sum(-1), (w * x * q).sum(-1)
    determinant = sw * sqq - sq * sq
    a = (sw * sxq - sq * sx) / determinant.clamp_min(_TINY)
    b = (a * sq - sx) / sw.clamp_min(_TINY)
    through_zero = (b < 0) | (determinant <= 1e-9 * sw * sqq)  # a single codeword settles no line
    a = torch.where(through_zero, sxq / sqq.clamp_min(_TINY), a).clamp_min(_TINY)
    return a, torch.where(through_zero, 0.0, b)


def round_scales(rows: Rows, free: Tensor, curvature: Tensor) -> tuple[Tensor, Tensor]:
    """Super-block scale [E, R, B] and codes [E, R, S] that stand for free scales [E, R, S] with least weighted error.

    `curvature` [E, R, S] is what a unit of squared difference costs.
    """
    layout = rows.layout
    table = layout.multiplier_table(free.device)
    per_block = layout.super_block // layout.sub_block
    free, curvature = free.unflatten(-1, (-1, per_block)), curvature.unflatten(-1, (-1, per_block))
    if layout.has_power_of_two_scale:
        d = rows.rounded(free)
        return d.squeeze(-1), torch.bucketize(free / d, (table[1:] + table[:-1]) / 2).flatten(-2)
    if len(table) == 1:
        return rows.rounded(free.squeeze(-1)), torch.zeros_like(free, dtype=torch.int64).flatten(-2)
    shares = torch.linspace(0.4, 1.15, _SUPER_SCALES).tolist()
    if (kernels := _kernels_for(rows)) is not None:
        return kernels.round_scales(rows, free.flatten(-2), curvature.flatten(-2), shares)
    middles = (table[1:] + table[:-1]) / 2
    peak = free.abs().amax(-1, keepdim=True)

    def codes_of(d: Tensor) -> Tensor:
        return torch.bucketize(torch.where(d != 0, free / d, 0.0), middles)

    best = None
    for share in shares:
        d = peak / (share * table[-1])
        for _ in range(2):
            m = table[codes_of(d)]
            square = (curvature * m * m).sum(-1, keepdim=True)
            d = torch.where(square > 0, (curvature * m * free).sum(-1, keepdim=True) / square.clamp_min(_TINY), d)
        d = rows.rounded(d)
        codes = codes_of(d)
        error = (curvature * (free - d * table[codes]).square()).sum(-1, keepdim=True)
        best = _lower(best, (error, d, codes))
    return best[1].squeeze(-1), best[2].flatten(-2)


def _neighbours(rows: Rows, metric: Tensor, fields: Fields, values: Tensor) -> tuple[Fields, Tensor]:
    """Try the scale code below and above (and minimums likewise) in every sub-block, with a full search each."""
    layout = rows.layout
    if len(layout.multipliers) == 1:
        return fields, values
    if (kernels := _kernels_for(rows)) is not None:
        return kernels.neighbours(rows, metric, fields, values)
    error = _sum(_error(rows, metric, fields, values), layout.sub_block)
    best = fields
    for step, min_step in product((-1, 0, 1), repeat=2) if layout.num_mins else ((-1, 0), (1, 0)):
        if (step, min_step) == (0, 0):
            continue
        scales = (fields.scales + step).clamp(0, len(layout.multipliers) - 1)
        mins = None if fields.mins is None else (fields.mins + min_step).clamp(0, layout.num_mins - 1)
        trial, trial_values = _search(rows, metric, replace(fields, scales=scales, mins=mins))
        trial_error = _sum(_error(rows, metric, trial, trial_values), layout.sub_block)
        wins = trial_error < error
        error = torch.where(wins, trial_error, error)
        # d and dmin, one for many sub-blocks, are the same tensors in both.
        best = trial.map(lambda new, old: old if new is old else _where(wins, new, old), best)  # noqa: B023
        values = _where(wins, trial_values, values)
    return best, values


def _refit(rows: Rows, metric: Tensor, fields: Fields, values: Tensor) -> Fields:
    """`d` (and `dmin`) by weighted least squares over each super-block, as they will be stored."""
    layout = rows.layout
    units, *downs = rows.units(fields, values)
    b = rows.minimums(fields) if downs else None
    x = rows.x if b is None else rows.x + rows.wide(b)
    fields = replace(fields, d=rows.rounded(_least_squares(x, units, metric, layout.super_block, fields.d)))
    if fields.dmin is None:
        return fields
    ups = rows.wide(rows.scales(fields)) * values
    dmin = _least_squares(rows.x - ups, *downs, metric, layout.super_block, fields.dmin)
    return replace(fields, dmin=rows.rounded(dmin if layout.has_plain_minimum else dmin.clamp_min(0)))


def _least_squares(x: Tensor, units: Tensor, metric: Tensor, width: int, otherwise: Tensor) -> Tensor:
    w = metric.unsqueeze(1)
    square = _sum(w * units * units, width)
    return torch.where(square > 0, _sum(w * x * units, width) / square.clamp_min(_TINY), otherwise)


def _error(rows: Rows, metric: Tensor, fields: Fields, values: Tensor) -> Tensor:
    return _squares(rows.x - rows.decoded(fields, values), metric)


def _squares(difference: Tensor, metric: Tensor) -> Tensor:
    return difference.square() * metric.unsqueeze(1)


def _sum(t: Tensor, width: int) -> Tensor:
    return t.unflatten(-1, (-1, width)).sum(-1)
