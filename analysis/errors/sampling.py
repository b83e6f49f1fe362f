"""Rows drawn at random, which stand for a whole tensor, and what is known of it from them.

Experts are drawn first, then rows of each, both by priority sampling (Duffield, Lund and Thorup 2007): unit i of size
a_i gets the key u_i / a_i, u_i uniform in (0, 1), and the k units with the smallest keys are taken; with t the next
key, unit i then stands for 1 / min(1, a_i t) units. Samples of any k are nested, large units come almost surely, and
when all are taken nothing is estimated. The size of a row is the energy of its output under the importance of its
expert's inputs, times the share of tokens that the expert received; a quarter of it counts weights and experts alike,
as `relative_rms` does. Sizes cost one look at each weight, which the checksum of the tensor takes anyway.

Within an expert, weights are normalised to the known sum of its sizes. The error of a type is a ratio of two estimated
totals, error over energy; its variance is that of the residuals z = error - ratio * energy, of experts among the tensor
and of rows within experts:

    sum_e (1 - p_e) / p_e² z_e²  +  sum_e 1 / p_e  sum_r (1 - p_r) / p_r² (z_r - a_r z_e / a_e)²

Often one expert of many loses a tenth less than the others, and where it is not drawn the first sum does not show that.
So there are rather many experts with few rows of each: all of up to 16. Of more, n that are drawn have that sum scaled
by n / (n - 3): n / (n - 1) for the ratio, and (n - 1) / (n - 3), the variance of Student's distribution, because errors
are judged by a variance that is itself estimated.
"""

import hashlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from math import prod

import torch
from torch import Tensor

_EVEN_SHARE = 0.25
_FIRST_EXPERTS = 16
_MATRICES = 8  # so many experts have `first_rows` each; more of them share fewer rows
_FEWEST_ROWS = 128  # on a CPU so many rows of a matrix are searched in the time of one
_FEWEST_OF_EXPERT = 32  # an expert's second moments are factored for them
_SMALLEST = 1e-6  # size of a row over the mean, at least: a row of zeros can be drawn, too


@dataclass(frozen=True)
class Sampling:
    """Limits of what is measured of a tensor: rounds of twice as many rows, until its errors are known well enough."""

    seed: int = 0
    target: float = 0.02
    """Standard error of `weighted_error` over itself."""
    negligible: float = 1e-5
    """A standard error that is small whatever `weighted_error` is: a type that loses so little decides nothing."""
    most_weights: int = 1 << 22
    """Weights of a tensor that are measured at most, but a few rows of a few experts; smaller ones may be whole."""
    first_rows: int = _FEWEST_ROWS
    """Rows of a matrix that are measured first, and of each of few experts. A GPU takes as long for more."""
    version: int = 2
    """Number of the way of drawing; an interrupted table does not go on with rows that were drawn in another way."""


@dataclass(frozen=True)
class Extent:
    """Numbers of experts, and of rows in each, that are drawn."""

    experts: int
    rows: int


