"""The target of a layer behind a quantized prefix, and factors that restore its output variance.

With x the layer's inputs in full precision and x' those behind the prefix, the layer is to reproduce W x from x':

    T = argmin_T E|W x - T x'|^2 + lambda |T - W|^2 = (W C + lambda W)(M + lambda I)^-1
    M = E[x' x'T],   C = E[x x'T]

Where a bias or a norm takes up the mean of the layer's outputs, M and C are those of the centred inputs.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

from bayesq.calibration.paired import PairedMoments, PairedSums

# Candidates of lambda as multiples of M's mean diagonal; infinity keeps W.
LAMBDAS = (0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0, math.inf)
# The search begins at this one. Each candidate takes a factorization, the most expensive part of a wide layer.
FIRST_LAMBDA = LAMBDAS.index(0.1)
# Rows are scaled within these bounds; a variance beyond them is an estimate from few samples.
ROW_FACTOR = (0.5, 2.0)


@dataclass(frozen=True)
class Target:
    """Weights to round in place of W.

    Attributes:
        weight: T [g, r, c] float32.
        penalty: the chosen lambda, as a multiple of M's mean diagonal.
        change: |T - W| / |W|.
    """

    weight: Tensor
    penalty: float
    change: float


def choose_target(weight: Tensor, sums: PairedSums, centred: bool) -> Target:
    """T with the lambda of the least error on the held-out examples.

    Args:
        weight: W [g, r, c].
        sums: of the layer's inputs.
        centred: a bias or a norm takes up the mean of the outputs.
    """
    w = weight.double()
    best = _choose_penalty(w, sums, centred)
    t = ridge(w, sums.moments(centred), best)
    if t is w:
        best = math.inf
    change = float((t - w).norm() / w.norm().clamp(min=torch.finfo(w.dtype).tiny))
    return Target(t.to(weight.dtype), best, change)


def _choose_penalty(weight: Tensor, sums: PairedSums, centred: bool) -> float:
    """Of LAMBDAS the one with the least error on the held-out examples, searched from FIRST_LAMBDA downhill."""
    fitted, held_out = sums.split(centred)
    cross, product = weight @ held_out.cross, weight @ fitted.cross

    @cache
    def error(k: int) -> float:
        t = ridge(weight, fitted, LAMBDAS[k], product)
        return float((t @ held_out.prefix).sub_(cross, alpha=2).mul_(t).sum())

    return LAMBDAS[_local_minimum(error, len(LAMBDAS), FIRST_LAMBDA)]


def _local_minimum(error: Callable[[int], float], count: int, start: int) -> int:
    """Index of the local minimum reached from `start`, or the last index (`count` - 1) if that is no worse."""
    k = start
    while True:
        low = min((k, *(j for j in (k - 1, k + 1) if 0 <= j < count)), key=error)
        if low == k:
            return k if error(k) < error(count - 1) else count - 1
        k = low


def ridge(weight: Tensor, moments: PairedMoments, penalty: float, product: Tensor | None = None) -> Tensor:
    """(W C + lambda W)(M + lambda I)^-1 [g, r, c], lambda = penalty * mean diag M.

    It is W for infinite lambda, for M = 0, and where rounding errors leave M + lambda I indefinite: inputs that hardly
    vary about a large mean have a centred M with no correct digits.

    Args:
        product: W C, if it is known.
    """
    m = moments.prefix
    diagonal = m.diagonal(dim1=-2, dim2=-1)
    size = penalty * diagonal.mean(-1)
    if math.isinf(penalty) or not bool((size > 0).all()):
        return weight
    damped = m.clone()
    damped.diagonal(dim1=-2, dim2=-1).add_(size[:, None])
    right = (weight @ moments.cross if product is None else product) + size[:, None, None] * weight
    factor, failed = torch.linalg.cholesky_ex(damped)
    return weight if bool(failed.any()) else torch.cholesky_solve(right.mT, factor).mT


def output_variance(weight: Tensor, centred_moment: Tensor) -> Tensor:
    """Variance of each output, diag(W A WT) [g, r] for centred A [g, c, c]."""
    w = weight.double()
    return ((w @ centred_moment.double()) * w).sum(-1).clamp(min=0)


def row_factors(full: Tensor, now: Tensor) -> Tensor:
    """Factors [g, r] that give each output its full-precision variance back."""
    usable = (now > 0) & (full > 0)
    return torch.where(usable, full / torch.where(usable, now, 1.0), 1.0).sqrt().clamp(*ROW_FACTOR)
