"""Codebooks that minimise posterior-expected distortion, and their closed-form distortion tables.

A weight is known as a Gaussian w ~ N(m, s^2). For a cell [t0, t1) with level c, a = (t0 - m)/s, b = (t1 - m)/s:

    P             = Phi(b) - Phi(a)
    E[w; cell]    = m P + s (phi(a) - phi(b))
    E[(w-c)^2; cell] = (s^2 + (m-c)^2) P + s ((2(m-c) + s a) phi(a) - (2(m-c) + s b) phi(b))

so a codebook's distortion needs no sampling or quadrature. All numbers are float64. Distortion of a trellis:
`bayesq.quant.bitshift`.
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

LLOYD_STEPS = 200
# Relative change of the distortion below which Lloyd has converged; levels are stored in fp16 anyway.
LLOYD_TOLERANCE = 1e-7
# A cell with less mass counts as empty: float64 has too few digits there, and a centroid might leave its cell.
LEAST_MASS = 1e-300
# Steps of the search for a uniform grid's clip range (a coarse scan, then a finer one around its best).
RANGE_STEPS = 48


def normal_density(x: Tensor) -> Tensor:
    """Standard normal density phi; 0 at infinity."""
    density: Tensor = torch.exp(-0.5 * x.square()) / math.sqrt(2 * math.pi)
    return density


def normal_interval(a: Tensor, b: Tensor) -> Tensor:
    """Phi(b) - Phi(a) for a <= b, accurate in both tails."""
    # In the upper tail Phi is 1 minus a tiny number: mirror the interval into the lower tail, where nothing cancels.
    upper = a > 0
    low, high = torch.where(upper, -b, a), torch.where(upper, -a, b)
    # torch.special.ndtr is (1 + erf) / 2, which has no digits beyond 8 standard deviations; erfc has.
    interval: Tensor = (torch.special.erfc(-high / math.sqrt(2)) - torch.special.erfc(-low / math.sqrt(2))) / 2
    return interval


def cell_integrals(mean: Tensor, std: Tensor, lower: Tensor, upper: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Zeroth, first and second moment of w ~ N(mean, std^2) over a cell [lower, upper).

    The second moment is about the mean: E[(w - m)^2; cell] = s^2 (P + a phi(a) - b phi(b)).

    Args:
        mean, std: broadcastable, std > 0.
        lower, upper: cell bounds, infinite ones allowed.

    Returns:
        P, E[w; cell], E[(w - m)^2; cell].
    """
    a, b = (lower - mean) / std, (upper - mean) / std
    phi_a, phi_b = normal_density(a), normal_density(b)
    p = normal_interval(a, b)
    first = mean * p + std * (phi_a - phi_b)
    # a phi(a) is inf * 0 at the outer bounds; its limit is 0.
    edge_a = torch.where(torch.isinf(a), torch.zeros_like(a), a * phi_a)
    edge_b = torch.where(torch.isinf(b), torch.zeros_like(b), b * phi_b)
    second = std.square() * (p + edge_a - edge_b)
    return p, first, second


def cell_distortion(mean: Tensor, std: Tensor, lower: Tensor, upper: Tensor, level: Tensor) -> Tensor:
    """E[(w - level)^2; cell] for w ~ N(mean, std^2), the third formula above."""
    p, first, second = cell_integrals(mean, std, lower, upper)
    # (w - c)^2 = (w - m)^2 + 2 (m - c)(w - m) + (m - c)^2
    return second + 2 * (mean - level) * (first - mean * p) + (mean - level).square() * p


def cells(levels: Tensor) -> tuple[Tensor, Tensor]:
    """Lower and upper bounds [K] of the nearest-level cells of increasing levels [K]."""
    middle = (levels[1:] + levels[:-1]) / 2
    edge = levels.new_full((1,), torch.inf)
    return torch.cat([-edge, middle]), torch.cat([middle, edge])


def expected_distortion(mean: Tensor, std: Tensor, precision: Tensor, levels: Tensor) -> Tensor:
    """Posterior-expected distortion sum_i P_i sum_k E[(w_i - c_k)^2; cell k] / sum_i P_i of a codebook.

    Args:
        mean, std, precision: [n] of the weights w_i ~ N(mean_i, std_i^2); std > 0, precision >= 0.
        levels: [K] increasing.
    """
    lower, upper = cells(levels)
    distortion = cell_distortion(mean[:, None], std[:, None], lower, upper, levels).sum(1)
    return (precision * distortion).sum() / precision.sum()


