"""GPTQ (Frantar et al., arXiv 2210.17323): round column by column, feed each error to the later columns.

With everything that makes it strong: act-order, 1 % damping, per-row asymmetric grids whose clip rule is chosen per row
by calibrated output error, optional column groups, inputs from the full-precision or from the already quantized prefix.
"""

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from baselines.scalar import ScalarMethod
from bayesq.calibration.inputs import INPUT_MAGNITUDE, INPUT_MOMENT
from bayesq.calibration.statistic import Statistic
from bayesq.contract import Context, LayerProblem, check_finite, stack_groups
from bayesq.entropy_scalar import centred_grid
from bayesq.errors import Refused
from bayesq.quant.feedback import (
    BlockObserver,
    FeedbackFactor,
    feedback_factors,
    feedback_round,
    feedback_round_groups,
    output_error,
)
from bayesq.quant.grids import CLIP_RULES, AffineGrid, check_flag, check_group_size, curvature_grid, zero_code
from bayesq.quant.tensor import QuantizedTensor


class GPTQ(ScalarMethod):
    """The published algorithm.

    Args:
        clip: "minmax", "mse", or "auto": both, and per row the one with the smaller calibrated output error; or
            "curvature", not published: least squared error, weighted by the curvature after feedback to later columns.
        act_order: visit columns in decreasing input energy.
        damping: fraction of the mean diagonal added to the input moment.
        group_size: columns that share a scale and zero; None = one per row. With act-order the groups' grids are set
            from the original weights beforehand, so that no column permutation has to be stored.
        scale_dtype: precision of the scales; float16 is stored, float32 is for comparison with published results only.
        symmetric: ranges are symmetric, and zero is the code 2**(width - 1).
    """

    statistics: frozenset[Statistic] = frozenset({INPUT_MOMENT})
    entropy_statistics: frozenset[Statistic] = frozenset({INPUT_MAGNITUDE})
    together = True  # groups of a convolution are rounded in one loop over columns

    def __init__(
        self,
        clip: str,
        act_order: bool,
        damping: float,
        group_size: int | None,
        scale_dtype: torch.dtype = torch.float16,
        symmetric: bool = False,
    ) -> None:
        if clip not in (*CLIP_RULES, "curvature", "auto"):
            raise Refused(f"method.clip={clip}: choose from {', '.join(CLIP_RULES)}, curvature, auto")
        if not damping >= 0:
            raise Refused(f"method.damping={damping}: must be 0 or more")
        self.rules = list(CLIP_RULES) if clip == "auto" else [clip]
        self.act_order = act_order
        self.damping = damping
        self.group_size = check_group_size(group_size)
        self.symmetric = check_flag("symmetric", symmetric)
        self.scale_dtype = scale_dtype

    def planned(self, layer: LayerProblem) -> LayerProblem:
        """The layer with zeros in dead columns, which take nearly no bits; rotated columns are hardly ever dead."""
        if layer.rotation is not None:
            return layer
        dead = layer.statistic(INPUT_MAGNITUDE.name) == 0
        return replace(layer, weight=layer.weight.masked_fill(dead[:, None], 0.0)) if bool(dead.any()) else layer

    def quantize_layer(self, layer: LayerProblem, width: Tensor, context: Context) -> QuantizedTensor:
        """Factor the input moment and round column by column."""
        check_finite(layer)
        moments = layer.input_statistic("input_moment")
        factors = feedback_factors(moments, self.damping, self.act_order)
        layer.count("damping_retries", sum(factor.retries for factor in factors))
        self._begin(layer)
        if self._coded is not None:
            return self._coded.fit(layer, lambda step: self.round_steps(layer.weight, factors, step))
        codes, scale, zero, _ = self.round_layer(layer.weight, moments, factors, width)
        return QuantizedTensor(
            codes=codes,
            width=width,
            scale=scale.to(torch.float16),
            zero=zero_code(zero, width[:, None]),
            groups=len(moments),
            group_size=self.group_size,
        )

    def _begin(self, layer: LayerProblem) -> None:
        """Read what a variant needs of the layer beside its weights and input moment."""

    def _feedback(
        self, weight: Tensor, group: int, factor: FeedbackFactor, grid: AffineGrid, follow: BlockObserver | None
    ) -> tuple[Tensor, Tensor]:
        """Codes and values of one group's matrix."""
        codes, values, _ = feedback_round(weight, factor, grid, follow)
        return codes, values

    def _error(self, value: Tensor, weight: Tensor, moments: Tensor) -> Tensor:
        """Calibrated output error of each row, up to a constant."""
        return output_error(value - weight, moments)

    def round_steps(self, weight: Tensor, factors: Sequence[FeedbackFactor], step: Tensor) -> Tensor:
        """Codes [R, C] of a layer [g, r, c] for steps [R] around the code 128; the clip rules are not read."""
        weight = _without_dead(weight, factors)
        if self.together and len(weight) > 1:
            return feedback_round_groups(weight, factors, centred_grid(step))[0]
        by_group = enumerate(zip(weight, factors, step.chunk(len(weight)), strict=True))
        return torch.cat([self._feedback(w, g, factor, centred_grid(s), None)[0] for g, (w, factor, s) in by_group])

    def round_layer(
        self, weight: Tensor, moments: Tensor, factors: Sequence[FeedbackFactor], width: Tensor
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Quantize a layer.

        Args:
            weight: [g, r, c]. A dead column's weights become zero, as published.
            moments: [g, c, c] input moments, by which the clip rules are compared.
            factors: of `moments`.
            width: [R] bits.

        Returns:
            codes [R, C] uint8, scale [R, S], zero [R, S], values [R, C] float64.
        """
        weight = _without_dead(weight, factors)
        codes, scale, zero, values = self._round(weight, factors, width, self.rules[0])
        for rule in self.rules[1:]:
            other = self._round(weight, factors, width, rule)
            old, new = (self._error(x.reshape(weight.shape), weight, moments) for x in (values, other[3]))
            better = (new < old).reshape(-1, 1)
            pairs = zip(other, (codes, scale, zero, values), strict=True)
            codes, scale, zero, values = (torch.where(better, theirs, ours) for theirs, ours in pairs)
        return codes, scale, zero, values

    def _round(
        self, weight: Tensor, factors: Sequence[FeedbackFactor], width: Tensor, rule: str
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """`round_layer` under one clip rule."""
        if self.together and len(weight) > 1 and self.group_size is None:
            curvature = torch.stack([factor.column_curvature for factor in factors])[:, None].expand(weight.shape)
            grid = self._grid(stack_groups(weight), width, rule, stack_groups(curvature))
            codes, values, _ = feedback_round_groups(weight, factors, grid)
            return codes, grid.scale, grid.zero, values
        parts = []
        for g, (matrix, factor, widths) in enumerate(zip(weight, factors, width.chunk(len(weight)), strict=True)):
            curvature = factor.column_curvature.expand(matrix.shape)
            grid = self._grid(matrix, widths, rule, curvature)
            follow = None if self.act_order or self.group_size is None else self._follower(grid, rule, curvature)
            codes, values = self._feedback(matrix, g, factor, grid, follow)
            parts.append((codes, grid.scale, grid.zero, values))
        codes, scale, zero, values = (torch.cat(part) for part in zip(*parts, strict=True))
        return codes, scale, zero, values

    def _clip(self, rule: str, weight: Tensor, width: Tensor, curvature: Tensor) -> tuple[Tensor, Tensor]:
        if rule == "curvature":
            return curvature_grid(weight, width, curvature, self.scale_dtype, symmetric=self.symmetric)
        return CLIP_RULES[rule](weight, width, self.scale_dtype, symmetric=self.symmetric)

    def _grid(self, weight: Tensor, width: Tensor, rule: str, curvature: Tensor) -> AffineGrid:
        size = self.group_size or weight.shape[1]
        parts = zip(weight.split(size, dim=1), curvature.split(size, dim=1), strict=True)
        pairs = [self._clip(rule, part, width, cost) for part, cost in parts]
        scale, zero = (torch.stack(column, 1) for column in zip(*pairs, strict=True))
        return AffineGrid(scale, zero, width, self.group_size)

    def _follower(self, grid: AffineGrid, rule: str, curvature: Tensor) -> BlockObserver:
        """Grids of column groups from the weights as updated by earlier blocks, as the published code sets them."""
        size = self.group_size
        assert size is not None

        def on_block(weight: Tensor, start: int, stop: int) -> None:
            for first in range(-(-start // size) * size, stop, size):
                s = first // size
                columns = slice(first, first + size)
                part, cost = weight[columns].T, curvature[:, columns]
                grid.scale[:, s], grid.zero[:, s] = self._clip(rule, part, grid.width, cost)

        return on_block


def _without_dead(weight: Tensor, factors: Sequence[FeedbackFactor]) -> Tensor:
    """The weights [g, r, c] in float64, those of dead columns zero, as published."""
    dead = torch.stack([factor.dead for factor in factors])
    return weight.to(torch.float64).masked_fill(dead[:, None, :], 0.0)
