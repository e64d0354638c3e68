"""LNQ (GuidedQuant; Kim et al., arXiv 2505.07004): row tables by alternating least squares and coordinate descent.

For the rows J_k of each row group k, with q_r = P_r l_r (codes P one-hot, levels l),

    min over levels and codes of sum_{r in J_k} (w_r - q_r)T H_k (w_r - q_r),
    H_k = E_example[sum_positions mean_{r in J_k} d_r^2 x xT]

Starting from k-means weighted with diag H_k, each round computes

    l = (PT H P)^-1 PT H w,
    q_i = the level nearest to w_i - sum_{j != i} H_ij (q_j - w_j) / H_ii,   column by column, in some sweeps.

Levels are rounded to fp16 in every round; a row takes new levels only if these are better. So the objective never
rises. groups = 0 has H = E[x xT] of the layer's inputs, LNQ without guidance.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from baselines.kmeans import best_levels, in_fp16, nearest
from baselines.row_tables import row_level_bits, row_table_tensor, table_distortion
from bayesq.calibration.inputs import INPUT_MOMENT
from bayesq.calibration.samples import Pairs, in_stack
from bayesq.calibration.statistic import Source, Statistic
from bayesq.contract import Allocate, Context, LayerProblem, check_finite
from bayesq.errors import Refused
from bayesq.quant.compiled import compiled
from bayesq.quant.feedback import output_error
from bayesq.quant.tensor import QuantizedTensor

# Rows that are searched together: their errors stay in a core's cache while a row of H serves all of them.
BLOCK = 16


@dataclass(frozen=True)
class GuidedMoment(Statistic):
    """H = E_example[sum_positions mean_{r in J_k} d_r^2 x xT]  [g, k, c, c], rows J_k of `row_groups`.

    Attributes:
        groups: k, at most; a layer with fewer rows has one group for each row.
    """

    name: ClassVar[str] = "guided_moment"
    source: ClassVar[Source] = Source.WEIGHT_GRADIENTS

    groups: int

    def shape(self, groups: int, rows: int, columns: int) -> tuple[int, ...]:
        """[g, k, c, c]."""
        return groups, min(self.groups, rows), columns, columns

    def neutral(self, groups: int, rows: int, columns: int) -> Tensor:
        """Identities."""
        return torch.eye(columns).expand(self.shape(groups, rows, columns)).contiguous()

    def gradients(self, pairs: Pairs, required: Mapping[str, Tensor]) -> Tensor:
        """The sum of H over these examples, in place of their weight gradients."""
        total: Tensor | None = None
        for group, d, x in pairs.blocks():
            d, x = (part.transpose(0, 1).flatten(1, 2) for part in (d, x))  # [g, n, r] and [g, n, c]
            energies = [part.square().mean(-1, keepdim=True) for part in row_groups(d, self.groups)]
            moments = [(x * energy).transpose(1, 2) @ x for energy in energies]
            term = in_stack(pairs.groups, group, torch.stack(moments, 1))
            total = term if total is None else total + term
        assert total is not None
        return total

    def contribution(self, values: Tensor) -> Tensor:
        """The sum, unchanged."""
        return values

    def squares(self, tensor: Tensor) -> Tensor:
        """The diagonals."""
        return tensor.diagonal(dim1=-2, dim2=-1)


def row_groups(rows: Tensor, groups: int) -> tuple[Tensor, ...]:
    """[..., r] split along its last dimension into at most `groups` parts of nearly equal size."""
    return rows.tensor_split(min(groups, rows.shape[-1]), dim=-1)


class LNQ:
    """The published algorithm.

    Args:
        groups: row groups of each layer, or of each group of a convolution; 0 = no guidance.
        rounds: of least squares and coordinate descent; the levels are fitted once more at the end.
        sweeps: over all columns, in each round; a sweep without a change is the last.
        damping: fraction of the mean diagonal added to H.
    """

    def __init__(self, groups: int, rounds: int, sweeps: int, damping: float) -> None:
        for key, value, least in (("groups", groups, 0), ("rounds", rounds, 0), ("sweeps", sweeps, 1)):
            if value < least or int(value) != value:
                raise Refused(f"method.{key}={value}: needs a whole number of at least {least}")
        if not damping >= 0:
            raise Refused(f"method.damping={damping}: must be 0 or more")
        self.groups, self.rounds, self.sweeps, self.damping = int(groups), int(rounds), int(sweeps), damping
        self.statistics: frozenset[Statistic] = frozenset({GuidedMoment(self.groups) if groups else INPUT_MOMENT})

    def prepare(self, layers: Sequence[LayerProblem], allocate: Allocate, context: Context) -> Mapping[str, Tensor]:
        """Choose the widths."""
        return allocate(layers, 0, table_distortion, row_level_bits)

    def quantize_layer(self, layer: LayerProblem, width: Tensor, context: Context) -> QuantizedTensor:
        """Levels and codes of the rows that share a moment and a width, BLOCK rows at a time."""
        check_finite(layer)
        moments = self._moments(layer)
        groups, rows, columns = layer.weight.shape
        parts = row_groups(torch.arange(rows), moments.shape[1])
        codes = torch.empty(groups * rows, columns, dtype=torch.uint8)
        tables: list[Tensor] = [torch.empty(0)] * len(width)
        for g in range(groups):
            for k, part in enumerate(parts):
                h = self.damped(moments[g, k])
                of_part = width[g * rows + part]
                for bits in of_part.unique().tolist():
                    for chosen in part[of_part == bits].split(BLOCK):
                        place = g * rows + chosen
                        levels, codes[place] = self.fit(layer.weight[g, chosen].to(torch.float64), h, 2**bits)
                        for row, table in zip(place.tolist(), levels, strict=True):
                            tables[row] = table
        return row_table_tensor(codes, tables, width, groups)

    def _moments(self, layer: LayerProblem) -> Tensor:
        """H [g, k, c, c]: guided, of full-precision inputs, as the gradients are; else of the run's `inputs`."""
        if self.groups:
            return layer.statistic("guided_moment")
        return layer.input_statistic("input_moment")[:, None]

    def damped(self, moment: Tensor) -> Tensor:
        """H + damping * mean(diag H) I, float64; the identity where H is 0."""
        h = moment.to(torch.float64).clone()
        mean = float(h.diagonal().mean())
        if not mean > 0:
            return torch.eye(len(h), dtype=torch.float64)
        h.diagonal().add_(self.damping * mean)
        return h

    def fit(self, weight: Tensor, h: Tensor, count: int) -> tuple[Tensor, Tensor]:
        """Levels [n, count] float64, exact in fp16, and codes [n, c] uint8 for weights [n, c] float64."""
        levels = in_fp16(best_levels(weight, h.diagonal().expand(weight.shape), count))
        codes, _ = nearest(weight, levels)
        for _ in range(self.rounds):
            levels, codes = fit_levels(weight, h, levels, codes)
            codes = descend(weight, h, levels, codes, self.sweeps)
        return fit_levels(weight, h, levels, codes)


