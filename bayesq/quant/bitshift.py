"""Searching a bitshift trellis: the ring of bits down each column with the least distortion.

`bayesq.quant.codes.bitshift` defines the codes. The Viterbi algorithm finds the best path for a given state before the
first row. That state comes from a first search over the last rows followed by the first ones, which begins and ends
anywhere. (The published code searches the column turned by half its length, which is worse in short columns.)
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import numpy as np
import torch
from torch import Tensor

from bayesq.quant.codes.bitshift import Bitshift
from bayesq.quant.compiled import compiled
from bayesq.quant.grids import MAX_WIDTH, feed_back

# Rows on each side of the seam, where the last row meets the first, that decide which states are tried there.
SEAM_ROWS = 32
# Rows searched for a column of n rows: SEARCHED_ROWS / n states at the seam are tried, so more in short columns, where
# that state matters most.
SEARCHED_ROWS = 384
# Largest entry in level units; levels are between -5 and 2**8.
FARTHEST = 4096.0
# Normal weights from which `bitshift_distortion` is estimated, and the longest columns of them.
DISTORTION_SAMPLES, MOST_ROWS = 2048, 256


@compiled()
def _advance(cost: Any, best: Any, left: Any, levels: Any, x: Any, weight: Any, count: Any) -> None:
    """Path costs [2**L] of the states of the next row, an entry x of `count` codes.

    The loops have a shape that compiles to vector code: four codes at a time, because each count is a multiple of 4.

    Args:
        best: [2**L / 4] overwritten.
        left: [2**L / count] uint8, written: the oldest bits of the cheapest of the states that differ only in them.
            They leave the window.
    """
    step, quarter = len(levels) // count, count // 4
    for kept in range(step):
        best[kept], left[kept] = np.float32(np.inf), 0
    for first in range(0, count, 4):
        a, b = cost[first * step : (first + 1) * step], cost[(first + 1) * step : (first + 2) * step]
        c, d = cost[(first + 2) * step : (first + 3) * step], cost[(first + 3) * step : (first + 4) * step]
        for kept in range(step):
            least, k_least = best[kept], np.int32(left[kept])
            k_least = np.int32(first) if a[kept] < least else k_least
            least = a[kept] if a[kept] < least else least
            k_least = np.int32(first + 1) if b[kept] < least else k_least
            least = b[kept] if b[kept] < least else least
            k_least = np.int32(first + 2) if c[kept] < least else k_least
            least = c[kept] if c[kept] < least else least
            k_least = np.int32(first + 3) if d[kept] < least else k_least
            least = d[kept] if d[kept] < least else least
            best[kept], left[kept] = least, np.uint8(k_least)
    # Path costs are float32 and grow from row to row: the first is subtracted from all, so that they lose no digits.
    base = best[0] if best[0] < np.float32(np.inf) else np.float32(0)
    for kept in range(step - 1, -1, -1):  # repeats each cost in place, from the end
        at = best[kept] - base
        for i in range(quarter * kept, quarter * kept + quarter):
            best[i] = at
    for i in range(len(levels) // 4):
        for k in range(4):
            e = x - levels[4 * i + k]
            cost[4 * i + k] = best[i] + e * e * weight


@compiled()
def _retreat(after: Any, before: Any, levels: Any, x: Any, weight: Any, count: Any) -> None:
    """Least costs before [2**L / count] of the paths from a row on, an entry x of `count` codes.

    Args:
        after: [2**L] least cost of the paths from the next row on, by the state of this one.
    """
    for kept in range(len(levels) // count):
        least = np.float32(np.inf)
        for k in range(count):
            e = x - levels[count * kept + k]
            c = after[count * kept + k] + e * e * weight
            least = c if c < least else least
        before[kept] = least


@compiled()
def _forward(x: Any, weight: Any, width: Any, levels: Any, first: Any, cost: Any, source: Any) -> None:
    """Least costs [2**L] of the paths that end in each state.

    Args:
        x, weight, width, levels, first, source: as in `best_ring`; first = -1: any bits.
        cost: [2**L] float32, written.
    """
    best = np.empty(levels.shape[1] >> 2, np.float32)
    for s in range(levels.shape[1]):
        e = x[0] - levels[width[0], s]
        cost[s] = e * e * weight[0] if first < 0 or s >> width[0] == first else np.float32(np.inf)
    for r in range(1, len(x)):
        bits, left = width[r], source[r]
        if bits == 2:  # loops of a constant length compile to vector code
            _advance(cost, best, left, levels[2], x[r], weight[r], 4)
        elif bits == 3:
            _advance(cost, best, left, levels[3], x[r], weight[r], 8)
        elif bits == 4:
            _advance(cost, best, left, levels[4], x[r], weight[r], 16)
        else:
            _advance(cost, best, left, levels[bits], x[r], weight[r], 1 << bits)


@compiled()
def _backward(x: Any, weight: Any, width: Any, levels: Any) -> Any:
    """Least costs [2**L / 2**width[0]] of the paths down these rows, by the bits before the first row.

    Arguments as in `best_ring`.
    """
    size = levels.shape[1]
    after, before = np.zeros(size, np.float32), np.empty(size, np.float32)
    for r in range(len(x) - 1, -1, -1):
        bits = width[r]
        if bits == 2:
            _retreat(after, before, levels[2], x[r], weight[r], 4)
        elif bits == 3:
            _retreat(after, before, levels[3], x[r], weight[r], 8)
        elif bits == 4:
            _retreat(after, before, levels[4], x[r], weight[r], 16)
        else:
            _retreat(after, before, levels[bits], x[r], weight[r], 1 << bits)
        step = size >> bits
        base = before[0] if before[0] < np.float32(np.inf) else np.float32(0)
        for k in range(1 << bits):
            for kept in range(step):
                after[k * step + kept] = before[kept] - base
    return after[:step]


@compiled()
def best_ring(x: Any, weight: Any, width: Any, levels: Any, first: Any, source: Any, state: Any) -> Any:
    """The path with the least distortion for given bits before the first row; returns its distortion.

    Args:
        x: [n] float32 entries in units of the levels.
        weight: [n] float32 cost of a squared error.
        width: [n] int64 bits.
        levels: [9, 2**L] float32 of the states in rows of each width.
        first: the last L - width[0] bits before the first row, which are the path's last ones too.
        source: [n, 2**L / 4] uint8, overwritten.
        state: [n] int64, written.
    """
    n, size = len(x), levels.shape[1]
    cost = np.empty(size, np.float32)
    _forward(x, weight, width, levels, first, cost, source)
    step, total = size >> width[0], np.float32(0)
    last = first + step * int(cost[first::step].argmin())
    for r in range(n - 1, -1, -1):
        state[r] = last
        e = x[r] - levels[width[r], last]
        total += e * e * weight[r]
        if r > 0:
            kept = last >> width[r]
            last = kept + source[r, kept] * (size >> width[r])
    return total


@compiled()
def _best_starts(x: Any, weight: Any, width: Any, levels: Any, count: Any, source: Any) -> Any:
    """The most promising bits before the first row, best first; arguments as in `best_ring`.

    Their rank is the least cost of a path through the column's last rows and on through its first ones.
    """
    n, near = len(x), min(len(x), SEAM_ROWS)
    cost = np.empty(levels.shape[1], np.float32)
    _forward(x[n - near :], weight[n - near :], width[n - near :], levels, -1, cost, source)
    seam = _backward(x[:near], weight[:near], width[:near], levels)
    for k in range(len(seam)):
        least = cost[k]
        for s in range(k + len(seam), len(cost), len(seam)):
            least = cost[s] if cost[s] < least else least
        seam[k] += least
    starts = np.empty(min(count, len(seam)), np.int64)
    for k in range(len(starts)):
        starts[k] = seam.argmin()
        seam[starts[k]] = np.float32(np.inf)
    return starts


@compiled()
def _round_column(x: Any, scale: Any, zero: Any, weight: Any, width: Any, levels: Any, code: Any, value: Any) -> None:
    """Codes uint8 and values float64 [n] of the best ring for entries x [n] float64."""
    n = len(x)
    # Far beyond the levels an entry has the same best level, but its cost would overflow in float32.
    units = np.minimum(np.maximum(x / scale + zero, -FARTHEST), FARTHEST).astype(np.float32)
    source, state, best = np.empty((n, levels.shape[1] >> 2), np.uint8), np.empty(n, np.int64), np.empty(n, np.int64)
    starts = _best_starts(units, weight, width, levels, max(1, SEARCHED_ROWS // n), source)
    least = best_ring(units, weight, width, levels, starts[0], source, best)
    for first in starts[1:]:
        total = best_ring(units, weight, width, levels, first, source, state)
        if total < least:
            least = total
            best, state = state, best
    for r in range(n):
        code[r] = np.uint8(best[r] & ((1 << width[r]) - 1))
        value[r] = scale[r] * (levels[width[r], best[r]] - zero[r])


@compiled()
def _bitshift_block(
    x: Any, delta: Any, upper: Any, scale: Any, zero: Any, weight: Any, width: Any, levels: Any, codes: Any, values: Any
) -> None:
    """`BitshiftGrid.round_block`."""
    for j in range(x.shape[0]):
        _round_column(x[j], scale, zero, weight, width, levels, codes[j], values[j])
        for r in range(x.shape[1]):
            delta[j, r] -= values[j, r]
        feed_back(x, delta, upper, j, 0, x.shape[1])


@compiled()
def _round_columns(
    x: Any, scale: Any, zero: Any, weight: Any, width: Any, levels: Any, codes: Any, values: Any
) -> None:
    """`_round_column` of every column of x [C, n], with weights [C, n]."""
    for j in range(x.shape[0]):
        _round_column(x[j], scale, zero, weight[j], width, levels, codes[j], values[j])


@dataclass
class BitshiftGrid:
    """Rounds a column at a time along a ring of bits.

    Attributes:
        scale: [n] of each row.
        zero: [n] offset in level units.
        width: [n] bits; together at least as many as a state has.
        code: has the levels.
        row_curvature: [n] weight of each row's squared errors, in any unit; None = 1.
    """

    scale: Tensor
    zero: Tensor
    width: Tensor
    code: Bitshift
    row_curvature: Tensor | None = None
    _rows: tuple[np.ndarray, np.ndarray] = field(init=False)
    _tables: tuple[np.ndarray, np.ndarray, np.ndarray] = field(init=False)

    def __post_init__(self) -> None:
        if int(self.width.sum()) < (self.code.states - 1).bit_length():
            raise ValueError("a column has fewer bits than a state")
        scale, zero = (part.to(torch.float64).contiguous() for part in (self.scale, self.zero))
        cost = scale.square()
        if self.row_curvature is not None:
            cost = cost * self.row_curvature.to(torch.float64)
        levels = torch.zeros(MAX_WIDTH + 1, self.code.states)
        for w in self.width.unique().tolist():
            levels[w] = self.code.levels(w)
        self._rows = scale.numpy(), zero.numpy()
        self._tables = _around_one(cost).numpy(), self.width.long().numpy(), levels.numpy()

    def round(self, x: Tensor, column: int) -> tuple[Tensor, Tensor]:
        """Codes and values of the best ring down the entries x [n] of one column."""
        code, value = np.empty(len(x), np.uint8), np.empty(len(x))
        _round_column(x.double().contiguous().numpy(), *self._rows, *self._tables, code, value)
        return torch.from_numpy(code), torch.from_numpy(value)

    def round_block(
        self, x: Tensor, delta: Tensor, upper: Tensor, columns: Sequence[int], codes: Tensor, values: Tensor
    ) -> None:
        """Round some columns with feedback among them, see `bayesq.quant.feedback`."""
        _bitshift_block(
            x.numpy(), delta.numpy(), upper.numpy(), *self._rows, *self._tables, codes.numpy(), values.numpy()
        )

    def round_matrix(self, x: Tensor, curvature: Tensor) -> tuple[Tensor, Tensor]:
        """Codes and values of a whole matrix [n, C] without feedback.

        Args:
            curvature: [n, C] cost of a squared error of each entry, in any unit for each column.
        """
        columns = x.T.double().contiguous()
        _, width, levels = self._tables
        cost = _around_one(curvature.to(torch.float64).T * self.scale.double().square())
        codes, values = np.empty(columns.shape, np.uint8), np.empty(columns.shape)
        _round_columns(columns.numpy(), *self._rows, cost.numpy(), width, levels, codes, values)
        return torch.from_numpy(codes).T, torch.from_numpy(values).T


def _around_one(cost: Tensor) -> Tensor:
    """Costs float32 with mean 1 along the last dimension: path costs in float32 neither overflow nor underflow."""
    mean = cost.mean(-1, keepdim=True).clamp(min=torch.finfo(cost.dtype).tiny)
    return (cost / mean).float().contiguous()


@cache
def bitshift_distortion(width: int, code: Bitshift, rows: int, scale: float) -> float:
    """Expected squared error per weight for a standard normal source, in columns of `rows` rows.

    Args:
        scale: of each row.
    """
    rows = min(rows, MOST_ROWS)
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(DISTORTION_SAMPLES // rows, rows, generator=generator, dtype=torch.float64)
    zero = torch.full((rows,), code.middle(width))
    grid = BitshiftGrid(torch.full((rows,), scale), zero, torch.full((rows,), width), code)
    return float(torch.stack([grid.round(column, 0)[1] - column for column in x]).square().mean())