def expected_lloyd(mean: Tensor, std: Tensor, precision: Tensor, levels: Tensor) -> Tensor:
    """Non-uniform levels with least posterior-expected distortion: Lloyd's iteration on Gaussians.

        c_k = sum_i P_i E[w_i; cell k] / sum_i P_i Prob_i(cell k),   bounds at midpoints

    Args:
        mean, std, precision: as in `expected_distortion`.
        levels: [K] starting point, increasing; BayesQ begins with `BayesQ._start` and goes on from the last round's.

    Returns:
        [K] increasing; the level of an empty cell does not move.
    """
    last = math.inf
    for _ in range(LLOYD_STEPS):
        lower, upper = cells(levels)
        p, first, second = cell_integrals(mean[:, None], std[:, None], lower, upper)
        weight = precision[:, None]
        mass, moment = (weight * p).sum(0), (weight * first).sum(0)
        levels = torch.where(mass > LEAST_MASS, moment / mass.clamp(min=LEAST_MASS), levels)
        # sum E[w^2; cell] - sum mass_k c_k^2 is the distortion of the new levels c in the old cells.
        energy = (weight * (second + mean[:, None] * (2 * first - mean[:, None] * p))).sum()
        distortion = float((energy - (levels * moment).sum()) / precision.sum())
        if last - distortion < LLOYD_TOLERANCE * distortion:
            break
        last = distortion
    return levels


def expected_uniform(mean: Tensor, std: Tensor, precision: Tensor, width: int) -> Tensor:
    """Uniform levels (k - (K-1)/2) h, K = 2**width, whose step h has least posterior-expected distortion.

    Args:
        mean, std, precision: as in `expected_distortion`.
    """
    half = (2**width - 1) / 2
    codes = torch.arange(2**width, dtype=torch.float64) - half
    widest = float((mean.abs() + 6 * std).amax()) / half
    low, high = widest / RANGE_STEPS, widest
    for _ in range(3):
        steps: list[float] = torch.linspace(low, high, RANGE_STEPS, dtype=torch.float64).tolist()
        errors = [float(expected_distortion(mean, std, precision, codes * step)) for step in steps]
        best = errors.index(min(errors))
        low, high = steps[max(best - 1, 0)], steps[min(best + 1, RANGE_STEPS - 1)]
    levels: Tensor = codes * steps[best]
    return levels


_STANDARD = {
    "mean": torch.zeros(1, dtype=torch.float64),
    "std": torch.ones(1, dtype=torch.float64),
    "precision": torch.ones(1, dtype=torch.float64),
}


@cache
def normal_levels(kind: str, width: int) -> Tensor:
    """Optimal levels [2**width] for a standard normal source: kind "lloyd" (Lloyd-Max) or "uniform"."""
    if kind == "uniform":
        return expected_uniform(**_STANDARD, width=width)
    quantiles = (torch.arange(2**width, dtype=torch.float64) + 0.5) / 2**width
    # sqrt(3): the optimal level density is proportional to the cube root of the source density (Panter and Dite).
    start = math.sqrt(3) * torch.special.ndtri(quantiles)
    return _symmetric(_polish(expected_lloyd(**_STANDARD, levels=start)))


def _polish(levels: Tensor) -> Tensor:
    """Lloyd-Max levels of the standard normal to machine precision (plain Lloyd slows down with many levels).

    Newton's method on g_k(c) = E[w; cell k] - c_k P(cell k) = 0, whose Jacobian is tridiagonal.
    """
    for _ in range(100):
        lower, upper = cells(levels)
        p, first, _ = cell_integrals(_STANDARD["mean"], _STANDARD["std"], lower, upper)
        residual = first - levels * p
        # d residual / d bound t between k and k+1 is (t - c_k) phi(t) for k, -(t - c_{k+1}) phi(t) for k+1;
        # both equal half the gap times phi(t); d t / d c = 1/2 on either side.
        inner = upper[:-1]
        pull = (levels[1:] - levels[:-1]) / 4 * normal_density(inner)
        diagonal = -p
        diagonal[:-1] += pull
        diagonal[1:] += pull
        jacobian = torch.diag(diagonal) + torch.diag(pull, 1) + torch.diag(pull, -1)
        step = torch.linalg.solve(jacobian, residual)
        levels = levels - step
        if float(step.abs().max()) < 1e-14:
            break
    return levels


