"""AWQ (Lin et al., arXiv 2306.00978): scale salient input channels up before rounding, and down again afterwards.

In an arbitrary network the per-channel scales cannot be folded into the layer before, so they are stored with the layer
and counted. Exponent and clip range are both searched on the calibrated output error tr(dW A dWT), which equals the
published search on sample outputs over the whole calibration set.
"""

from collections.abc import Iterator
from functools import partial

import torch
from torch import Tensor

from baselines.scalar import ScalarMethod
from bayesq.calibration.inputs import INPUT_MAGNITUDE, INPUT_MOMENT
from bayesq.calibration.statistic import Statistic
from bayesq.contract import Context, LayerProblem, check_finite, stack_groups
from bayesq.entropy import usable_step
from bayesq.entropy_scalar import ScalarRounds, nearest_codes, scaled_weight
from bayesq.errors import Refused
from bayesq.quant.codes.rate_tables import CENTRE
from bayesq.quant.feedback import output_error
from bayesq.quant.grids import by_column_groups, check_flag, check_group_size, minmax_grid, round_affine, zero_code
from bayesq.quant.tensor import QuantizedTensor


class AWQ(ScalarMethod):
    """Activation-aware scaling, then round to nearest.

    Args:
        exponents: candidates alpha in [0, 1] are k / exponents, k = 0..exponents; 0 is the identity (no scales stored).
        clip_steps: candidate ranges of a row are its range times 1 - k / clip_steps * (1 - clip_lowest),
            k = 0..clip_steps; 0 = no clipping.
        clip_lowest: smallest range tried, as a fraction.
        group_size: columns that share a grid; None = one grid per row. The groups of a row shrink together.
        symmetric: ranges are symmetric, and zero is the code 2**(width - 1).
    """

    statistics: frozenset[Statistic] = frozenset({INPUT_MOMENT, INPUT_MAGNITUDE})

    def __init__(
        self,
        exponents: int,
        clip_steps: int,
        clip_lowest: float,
        group_size: int | None = None,
        symmetric: bool = False,
    ) -> None:
        if exponents < 1 or clip_steps < 0 or not 0 < clip_lowest <= 1:
            raise Refused(
                f"method.exponents={exponents} must be at least 1, method.clip_steps={clip_steps} at least 0, "
                f"method.clip_lowest={clip_lowest} in (0, 1]"
            )
        self.exponents = exponents
        self.clip_steps = clip_steps
        self.clip_lowest = clip_lowest
        self.group_size, self.symmetric = check_group_size(group_size), check_flag("symmetric", symmetric)

    def column_scale_bits(self, layer: LayerProblem) -> int:
        """An fp16 scale for each input channel of each group."""
        return 16 * len(layer.weight) * layer.columns // layer.positions_per_channel

    def quantize_layer(self, layer: LayerProblem, width: Tensor, context: Context) -> QuantizedTensor:
        """Search channel scales and ranges, then round to nearest; with codec=entropy there are no ranges."""
        check_finite(layer)
        if self._coded is not None:
            return self._coded_layer(layer, self._coded)
        moment = layer.input_statistic("input_moment").to(torch.float64)
        magnitude = layer.input_statistic("input_magnitude").to(torch.float64)
        weight = layer.weight.to(torch.float64)
        searched = self.search_scale(weight, moment, magnitude, width, layer.positions_per_channel)
        # The exponent was chosen with unclipped ranges. With clipping, the identity may be better.
        column_scale = torch.ones_like(searched)
        spread = _spread(column_scale, layer.positions_per_channel)
        error, scale, zero = self.search_clip(weight, moment, spread, width)
        if not bool((searched == 1).all()):
            wider = _spread(searched, layer.positions_per_channel)
            other_error, other_scale, other_zero = self.search_clip(weight, moment, wider, width)
            if float(other_error.sum()) < float(error.sum()):
                column_scale, spread, scale, zero = searched, wider, other_scale, other_zero
        codes, _ = round_affine(stack_groups(weight * spread), scale, zero, width, self.group_size)
        return QuantizedTensor(
            codes=codes.to(torch.uint8),
            width=width,
            scale=scale.to(torch.float16),
            zero=zero_code(zero, width[:, None]),
            groups=len(moment),
            group_size=self.group_size,
            column_scale=None if bool((column_scale == 1).all()) else column_scale.to(torch.float16),
        )

    def search_scale(
        self, weight: Tensor, moment: Tensor, magnitude: Tensor, width: Tensor, positions_per_channel: int
    ) -> Tensor:
        """Channel scales [g, c / k] of the exponent with the least output error, in fp16 precision.

        Args:
            weight: [g, r, c].
            moment: [g, c, c].
            magnitude: [g, c] mean absolute input.
            width: [R] bits.
            positions_per_channel: k neighbouring columns per input channel.
        """
        best, least = torch.ones_like(magnitude[:, ::positions_per_channel]), torch.inf
        for scale in self._candidates(magnitude, positions_per_channel):
            spread = _spread(scale, positions_per_channel)
            error = float(self._errors(weight, moment, spread, width, 1.0)[0].sum())
            if error < least:
                best, least = scale, error
        return best

    def _candidates(self, magnitude: Tensor, positions_per_channel: int) -> Iterator[Tensor]:
        """Channel scales [g, c / k] of every exponent, in fp16 precision; see `search_scale`."""
        channel = magnitude.unflatten(1, (-1, positions_per_channel)).mean(2)
        # A channel that is always zero would get scale 0, and its weights would be lost.
        channel = channel.clamp(min=float(channel.amax()) * 1e-4 or 1.0)
        for k in range(self.exponents + 1):
            scale = channel ** (k / self.exponents)
            scale = scale / (scale.amax() * scale.amin()).sqrt()
            yield scale.to(torch.float16).to(magnitude.dtype)

    def _coded_layer(self, layer: LayerProblem, coded: ScalarRounds) -> QuantizedTensor:
        """Search channel scales, then round to nearest with entropy-coded codes.

        All scales are compared at the layer's first steps, and divided by a number that keeps the layer's mean square,
        so that their streams are about equally long.
        """
        moment = layer.input_statistic("input_moment").to(torch.float64)
        magnitude = layer.input_statistic("input_magnitude").to(torch.float64)
        best, least = None, torch.inf
        for candidate in self._candidates(magnitude, layer.positions_per_channel):
            size = scaled_weight(layer, candidate).norm() / layer.weight.double().norm().clamp(min=1e-300)
            scale = (candidate / size.clamp(min=1e-4)).to(torch.float16)
            weight = stack_groups(scaled_weight(layer, scale))
            step = usable_step(coded.first_steps(layer), weight)
            value = step[:, None] * (nearest_codes(weight, step).double() - CENTRE)
            value = value.reshape(layer.weight.shape) / _spread(scale.double(), layer.positions_per_channel)
            error = float(output_error(value - layer.weight, moment, torch.float32).sum())
            if error < least:
                best, least = scale, error
        if best is not None and bool((best == 1).all()):
            best = None
        weight = stack_groups(scaled_weight(layer, best))
        return coded.fit(layer, lambda step: nearest_codes(weight, step), best)

    def search_clip(
        self, weight: Tensor, moment: Tensor, spread: Tensor, width: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Output error [R], scale and zero [R, S] of the ranges with the least output error, row by row."""
        least, scale, zero = self._errors(weight, moment, spread, width, 1.0)
        for k in range(1, self.clip_steps + 1):
            shrink = 1 - k / self.clip_steps * (1 - self.clip_lowest)
            error, s, z = self._errors(weight, moment, spread, width, shrink)
            better = error < least
            least = torch.where(better, error, least)
            scale, zero = torch.where(better[:, None], s, scale), torch.where(better[:, None], z, zero)
        return least, scale, zero

    def _errors(
        self, weight: Tensor, moment: Tensor, spread: Tensor, width: Tensor, shrink: float
    ) -> tuple[Tensor, Tensor, Tensor]:
        scaled = stack_groups(weight * spread)
        rule = partial(minmax_grid, width=width, symmetric=self.symmetric, shrink=shrink)
        scale, zero = by_column_groups(rule, scaled, self.group_size)
        value = round_affine(scaled, scale, zero, width, self.group_size)[1].reshape(weight.shape) / spread
        return output_error(value - weight, moment, torch.float32).flatten(), scale, zero


def _spread(column_scale: Tensor, positions_per_channel: int) -> Tensor:
    """[g, c / k] -> [g, 1, c], one factor for each column."""
    return column_scale.repeat_interleave(positions_per_channel, dim=1)[:, None, :]
