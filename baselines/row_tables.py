"""What methods with a table of levels for each row share: SqueezeLLM and LNQ."""

from collections.abc import Sequence
from functools import cache

import torch
from torch import Tensor

from baselines.kmeans import best_levels, nearest
from bayesq.contract import LayerProblem
from bayesq.quant.accounting import AFFINE_ROW_BITS
from bayesq.quant.codes import RowTable, SparseOverlay
from bayesq.quant.codes.row_table import LEVEL_BITS
from bayesq.quant.tensor import QuantizedTensor

# Normal rows from which `table_distortion` is estimated.
DISTORTION_ROWS = 8


def row_table_tensor(
    codes: Tensor, tables: Sequence[Tensor], width: Tensor, groups: int, overlay: SparseOverlay | None = None
) -> QuantizedTensor:
    """A layer with these codes [R, C] and the levels of each row."""
    no_scale = len(width), 0
    return QuantizedTensor(
        codes=codes,
        width=width,
        scale=torch.empty(no_scale, dtype=torch.float16),
        zero=torch.empty(no_scale, dtype=torch.uint8),
        groups=groups,
        code=RowTable(torch.cat(list(tables)).to(torch.float16)),
        overlay=overlay,
    )


def table_distortion(layer: LayerProblem, width: int) -> float:
    """Expected squared error of levels fitted to one row of a layer, for normal weights of unit variance.

    A row of few columns is fitted better than the distribution it comes from: 144 columns at 4 bits have .54 of the
    error of Lloyd-Max levels.
    """
    return _fitted_distortion(layer.columns, 2**width)


@cache
def _fitted_distortion(columns: int, count: int) -> float:
    if columns <= count:
        return 0.0
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(DISTORTION_ROWS, columns, generator=generator, dtype=torch.float64)
    _, values = nearest(weight, best_levels(weight, torch.ones_like(weight), count))
    return float((values - weight).square().mean() / weight.var(1, unbiased=False).mean())


def row_level_bits(layer: LayerProblem, width: int) -> int:
    """Bits that a row's table takes beyond an affine row's scale and zero point."""
    return (LEVEL_BITS << width) - AFFINE_ROW_BITS