def _symmetric(levels: Tensor) -> Tensor:
    return (levels - levels.flip(0)) / 2


@cache
def normal_distortion(kind: str, width: int, noise: float = 0.0) -> float:
    """Expected MSE of the `width`-bit codebook for a standard normal source blurred by posterior noise.

    A block of weights with unit standard deviation, each known up to N(0, noise^2), is N(0, 1 + noise^2) as seen by
    the codebook; levels are those of `normal_levels` scaled to that standard deviation.

    Args:
        kind: "lloyd" or "uniform".
        width: bits, 1..8.
        noise: rho = posterior std / block std. Methods and allocators use 0.
    """
    spread = math.sqrt(1 + noise * noise)
    levels = normal_levels(kind, width) * spread
    return float(expected_distortion(_STANDARD["mean"], _STANDARD["std"] * spread, _STANDARD["precision"], levels))


# Non-uniform levels are stored as fp16 tables, one per width for the whole model. Wider codes than this have no table:
# Lloyd-Max gains 0.24 bit at 5 bits on a normal source, and few rows are much wider.
TABLE_MAX_WIDTH = 6
# Largest relative increase of the risk that a table may cost: taking x bits per weight from the codes multiplies the
# risk by 1 + 2 ln(2) x. The limit is low, because few rows may have the width of the table.
TABLE_COST = 0.005


def table_widths(weights: int) -> tuple[int, ...]:
    """Widths with a table of levels in a model of `weights` quantized weights; the others have uniform levels."""
    return tuple(width for width in range(2, TABLE_MAX_WIDTH + 1) if table_price(width, weights) <= TABLE_COST)


def table_bits(widths: Iterable[int]) -> int:
    """Bits on disk of the tables of these widths."""
    return sum(16 << width for width in widths)


def table_price(width: int, weights: int) -> float:
    """Relative increase of the risk by the table of a width, whose bits are taken from the codes of all weights."""
    return 2 * math.log(2) * table_bits((width,)) / weights


def level_unit(width: int) -> float:
    """The level unit in standard deviations: the step of the best uniform code for a standard normal source."""
    levels = normal_levels("uniform", width)
    return float(levels[1] - levels[0])


# Codebooks are designed on a distribution that is compressed to this many cells.
ATOMS = 1024


@dataclass(frozen=True)
class Atoms:
    """A distribution of weights in level units, compressed to at most ATOMS Gaussians with the same moments.

    Attributes:
        moments: [4, ATOMS] sums over a cell of p, p m, p m^2 and p s^2 for weights w_i ~ N(m_i, s_i^2), precision p_i.
        cell: width of a cell in level units.
    """

    moments: Tensor
    cell: float

    @classmethod
    def of(cls, mean: Tensor, variance: Tensor, precision: Tensor, width: int) -> "Atoms":
        """Compress weights that will be rounded to `width` bits.

        Cells cover the codes 0 .. 2**width - 1 and half that range on either side; weights beyond go to the outermost
        cells.

        Args:
            mean, variance, precision: of the weights, all of one shape, in level units.
        """
        span = 2.0 ** (width + 1)
        cell = ((mean + span / 4) * (ATOMS / span)).long().clamp(0, ATOMS - 1).flatten()
        rows = (precision, precision * mean, precision * mean.square(), precision * variance)
        moments = torch.zeros(len(rows), ATOMS, dtype=torch.float64)
        for sums, row in zip(moments, rows, strict=True):
            sums.index_add_(0, cell, row.to(torch.float64).flatten())
        return cls(moments, span / ATOMS)

    def add(self, other: "Atoms") -> "Atoms":
        """Moments of these and another layer's weights."""
        return Atoms(self.moments + other.moments, self.cell)

    def gaussians(self) -> tuple[Tensor, Tensor, Tensor]:
        """Means, standard deviations and precisions [n] of the cells that are not empty."""
        p, pm, pmm, pv = self.moments[:, self.moments[0] > 0]
        mean = pm / p
        # The variance of the means inside a cell adds to the posterior variance; the floor keeps it above 0.
        spread = (pmm / p - mean.square()).clamp(min=(1e-2 * self.cell) ** 2)
        return mean, (spread + pv / p).sqrt(), p
