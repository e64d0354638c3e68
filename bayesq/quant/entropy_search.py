"""Searching entropy-coded codes: the symbols of a column with the least distortion + lambda x bits.

`bayesq.quant.codes.entropy` defines the codes. With a trellis the Viterbi algorithm finds the best path down a column,
else each symbol is chosen separately. Code lengths are the ideal ones of the rows' tables.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from bayesq.quant.codes.rate_tables import CENTRE, RateTables
from bayesq.quant.codes.trellis import SUBSETS, subset_table
from bayesq.quant.compiled import compiled
from bayesq.quant.grids import feed_back

LARGEST = CENTRE - 1
# Path costs are float32. After this many rows their minimum is subtracted, before they lose digits.
RENORMALIZE = 64


@compiled()
def _try(x: Any, w: Any, s: Any, levels: Any, lengths: Any, best: Any, code: Any) -> tuple[Any, Any]:
    """The cheaper one of the best code so far and the symbol s, for an entry x in level units."""
    k = min(max(s, -LARGEST), LARGEST) + CENTRE
    error = x - levels[k]
    cost = w * error * error + lengths[k]
    return (cost, k) if cost < best else (best, code)


@compiled()
def _cheapest(x: Any, w: Any, levels: Any, lengths: Any, cost: Any, code: Any) -> None:
    """The cheapest symbol of each subset for an entry.

    Of each subset, the nearest symbol, the next one towards zero and zero itself are tried.

    Args:
        x: entry in level units.
        w: cost in bits of a squared error of one level unit.
        levels, lengths: [sets, 256].
        cost: [4] float32, written; code: [4] int64, written.
    """
    for subset in range(SUBSETS):
        which, parity = subset & 1, subset >> 1
        best, k = np.inf, CENTRE
        if which == 0:
            s = int(np.rint(x))
            if (s & 1) != parity:
                s += 1 if x > s else -1
            best, k = _try(x, w, s, levels[0], lengths[0], best, k)
            best, k = _try(x, w, s - 2 if s > 1 else s + 2 if s < -1 else s, levels[0], lengths[0], best, k)
        else:
            # u counts the levels u + 1/2
            u = int(np.floor(x))
            if ((u + 1) & 1) != parity:
                u += 1 if x - u > 0.5 else -1
            best, k = _try(x, w, u + 1 if u >= 0 else u, levels[1], lengths[1], best, k)
            v = u - 2 if u > 1 else u + 2 if u < -2 else u
            best, k = _try(x, w, v + 1 if v >= 0 else v, levels[1], lengths[1], best, k)
        if parity == 0:
            best, k = _try(x, w, 0, levels[which], lengths[which], best, k)
        cost[subset], code[subset] = best, k


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


@compiled()
def _search(
    units: Any, weight: Any, rate_class: Any, levels: Any, lengths: Any, subset: Any, code: Any, level: Any
) -> None:
    """The cheapest codes [n] of one column and their levels [n], both written.

    Args:
        units, weight: [n] float64, see `_cheapest`.
        rate_class: [n] int64.
        levels, lengths: [classes, sets, 256] float64.
        subset: [states / 2] uint8, subset of window 2 p; empty = no trellis.
    """
    n = len(units)
    if len(subset) == 0:
        for i in range(n):
            table, length, x = levels[rate_class[i], 0], lengths[rate_class[i], 0], units[i]
            s = int(np.rint(x))
            inner = s - 1 if s > 0 else s + 1 if s < 0 else 0
            best, k = _try(x, weight[i], s, table, length, np.inf, CENTRE)
            best, k = _try(x, weight[i], inner, table, length, best, k)
            best, k = _try(x, weight[i], 0, table, length, best, k)
            code[i], level[i] = k, table[k]
        return
    cost, codes, path = np.empty((n, SUBSETS), np.float32), np.empty((n, SUBSETS), np.int64), np.empty(n, np.uint8)
    for i in range(n):
        _cheapest(units[i], weight[i], levels[rate_class[i]], lengths[rate_class[i]], cost[i], codes[i])
    best_path(cost, subset, path)
    for i in range(n):
        chosen = path[i] >> 1
        code[i] = codes[i, chosen]
        level[i] = levels[rate_class[i], chosen & 1, code[i]]


@compiled()
def _round_columns(
    x: Any,
    delta: Any,
    upper: Any,
    scale: Any,
    weight: Any,
    rate_class: Any,
    levels: Any,
    lengths: Any,
    subset: Any,
    codes: Any,
    values: Any,
) -> None:
    """Columns x [B, R] one after the other, with feedback if `upper` is not empty; weight [B, R]."""
    n = x.shape[1]
    code, level = np.empty(n, np.int64), np.empty(n)
    for j in range(x.shape[0]):
        _search(x[j] / scale, weight[j], rate_class, levels, lengths, subset, code, level)
        for r in range(n):
            codes[j, r] = np.uint8(code[r])
            values[j, r] = scale[r] * level[r]
            delta[j, r] -= values[j, r]
        if len(upper):
            feed_back(x, delta, upper, j, 0, n)


@dataclass
class EntropyGrid:
    """Rows with one step each; codes along each column on a trellis, or each chosen separately.

    Attributes:
        scale: [R] steps.
        cost: [R] factor of the curvature: cost * curvature is what a squared error of one step costs, in bits.
        curvature: [R, C].
        rate_class: [R] uint8.
        tables: of the symbols.
        states: of the trellis; None = scalar codes.
    """

    scale: Tensor
    cost: Tensor
    curvature: Tensor
    rate_class: Tensor
    tables: RateTables
    states: int | None
    _parts: tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray] = field(init=False)

    def __post_init__(self) -> None:
        subset = np.zeros(0, np.uint8)
        if self.states is not None:
            subset = subset_table(self.states)[: self.states : 2].astype(np.uint8)
        levels = self.tables.levels().double().numpy()
        self._parts = (self.rate_class.long().numpy(), levels, self.tables.lengths(), subset)
        self._scale = self.scale.double().contiguous().numpy()

    def _weight(self, columns: Sequence[int]) -> np.ndarray:
        """Cost in bits of a squared error of one step: [columns, R]."""
        cost = self.curvature[:, columns].double() * self.cost[:, None]
        weight: np.ndarray = cost.T.contiguous().numpy()
        return weight

    def round(self, x: Tensor, column: int) -> tuple[Tensor, Tensor]:
        """Codes and values of the entries x [R] of one column."""
        codes, values = self._columns(x[None], [column])
        return codes[0], values[0]

    def round_block(
        self, x: Tensor, delta: Tensor, upper: Tensor, columns: Sequence[int], codes: Tensor, values: Tensor
    ) -> None:
        """Round some columns with feedback among them, see `bayesq.quant.feedback`."""
        block = x.numpy(), delta.numpy(), upper.numpy()
        _round_columns(*block, self._scale, self._weight(columns), *self._parts, codes.numpy(), values.numpy())

    def round_matrix(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Codes uint8 and values of a whole matrix [R, C] without feedback."""
        codes, values = self._columns(x.T.double().contiguous(), range(x.shape[1]))
        return codes.T.contiguous(), values.T.contiguous()

    def _columns(self, x: Tensor, columns: Sequence[int]) -> tuple[Tensor, Tensor]:
        codes, values = torch.empty(x.shape, dtype=torch.uint8), torch.empty(x.shape, dtype=torch.float64)
        self.round_block(x, x.clone(), torch.empty(0, 0, dtype=torch.float64), columns, codes, values)
        return codes, values
