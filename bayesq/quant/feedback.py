"""Successive rounding with error feedback: the routine that GPTQ and BayesQ share.

The layer's quadratic error sum_r (w_r - q_r)T A (w_r - q_r) is minimised greedily, column by column: round one column,
then move the other columns to their optimum, given the rounded ones. With U unit upper triangular, D diagonal and
U D UT = A, column k has moved by sum_{j<k} (w_j - q_j) U_jk when it is rounded, and the total error is
sum_k D_k (x_k - q_k)^2, where x_k is the moved column. These are the codes of Frantar et al. (GPTQ, arXiv 2210.17323,
section 3), who feed (x_j - q_j) / V_jj through the rows of V, VT V = A^-1; so D_k = 1 / V_kk^2. Without the inverse the
factorization of a wide layer takes a quarter of the time.

How far columns will move is not predicted. BayesQ fits its grids again after a rounding instead (`bayesq.method`).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor

from bayesq.errors import Refused
from bayesq.quant.compiled import compiled

# Columns of an outer block, which updates all later columns by one matrix product. Twice the published code's value,
# because it is faster for wide layers.
BLOCK = 256
# The same with an observer of the updated weights: the published code's value.
OBSERVED_BLOCK = 128
# Columns inside a block that are rounded in one compiled step; the rest of the block gets one matrix product.
SUB_BLOCK = 16
# Columns that `_transpose` copies together. With 512 or 1024 numbers in a row, equal places of all rows share a set of
# the nearest cache, which holds this many lines.
TILE = 8
DAMPING_RETRIES = 8
# Retries start at least here, if the configured damping is smaller (0, for example): well above float64 round-off.
LEAST_DAMPING = 1e-8


class Grid(Protocol):
    """Anything that rounds one column."""

    def round(self, x: Tensor, column: int) -> tuple[Tensor, Tensor]:
        """Codes and values [R] for entries x [R] of `column`."""
        ...


@runtime_checkable
class BlockGrid(Grid, Protocol):
    """A grid that rounds some columns in one compiled step, with feedback from each to the next."""

    def round_block(
        self, x: Tensor, delta: Tensor, upper: Tensor, columns: Sequence[int], codes: Tensor, values: Tensor
    ) -> None:
        """What `_round_block` does."""
        ...


class BlockObserver(Protocol):
    """Called with all columns when a block begins, for grids that depend on the updated weights."""

    def __call__(self, weight: Tensor, start: int, stop: int) -> None:
        """Weights [C, R] in visiting order; columns start..stop are about to be rounded."""
        ...


@dataclass
class FeedbackFactor:
    """Factorization of one input moment, shared by all rows, widths and methods.

    Attributes:
        order: [c] visiting order of the columns.
        upper: [c, c] float64 unit upper triangular U with U D UT = A[order][:, order] + damping.
        column_curvature: [c] D, original order: increase of the layer's error per squared rounding error of a column.
        dead: [c] columns (original order) that no calibration input reached.
        retries: how often the damping had to grow before the factorization succeeded.
    """

    order: Tensor
    upper: Tensor
    column_curvature: Tensor
    dead: Tensor
    retries: int


def feedback_factor(moment: Tensor, damping: float, act_order: bool = True) -> FeedbackFactor:
    """Factor an input moment for `feedback_round`.

    Args:
        moment: [c, c] second moment A of the layer's inputs (any positive multiple gives the same codes).
        damping: added to the diagonal, as a fraction of its mean; ten times larger in each retry, which follows if the
            moment is not positive definite.
        act_order: visit columns in decreasing diag(A), ties in column order.

    Raises:
        Refused: the moment is not finite, or no retry made it positive definite.
    """
    a = moment.to(torch.float64)
    _check_finite(a)
    diagonal = a.diagonal().clone()
    dead = diagonal == 0
    # A dead column interacts with no other. The mean as its diagonal entry does not change the damping.
    diagonal[dead] = 1.0 if bool(dead.all()) else diagonal[~dead].mean()
    order = torch.argsort(diagonal, descending=True, stable=True) if act_order else torch.arange(len(a))
    mean = float(diagonal[order].mean())
    last_first = order.flip(0)
    for retry in range(DAMPING_RETRIES):
        fraction = damping if retry == 0 else max(damping, LEAST_DAMPING) * 10**retry
        # Factors of wide layers take hundreds of megabytes. LAPACK works in place on matrices stored by columns, so
        # there are never more than two copies besides A. Gathering rows and columns at once would take three times as
        # long. The transpose is right because A is symmetric.
        root = a.index_select(0, last_first).index_select(1, last_first).T
        root.diagonal().copy_(diagonal[last_first] + fraction * mean)
        failed = torch.empty((), dtype=torch.int32)
        torch.linalg.cholesky_ex(root, out=(root, failed))
        if int(failed) == 0:
            # M = root.flip is upper triangular with M MT = A[order][:, order] + damping: a Cholesky factor from the
            # last column backwards.
            upper = root.flip(0, 1)
            curvature, pivots = upper.diagonal().square()[torch.argsort(order)], upper.diagonal().clone()
            return FeedbackFactor(order, upper.div_(pivots), curvature, dead, retry)
    raise Refused(f"the input moment is not positive definite even with damping {fraction:g}")


def _check_finite(moment: Tensor) -> None:
    """Refuse NaN and infinities, without the memory of a mask.

    Raises:
        Refused: the moment has some.
    """
    if not all(bool(torch.isfinite(bound)) for bound in torch.aminmax(moment)):
        raise Refused("the input moment has NaN or infinite entries")


def feedback_factors(moments: Tensor, damping: float, act_order: bool = True) -> list[FeedbackFactor]:
    """`feedback_factor` of each group's moment [g, c, c] in one batch, since a depthwise convolution has hundreds."""
    if len(moments) == 1:
        return [feedback_factor(moments[0], damping, act_order)]
    a = moments.to(torch.float64)
    _check_finite(a)
    diagonal = a.diagonal(dim1=-2, dim2=-1)
    dead = diagonal == 0
    live = (~dead).sum(1, keepdim=True)
    mean = torch.where(live > 0, diagonal.sum(1, keepdim=True) / live.clamp(min=1), 1.0)
    diagonal = torch.where(dead, mean, diagonal)
    order = torch.arange(a.shape[-1]).expand(len(a), -1)
    if act_order:
        order = torch.argsort(diagonal, dim=1, descending=True, stable=True)
    damped = a.gather(1, order[:, :, None].expand_as(a)).gather(2, order[:, None, :].expand_as(a))
    sorted_diagonal = diagonal.gather(1, order)
    damped.diagonal(dim1=-2, dim2=-1).copy_(sorted_diagonal + damping * sorted_diagonal.mean(1, keepdim=True))
    root, info = torch.linalg.cholesky_ex(damped.flip(1, 2))
    root = root.flip(1, 2)
    pivots = root.diagonal(dim1=-2, dim2=-1)
    curvature = pivots.square().gather(1, torch.argsort(order, dim=1))
    upper = root / pivots[:, None, :]
    factors = []
    for g, failed in enumerate(info.tolist()):
        if failed:
            factors.append(feedback_factor(moments[g], damping, act_order))
        else:
            factors.append(FeedbackFactor(order[g], upper[g], curvature[g], dead[g], 0))
    return factors


