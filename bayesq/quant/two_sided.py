"""Row-side feedback: a column's entries are rounded one after the other, each error fed to the rows that follow.

For P = A (x) G the errors of a column also interact through G. Ordered by columns first, the Cholesky factor of P^-1 is
the Kronecker product of those of A^-1 and G^-1, so `feedback.feedback_round` stays as it is, and only the rounding of a
column x changes: with V unit upper triangular, V E VT = G, row s has moved when its turn comes by

    sum_{r before s} (x_r - q_r) V_rs.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from bayesq.quant.compiled import compiled
from bayesq.quant.feedback import FeedbackFactor
from bayesq.quant.grids import CodebookGrid


@compiled()
def _round_column(x: Any, upper: Any, order: Any, scale: Any, zero: Any, levels: Any, bounds: Any, code: Any) -> None:
    """Codes [R] of a column x [R]; levels and bounds [R, K] of each row, padded with infinity."""
    rows = order.shape[0]
    met = x.copy()
    for i in range(rows):
        r = order[i]
        k = np.searchsorted(bounds[r], met[r] / scale[r] + zero[r])
        code[r] = k
        error = x[r] - scale[r] * (levels[r, k] - zero[r])
        for later in range(i + 1, rows):
            met[order[later]] += error * upper[i, later]


@dataclass
class TwoSidedGrid:
    """A `CodebookGrid` whose columns are rounded row by row with feedback.

    Attributes:
        scale, zero, width, codebooks: as in `CodebookGrid`.
        factor: of G [R, R], rows visited in decreasing diag(G).
    """

    scale: Tensor
    zero: Tensor
    width: Tensor
    codebooks: Mapping[int, Tensor]
    factor: FeedbackFactor
    _tables: tuple[np.ndarray, ...] = field(init=False)

    def __post_init__(self) -> None:
        levels, bounds = CodebookGrid(self.scale, self.zero, self.width, self.codebooks).tables()
        parts = (self.factor.upper, self.factor.order, self.scale, self.zero, levels, bounds)
        self._tables = tuple(part.contiguous().numpy() for part in parts)

    def round(self, x: Tensor, column: int) -> tuple[Tensor, Tensor]:
        """Codes and values [R] for the entries x [R] of one column."""
        upper, order, scale, zero, levels, bounds = self._tables
        code = np.empty(len(x), np.int64)
        _round_column(x.numpy(), upper, order, scale, zero, levels, bounds, code)
        value = levels[np.arange(len(code)), code]
        return torch.from_numpy(code), self.scale * (torch.from_numpy(value) - self.zero)