@dataclass(frozen=True)
class DrawnRows:
    """The rows of one tensor that may be measured, in the order in which they were drawn."""

    experts: Tensor  # [E], by their keys
    expert_sizes: Tensor  # float64 [E], of experts by number
    expert_keys: Tensor  # float64 [E], rising
    weights: Tensor  # float32 [E, M, C], of experts by number, rows in their order
    row_sizes: Tensor  # float64 [E, M]
    row_keys: Tensor  # float64 [E, M], rising
    next_keys: Tensor  # float64 [E], of the first row that is not among them; infinite where all are
    num_rows: int  # of an expert
    _weights_of: dict[Extent, Tensor] = field(default_factory=dict)
    """Results of `_row_weights`, which every type asks for."""

    def extents(self, limits: Sampling) -> Iterator[Extent]:
        """Yield how much is drawn in each round: first more experts, then more rows of each."""
        num_experts, most_rows, columns = self.weights.shape
        rows = limits.first_rows * min(num_experts, _MATRICES) ** 2 // num_experts**2
        rows = min(most_rows, max(_FEWEST_OF_EXPERT, rows))
        most_experts = min(num_experts, max(_FIRST_EXPERTS, limits.most_weights // (rows * columns)))
        experts = min(num_experts, _FIRST_EXPERTS)
        yield Extent(experts, rows)
        while experts < most_experts or (experts == num_experts and rows < most_rows):
            if experts < most_experts:
                experts = min(2 * experts, most_experts)
            else:
                rows = min(2 * rows, most_rows)
            yield Extent(experts, rows)

    def expert_chances(self, extent: Extent) -> Tensor:
        """Return the chance of each drawn expert to be drawn, float64 [n], in their order."""
        drawn = self.experts[: extent.experts]
        if extent.experts == len(self.experts):
            return torch.ones(len(drawn), dtype=torch.float64)
        return (self.expert_sizes[drawn] * self.expert_keys[extent.experts]).clamp_max(1.0)

    def row_chances(self, extent: Extent) -> Tensor:
        """Return the chance of each drawn row within its drawn expert, float64 [n, m]."""
        drawn, sizes = self.experts[: extent.experts], self.row_sizes[:, : extent.rows]
        if extent.rows == self.num_rows:
            return torch.ones_like(sizes[drawn])
        is_last = extent.rows == self.row_keys.shape[1]
        following = self.next_keys if is_last else self.row_keys[:, extent.rows]
        return (sizes * following.unsqueeze(1))[drawn].clamp_max(1.0)

    def is_whole(self, extent: Extent) -> bool:
        """Return whether nothing is left out."""
        return extent == Extent(len(self.experts), self.num_rows)

    def totals(self, values: Tensor, extent: Extent) -> Tensor:
        """Estimate sums over all rows of each drawn expert, from those of its drawn rows; [..., n, m] to [..., n]."""
        return (values * self._row_weights(extent)).sum(-1)

    def standard_error(self, errors: Tensor, energies: Tensor, shares: Tensor, extent: Extent) -> float:
        """Return that of the sum of `errors` [n, m] over that of `energies`, experts counted by `shares` [n]."""
        chances, row_chances = self.expert_chances(extent), self.row_chances(extent)
        by_expert = shares / chances
        error, energy = ((self.totals(values, extent) * by_expert).sum() for values in (errors, energies))
        if not float(energy) > 0:
            return 0.0
        residuals = (errors - error / energy * energies) * shares.unsqueeze(1)
        of_experts = self.totals(residuals, extent)
        drawn = self.experts[: extent.experts]
        sizes = self.row_sizes[drawn, : extent.rows]
        apart = residuals - sizes * (of_experts / self.expert_sizes[drawn]).unsqueeze(1)
        within = ((1 - row_chances) * (self._row_weights(extent) * apart).square()).sum(-1) * _freedom(extent.rows)
        between = (1 - chances) * (of_experts / chances).square() * _freedom(extent.experts, 3)
        return float((between + within / chances).sum().sqrt() / energy)

    def _row_weights(self, extent: Extent) -> Tensor:
        """Return how many rows each drawn row stands for, float64 [n, m]."""
        if extent not in self._weights_of:
            weights = 1 / self.row_chances(extent)
            if extent.rows < self.num_rows:
                drawn = self.experts[: extent.experts]
                sizes = self.row_sizes[drawn, : extent.rows]
                weights = weights * (self.expert_sizes[drawn] / (weights * sizes).sum(-1)).unsqueeze(1)
            self._weights_of[extent] = weights
        return self._weights_of[extent]


def draw(
    name: str,
    shape: tuple[int, int, int],
    blocks: Iterable[tuple[range, range, Tensor]],
    scale: Tensor | None,
    shares: Tensor,
    limits: Sampling,
) -> DrawnRows:
    """Draw rows of a tensor [E, R, C] that is read once: `blocks` are experts, rows and weights, all rows in order.

    `scale` [E, C] is the importance of the inputs, `shares` [E] the tokens that each expert received.
    """
    num_experts, num_rows, columns = shape
    most = most_rows(shape, limits)
    digest = hashlib.sha256(f"{limits.seed} {name}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:7], "big"))
    uniform = torch.rand(num_experts, num_rows, dtype=torch.float64, generator=generator).clamp_min(1e-300)
    mean_scale = 1.0 if scale is None else float(scale.mean())
    sizes = torch.empty(num_experts, num_rows, dtype=torch.float64)
    kept: list[Tensor] = [torch.empty(0, columns)] * num_experts
    places: list[Tensor] = [torch.empty(0, dtype=torch.int64)] * num_experts
    for experts, rows, weights in blocks:
        for expert, matrix in zip(experts, weights, strict=True):
            squares = matrix.square()
            even = squares.sum(-1).double() * mean_scale
            energy = even if scale is None else (squares @ scale[expert]).double()
            mixed = (1 - _EVEN_SHARE) * shares[expert] * energy + _EVEN_SHARE / num_experts * even
            sizes[expert, rows.start : rows.stop] = mixed.clamp_min(_SMALLEST * float(mixed.mean())).clamp_min(1e-300)
            candidates = torch.cat([places[expert], torch.arange(rows.start, rows.stop)])
            keys = uniform[expert, candidates] / sizes[expert, candidates]
            first = keys.argsort(stable=True)[:most]
            earlier, places[expert] = len(places[expert]), candidates[first]
            old, new = kept[expert], torch.empty(len(first), columns)
            is_new = first >= earlier
            new[is_new], new[~is_new] = matrix[first[is_new] - earlier], old[first[~is_new]]
            kept[expert] = new
    return _ordered(kept, sizes, uniform, generator)


def _ordered(kept: list[Tensor], sizes: Tensor, uniform: Tensor, generator: torch.Generator) -> DrawnRows:
    """Sort rows and experts by their keys."""
    keys, order = (uniform / sizes).sort(dim=-1, stable=True)
    most = len(kept[0])
    endless = torch.full((len(kept),), torch.inf, dtype=torch.float64)
    expert_sizes = sizes.sum(-1)
    drawn = torch.rand(len(kept), dtype=torch.float64, generator=generator).clamp_min(1e-300) / expert_sizes
    expert_keys, experts = drawn.sort(dim=0, stable=True)
    return DrawnRows(
        experts=experts,
        expert_sizes=expert_sizes,
        expert_keys=expert_keys,
        weights=torch.stack(kept),
        row_sizes=sizes.gather(1, order[:, :most]),
        row_keys=keys[:, :most].contiguous(),
        next_keys=keys[:, most].clone() if most < keys.shape[1] else endless,
        num_rows=sizes.shape[1],
    )


def most_rows(shape: tuple[int, int, int], limits: Sampling) -> int:
    """Return how many rows of each expert are drawn at most, and kept in memory."""
    num_experts, num_rows, columns = shape
    fewest = _FEWEST_OF_EXPERT if num_experts > 1 else limits.first_rows
    return min(num_rows, max(fewest, limits.most_weights // (num_experts * columns)))


def blocks_of(shape: tuple[int, int, int], most_weights: int) -> Iterator[tuple[range, range]]:
    """Cut a tensor [E, R, C] into experts, or rows of a matrix, of at most so many weights (or one alone)."""
    num_experts, num_rows, columns = shape
    at_once = num_rows if num_experts > 1 else max(1, most_weights // columns)
    for expert in range(num_experts):
        for start in range(0, num_rows, at_once):
            yield range(expert, expert + 1), range(start, min(start + at_once, num_rows))


def stacked(shape: tuple[int, ...]) -> tuple[int, int, int]:
    """Return experts (or heads), rows and columns; a matrix is one expert."""
    return prod(shape[:-2]), shape[-2], shape[-1]


def _freedom(count: int, lost: int = 1) -> float:
    return count / max(1, count - lost)