def objective(weight: Tensor, h: Tensor, levels: Tensor, codes: Tensor) -> Tensor:
    """(w - q)T H (w - q) of each row [n]."""
    return output_error(levels.gather(1, codes.long()) - weight, h)


def fit_levels(weight: Tensor, h: Tensor, levels: Tensor, codes: Tensor) -> tuple[Tensor, Tensor]:
    """The least squares levels (PT H P)^-1 PT H w in fp16, in rising order, with the codes renamed accordingly.

    Levels that no weight has, and rows whose objective does not fall, stay as they are.
    """
    count = levels.shape[1]
    normal = torch.zeros(len(weight), count, count, dtype=torch.float64)
    _normal_matrices(h.numpy(), codes.numpy(), normal.numpy())
    right = torch.zeros_like(levels).scatter_add_(1, codes.long(), weight @ h)
    unused = normal.diagonal(dim1=1, dim2=2) == 0
    normal.diagonal(dim1=1, dim2=2)[unused] = 1.0
    right[unused] = levels[unused]
    root, failed = torch.linalg.cholesky_ex(normal)
    solved = torch.cholesky_solve(right[:, :, None], root)[:, :, 0]
    solved = torch.where(((failed == 0) & torch.isfinite(solved).all(1))[:, None], solved, levels)
    solved, order = solved.sort(1)
    renamed = order.argsort(1).gather(1, codes.long()).to(torch.uint8)
    fitted = in_fp16(solved)
    better = (objective(weight, h, fitted, renamed) < objective(weight, h, levels, codes))[:, None]
    return torch.where(better, fitted, levels), torch.where(better, renamed, codes)


@compiled(error_model="numpy")
def _normal_matrices(h: Any, codes: Any, normal: Any) -> None:
    """Write PT H P [n, K, K] of each row's codes [n, c]."""
    rows, columns = codes.shape
    sums = np.zeros((rows, normal.shape[1], columns))
    for i in range(columns):
        for r in range(rows):
            total = sums[r, codes[r, i]]
            for j in range(columns):
                total[j] += h[i, j]
    for r in range(rows):
        for k in range(normal.shape[1]):
            for j in range(columns):
                normal[r, k, codes[r, j]] += sums[r, k, j]


def descend(weight: Tensor, h: Tensor, levels: Tensor, codes: Tensor, sweeps: int) -> Tensor:
    """Codes [n, c] after coordinate descent: column by column, each row takes the level of least objective."""
    codes = codes.clone()
    pull = (levels.gather(1, codes.long()) - weight) @ h
    _sweep(h.numpy(), levels.contiguous().numpy(), codes.numpy(), pull.numpy(), sweeps)
    return codes


@compiled(error_model="numpy")
def _sweep(h: Any, levels: Any, codes: Any, pull: Any, sweeps: int) -> None:
    """`descend`; pull [n, c] is H (q - w), and follows each change."""
    last = levels.shape[1] - 1
    for _ in range(sweeps):
        changes = 0
        for i in range(h.shape[0]):
            if not h[i, i] > 0:
                continue
            for r in range(codes.shape[0]):
                now = levels[r, codes[r, i]]
                aim = now - pull[r, i] / h[i, i]
                above = min(np.searchsorted(levels[r], aim), last)
                code = above
                if above > 0 and aim - levels[r, above - 1] < levels[r, above] - aim:
                    code = above - 1
                if abs(levels[r, code] - aim) < abs(now - aim):
                    step = levels[r, code] - now
                    codes[r, i] = code
                    changes += 1
                    for j in range(h.shape[0]):
                        pull[r, j] += step * h[i, j]
        if changes == 0:
            break
