"""RTN and embedding tables: rounding to nearest on affine grids. BayesQ itself rounds in `bayesq.rounding`."""

from functools import partial

import torch
from torch import Tensor

from bayesq.contract import LayerProblem, check_finite, stack_groups
from bayesq.quant.grids import CLIP_RULES, FP16_MAX, FP16_TINY, by_column_groups, round_affine, zero_code
from bayesq.quant.tensor import QuantizedTensor


def round_to_nearest(
    layer: LayerProblem, width: Tensor, clip: str, group_size: int | None = None, symmetric: bool = False
) -> QuantizedTensor:
    """Round every weight to the nearest level of its row's grid.

    Args:
        layer: only its weights are read.
        width: uint8 [R] bits.
        clip: one of CLIP_RULES.
        group_size: columns that share a grid; None = one grid per row.
        symmetric: see `minmax_grid`.

    Raises:
        Refused: NaN or infinite weights.
    """
    check_finite(layer)
    weight = stack_groups(layer.weight).to(torch.float64)
    rule = partial(CLIP_RULES[clip], width=width, symmetric=symmetric)
    scale, zero = by_column_groups(rule, weight, group_size)
    codes, _ = round_affine(weight, scale, zero, width, group_size)
    return QuantizedTensor(
        codes=codes.to(torch.uint8),
        width=width,
        scale=scale.to(torch.float16),
        zero=zero_code(zero, width[:, None]),
        groups=layer.weight.shape[0],
        group_size=group_size,
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
