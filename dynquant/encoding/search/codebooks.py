"""Values that a group of neighbouring weights may take, and the nearest ones to a target.

Targets `y` are weights divided by their scale, [B, R, group]: B groups with a metric of their own, R rows each. The
distance is sum_j metric[b, j] * (y[j] - value[j])^2. Every search is exact. A grid is first tried by rounding each
coordinate on its own: where the rounded vector is a word of the grid (about half of the time), no word is nearer; the
other rows are compared with all words.
"""

from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from typing import Protocol

import torch
from torch import Tensor

from dynquant.formats import tables

_CPU_SCORES = 1 << 19
"""Scores in memory at a time: two megabytes, so that they are compared while they are in the cache."""
_GPU_SCORES = 1 << 28
_SCORE_RUN = 64
"""A CPU finds the smallest of many numbers faster as the smallest run of this length, and then inside it."""
_TRIED_AT_ONCE = (0, 1, 3, 8)
"""Bounds of the groups of sign places searched together: after the first of them most targets have few left to try."""


class Codebook(Protocol):
    """The values that `group` neighbouring weights can take together, before scaling."""

    group: int
    peak: float
    """Largest magnitude of a value."""

    def nearest(self, y: Tensor, metric: Tensor) -> Tensor:
        """Values [B, R, group] nearest to `y` [B, R, group] under the diagonal metric [B, group]."""

    def scan(self, y: Tensor, metric: Tensor) -> Tensor:
        """Values found faster, and good enough to choose a scale by; they need not be storable."""


@dataclass(frozen=True)
class Integers:
    """Neighbouring integers, one weight at a time: the K types, Q2_0 and the ternary TQ types."""

    low: int
    high: int
    group: int = 1

    @property
    def peak(self) -> float:
        return float(max(-self.low, self.high))

    def nearest(self, y: Tensor, metric: Tensor) -> Tensor:
        return y.round().clamp_(self.low, self.high)

    scan = nearest


@dataclass(frozen=True)
class Values:
    """A fixed table of values, one weight at a time: sixteen of IQ4 and MXFP4, -1 and 1 of Q1_0."""

    type_name: str
    group: int = 1

    @property
    def peak(self) -> float:
        return float(self.table(torch.device("cpu")).abs().max())

    def table(self, device: torch.device) -> Tensor:
        """All values, ascending."""
        return tables.values(self.type_name, device).unique()

    def nearest(self, y: Tensor, metric: Tensor) -> Tensor:
        table = self.table(y.device)
        return table[torch.bucketize(y.contiguous(), (table[1:] + table[:-1]) / 2)]

    scan = nearest


