"""Rounding to nearest on per-row affine grids, and a count of the steps that fp16 cannot hold."""

import torch
from torch import Tensor

from bayesq.contract import LayerProblem, check_finite, stack_groups
from bayesq.quant.grids import CLIP_RULES, FP16_MAX, FP16_TINY, round_affine, zero_code
from bayesq.quant.tensor import QuantizedTensor


def round_to_nearest(layer: LayerProblem, width: Tensor, clip: str) -> QuantizedTensor:
    """Round every weight to the nearest level of its row's grid.

    Args:
        layer: only its weights are read.
        width: uint8 [R] bits.
        clip: one of CLIP_RULES.

    Raises:
        Refused: NaN or infinite weights.
    """
    check_finite(layer)
    weight = stack_groups(layer.weight).to(torch.float64)
    scale, zero = CLIP_RULES[clip](weight, width)
    codes, _ = round_affine(weight, scale, zero, width)
    return QuantizedTensor(
        codes=codes.to(torch.uint8),
        width=width,
        scale=scale[:, None].to(torch.float16),
        zero=zero_code(zero, width)[:, None],
        groups=layer.weight.shape[0],
    )


def clamped_scales(weight: Tensor, tensor: QuantizedTensor) -> int:
    """Number of rows whose step is clamped to the largest or smallest number of fp16.

    Args:
        weight: [g, r, c] before rounding; rows of zeros do not count.
        tensor: the rounded layer.
    """
    scale = tensor.scale.to(torch.float32)
    clamped = ((scale >= FP16_MAX) | (scale <= FP16_TINY)).any(1)
    return int((clamped & (stack_groups(weight) != 0).any(1)).sum())
