"""HQQ (Badri and Shaji, Mobius Labs, 2023): zero points by half-quadratic splitting; no calibration data.

    min over z and e of |e|_p^p + beta/2 |W - s (Q - z) - e|^2,   Q = clamp(round(W / s + z)),   0 < p <= 1

The scale s spans each row's range. A few steps alternate, with growing beta, between

    e = sign(x) max(|x| - |x|^(p - 1) / beta, 0),  x = W - s (Q - z),   and   z = mean(Q - (W - e) / s).

With `fit_scale`, s follows by least squares on W - e; the published code leaves it as it is. Of all steps each row
keeps the one of least |W - s (Q - z)|_p^p as it will be stored, s in fp16 and z in 8 bits. The published code stops
when the mean absolute error of the whole layer rises, and stores z in fp16 or in 8 bits.
"""

from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import Tensor

from bayesq.calibration.statistic import Statistic
from bayesq.contract import Allocate, Context, LayerProblem, check_finite, stack_groups
from bayesq.errors import Refused
from bayesq.quant.accounting import group_scale_bits
from bayesq.quant.grids import check_group_size, minmax_grid, stored_scale, top_code, zero_code, zero_value
from bayesq.quant.tensor import QuantizedTensor


class HQQ:
    """The published algorithm, and the best of its steps for each row.

    Args:
        norm: p.
        beta: at the first step.
        growth: factor of beta from step to step.
        steps: how many.
        fit_scale: fit the scale too.
        group_size: columns that share a scale and zero; None = one per row.
    """

    statistics: frozenset[Statistic] = frozenset()

    def __init__(
        self, norm: float, beta: float, growth: float, steps: int, fit_scale: bool, group_size: int | None
    ) -> None:
        if not 0 < norm <= 1:
            raise Refused(f"method.norm={norm}: must be above 0 and at most 1")
        if not beta > 0:
            raise Refused(f"method.beta={beta}: must be above 0")
        if not growth >= 1:
            raise Refused(f"method.growth={growth}: must be at least 1")
        if steps < 0 or int(steps) != steps:
            raise Refused(f"method.steps={steps}: needs a whole number of at least 0")
        self.norm, self.beta, self.growth, self.steps = norm, beta, growth, int(steps)
        self.fit_scale = fit_scale
        self.group_size = check_group_size(group_size)

    def prepare(self, layers: Sequence[LayerProblem], allocate: Allocate, context: Context) -> Mapping[str, Tensor]:
        """Choose the widths."""
        scales = sum(group_scale_bits(layer.rows, layer.columns, self.group_size) for layer in layers)
        return allocate(layers, scales=scales)

    def quantize_layer(self, layer: LayerProblem, width: Tensor, context: Context) -> QuantizedTensor:
        """Fit each row's, or column group's, scale and zero point and round to nearest."""
        check_finite(layer)
        weight = stack_groups(layer.weight).to(torch.float64)
        parts = [self.fit(part, width) for part in weight.split(self.group_size or layer.columns, dim=1)]
        codes, scale, zero = zip(*parts, strict=True)
        return QuantizedTensor(
            codes=torch.cat(codes, 1).to(torch.uint8),
            width=width,
            scale=torch.stack(scale, 1).to(torch.float16),
            zero=zero_code(torch.stack(zero, 1), width[:, None]),
            groups=layer.weight.shape[0],
            group_size=self.group_size,
        )

    def fit(self, weight: Tensor, width: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Codes [R, C], scale [R] and zero [R], as stored, of the best step of each row of weight [R, C] float64."""
        least = torch.full((len(weight),), torch.inf, dtype=torch.float64)
        best_scale, best_zero = torch.empty_like(least), torch.empty_like(least)
        for scale, zero in self.iterates(weight, width):
            zero = zero_value(zero_code(zero, width), width, zero.dtype)
            error = (weight - scale[:, None] * (_codes(weight, scale, zero, width) - zero[:, None])).abs()
            cost = error.pow(self.norm).sum(1)
            better = cost < least
            least = torch.where(better, cost, least)
            best_scale, best_zero = torch.where(better, scale, best_scale), torch.where(better, zero, best_zero)
        return _codes(weight, best_scale, best_zero, width), best_scale, best_zero

    def iterates(self, weight: Tensor, width: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
        """Scale [R] and zero [R] at the start, where code 0 is the smallest weight (or 0), and after each step."""
        scale, _ = minmax_grid(weight, width)
        zero = -weight.amin(1).clamp(max=0) / scale
        yield scale, zero
        beta = self.beta
        for _ in range(self.steps):
            s = scale[:, None]
            code = _codes(weight, scale, zero, width)
            error = weight - s * (code - zero[:, None])
            size = error.abs()
            target = weight - error.sign() * (size - size.pow(self.norm - 1) / beta).clamp(min=0)
            zero = (code - target / s).mean(1)
            if self.fit_scale:
                level = code - zero[:, None]
                fitted = (level * target).sum(1) / level.square().sum(1)
                scale = torch.where(fitted > 0, stored_scale(fitted), scale)
            yield scale, zero
            beta *= self.growth


def _codes(weight: Tensor, scale: Tensor, zero: Tensor, width: Tensor) -> Tensor:
    """Nearest codes [R, C]; zero need not be whole."""
    code = (weight / scale[:, None] + zero[:, None]).round_().clamp_(min=0)
    return torch.minimum(code, top_code(width, weight.dtype)[:, None])
