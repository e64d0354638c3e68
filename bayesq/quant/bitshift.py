"""Searching a bitshift trellis: the ring of bits down each column with the least distortion.

`bayesq.quant.codes.bitshift` defines the codes. The Viterbi algorithm finds the best path for a given state before the
first row. That state comes from a first search over the last rows followed by the first ones, which begins and ends
anywhere. (The published code searches the column turned by half its length, which is worse in short
columns.)
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import numpy as np
import torch
from torch import Tensor

from bayesq.quant.codes.bitshift import normal_levels
from bayesq.quant.compiled import compiled
from bayesq.quant.grids import feed_back

# Rows on each side of the seam between the last and the first row that decide the state there.
SEAM_ROWS = 32
# Normal weights from which `bitshift_distortion` is estimated, and the longest columns of them.
DISTORTION_SAMPLES, MOST_ROWS = 2048, 256


@compiled(inline="always")
def _advance(cost: Any, best: Any, left: Any, levels: Any, x: Any, weight: Any, count: Any) -> None:
    """Path costs [2**L] of the states of the next row, an entry x of `count` codes.

    Args:
        best: [2**L / count] written: least cost of the states that share all bits but the oldest.
        left: [2**L / count] uint8, written: the oldest bits of the cheapest one, which leave the window.
    """
    step = len(levels) // count
    for kept in range(step):
        least, k_least = cost[kept], np.int32(0)
        for k in range(1, count):
            c = cost[k * step + kept]
            k_least = np.int32(k) if c < least else k_least
            least = c if c < least else least
        best[kept], left[kept] = least, np.uint8(k_least)
    base = best[:step].min()  # path costs are float32: subtracted before they lose digits
    for kept in range(step):
        at = best[kept] - base
        for k in range(count):
            e = x - levels[count * kept + k]
            cost[count * kept + k] = at + e * e * weight


@compiled()
def best_ring(x: Any, weight: Any, width: Any, levels: Any, first: Any, state: Any) -> None:
    """The path with the least distortion.

    Args:
        x: [n] float32 entries in units of the levels.
        weight: [n] float32 cost of a squared error.
        width: [n] int64 bits.
        levels: [2**L] float32 of the states.
        first: the last L - width[0] bits before the first row, which are the path's last ones too; -1: any.
        state: [n] int64, written.
    """
    n, size = x.shape[0], levels.shape[0]
    cost, best = np.empty(size, np.float32), np.empty(size, np.float32)
    source = np.empty((n, size >> width.min()), np.uint8)
    for s in range(size):
        e = x[0] - levels[s]
        cost[s] = e * e * weight[0] if first < 0 or s >> width[0] == first else np.float32(np.inf)
    for r in range(1, n):
        bits, left, entry, unit = width[r], source[r], x[r], weight[r]
        if bits == 2:  # loops of a constant length compile to vector code
            _advance(cost, best, left, levels, entry, unit, 4)
        elif bits == 3:
            _advance(cost, best, left, levels, entry, unit, 8)
        elif bits == 4:
            _advance(cost, best, left, levels, entry, unit, 16)
        else:
            _advance(cost, best, left, levels, entry, unit, 1 << bits)
    last, step = int(cost.argmin()), size >> width[0]
    if first >= 0:
        last = first + step * int(cost[first::step].argmin())
    for r in range(n - 1, -1, -1):
        state[r] = last
        if r > 0:
            kept = last >> width[r]
            last = kept + source[r, kept] * (size >> width[r])


@compiled()
def _round_column(x: Any, scale: Any, weight: Any, width: Any, levels: Any, code: Any, value: Any) -> None:
    """Codes uint8 and values float64 [n] of the best ring for entries x [n] float64."""
    n = len(x)
    units, state = (x / scale).astype(np.float32), np.empty(n, np.int64)
    near = min(n, SEAM_ROWS)
    around, seam_width = np.empty(2 * near, np.int64), np.concatenate((width[n - near :], width[:near]))
    seam, seam_weight = (
        np.concatenate((units[n - near :], units[:near])),
        np.concatenate((weight[n - near :], weight[:near])),
    )
    best_ring(seam, seam_weight, seam_width, levels, -1, around)
    best_ring(units, weight, width, levels, around[near] >> width[0], state)
    for r in range(n):
        code[r] = np.uint8(state[r] & ((1 << width[r]) - 1))
        value[r] = scale[r] * levels[state[r]]


@compiled()
def _bitshift_block(
    x: Any, delta: Any, upper: Any, scale: Any, weight: Any, width: Any, levels: Any, codes: Any, values: Any
) -> None:
    """`BitshiftGrid.round_block`."""
    for j in range(x.shape[0]):
        _round_column(x[j], scale, weight, width, levels, codes[j], values[j])
        for r in range(x.shape[1]):
            delta[j, r] -= values[j, r]
        feed_back(x, delta, upper, j, 0, x.shape[1])


@dataclass
class BitshiftGrid:
    """Rounds a column at a time along a ring of bits.

    Attributes:
        scale: [n] of each row.
        width: [n] bits; together at least as many as a state has.
        states: 2**L of the trellis.
    """

    scale: Tensor
    width: Tensor
    states: int
    _parts: tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray] = field(init=False)

    def __post_init__(self) -> None:
        if int(self.width.sum()) < (self.states - 1).bit_length():
            raise ValueError("a column has fewer bits than a state")
        scale = self.scale.to(torch.float64).contiguous()
        weight = scale.square() / scale.square().mean()
        levels = normal_levels(self.states)
        self._parts = scale.numpy(), weight.float().numpy(), self.width.long().numpy(), levels.numpy()

    def round(self, x: Tensor, column: int) -> tuple[Tensor, Tensor]:
        """Codes and values of the best ring down the entries x [n] of one column."""
        code, value = np.empty(len(x), np.uint8), np.empty(len(x))
        _round_column(x.double().contiguous().numpy(), *self._parts, code, value)
        return torch.from_numpy(code), torch.from_numpy(value)

    def round_block(
        self, x: Tensor, delta: Tensor, upper: Tensor, columns: Sequence[int], codes: Tensor, values: Tensor
    ) -> None:
        """Round some columns with feedback among them, see `bayesq.quant.feedback`."""
        _bitshift_block(x.numpy(), delta.numpy(), upper.numpy(), *self._parts, codes.numpy(), values.numpy())


@cache
def bitshift_distortion(width: int, states: int, rows: int, spread: float) -> float:
    """Expected squared error per weight for a standard normal source, in columns of so many rows.

    Args:
        spread: standard deviation of the levels.
    """
    rows = min(rows, MOST_ROWS)
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(DISTORTION_SAMPLES // rows, rows, generator=generator, dtype=torch.float64)
    grid = BitshiftGrid(torch.full((rows,), spread), torch.full((rows,), width), states)
    return float(torch.stack([grid.round(column, 0)[1] - column for column in x]).square().mean())