def feedback_round_groups(
    weight: Tensor, factors: Sequence[FeedbackFactor], grid: Grid
) -> tuple[Tensor, Tensor, Tensor]:
    """`feedback_round` of all groups at once, each in its column order: one step per column for all groups.

    Args:
        weight: [g, r, c] in original column order.
        factors: of each group.
        grid: rounds one entry of all R = g * r rows; must not depend on the column.

    Returns:
        codes [R, C] uint8, values [R, C] float64, target [R, C] float64, as `feedback_round`.
    """
    groups, rows, columns = weight.shape
    order = torch.stack([factor.order for factor in factors])
    u = torch.stack([factor.upper for factor in factors])
    by_column = order[:, None, :].expand(groups, rows, columns)
    w = weight.to(torch.float64).gather(2, by_column).permute(2, 0, 1).contiguous()  # [C, g, r]
    x = w.clone()
    codes = torch.empty(x.shape, dtype=torch.uint8)
    values = torch.empty_like(x)
    for j in range(columns):
        code, value = grid.round(x[j].reshape(-1), j)
        codes[j], values[j] = code.reshape(groups, rows), value.reshape(groups, rows)
        x[j + 1 :] += u[:, j, j + 1 :].T[:, :, None] * (w[j] - values[j])
    back = torch.argsort(order, dim=1)[:, None, :].expand(groups, rows, columns)
    restored = (part.permute(1, 2, 0).gather(2, back).flatten(0, 1) for part in (codes, values, x))
    codes, values, target = restored
    return codes, values, target


