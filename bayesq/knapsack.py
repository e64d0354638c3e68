"""Greedy knapsack on lower convex hulls: always the largest decrease in risk per bit."""

import math
from typing import Any

import numpy as np
import torch
from torch import Tensor

from bayesq.errors import Refused
from bayesq.quant.compiled import compiled


@compiled()
def _lower_hulls(risk: Any, bits: Any, hull: Any, length: Any) -> None:
    """Write `lower_hull` of every block into hull [B, W] and length [B]."""
    for block in range(risk.shape[0]):
        r, b, vertices, n = risk[block], bits[block], hull[block], 0
        for k in range(len(r)):
            if not math.isfinite(r[k]) or (n > 0 and r[k] >= r[vertices[n - 1]]):
                continue
            while n > 1:
                i, j = vertices[n - 2], vertices[n - 1]
                if (r[i] - r[j]) * (b[k] - b[j]) > (r[j] - r[k]) * (b[j] - b[i]):
                    break
                n -= 1
            vertices[n] = k
            n += 1
        length[block] = n


def lower_hull(risk: np.ndarray, bits: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Choices on the lower convex hull of each block's (bits, risk) points, beginning with the cheapest.

    Args:
        risk: [B, W] finite, or inf for a choice that a block does not have; each block has a choice.
        bits: [B, W] strictly increasing along W.

    Returns:
        hull [B, W] int64 and length [B] int64: the choices of block b are the first length[b] entries of hull[b].
    """
    hull, length = np.zeros(risk.shape, np.int64), np.zeros(len(risk), np.int64)
    _lower_hulls(risk, bits, hull, length)
    return hull, length


def greedy_knapsack(risk: Tensor, bits: Tensor, capacity: float) -> Tensor:
    """Spend `capacity` bits on the blocks, always where the risk falls most per bit.

    Every block starts at its cheapest width and moves along its lower convex hull. A step that does not fit ends its
    block; smaller steps of other blocks may still fit. The result is never over the capacity, its risk exceeds the
    optimum by less than one step's decrease, and a larger capacity never gives a higher risk. Ties go to the earlier
    block.

    Args:
        risk: [B, W] predicted risk of each block at each width; inf where the block may not have that width.
        bits: [B, W] cost, increasing along W.
        capacity: total bits.

    Returns:
        [B] chosen index into W.

    Raises:
        Refused: even the cheapest widths exceed the capacity, a risk is NaN, or a block has no choice.
    """
    if bool(torch.isnan(risk).any()) or not bool(torch.isfinite(risk).any(1).all()):
        raise Refused("a predicted risk is NaN, or infinite at every width of a block")
    r, b = risk.to(torch.float64).numpy(), bits.to(torch.float64).numpy()
    hull, length = lower_hull(r, b)
    choice = hull[:, 0].copy()
    least = float(b[np.arange(len(b)), choice].sum())
    left = capacity - least
    if left < 0:
        raise Refused(f"the smallest widths need {least:.0f} bits, the budget has {capacity:.0f}")
    # every step from one choice of a hull to the next
    block, place = np.nonzero(np.arange(1, hull.shape[1]) < length[:, None])
    before, after = hull[block, place], hull[block, place + 1]
    costs = b[block, after] - b[block, before]
    slope = (r[block, before] - r[block, after]) / costs
    # Along a hull slopes fall, so sorting keeps a block's steps in order; `before` breaks exact ties.
    order = np.lexsort((before, block, -slope))
    cheapest = float((b[:, 1:] - b[:, :-1]).min()) if b.shape[1] > 1 else np.inf
    steps = (part[order].tolist() for part in (block, before, after, costs))
    for k, i, j, cost in zip(*steps, strict=True):
        if left < cheapest:
            break
        if choice[k] == i and cost <= left:
            choice[k] = j
            left -= cost
    return torch.from_numpy(choice)
