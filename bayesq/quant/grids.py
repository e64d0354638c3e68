"""Grids: the finite sets of values a row of weights may take, and rounding to the nearest of them.

A grid has R rows (all groups' rows stacked) and turns a column x[R] into codes and values:

    value = scale * (level(code) - zero),     level(code) = code (affine) or codebook[width][code]

Scales have fp16 precision from the start, because they are stored in fp16: so codes are chosen for the values that will
be deployed.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from bayesq.defaults import MAX_BITS, MIN_BITS
from bayesq.errors import Refused
from bayesq.quant.compiled import compiled

MIN_WIDTH, MAX_WIDTH = MIN_BITS, MAX_BITS
ZERO_BITS = 8
# Smallest (subnormal) and largest fp16: scales are clamped to them, never zero or infinite. Below 2**-14 fp16 loses
# digits, which costs far less than a step that is too large for the row.
FP16_TINY, FP16_MAX = 2.0**-24, 65504.0
# Search of the published GPTQ quantizer: shrink the range in steps of 1/100 down to 0.2, error norm 2.4.
CLIP_STEPS, CLIP_LOWEST, CLIP_NORM = 100, 0.2, 2.4
# Rows that are searched together: their temporaries fit a core's cache.
CLIP_ROWS = 128


def stored_scale(scale: Tensor) -> Tensor:
    """Round positive scales to the nearest storable fp16 value, in the input's dtype."""
    return scale.clamp(FP16_TINY, FP16_MAX).to(torch.float16).to(scale.dtype)


def zero_code(zero: Tensor, width: Tensor) -> Tensor:
    """Stored form uint8 of zero points: units of 2**(width - 8) levels, so 256 steps over the code range.

    Integer zero points of an affine grid, 0 .. 2**width - 1, are represented exactly.
    """
    unit = 2.0 ** (width.to(torch.float64) - ZERO_BITS)
    return (zero.to(torch.float64) / unit).round().clamp(0, 2**ZERO_BITS - 1).to(torch.uint8)


def zero_value(code: Tensor, width: Tensor, dtype: torch.dtype) -> Tensor:
    """Inverse of `zero_code`: zero points in level units."""
    return code.to(dtype) * 2.0 ** (width.to(dtype) - ZERO_BITS)


def top_code(width: Tensor, dtype: torch.dtype) -> Tensor:
    """Largest code of each width, 2**width - 1."""
    return 2 ** width.to(dtype) - 1


def round_affine(
    weight: Tensor, scale: Tensor, zero: Tensor, width: Tensor, group_size: int | None = None
) -> tuple[Tensor, Tensor]:
    """Nearest codes and values of a whole matrix [R, C] on affine grids.

    Args:
        scale, zero: [R], or [R, S] of the groups of `group_size` columns.
        width: [R] bits.
    """
    columns = weight.shape[1]
    if scale.dim() == 1:
        scale, zero = scale[:, None], zero[:, None]
    elif scale.shape[1] > 1:
        scale, zero = (part.repeat_interleave(group_size or columns, 1)[:, :columns] for part in (scale, zero))
    top = top_code(width, weight.dtype)[:, None]
    code = torch.round(weight / scale).add_(zero).clamp_(min=0).clamp_(max=top)
    return code, scale * (code - zero)


# Entries of a column that are processed together: with the other columns of the block they fit the nearest cache.
TILE = 256


@compiled(error_model="numpy")
def feed_back(x: Any, delta: Any, upper: Any, j: Any, low: Any, high: Any) -> None:
    """Add the feedback of column j to the entries low to high of all later columns (see `_round_block`)."""
    for k in range(j + 1, x.shape[0]):
        share, error, later = upper[j, k], delta[j, low:high], x[k, low:high]
        for r in range(high - low):
            later[r] += error[r] * share


