"""Searching a trellis: the codes of a column with the least distortion, and the design of levels.

`bayesq.quant.codes.trellis` defines the codes. The path with the least distortion comes from the
Viterbi algorithm over its states.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import numpy as np
import torch
from torch import Tensor

from bayesq.quant.codes.trellis import SUBSETS, subset_table, uniform_levels
from bayesq.quant.compiled import compiled
from bayesq.quant.grids import MAX_WIDTH, feed_back

# A trellis runs down the rows of a group; with fewer rows it offers no more choices than a scalar code.
LEAST_TRELLIS_ROWS = 4
# Path costs are float32. After this many rows their minimum is subtracted, before they lose digits.
RENORMALIZE = 64
# Up to this width the nearest level is searched one by one, beyond it by bisection.
FEW_BITS = 5


@compiled()
def _nearest(units: Any, weight: Any, width: Any, levels: Any, middles: Any, nearest: Any, distance: Any) -> None:
    """The nearest level of each subset to each entry, and its distortion.

    The four subsets are written out and arrays are not sliced, for speed: with loops, slices and branches this took
    most of the time of a search.

    Args:
        units, weight, width, levels, middles: as of `_search`.
        nearest: [n, 4] int64, written: index into the levels.
        distance: [n, 4] float32, written.
    """
    for i in range(units.shape[0]):
        x, w, cost = units[i], width[i], weight[i]
        k0 = k1 = k2 = k3 = 0
        step = 1 << (w - 1)
        if w <= FEW_BITS:
            for q in range(step - 1):
                k0 += x > middles[w, q, 0]
                k1 += x > middles[w, q, 1]
                k2 += x > middles[w, q, 2]
                k3 += x > middles[w, q, 3]
        else:
            while step > 1:
                step >>= 1
                k0 += step * (x > middles[w, k0 + step - 1, 0])
                k1 += step * (x > middles[w, k1 + step - 1, 1])
                k2 += step * (x > middles[w, k2 + step - 1, 2])
                k3 += step * (x > middles[w, k3 + step - 1, 3])
        k0, k1, k2, k3 = SUBSETS * k0, SUBSETS * k1 + 1, SUBSETS * k2 + 2, SUBSETS * k3 + 3
        nearest[i, 0], nearest[i, 1], nearest[i, 2], nearest[i, 3] = k0, k1, k2, k3
        e0, e1, e2, e3 = x - levels[w, k0], x - levels[w, k1], x - levels[w, k2], x - levels[w, k3]
        distance[i, 0], distance[i, 1] = e0 * e0 * cost, e1 * e1 * cost
        distance[i, 2], distance[i, 3] = e2 * e2 * cost, e3 * e3 * cost


@compiled()
def _search(units: Any, weight: Any, width: Any, levels: Any, middles: Any, subset: Any, code: Any, index: Any) -> None:
    """The path with the least distortion down one column.

    Args:
        units: [n] float64 entries in level units.
        weight: [n] float64 cost of a squared error of one level unit.
        width: [n] int64.
        levels: [9, 512] float64, levels of each width.
        middles: [9, 127, 4] float64, midpoints between neighbouring levels of each width's subsets.
        subset: [states / 2] uint8, subset of window 2 p.
        code, index: [n] int64, written: codes, and level indices.
    """
    n = units.shape[0]
    nearest, distance = np.empty((n, SUBSETS), np.int64), np.empty((n, SUBSETS), np.float32)
    _nearest(units, weight, width, levels, middles, nearest, distance)
    path = np.empty(n, np.uint8)
    best_path(distance, subset, path)
    for i in range(n):
        chosen = nearest[i, path[i] >> 1]
        index[i] = chosen
        code[i] = 2 * (chosen // SUBSETS) + (path[i] & 1)


@compiled()
def best_path(distance: Any, subset: Any, path: Any) -> None:
    """The path of least cost through the trellis, by the Viterbi algorithm.

    Old states p and p + half lead to new states 2 p and 2 p + 1; the newest and the oldest bit of a window each flip
    the high bit of its subset, so one table entry gives all four branches.

    Args:
        distance: [n, 4] float32, cost of each subset.
        subset: [states / 2] uint8, subset of window 2 p.
        path: [n] uint8, written: 2 * subset + bit.
    """
    n, half = distance.shape[0], subset.shape[0]
    # Whole arrays, and selections instead of table look-ups, so that the loops over states compile to vector code.
    lower, upper = np.full(half, np.float32(1e30)), np.full(half, np.float32(1e30))
    lower[0] = 0
    even, odd = np.empty(half, np.float32), np.empty(half, np.float32)
    source = np.empty((n, half), np.uint8)  # bit 0: state 2 p came from p + half; bit 1: 2 p + 1 did
    for i in range(n):
        d0, d1, d2, d3 = distance[i, 0], distance[i, 1], distance[i, 2], distance[i, 3]
        for p in range(half):
            s = subset[p]
            a = d0 if s == 0 else d1 if s == 1 else d2 if s == 2 else d3
            b = d2 if s == 0 else d3 if s == 1 else d0 if s == 2 else d1
            zero_lower, zero_upper = lower[p] + a, upper[p] + b
            one_lower, one_upper = lower[p] + b, upper[p] + a
            source[i, p] = np.uint8(zero_upper < zero_lower) | np.uint8(one_upper < one_lower) << 1
            even[p] = zero_upper if zero_upper < zero_lower else zero_lower
            odd[p] = one_upper if one_upper < one_lower else one_lower
        for p in range(half // 2):
            q = p + half // 2
            lower[2 * p], lower[2 * p + 1] = even[p], odd[p]
            upper[2 * p], upper[2 * p + 1] = even[q], odd[q]
        if i % RENORMALIZE == RENORMALIZE - 1:
            least = min(lower.min(), upper.min())
            for p in range(half):
                lower[p] -= least
                upper[p] -= least
    state = int(lower.argmin())
    if upper.min() < lower[state]:
        state = half + int(upper.argmin())
    for i in range(n - 1, -1, -1):
        bit, p = state & 1, state >> 1
        oldest = (int(source[i, p]) >> bit) & 1
        path[i] = 2 * (subset[p] ^ (2 * (bit ^ oldest))) + bit
        state = p + half * oldest


# Not numba's parallel loops: they share OpenMP's thread count with torch, and set it for the whole process.
@compiled()
def _search_columns(
    units: Any, weight: Any, width: Any, levels: Any, middles: Any, subset: Any, code: Any, index: Any
) -> None:
    """`_search` in every column of [C, n]."""
    for c in range(units.shape[0]):
        _search(units[c], weight[c], width, levels, middles, subset, code[c], index[c])


@compiled()
def _round_column(
    x: Any,
    scale: Any,
    zero: Any,
    weight: Any,
    width: Any,
    levels: Any,
    middles: Any,
    subset: Any,
    code: Any,
    value: Any,
) -> None:
    """`_search` for entries x [n] in the weights' units; value [n] receives the decoded codes."""
    index = np.empty(len(x), np.int64)
    _search(x / scale + zero, weight, width, levels, middles, subset, code, index)
    for i in range(len(x)):
        value[i] = scale[i] * (levels[width[i], index[i]] - zero[i])