class Grid:
    """Words of `width` values each from a few ascending levels, as gguf-py's tables hold them."""

    def __init__(self, type_name: str) -> None:
        self._words = torch.from_numpy(tables.grid_rows(type_name))  # [K, width]
        self.width = self._words.shape[1]
        self._levels = self._words.unique()
        self._places = len(self._levels) ** torch.arange(self.width - 1, -1, -1)  # a word is a number in base `levels`
        self._index = torch.full((len(self._levels) ** self.width,), -1, dtype=torch.int64)
        self._index[self._number(torch.bucketize(self._words, self._levels))] = torch.arange(len(self._words))

    @property
    def peak(self) -> float:
        return float(self._levels.abs().max())

    @property
    def lowest(self) -> float:
        return float(self._levels[0])

    def arrays(self) -> tuple[Tensor, Tensor, Tensor]:
        """Words [K, width], ascending levels, and the index of each number in base `levels`; -1 where it is no word."""
        return self._words, self._levels, self._index

    def index_of(self, words: Tensor) -> Tensor:
        """Index of each word [..., width]; -1 where it is none."""
        levels = self._levels.to(words.device)
        return self._index.to(words.device)[self._number(torch.bucketize(words.contiguous(), levels))]

    def nearest(self, y: Tensor, metric: Tensor, owner: Tensor) -> tuple[Tensor, Tensor]:
        """Nearest words [N, width] to `y` [N, width], and their distances [N]; row n has metric[owner[n]].

        `owner` must ascend.
        """
        levels = self._levels.to(y.device)
        words = levels[torch.bucketize(y.contiguous(), (levels[1:] + levels[:-1]) / 2)]
        missed = (self.index_of(words) < 0).nonzero().squeeze(1)
        if len(missed):
            words[missed] = self._nearest_of_all(y[missed], metric, owner[missed])
        return words, ((y - words).square_() * metric[owner]).sum(-1)

    def _nearest_of_all(self, y: Tensor, metric: Tensor, owner: Tensor) -> Tensor:
        words = self._words.to(y.device)
        weighted = y * metric[owner]
        norms = metric @ (words * words).T  # [B, K]
        doubled = (-2 * words).T.contiguous()
        best = torch.empty(len(y), dtype=torch.int64, device=y.device)
        if y.device.type != "cpu":
            step = max(1, _GPU_SCORES // len(words))
            for at in range(0, len(y), step):
                rows = slice(at, at + step)
                best[rows] = (weighted[rows] @ doubled).add_(norms[owner[rows]]).argmin(-1)
            return words[best]
        ends = torch.searchsorted(owner, torch.arange(len(metric)), right=True).tolist()
        step, start = _CPU_SCORES // len(words), 0
        for norm, end in zip(norms, ends, strict=True):
            for at in range(start, end, step):
                rows = slice(at, min(at + step, end))
                best[rows] = _argmin(torch.addmm(norm, weighted[rows], doubled))
            start = end
        return words[best]

    def nearest_with_one_negated(self, y: Tensor, metric: Tensor, owner: Tensor) -> tuple[Tensor, Tensor]:
        """As `nearest`, for `y` >= 0 and words of which one value is negated: all words and places are compared.

        Negating value i of a word adds 4 * metric_i * y_i * value_i to its distance.
        """
        words = self._words.to(y.device)
        weighted = y * metric[owner]
        norms, doubled = metric @ (words * words).T, -2 * words.T
        best, places = (torch.empty(len(y), dtype=torch.int64, device=y.device) for _ in range(2))
        step = _GPU_SCORES // (3 * len(words))
        for at in range(0, len(y), step):
            rows = slice(at, at + step)
            extra = weighted[rows, :1] * words[:, 0]
            for place in range(1, self.width):
                extra = torch.minimum(extra, weighted[rows, place, None] * words[:, place])
            best[rows] = (4 * extra + weighted[rows] @ doubled).add_(norms[owner[rows]]).argmin(-1)
            places[rows] = (weighted[rows] * words[best[rows]]).argmin(-1)
        nearest = words[best].scatter(1, places[:, None], -words[best].gather(1, places[:, None]))
        return nearest, ((y - nearest).square_() * metric[owner]).sum(-1)

    def _number(self, digits: Tensor) -> Tensor:
        return (digits * self._places.to(digits.device)).sum(-1)


@dataclass(frozen=True)
class TernaryWords:
    """IQ1: words of eight from {-1, 0, 1}. The common shift of a block is not part of the word."""

    group: int = 8

    @cached_property
    def grid(self) -> Grid:
        return Grid("IQ1_S")

    @property
    def peak(self) -> float:
        return self.grid.peak

    def nearest(self, y: Tensor, metric: Tensor) -> Tensor:
        return self.grid.nearest(y.flatten(0, 1), metric, _owners(y))[0].view_as(y)

    def scan(self, y: Tensor, metric: Tensor) -> Tensor:
        """Rounded coordinates: half of them are words, and the scale that suits them costs words 0.3 % at most."""
        return y.round().clamp_(-1, 1)


@dataclass(frozen=True)
class SignedWords:
    """IQ2 and IQ3: eight magnitudes from one or two grid words, and a sign each.

    With `even_signs` only seven signs are stored and the number of minus signs is even. A target with an odd number
    then has one sign against it: the cheapest such choice over all words and all eight places is found.
    """

    type_name: str
    even_signs: bool
    group: int = 8

    @cached_property
    def grid(self) -> Grid:
        return Grid(self.type_name)

    @property
    def peak(self) -> float:
        return self.grid.peak

    def nearest(self, y: Tensor, metric: Tensor) -> Tensor:
        rows = y.flatten(0, 1)
        targets = Targets(self.grid, rows.abs(), metric, _owners(y))
        magnitudes = targets.magnitudes
        negative = rows < 0
        if self.even_signs:
            is_odd = negative.sum(-1) % 2 == 1
            if y.device.type == "cpu":
                odd = is_odd.nonzero().squeeze(1)
                magnitudes[odd] = targets.with_one_negated(odd)
            else:
                magnitudes = torch.where(is_odd[:, None], targets.all_with_one_negated(), magnitudes)
        return torch.where(negative, -magnitudes, magnitudes).view_as(y)

    def scan(self, y: Tensor, metric: Tensor) -> Tensor:
        """Words with the signs of the targets, whatever their number."""
        magnitudes = Targets(self.grid, y.flatten(0, 1).abs(), metric, _owners(y)).magnitudes.view_as(y)
        return torch.where(y < 0, -magnitudes, magnitudes)


class Targets:
    """Magnitudes `y` [N, 8] to be met by one word of eight or two words of four."""

    def __init__(self, grid: Grid, y: Tensor, metric: Tensor, owner: Tensor) -> None:
        self._grid, self._y, self._metric, self._owner = grid, y, metric, owner
        nearest = [grid.nearest(y[:, part], metric[:, part], owner) for part in self._parts()]
        self.magnitudes = torch.cat([words for words, _ in nearest], dim=1)
        self._costs = torch.stack([cost for _, cost in nearest], dim=1)  # [N, parts]

    def _parts(self) -> list[slice]:
        return [slice(at, at + self._grid.width) for at in range(0, 8, self._grid.width)]

    def all_with_one_negated(self) -> Tensor:
        """For every row, the nearest magnitudes [N, 8] of which one is negated.

        Twice the arithmetic of `with_one_negated` and no wait for a count of rows: a GPU prefers it.
        """
        negated = [
            self._grid.nearest_with_one_negated(self._y[:, part], self._metric[:, part], self._owner)
            for part in self._parts()
        ]
        extra = torch.stack([cost for _, cost in negated], dim=1) - self._costs
        part_of_place = torch.arange(8, device=extra.device) // self._grid.width
        is_cheapest = part_of_place == extra.argmin(dim=1, keepdim=True)
        return torch.where(is_cheapest, torch.cat([words for words, _ in negated], dim=1), self.magnitudes)

    def with_one_negated(self, rows: Tensor) -> Tensor:
        """The same for some rows [len(rows), 8], with searches for few of the places.

        Negating place i costs at least 4 * metric_i * y_i * (lowest level) more than the best words without, so places
        are tried from the cheapest on, a few in one search, and a row is done when no untried place can win.
        """
        floors = 4 * self._grid.lowest * self._metric[self._owner[rows]] * self._y[rows]
        floors, order = floors.sort(dim=-1, stable=True)
        extra = torch.full_like(floors[:, 0], torch.inf)
        best = self.magnitudes[rows].clone()
        for start, end in pairwise(_TRIED_AT_ONCE):
            row, rank = (floors[:, start:end] < extra[:, None]).nonzero(as_tuple=True)
            place = order[row, rank + start]
            words, cost = self._negated(rows[row], place)
            ranked = torch.full_like(floors[:, start:end], torch.inf)
            ranked[row, rank] = cost
            which = torch.full_like(order[:, start:end], -1)
            which[row, rank] = torch.arange(len(row), device=row.device)
            lowest, winner = ranked.min(dim=-1)
            won = (lowest < extra).nonzero().squeeze(1)
            extra[won] = lowest[won]
            best[won] = words[which[won, winner[won]]]
        return best

    def _negated(self, rows: Tensor, place: Tensor) -> tuple[Tensor, Tensor]:
        """Magnitudes [len(rows), 8] with the value at `place` negated, and what they cost more than those without."""
        magnitudes = self.magnitudes[rows]
        cost = torch.empty_like(magnitudes[:, 0])
        for number, part in enumerate(self._parts()):
            mine = (place // self._grid.width == number).nonzero().squeeze(1)
            each, inside, source = torch.arange(len(mine), device=mine.device), place[mine] - part.start, rows[mine]
            target = self._y[source, part]
            target[each, inside] *= -1
            words, distance = self._grid.nearest(target, self._metric[:, part], self._owner[source])
            words[each, inside] *= -1
            magnitudes[mine, part] = words
            cost[mine] = distance - self._costs[source, number]
        return magnitudes, cost


def _owners(y: Tensor) -> Tensor:
    """The batch index of every row of [B, R, group], as [B * R]."""
    return torch.arange(len(y), device=y.device).repeat_interleave(y.shape[1])


def _argmin(scores: Tensor) -> Tensor:
    """Index of the smallest score in each row [N, K]; K is a multiple of `_SCORE_RUN`."""
    runs = scores.view(len(scores), -1, _SCORE_RUN)
    run = runs.view(-1, _SCORE_RUN).amin(-1).view(len(scores), -1).argmin(-1)
    inside = runs[torch.arange(len(scores)), run].argmin(-1)
    return run * _SCORE_RUN + inside
