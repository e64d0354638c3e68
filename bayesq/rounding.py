"""Rounding a layer by its whitening, its predicted risk, and the rows' grids before and after rounding."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from bayesq.codebook import normal_levels
from bayesq.contract import stack_groups
from bayesq.quant.bitshift import BitshiftGrid
from bayesq.quant.codes import Bitshift
from bayesq.quant.compiled import compiled
from bayesq.quant.feedback import feedback_round, feedback_round_groups
from bayesq.quant.grids import FP16_TINY, CodebookGrid, stored_scale, zero_code, zero_value
from bayesq.whitening import Whitening


@dataclass
class Rounded:
    """One rounding of a layer, all groups' rows stacked (R = g * r).

    Attributes:
        codes: [R, C] uint8.
        scale: [R] fp16-exact.
        zero: [R] in level units, storable.
        width: [R] bits.
        values: [R, C] the decoded codes.
        target: [R, C] each entry when it was rounded: the weight plus the feedback of earlier columns.
    """

    codes: Tensor
    scale: Tensor
    zero: Tensor
    width: Tensor
    values: Tensor
    target: Tensor


def round_layer(
    weight: Tensor,
    whitening: Whitening,
    scale: Tensor,
    zero: Tensor,
    width: Tensor,
    codebooks: Mapping[int, Tensor],
    trellis: Bitshift | None = None,
) -> Rounded:
    """Round a layer once: to nearest without feedback factors (`round_matrix` of the grid), else with feedback.

    Args:
        weight: [g, r, c].
        scale, zero: [R]; they are first moved to storable values.
        width: [R] bits.
        codebooks: width -> levels; a width without one is affine.
        trellis: that codes run along, or None for scalar codes.
    """
    rows = weight.shape[1]
    scale, zero = stored_scale(scale), zero_value(zero_code(zero, width), width, scale.dtype)
    if whitening.factors is not None and len(weight) > 1 and trellis is None:
        every = CodebookGrid(scale, zero, width, codebooks)
        codes, values, target = feedback_round_groups(weight, whitening.factors, every)
        return Rounded(codes, scale, zero, width, values, target)
    parts = []
    for g in range(len(weight)):
        group = slice(g * rows, (g + 1) * rows)
        w = weight[g].to(torch.float64)
        rows_grid = scale[group], zero[group], width[group]
        grid: CodebookGrid | BitshiftGrid = (
            CodebookGrid(*rows_grid, codebooks)
            if trellis is None
            else BitshiftGrid(*rows_grid, trellis, whitening.row_curvature[g])
        )
        if whitening.factors is None:
            curvature = whitening.row_curvature[g][:, None] * whitening.column_curvature[g]
            codes, values = grid.round_matrix(w, curvature)
            parts.append((codes.to(torch.uint8), values, w))
        else:
            parts.append(feedback_round(w, whitening.factors[g], grid))
    codes, values, target = (torch.cat(part) for part in zip(*parts, strict=True))
    return Rounded(codes, scale, zero, width, values, target)


def predicted_risk(weight: Tensor, whitening: Whitening, distortions: Sequence[float]) -> Tensor:
    """Predicted risk of every row at every width, nats per example.

        1/2 s_r^2 T_b sum_c h_rc        with the curvature h of `bayesq.whitening`, for example G_rr D_c

    with s_r the row's standard deviation and T_b the expected distortion of a b-bit code for unit variance.

    Args:
        weight: [g, r, c].
        distortions: T_b of each candidate width.

    Returns:
        [R, widths] float64.
    """
    w = weight.to(torch.float64)
    variance = w.var(-1, unbiased=False)
    energy = 0.5 * whitening.row_curvature * whitening.column_curvature.sum(-1) * variance
    return stack_groups(energy)[:, None] * torch.tensor(distortions, dtype=torch.float64)


def rounding_curvature(whitening: Whitening, rows: int) -> Tensor:
    """The column curvatures as [R, C] for `rows` rows per group, without the factor row_curvature."""
    groups, _, columns = whitening.column_curvature.shape
    return stack_groups(whitening.column_curvature.expand(groups, rows, columns))


# Number of spreads tried for a row's first grid, from LEAST_SPREAD standard deviations up to no clipping.
SPREADS, LEAST_SPREAD = 24, 0.5


def first_rows(weight: Tensor, curvature: Tensor, width: Tensor, unit: Tensor, middle: Tensor) -> tuple[Tensor, Tensor]:
    """Scale and zero of each row before the first rounding, for levels made for weights of unit variance.

    The row's spread s minimises the cost of scalar Lloyd-Max levels without feedback:

        min_s sum_c h_c (w_c - m - s Q((w_c - m) / s))^2,   m = sum_c h_c w_c / sum_c h_c
        scale = s unit,   zero = middle - m / scale

    The first grid matters, because refits move only slowly and only to the nearest local optimum.

    Args:
        weight: [R, C].
        curvature: [R, C] weights, at least 0.
        width: [R] bits.
        unit: [R] length of a level unit, for weights of unit variance.
        middle: [R] middle of the levels, in level units.

    Returns:
        scale [R], zero [R], float64; a row of zeros has the smallest fp16 scale.
    """
    w, curvature = weight.to(torch.float64), curvature.to(torch.float64)
    total = curvature.sum(1, keepdim=True)
    tiny = torch.finfo(curvature.dtype).tiny
    curvature = torch.where(total > 0, curvature / total.clamp(min=tiny), 1 / curvature.shape[1])
    mean = (curvature * w).sum(1)
    distance = (w - mean[:, None]).abs()
    deviation = (curvature * distance.square()).sum(1).sqrt()
    spread = torch.empty_like(mean)
    for bits in width.unique().tolist():
        rows = width == bits
        levels = normal_levels("lloyd", bits)
        # A stored zero point lies within 0 .. 2**bits - 1, so the grid has to reach from the mean to zero.
        reach = mean[rows].abs() / ((2**bits - 1) / 2 * unit[rows])
        low = torch.maximum(LEAST_SPREAD * deviation[rows], reach)
        high = torch.maximum(distance[rows].amax(1) / levels[-1], low)
        ratio = high / low.clamp(min=torch.finfo(low.dtype).tiny)
        tried = low[:, None] * ratio[:, None] ** torch.linspace(0, 1, SPREADS, dtype=torch.float64)
        best = np.empty(len(low), np.int64)
        upper = levels[len(levels) // 2 :]
        _least_error(distance[rows].numpy(), curvature[rows].numpy(), tried.numpy(), upper.numpy(), best)
        spread[rows] = tried.gather(1, torch.from_numpy(best)[:, None])[:, 0]
    scale = (spread * unit).clamp(min=FP16_TINY)
    return scale, middle - mean / scale


@compiled()
def _least_error(distance: Any, curvature: Any, tried: Any, levels: Any, best: Any) -> None:
    """best [R]: the s for which the levels +-tried[r, s] levels[k] have the least weighted squared error in row r."""
    error = np.empty(distance.shape[1])
    for r in range(distance.shape[0]):
        x, g, least = distance[r], curvature[r], np.inf
        best[r] = 0
        for s in range(tried.shape[1]):
            error[:] = np.inf
            for level in levels:
                value = tried[r, s] * level
                for c in range(len(error)):
                    squared = (x[c] - value) * (x[c] - value)
                    error[c] = squared if squared < error[c] else error[c]
            total = 0.0
            for c in range(len(error)):
                total += g[c] * error[c]
            if total < least:
                best[r], least = s, total


def refit_rows(rounded: Rounded, curvature: Tensor) -> tuple[Tensor, Tensor]:
    """Scale and zero of each row by least squares on the rounding targets, weighted by the curvature.

        min_{a, b} sum_c h_c (target_c - a level_c - b)^2,   scale = a, zero = -b / a

    Args:
        curvature: [R, C] weights, positive.

    Returns:
        scale [R], zero [R]; a row with a single code, or with a degenerate fit, keeps its grid.
    """
    scale, zero = rounded.scale[:, None], rounded.zero[:, None]
    level = rounded.values / scale + zero
    total = curvature.sum(1, keepdim=True)
    mean_level = (curvature * level).sum(1, keepdim=True) / total
    mean_target = (curvature * rounded.target).sum(1, keepdim=True) / total
    covariance = (curvature * (level - mean_level) * (rounded.target - mean_target)).sum(1, keepdim=True)
    variance = (curvature * (level - mean_level).square()).sum(1, keepdim=True)
    slope = covariance / variance.clamp(min=torch.finfo(variance.dtype).tiny)
    # A variance this small means that all levels are equal.
    usable = (variance > 1e-12 * total) & (slope > 0)
    new_scale = torch.where(usable, slope, scale)
    new_zero = torch.where(usable, mean_level - mean_target / new_scale, zero)
    return new_scale[:, 0], new_zero[:, 0]
