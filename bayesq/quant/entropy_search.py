"""Searching entropy-coded codes: the symbols of a column with the least distortion + lambda x bits.

`bayesq.quant.codes.entropy` defines the codes. With a trellis the Viterbi algorithm finds the best path down a column,
else each symbol is chosen for itself. Code lengths are the ideal ones of the rows' tables.
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
from bayesq.quant.trellis import best_path

LARGEST = CENTRE - 1


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
    """Rows with one step each; codes along each column on a trellis, or each for itself.

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
