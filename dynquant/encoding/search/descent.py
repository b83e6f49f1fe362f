"""Coordinate descent on e H eᵀ after the feedback pass: everything is chosen once more, knowing all the rest.

`descend` revisits the codewords group by group, `descend_scales` the scale codes (minimums, shifts) of the sub-blocks
with their codewords, `refit` solves for all super-block scales of a row together. A change is only made where it lowers
the loss, so the loss never rises but for the rounding of refitted scales.
"""

from dataclasses import replace

import torch
from torch import Tensor

from dynquant.encoding.search.feedback import feed_back, has_kernels, upper_factor
from dynquant.encoding.search.layouts import BlockLayout, Fields
from dynquant.encoding.search.rows import Rows
from dynquant.encoding.search.scales import merged

_RIDGE = 1e-7
"""Added to the diagonal of the scale equations, relative to its mean: super-blocks of zeros have no equation."""


def loss(rows: Rows, fields: Fields, values: Tensor, hessian: Tensor) -> Tensor:
    """e H eᵀ of every row [E, R], in normalised units."""
    error = rows.x - rows.decoded(fields, values)
    return ((error @ hessian) * error).sum(-1)


def descend(rows: Rows, fields: Fields, values: Tensor, hessian: Tensor) -> Tensor:
    """Values after one visit of every group."""
    if has_kernels(rows):
        from dynquant.encoding.search import column_kernels

        return column_kernels.descend(rows, fields, values, hessian)
    group = rows.layout.codebook.group
    spread = rows.spread(fields)
    decoded = spread.decoded(values, slice(None))
    values = values.clone()
    slope = (rows.x - decoded) @ hessian  # half the gradient
    for first in range(0, rows.x.shape[-1], group):
        columns = slice(first, first + group)
        block = hessian[:, columns, columns]
        pull = slope[..., columns]
        pull = pull / block if group == 1 else torch.linalg.solve(block, pull, left=False)
        target = spread.targets(decoded[..., columns] + pull, columns)
        nearest = rows.layout.codebook.nearest(target, block.diagonal(dim1=-2, dim2=-1))
        step = spread.a[..., columns] * (values[..., columns] - nearest)  # what the error grows by
        change = ((2 * slope[..., columns] + step @ block) * step).sum(-1, keepdim=True)
        better = change < 0
        values[..., columns] = torch.where(better, nearest, values[..., columns])
        slope += torch.where(better, step, 0.0) @ hessian[:, columns]
    return values


def descend_scales(rows: Rows, fields: Fields, values: Tensor, hessian: Tensor) -> tuple[Fields, Tensor]:
    """Fields and values after one visit of every sub-block, in which neighbouring scale codes are tried.

    For each trial the sub-block's codewords are found anew, by feedback within the sub-block.
    """
    layout = rows.layout
    if len(layout.multipliers) == 1:
        return fields, values
    if has_kernels(rows):
        from dynquant.encoding.search import scale_kernels

        return scale_kernels.descend_scales(rows, fields, values, hessian)
    width = layout.sub_block
    decoded = rows.decoded(fields, values)
    values, fields = values.clone(), fields.map(Tensor.clone)
    slope = (rows.x - decoded) @ hessian
    tiles = hessian.unflatten(-1, (-1, width)).unflatten(1, (-1, width))
    blocks = tiles.diagonal(dim1=1, dim2=3).movedim(-1, 1)  # [E, S, width, width]
    factors, solvers = upper_factor(blocks), torch.linalg.lu_factor(blocks)
    for s in range(rows.num_sub_blocks):
        columns = slice(s * width, (s + 1) * width)
        lu, pivots = (part[:, s] for part in solvers)
        target = decoded[..., columns] + torch.linalg.lu_solve(lu, pivots, slope[..., columns], left=False)
        sub = replace(rows, x=target)
        present = _sub_fields(fields, s, rows.num_sub_blocks)
        best, values[..., columns] = _best_trial(sub, present, values[..., columns], blocks[:, s], factors[:, s])
        present.map(Tensor.copy_, best)  # views: this writes into `fields`
        new = sub.decoded(best, values[..., columns])
        slope += (decoded[..., columns] - new) @ hessian[:, columns]
        decoded[..., columns] = new
    return fields, values


