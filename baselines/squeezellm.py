"""SqueezeLLM (Kim et al., arXiv 2306.07629): a table of levels for each row, by k-means weighted with the Fisher.

    min over 2**width levels and the codes of sum_c F_rc (w_rc - q_rc)^2,   F = E_example[(dl/dw)^2]

A share of the weights may stay in fp16 beside the codes: outliers, which are the largest |w| of a layer, and sensitive
weights, which are those with the largest F. They take no part in the k-means. The published code solves the k-means
by Lloyd's iteration and squares the gradients of the labels' loss. Here the k-means is exact, and F is the diagonal of
the Fisher of the network's own predictions.
"""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from baselines.kmeans import best_levels, in_fp16, nearest
from baselines.row_tables import row_level_bits, row_table_tensor, table_distortion
from bayesq.calibration.statistic import Statistic
from bayesq.contract import Allocate, Context, LayerProblem, check_finite, stack_groups
from bayesq.errors import Refused
from bayesq.fisher import FISHER_DIAGONAL
from bayesq.quant.codes import SparseOverlay
from bayesq.quant.tensor import QuantizedTensor

# Share of a row's mean curvature that is added to each weight's. Without it, weights of zero Fisher would have no
# influence on the levels, for example those of a channel that is zero for all calibration examples.
FLOOR = 1e-6


class SqueezeLLM:
    """The published algorithm.

    Args:
        sparse: share of a layer's weights that stay in fp16; 0.0045 in the paper.
        sensitive: part of these that is chosen by F; the others are outliers. 1/9 in the paper.
    """

    statistics: frozenset[Statistic] = frozenset({FISHER_DIAGONAL})

    def __init__(self, sparse: float, sensitive: float) -> None:
        for key, share in (("sparse", sparse), ("sensitive", sensitive)):
            if not 0 <= share <= 1:
                raise Refused(f"method.{key}={share}: needs a share from 0 to 1")
        self.sparse, self.sensitive = sparse, sensitive

    def prepare(self, layers: Sequence[LayerProblem], allocate: Allocate, context: Context) -> Mapping[str, Tensor]:
        """Choose the widths; the overlay counts as a codebook."""
        overlay = sum(self._overlay_bits(layer) for layer in layers)
        return allocate(layers, overlay, table_distortion, row_level_bits)

    def quantize_layer(self, layer: LayerProblem, width: Tensor, context: Context) -> QuantizedTensor:
        """Choose the fp16 weights, then levels and codes row by row."""
        check_finite(layer)
        weight = stack_groups(layer.weight).to(torch.float64)
        fisher = stack_groups(layer.statistic("fisher_diagonal")).to(torch.float64)
        chosen = self.sparse_weights(weight, fisher)
        curvature = (fisher + FLOOR * fisher.mean(1, keepdim=True)).masked_fill(chosen, 0.0)
        codes, tables = fit_rows(weight, curvature, width)
        overlay = SparseOverlay.of(weight, chosen) if bool(chosen.any()) else None
        return row_table_tensor(codes, tables, width, layer.weight.shape[0], overlay)

    def sparse_weights(self, weight: Tensor, fisher: Tensor) -> Tensor:
        """Which weights [R, C] stay in fp16; ties go to the earlier weight."""
        count = self._sparse_count(weight.numel())
        chosen = torch.zeros(weight.numel(), dtype=torch.bool)
        by_fisher = fisher.flatten().argsort(descending=True, stable=True)
        chosen[by_fisher[: round(self.sensitive * count)]] = True
        size = weight.abs().flatten().masked_fill(chosen, -1.0)
        chosen[size.argsort(descending=True, stable=True)[: count - int(chosen.sum())]] = True
        return chosen.reshape(weight.shape)

    def _sparse_count(self, weights: int) -> int:
        return int(self.sparse * weights)

    def _overlay_bits(self, layer: LayerProblem) -> int:
        """Bits of a layer's fp16 weights and their positions, see `bayesq.quant.codes.overlay`."""
        count, columns = self._sparse_count(layer.weight.numel()), layer.columns
        if not count:
            return 0
        index = layer.rows * columns.bit_length() + count * max((columns - 1).bit_length(), 1)
        return -(-index // 8) * 8 + 16 * count


def fit_rows(weight: Tensor, curvature: Tensor, width: Tensor) -> tuple[Tensor, list[Tensor]]:
    """Levels of least weighted squared error, and the nearest ones.

    Args:
        weight, curvature: [R, C], see `best_levels`.
        width: [R] uint8 bits.

    Returns:
        codes [R, C] uint8, and the levels [2**width] of each row, float64 and exact in fp16.
    """
    codes = torch.empty(weight.shape, dtype=torch.uint8)
    tables: list[Tensor] = [torch.empty(0)] * len(width)
    for bits in width.unique().tolist():
        rows = (width == bits).nonzero().flatten()
        levels = in_fp16(best_levels(weight[rows], curvature[rows], 2**bits))
        codes[rows] = nearest(weight[rows], levels)[0]
        for row, table in zip(rows.tolist(), levels, strict=True):
            tables[row] = table
    return codes, tables
