"""Weighted k-means on a line, by the exact dynamic program: the levels of a row that cost least.

    min over levels l and codes of sum_c h_c (w_c - l[code_c])^2

The clusters of an optimum are runs of the sorted weights. With E[k, j] the least cost of the first j weights in k runs,

    E[k, j] = min_i E[k - 1, i] + cost(i, j),   cost(i, j) = sum h w^2 - (sum h w)^2 / sum h   over the weights i..j-1

The best i does not fall as j grows, because the cost satisfies the quadrangle inequality (Wu, 1991; Groenlund et al.,
arXiv 1701.07204). So a row of C weights and K levels takes K C log C steps.
"""

from typing import Any

import numpy as np
import torch
from torch import Tensor

from bayesq.quant.codes.base import stored_levels
from bayesq.quant.compiled import compiled


@compiled(error_model="numpy")
def _cost(zeroth: Any, first: Any, second: Any, i: Any, j: Any) -> Any:
    """Cost of the sorted weights i..j-1 in one cluster, from prefix sums of h, h w and h w^2."""
    mass, moment = zeroth[j] - zeroth[i], first[j] - first[i]
    if not mass > 0:  # lost in the rounding of the prefix sums
        return 0.0
    return max(second[j] - second[i] - moment * moment / mass, 0.0)


@compiled(error_model="numpy")
def _best_levels(w: Any, h: Any, levels: Any) -> None:
    """Write the best levels [K] of sorted weights w [C] with h [C] > 0; unused levels repeat the last one."""
    n, clusters = len(w), min(len(levels), len(w))
    zeroth, first, second = np.zeros(n + 1), np.zeros(n + 1), np.zeros(n + 1)
    for c in range(n):
        zeroth[c + 1] = zeroth[c] + h[c]
        first[c + 1] = first[c] + h[c] * w[c]
        second[c + 1] = second[c] + h[c] * w[c] * w[c]
    least, last = np.empty(n + 1), np.empty(n + 1)
    start = np.zeros((clusters + 1, n + 1), np.int32)  # first weight of the last run
    for j in range(1, n + 1):
        last[j] = _cost(zeroth, first, second, 0, j)
    stride = 1
    while stride <= n:
        stride *= 2
    for k in range(2, clusters + 1):
        # The new j lie halfway between finished ones, whose best i bound the search.
        step = stride
        while step >= 1:
            for j in range(step, n + 1, 2 * step):
                if j < k:
                    continue
                low = max(start[k, j - step], k - 1) if j - step >= k else k - 1
                high = min(start[k, j + step], j - 1) if j + step <= n else j - 1
                least[j], best = np.inf, low
                for i in range(low, high + 1):
                    total = last[i] + _cost(zeroth, first, second, i, j)
                    if total < least[j]:
                        least[j], best = total, i
                start[k, j] = best
            step //= 2
        last, least = least, last
    j = n
    for k in range(clusters, 0, -1):
        i = start[k, j]
        levels[k - 1] = (h[i:j] * w[i:j]).sum() / h[i:j].sum()  # differences of the prefix sums have fewer digits
        j = i
    levels[clusters:] = levels[clusters - 1]


@compiled(error_model="numpy")
def _all_levels(w: Any, h: Any, levels: Any) -> None:
    for r in range(w.shape[0]):
        used = h[r] > 0
        _best_levels(w[r][used], h[r][used], levels[r])


def best_levels(weight: Tensor, curvature: Tensor, count: int) -> Tensor:
    """The levels of least weighted squared error of each row.

    Args:
        weight: [R, C].
        curvature: [R, C] h, at least 0 and in any unit; a row without any counts all weights equally.
        count: K levels.

    Returns:
        [R, K] float64, non-decreasing; a row with fewer different weights repeats its last level.
    """
    w, order = weight.to(torch.float64).sort(1)
    h = curvature.to(torch.float64).gather(1, order)
    # Each row gets mean 0 and a largest curvature of 1, so that the prefix sums lose no digits.
    h = torch.where((h > 0).any(1, keepdim=True), h, torch.ones_like(h))
    h = h / h.amax(1, keepdim=True)
    centre = (h * w).sum(1, keepdim=True) / h.sum(1, keepdim=True)
    levels = torch.empty(len(w), count, dtype=torch.float64)
    _all_levels((w - centre).numpy(), h.numpy(), levels.numpy())
    return (levels + centre).cummax(1).values


def nearest(weight: Tensor, levels: Tensor) -> tuple[Tensor, Tensor]:
    """Codes uint8 and values float64 [R, C] of the nearest levels [R, K], which must not decrease along a row."""
    w = weight.to(torch.float64)
    codes = torch.searchsorted(((levels[:, 1:] + levels[:, :-1]) / 2).contiguous(), w.contiguous())
    return codes.to(torch.uint8), levels.gather(1, codes)


def in_fp16(levels: Tensor) -> Tensor:
    """Levels [R, K] as they are stored, float64."""
    return stored_levels(levels).to(torch.float64)