@compiled()
def _trellis_block(
    x: Any,
    delta: Any,
    upper: Any,
    scale: Any,
    zero: Any,
    weight: Any,
    width: Any,
    levels: Any,
    middles: Any,
    subset: Any,
    codes: Any,
    values: Any,
) -> None:
    """`TrellisGrid.round_block`."""
    code, value = np.empty(x.shape[1], np.int64), np.empty(x.shape[1])
    for j in range(x.shape[0]):
        _round_column(x[j], scale, zero, weight, width, levels, middles, subset, code, value)
        for r in range(x.shape[1]):
            codes[j, r] = np.uint8(code[r])
            values[j, r] = value[r]
            delta[j, r] -= value[r]
        feed_back(x, delta, upper, j, 0, x.shape[1])


@dataclass
class TrellisGrid:
    """Levels shared by all rows of a width, scale and zero per row, codes along each column on a trellis.

    Attributes:
        scale: [R].
        zero: [R] offset in level units.
        width: [R] bits per code.
        codebooks: width -> increasing levels [2**(width+1)]; a width without one has `uniform_levels`.
        row_curvature: [R] weight of each row's squared errors, in any unit, because a path runs through several rows.
        states: of the trellis.
    """

    scale: Tensor
    zero: Tensor
    width: Tensor
    codebooks: Mapping[int, Tensor]
    row_curvature: Tensor
    states: int
    _tables: tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray, np.ndarray] = field(init=False)
    _rows: tuple[np.ndarray, np.ndarray] = field(init=False)

    def __post_init__(self) -> None:
        scale, zero = (part.to(torch.float64).contiguous().numpy() for part in (self.scale, self.zero))
        self._rows = scale, zero
        levels = np.zeros((MAX_WIDTH + 1, 2 ** (MAX_WIDTH + 1)))
        for w in self.width.unique().tolist():
            book = self.codebooks[w] if w in self.codebooks else uniform_levels(w)
            levels[w, : len(book)] = book.to(torch.float64).numpy()
        weight = self.row_curvature.to(torch.float64) * self.scale.to(torch.float64).square()
        # Only ratios matter; with weights around 1 float32 path costs neither overflow nor underflow.
        weight = weight / weight.mean().clamp(min=torch.finfo(torch.float64).tiny)
        subset = subset_table(self.states)[: self.states : 2].astype(np.uint8)
        by_subset = levels.reshape(len(levels), -1, SUBSETS)
        middles = (by_subset[:, :-1] + by_subset[:, 1:]) * 0.5
        self._tables = (weight.numpy(), self.width.to(torch.int64).numpy(), levels, middles, subset)

    def round(self, x: Tensor, column: int) -> tuple[Tensor, Tensor]:
        """Codes and values of the best path down the entries x [R] of one column."""
        code, value = np.empty(len(x), np.int64), np.empty(len(x))
        _round_column(x.numpy(), *self._rows, *self._tables, code, value)
        return torch.from_numpy(code), torch.from_numpy(value)

    def round_block(
        self, x: Tensor, delta: Tensor, upper: Tensor, columns: Sequence[int], codes: Tensor, values: Tensor
    ) -> None:
        """Round some columns with feedback among them, see `bayesq.quant.feedback`."""
        block = (x.numpy(), delta.numpy(), upper.numpy())
        _trellis_block(*block, *self._rows, *self._tables, codes.numpy(), values.numpy())

    def round_matrix(self, x: Tensor, curvature: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Codes and values of a whole matrix [R, C] without feedback.

        Args:
            curvature: [R, C] cost of a squared error of each entry; None = that of its row everywhere.
        """
        weight, width, levels, middles, subset = self._tables
        units = torch.addcdiv(self.zero[:, None], x, self.scale[:, None]).T.contiguous().numpy()
        if curvature is None:
            weights = np.ascontiguousarray(np.broadcast_to(weight, units.shape))
        else:
            cost = curvature.to(torch.float64).T * self.scale.square()
            weights = (cost / cost.mean(1, keepdim=True).clamp(min=torch.finfo(cost.dtype).tiny)).contiguous().numpy()
        code, index = np.empty(units.shape, np.int64), np.empty(units.shape, np.int64)
        _search_columns(units, weights, width, levels, middles, subset, code, index)
        value = torch.from_numpy(levels[width, index]).T
        return torch.from_numpy(code).T, self.scale[:, None] * (value - self.zero[:, None])


# Draws and rounds of the design below. They give the distortion to about half a percent. The error of the levels is far
# below the misfit between a network's weights and the normal distribution.
DESIGN_SAMPLES, DESIGN_COLUMNS, DESIGN_STEPS = 4096, 8, 25
# The design ends with the first round that gains less.
DESIGN_TOLERANCE = 5e-4
# Number of candidate ranges of uniform levels; every COARSE-th is tried, then those around the best.
STEP_FACTORS, COARSE = 60, 5


# Results of `normal_trellis` for 64 states, the default, because the search takes a second: designed and uniform
# levels.
DESIGNED_64 = {
    2: 0.08204861118782844,
    3: 0.022680922702705646,
    4: 0.006344337433508882,
    5: 0.0016583348252384618,
    6: 0.00041955435971893177,
}
UNIFORM_64 = {
    2: 0.09049430850453355,
    3: 0.028522398720577106,
    4: 0.008940531437505249,
    5: 0.0027665769175194,
    6: 0.0008222810601938819,
    7: 0.00023579816569914774,
    8: 6.453693106907986e-05,
}


def trellis_distortion(width: int, states: int, designed: bool) -> float:
    """Expected squared error per weight for a standard normal source; arguments as of `normal_trellis`."""
    known = (DESIGNED_64 if designed else UNIFORM_64) if states == 64 else {}
    return known[width] if width in known else normal_trellis(width, states, designed)[1]


@cache
def normal_trellis(width: int, states: int, designed: bool) -> tuple[Tensor, float]:
    """Levels [2**(width+1)] for a standard normal source and their distortion per weight.

    No closed form is known, so both come from draws with a fixed seed. Lloyd's iteration designs levels: each moves to
    the mean of the draws that the best paths assign to it. For uniform levels, several steps are tried.

    Args:
        width: bits.
        states: of the trellis.
        designed: non-uniform levels; otherwise uniform ones.
    """
    x = torch.randn(DESIGN_SAMPLES, DESIGN_COLUMNS, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    one, zero = torch.ones(len(x), dtype=torch.float64), torch.zeros(len(x), dtype=torch.float64)
    rows = torch.full((len(x),), width)

    def assign(levels: Tensor) -> tuple[Tensor, float]:
        _, values = TrellisGrid(one, zero, rows, {width: levels}, one, states).round_matrix(x)
        return values, float((x - values).square().mean())

    count = 2 ** (width + 1)
    if not designed:
        half = uniform_levels(width) - (2**width - 1) / 2
        # The best range of a normal row is well inside 2 sqrt(width) + 1 standard deviations from 2 to 8 bits.
        unit = half * (2 * width**0.5 + 1) / STEP_FACTORS / half[-1]
        tried: dict[int, float] = {}
        for step in (COARSE, 1):
            best = min(tried, key=tried.__getitem__) if tried else 2 * STEP_FACTORS // 3
            reach = COARSE - 1 if tried else STEP_FACTORS // 3
            for k in range(best - reach, best + reach + 1, step):
                if k not in tried:
                    tried[k] = assign(unit * k)[1]
        best = min(tried, key=tried.__getitem__)
        return unit * best, tried[best]
    quantiles = (torch.arange(count, dtype=torch.float64) + 0.5) / count
    # sqrt(3): the optimal level density is proportional to the cube root of the source density (Panter and Dite).
    levels, distortion = 3**0.5 * torch.special.ndtri(quantiles), torch.inf
    for _ in range(DESIGN_STEPS):
        last = distortion
        values, distortion = assign(levels)
        if last - distortion < DESIGN_TOLERANCE * distortion:
            break
        index = torch.searchsorted(levels, values.contiguous()).flatten()
        mass = torch.bincount(index, minlength=count)
        total = torch.bincount(index, x.flatten(), minlength=count)
        levels = torch.where(mass > 0, total / mass.clamp(min=1), levels).cummax(0).values
        levels = (levels - levels.flip(0)) / 2
    return levels, distortion