def feedback_round(
    weight: Tensor,
    factor: FeedbackFactor,
    grid: Grid,
    on_block: BlockObserver | None = None,
    drift: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Round all rows of one matrix with error feedback.

    Args:
        weight: [R, C] in original column order.
        factor: of the input moment [C, C].
        grid: rounds one column, given its original index.
        on_block: see BlockObserver; receives original-order weights only when the factor has no act-order.
        drift: [C, C] float64 in visiting order, strictly upper: when column j is rounded, its target times drift[j, k]
            is added to the weights of each later column k (GPTAQ); None = 0.

    Returns:
        codes [R, C] uint8 in original order; their values [R, C] float64; target [R, C] float64, each entry when it
        was rounded (the weight plus all feedback).
    """
    columns, rows = weight.shape[1], weight.shape[0]
    u = factor.upper
    x = weight.T.contiguous()[factor.order].to(torch.float64)  # [C, R]: a column is contiguous
    delta = x.clone()  # weight - value, once a column is rounded
    codes = torch.empty(columns, rows, dtype=torch.uint8)
    values = torch.empty_like(x)
    original = factor.order.tolist()
    block = BLOCK if on_block is None else OBSERVED_BLOCK
    for start in range(0, columns, block):
        stop = min(start + block, columns)
        if on_block is not None:
            on_block(_optimum(x, delta, u, start), start, stop)
        for sub in range(start, stop, SUB_BLOCK):
            end = min(sub + SUB_BLOCK, stop)
            part = slice(sub, end)
            step = grid.round_block if isinstance(grid, BlockGrid) else partial(_round_block, grid)
            if drift is not None:
                step = partial(_round_block, grid, drift=drift[part, part])
            step(x[part], delta[part], u[part, part].contiguous(), original[part], codes[part], values[part])
            if end < stop:
                x[end:stop].addmm_(u[part, end:stop].T, delta[part])
                _move(x, delta, drift, part, slice(end, stop))
        if stop < columns:
            x[stop:].addmm_(u[start:stop, stop:].T, delta[start:stop])
            _move(x, delta, drift, slice(start, stop), slice(stop, columns))
    back = torch.argsort(factor.order)
    return _in_order(codes, back), _in_order(values, back), _in_order(x, back)


def _move(x: Tensor, delta: Tensor, drift: Tensor | None, rounded: slice, later: slice) -> None:
    """Add the drift of rounded columns to the weights of later ones, in x and in delta [C, R]."""
    if drift is not None:
        moved = drift[rounded, later].T @ x[rounded]
        x[later] += moved
        delta[later] += moved


def _in_order(x: Tensor, place: Tensor) -> Tensor:
    """x[place].T for x [C, R]."""
    out = torch.empty(x.shape[1], x.shape[0], dtype=x.dtype)
    _transpose(x.numpy(), place.numpy(), out.numpy())
    return out


@compiled()
def _transpose(x: Any, place: Any, out: Any) -> None:
    columns, rows = x.shape
    for first in range(0, columns, TILE):
        last = min(first + TILE, columns)
        for r in range(rows):
            for c in range(first, last):
                out[r, c] = x[place[c], r]


def _round_block(
    grid: Grid,
    x: Tensor,
    delta: Tensor,
    upper: Tensor,
    columns: Sequence[int],
    codes: Tensor,
    values: Tensor,
    drift: Tensor | None = None,
) -> None:
    """Round the columns x [B, R], feeding each one's error to those after it.

    Args:
        x: becomes the targets.
        delta: [B, R] the weights; becomes weights - values.
        upper: [B, B] U of these columns among each other.
        columns: their original indices.
        codes, values: [B, R] written.
        drift: [B, B] of `feedback_round`.
    """
    for j, column in enumerate(columns):
        code, value = grid.round(x[j], column)
        codes[j], values[j] = code, value
        delta[j] -= value
        x[j + 1 :].addr_(upper[j, j + 1 :], delta[j])
        _move(x, delta, drift, slice(j, j + 1), slice(j + 1, len(x)))


def _optimum(x: Tensor, weight: Tensor, upper: Tensor, start: int) -> Tensor:
    """The optimum of the columns [C, R] from `start` on, given those before.

    x = weight + F contains only the feedback F of rounded columns. The columns that are not yet rounded also feed their
    shifts to each other, so the optimum is weight + U^-T F.
    """
    best = x.clone()
    rest = upper[start:, start:].T
    moved = torch.linalg.solve_triangular(rest, x[start:] - weight[start:], upper=False, unitriangular=True)
    best[start:] = weight[start:] + moved
    return best


def output_error(delta: Tensor, moment: Tensor, dtype: torch.dtype = torch.float64) -> Tensor:
    """Calibrated output error of each row, delta_r A delta_rT.

    Args:
        delta: [..., r, c] weight error.
        moment: [..., c, c] input second moment A.
        dtype: precision of the products; float32 takes half the time and ranks candidates equally well.

    Returns:
        [..., r].
    """
    d = delta.to(dtype)
    return torch.einsum("...rc,...rc->...r", d @ moment.to(dtype), d)
