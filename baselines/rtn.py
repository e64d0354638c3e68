"""RTN: round each weight to the nearest value of a per-row affine grid. Uses no calibration data."""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from bayesq.calibration.statistic import Statistic
from bayesq.quant.grids import CLIP_RULES, round_affine, zero_code
from bayesq.quant.method import Allocate, Context, LayerProblem, check_finite, stack_groups
from bayesq.quant.tensor import QuantizedTensor


class RTN:
    """Round to nearest.

    Args:
        clip: "minmax" spans each row's range, "mse" shrinks it to the least rounding error.
    """

    statistics: frozenset[Statistic] = frozenset()
    inputs = "full"

    def __init__(self, clip: str) -> None:
        if clip not in CLIP_RULES:
            raise ValueError(f"method.clip={clip}: choose from {', '.join(CLIP_RULES)}")
        self.clip = clip

    def prepare(self, layers: Sequence[LayerProblem], allocate: Allocate, context: Context) -> Mapping[str, Tensor]:
        """Nothing but the widths needs all layers."""
        return allocate(layers)

    def quantize_layer(self, layer: LayerProblem, width: Tensor, context: Context) -> QuantizedTensor:
        """Round every weight to the nearest level of its row's grid."""
        check_finite(layer)
        weight = stack_groups(layer.weight).to(torch.float64)
        scale, zero = CLIP_RULES[self.clip](weight, width)
        codes, _ = round_affine(weight, scale, zero, width)
        return QuantizedTensor(
            codes=codes.to(torch.uint8),
            width=width,
            scale=scale[:, None].to(torch.float16),
            zero=zero_code(zero, width)[:, None],
            groups=layer.weight.shape[0],
        )