@compiled(error_model="numpy")
def _affine_block(
    x: Any, delta: Any, upper: Any, scale: Any, zero: Any, which: Any, top: Any, codes: Any, values: Any
) -> None:
    """`AffineGrid.round_block`; scale and zero [S, R], of which column j uses the row which[j]."""
    for low in range(0, x.shape[1], TILE):
        high = min(low + TILE, x.shape[1])
        for j in range(x.shape[0]):
            entry, error = x[j, low:high], delta[j, low:high]
            code_row, written = codes[j, low:high], values[j, low:high]
            step, offset, most = scale[which[j], low:high], zero[which[j], low:high], top[low:high]
            for r in range(high - low):
                code = min(max(np.rint(entry[r] / step[r]) + offset[r], 0.0), most[r])
                value = step[r] * (code - offset[r])
                code_row[r] = np.uint8(code)
                written[r] = value
                error[r] -= value
            feed_back(x, delta, upper, j, low, high)


@dataclass
class AffineGrid:
    """Asymmetric uniform grid, one per row and column group.

    Attributes:
        scale: [R, S] step; S column groups (1 unless group_size is set).
        zero: [R, S] integer code that stands for the real 0.
        width: [R] bits per code.
        group_size: columns per group; None = one grid per row.
    """

    scale: Tensor
    zero: Tensor
    width: Tensor
    group_size: int | None = None

    def round(self, x: Tensor, column: int) -> tuple[Tensor, Tensor]:
        """Nearest code and its value for the entries x[R] of one column."""
        s = 0 if self.group_size is None else column // self.group_size
        scale, zero = self.scale[:, s], self.zero[:, s]
        code = (x / scale).round_().add_(zero).clamp_(min=0).clamp_(max=self._top)
        return code, scale * (code - zero)

    def round_block(
        self, x: Tensor, delta: Tensor, upper: Tensor, columns: Sequence[int], codes: Tensor, values: Tensor
    ) -> None:
        """Round some columns with feedback among them, see `bayesq.quant.feedback`."""
        which = np.array([0 if self.group_size is None else column // self.group_size for column in columns])
        parts = (self.scale.T, self.zero.T, self._top)
        scale, zero, top = (part.to(torch.float64).contiguous().numpy() for part in parts)
        _affine_block(x.numpy(), delta.numpy(), upper.numpy(), scale, zero, which, top, codes.numpy(), values.numpy())

    def __post_init__(self) -> None:
        self._top = top_code(self.width, self.scale.dtype)


@compiled(error_model="numpy")
def _codebook_block(
    x: Any, delta: Any, upper: Any, scale: Any, zero: Any, levels: Any, bounds: Any, codes: Any, values: Any
) -> None:
    """`CodebookGrid.round_block`; levels [R, K] and bounds [R, K - 1], padded with infinity."""
    rows = x.shape[1]
    for j in range(x.shape[0]):
        for r in range(rows):
            code = np.searchsorted(bounds[r], x[j, r] / scale[r] + zero[r])
            value = scale[r] * (levels[r, code] - zero[r])
            codes[j, r] = np.uint8(code)
            values[j, r] = value
            delta[j, r] -= value
        feed_back(x, delta, upper, j, 0, rows)


@dataclass
class CodebookGrid:
    """Levels shared by all rows of a width, scale and zero per row.

    Attributes:
        scale: [R].
        zero: [R] offset in level units.
        width: [R] bits per code.
        codebooks: width -> increasing levels [2**width]; a width without one has the levels 0, 1, 2, ...
    """

    scale: Tensor
    zero: Tensor
    width: Tensor
    codebooks: Mapping[int, Tensor]

    def __post_init__(self) -> None:
        widths = [int(w) for w in torch.unique(self.width)]
        longest = 2 ** max(widths)
        # Infinite bounds pad short codebooks: no entry is rounded to a level beyond them.
        levels = self.scale.new_zeros(MAX_WIDTH + 1, longest)
        bounds = self.scale.new_full((MAX_WIDTH + 1, longest - 1), torch.inf)
        for w in widths:
            book = self.codebooks[w] if w in self.codebooks else torch.arange(2**w)
            book = book.to(self.scale)
            levels[w, : len(book)] = book
            bounds[w, : len(book) - 1] = (book[1:] + book[:-1]) / 2
        self._levels = levels[self.width.long()].contiguous()
        self._bounds = bounds[self.width.long()].contiguous()

    def round(self, x: Tensor, column: int) -> tuple[Tensor, Tensor]:
        """Nearest code and its value for the entries x[R] of one column."""
        code, value = self.round_matrix(x[:, None])
        return code[:, 0], value[:, 0]

    def round_block(
        self, x: Tensor, delta: Tensor, upper: Tensor, columns: Sequence[int], codes: Tensor, values: Tensor
    ) -> None:
        """Round some columns with feedback among them, see `bayesq.quant.feedback`."""
        parts = (self.scale, self.zero, self._levels, self._bounds)
        scale, zero, levels, bounds = (part.to(torch.float64).contiguous().numpy() for part in parts)
        block = (x.numpy(), delta.numpy(), upper.numpy())
        _codebook_block(*block, scale, zero, levels, bounds, codes.numpy(), values.numpy())

    def round_matrix(self, x: Tensor, curvature: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Nearest codes and values of a whole matrix [R, C]; `curvature` is read by other grids, see `BitshiftGrid`."""
        scale, zero = self.scale[:, None], self.zero[:, None]
        code = torch.searchsorted(self._bounds, torch.addcdiv(zero, x, scale))
        return code, scale * (torch.gather(self._levels, 1, code) - zero)


def minmax_grid(
    weight: Tensor,
    width: Tensor,
    scale_dtype: torch.dtype = torch.float16,
    symmetric: bool = False,
    shrink: float = 1.0,
) -> tuple[Tensor, Tensor]:
    """Scale and zero [R] of the grid that spans each row's range, 0 included (published GPTQ's default rule).

    Args:
        weight: [R, C].
        width: [R] bits.
        scale_dtype: precision the scale is stored in; float32 only to compare with published results.
        symmetric: the range is [-max|w|, max|w|], and zero is the code 2**(width - 1).
        shrink: part of the range that the grid spans.
    """
    low, high = _range(weight, symmetric)
    return grid_from_range(shrink * low, shrink * high, width, scale_dtype, symmetric)


def mse_grid(
    weight: Tensor,
    width: Tensor,
    scale_dtype: torch.dtype = torch.float16,
    steps: int = CLIP_STEPS,
    symmetric: bool = False,
) -> tuple[Tensor, Tensor]:
    """Scale and zero [R] with the range shrunk to minimise sum |w - q(w)|^2.4 (published GPTQ's mse option).

    Errors are compared in float32, as in the published code, which halves the memory traffic.

    Args:
        weight, width, scale_dtype, symmetric: as in `minmax_grid`.
        steps: ranges tried lie 1 / steps of the whole range apart.
    """
    return _search_ranges(weight, width, None, scale_dtype, steps, symmetric)


def curvature_grid(
    weight: Tensor,
    width: Tensor,
    curvature: Tensor,
    scale_dtype: torch.dtype = torch.float16,
    symmetric: bool = False,
) -> tuple[Tensor, Tensor]:
    """Scale and zero [R] with the range shrunk to minimise sum_c h_c (w_c - q(w_c))^2.

    Args:
        weight, width, scale_dtype, symmetric: as in `minmax_grid`.
        curvature: [R, C] weights of squared errors, at least 0, in any unit.
    """
    return _search_ranges(weight, width, curvature, scale_dtype, CLIP_STEPS, symmetric)


def _search_ranges(
    weight: Tensor, width: Tensor, curvature: Tensor | None, scale_dtype: torch.dtype, steps: int, symmetric: bool
) -> tuple[Tensor, Tensor]:
    """The search of `mse_grid` (no curvature) and `curvature_grid`, CLIP_ROWS rows at a time."""
    ranges = []
    for rows in torch.arange(len(weight)).split(CLIP_ROWS):
        part = slice(int(rows[0]), int(rows[-1]) + 1)
        cost = None
        if curvature is not None:
            most = curvature[part].amax(1, keepdim=True).clamp(min=torch.finfo(curvature.dtype).tiny)
            cost = (curvature[part] / most).to(torch.float32)
        ranges.append(_search_rows(weight[part].to(torch.float32), width[part], cost, scale_dtype, steps, symmetric))
    scales, zeros = zip(*ranges, strict=True)
    return torch.cat(scales).to(weight.dtype), torch.cat(zeros).to(weight.dtype)


def _search_rows(
    weight: Tensor, width: Tensor, curvature: Tensor | None, scale_dtype: torch.dtype, steps: int, symmetric: bool
) -> tuple[Tensor, Tensor]:
    low, high = _range(weight, symmetric)
    shrink = torch.tensor([1 - step / steps for step in range(round(steps * (1 - CLIP_LOWEST)))], dtype=low.dtype)
    # the grids of all steps at once, [steps, R]: for a few rows each call costs more than its arithmetic
    grids = grid_from_range(shrink[:, None] * low, shrink[:, None] * high, width, scale_dtype, symmetric)
    scale, zero = (part[0] for part in grids)
    best = torch.full_like(scale, torch.inf)
    top = top_code(width, weight.dtype)[:, None]
    code = torch.empty_like(weight)
    for s, z in zip(*grids, strict=True):
        torch.div(weight, s[:, None], out=code)
        code.round_().add_(z[:, None]).clamp_(min=0).clamp_(max=top).sub_(z[:, None]).mul_(s[:, None])
        code.sub_(weight)
        error = (code.abs_().pow_(CLIP_NORM) if curvature is None else code.square_().mul_(curvature)).sum(1)
        better = error < best
        best = torch.where(better, error, best)
        scale, zero = torch.where(better, s, scale), torch.where(better, z, zero)
    return scale, zero


def _range(weight: Tensor, symmetric: bool) -> tuple[Tensor, Tensor]:
    low, high = weight.amin(1).clamp(max=0), weight.amax(1).clamp(min=0)
    if symmetric:
        high = torch.maximum(-low, high)
        low = -high
    return low, high


def grid_from_range(
    low: Tensor,
    high: Tensor,
    width: Tensor,
    scale_dtype: torch.dtype = torch.float16,
    symmetric: bool = False,
) -> tuple[Tensor, Tensor]:
    """Scale and integer zero [R] of the affine grids that span [low, high]; an empty range becomes [-1, 1].

    Args:
        symmetric: zero is the code 2**(width - 1).
    """
    empty = (low == 0) & (high == 0)
    low, high = torch.where(empty, -torch.ones_like(low), low), torch.where(empty, torch.ones_like(high), high)
    top = top_code(width, low.dtype)
    scale = (high - low) / top
    scale = stored_scale(scale) if scale_dtype == torch.float16 else scale.to(scale_dtype).to(low.dtype)
    if symmetric:
        return scale, ((top + 1) / 2).expand_as(scale)
    return scale, torch.round(-low / scale).clamp_(min=0).clamp_(max=top)


def by_column_groups(
    rule: Callable[[Tensor], tuple[Tensor, Tensor]], weight: Tensor, group_size: int | None
) -> tuple[Tensor, Tensor]:
    """Scale and zero [R, S] that a rule gives each group of columns.

    Args:
        rule: gives scale and zero [R] of the columns [R, c] of one group.
        weight: [R, C].
        group_size: columns of a group, the last may have fewer; None = all.
    """
    scale, zero = zip(*map(rule, weight.split(group_size or weight.shape[1], dim=1)), strict=True)
    return torch.stack(scale, 1), torch.stack(zero, 1)


def check_group_size(group_size: int | None) -> int | None:
    """The value of method.group_size.

    Raises:
        Refused: it is no whole number of at least 1.
    """
    if group_size is not None and (type(group_size) is not int or group_size < 1):
        raise Refused(f"method.group_size={group_size}: must be at least 1, or null for one grid per row")
    return group_size


def check_flag(key: str, value: bool) -> bool:
    """The value of a boolean key of the method.

    Raises:
        Refused: it is neither.
    """
    if type(value) is not bool:
        raise Refused(f"method.{key}={value}: needs true or false")
    return value


CLIP_RULES: dict[str, Callable[..., tuple[Tensor, Tensor]]] = {"minmax": minmax_grid, "mse": mse_grid}