def _best_trial(sub: Rows, present: Fields, values: Tensor, block: Tensor, factor: Tensor) -> tuple[Fields, Tensor]:
    """The fields and values with least loss: those at hand, or a trial after feedback; all trials are run at once."""
    trials = _trials(sub.layout, present)
    count = len(trials)
    many = replace(sub, x=sub.x.repeat(count, 1, 1), unit=sub.unit.repeat(count, 1, 1))
    fields = present.map(lambda *tensors: torch.cat(tensors[1:]), *trials)
    tried = feed_back(many, fields, factor.repeat(count, 1, 1))
    losses = torch.cat(
        (
            loss(sub, present, values, block)[None],
            loss(many, fields, tried, block.repeat(count, 1, 1)).unflatten(0, (count, -1)),
        )
    )
    choice = losses.argmin(0, keepdim=True).unsqueeze(-1)  # [1, E, R, 1]; the first of equals

    def chosen(mine: Tensor, theirs: Tensor) -> Tensor:
        options = torch.cat((mine[None], theirs.unflatten(0, (count, -1))))
        return options.gather(0, choice.expand(1, *mine.shape)).squeeze(0)

    return present.map(chosen, fields), chosen(values, tried)


def _sub_fields(fields: Fields, s: int, num: int) -> Fields:
    """Views of the fields of sub-block `s` of `num`, as of a super-block of its own."""

    def part(t: Tensor) -> Tensor:
        start = s * t.shape[-1] // num  # of `d` and `dmin`, that of the super-block
        return t[..., start : start + max(1, t.shape[-1] // num)]

    return fields.map(part)


def _trials(layout: BlockLayout, fields: Fields) -> list[Fields]:
    """The present fields, and those that differ in one: the scale code or the minimum by one, or the shift."""
    trials = [fields]
    for step in (-1, 1):
        trials.append(replace(fields, scales=(fields.scales + step).clamp(0, len(layout.multipliers) - 1)))
        if fields.mins is not None:
            trials.append(replace(fields, mins=(fields.mins + step).clamp(0, layout.num_mins - 1)))
    if fields.shifts is not None and fields.shifts.shape[-1] == 1:
        trials.append(replace(fields, shifts=-fields.shifts))
    return trials


def refit(rows: Rows, fields: Fields, values: Tensor, hessian: Tensor) -> Fields:
    """All `d` (and `dmin`) of each row by least squares under the whole hessian, as they will be stored.

    Rows whose rounded scales lose more than the present ones keep those.
    """
    layout = rows.layout
    if layout.has_power_of_two_scale:
        return fields
    if has_kernels(rows):
        from dynquant.encoding.search import refit_kernels

        if refit_kernels.serves(rows):
            return refit_kernels.refit(rows, fields, values, hessian)
    units = torch.stack(rows.units(fields, values), dim=2)
    solution = _solve_scales(units, rows.x, hessian, layout.super_block)
    solution = rows.rounded(solution)
    blocks = fields.d.shape[-1]
    new = replace(fields, d=solution[..., :blocks], dmin=None if fields.dmin is None else solution[..., blocks:])
    better = loss(rows, new, values, hessian) < loss(rows, fields, values, hessian)
    return merged(better.unsqueeze(-1).expand_as(fields.d), (new, values), (fields, values))[0]


def _solve_scales(units: Tensor, x: Tensor, hessian: Tensor, width: int) -> Tensor:
    """Coefficients [E, R, k * B] of the vectors `units` [E, R, k, C], cut into B super-blocks each, that give `x`."""
    experts, num_rows, kinds, columns = units.shape
    blocks = columns // width
    cut = units.unflatten(-1, (blocks, width))  # [E, R, k, B, width]
    left = torch.empty(experts, num_rows, kinds * blocks, kinds * blocks, device=x.device)
    for j in range(blocks):
        part = hessian[:, j * width : (j + 1) * width]  # [E, width, C]
        for k in range(kinds):
            pulled = (cut[:, :, k, j] @ part).unflatten(-1, (blocks, width))  # [E, R, B, width]
            left[:, :, k * blocks + j] = (pulled.unsqueeze(2) * cut).sum(-1).flatten(2)
    right = ((x @ hessian).unflatten(-1, (blocks, width)).unsqueeze(2) * cut).sum(-1).flatten(2)
    diagonal = left.diagonal(dim1=-2, dim2=-1)
    ridge = _RIDGE * diagonal.mean(-1, keepdim=True) + torch.finfo(torch.float32).tiny
    left = left.to(torch.float64) + torch.diag_embed(ridge.expand_as(diagonal).to(torch.float64))
    return torch.linalg.solve(left, right.to(torch.float64).unsqueeze(-1)).squeeze(-1).to(torch.float32)
