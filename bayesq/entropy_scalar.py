"""Methods with scalar codes and codec=entropy: uniform steps; each layer keeps to its part of the budget.

`prepare` rounds the weights to nearest, with the factor of all steps that meets the budget. This gives the code tables
and each layer's part of the budget. In a layer's turn the method rounds with all its steps times one factor, which is
searched until the real stream fits (Huffman-coded GPTQ and the like).
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from bayesq.contract import LayerProblem, StreamBudget, check_finite, stack_groups
from bayesq.entropy import (
    RateClasses,
    StreamPlan,
    SymbolSums,
    coded_tensor,
    factor_for,
    full_width,
    overhead_bits,
    row_bits,
    usable_step,
)
from bayesq.quant.codes import RateTables
from bayesq.quant.codes.entropy import level_sets
from bayesq.quant.codes.rate_tables import CENTRE
from bayesq.quant.grids import MAX_WIDTH, AffineGrid, round_affine
from bayesq.quant.tensor import QuantizedTensor

# Passes that correct the factor by the streams' ideal length.
PASSES = 3


class ScalarRounds:
    """Steps, tables and plan of one network.

    Args:
        stream: the run's budget.
        layers: all layers of the network.
        scales: bits of all column scales, see `Budget.capacity`.
    """

    def __init__(self, stream: StreamBudget, layers: Sequence[LayerProblem], scales: int = 0) -> None:
        for layer in layers:
            check_finite(layer)
        self.steps = stream.steps(layers)
        weights = [stack_groups(layer.weight).double() for layer in layers]
        spreads = [weight.square().mean(1).sqrt() for weight in weights]
        relative, columns = [self.steps[layer.name] for layer in layers], [layer.columns for layer in layers]
        capacity = stream.capacity(layers, 0)
        # columns of zeros take nearly no bits at any step
        live = sum(int(weight.any(0).sum()) * len(weight) for weight in weights) or sum(map(Tensor.numel, weights))
        self.factor = factor_for(spreads, relative, columns, capacity)
        for _ in range(PASSES):
            self.tables, expected = self._nearest(layers, weights, spreads)
            capacity = stream.capacity(
                layers, overhead_bits(layers, self.tables), scales + self.column_class_bits(layers)
            )
            self.factor *= 2 ** max((sum(expected.values()) - capacity) / live, -MAX_WIDTH)
        self.plan = StreamPlan.of(expected, capacity)

    def column_class_bits(self, layers: Sequence[LayerProblem]) -> int:
        """Bits of the columns' classes; 0 without such classes."""
        return 0

    def _nearest(
        self, layers: Sequence[LayerProblem], weights: Sequence[Tensor], spreads: Sequence[Tensor]
    ) -> tuple[RateTables, dict[str, float]]:
        """Tables for all weights rounded to nearest, and the bits of each layer with them."""
        scales = [
            usable_step(self.steps[layer.name] * self.factor, weight)
            for layer, weight in zip(layers, weights, strict=True)
        ]
        classes = RateClasses.covering([spread / scale for spread, scale in zip(spreads, scales, strict=True)])
        sums, by_layer = SymbolSums.empty(classes.count), {}
        for layer, weight, spread, scale in zip(layers, weights, spreads, scales, strict=True):
            units = weight / scale[:, None]
            codes = nearest_codes(weight, scale)
            sums.add(
                codes, level_sets(codes.numpy(), None, 1), classes.of(spread / scale), units, torch.ones_like(units)
            )
            by_layer[layer.name] = codes
        sums.moments[:] = 0  # uniform steps: levels stay the symbols
        tables, _ = sums.tables()
        expected = {}
        for name, codes in by_layer.items():
            expected[name] = float(row_bits(codes, level_sets(codes.numpy(), None, 1), tables).amin(1).sum())
        return tables, expected

    def fit(
        self, layer: LayerProblem, round_steps: Callable[[Tensor], Tensor], column_scale: Tensor | None = None
    ) -> QuantizedTensor:
        """The layer rounded with the finest steps whose stream fits.

        Args:
            round_steps: codes uint8 [R, C] for steps [R], around the code 128.
            column_scale: [g, C / k] fp16, by which the weights are multiplied before rounding; None = ones.
        """
        weight = stack_groups(scaled_weight(layer, column_scale))

        def attempt(more: float) -> tuple[QuantizedTensor, int]:
            step = usable_step(self.first_steps(layer) * more, weight)
            tensor = self.coded(round_steps(step), step, layer.weight.shape[0], column_scale)
            return tensor, tensor.code.code_bits(tensor.codes, tensor.width, tensor.groups)

        return self.plan.fit(layer, attempt)

    def first_steps(self, layer: LayerProblem) -> Tensor:
        """The steps [R] with which the plan begins."""
        return self.steps[layer.name] * self.factor

    def coded(self, codes: Tensor, step: Tensor, groups: int, column_scale: Tensor | None) -> QuantizedTensor:
        """The layer with these codes [R, C] and steps [R]."""
        return coded_tensor(codes, step, self.tables, None, groups, column_scale)


def scaled_weight(layer: LayerProblem, column_scale: Tensor | None) -> Tensor:
    """The weights float64 [g, r, c] times a column scale [g, c / k]; None = ones."""
    weight = layer.weight.double()
    if column_scale is None:
        return weight
    return weight * column_scale.double().repeat_interleave(layer.columns // column_scale.shape[1], dim=1)[:, None]


def nearest_codes(weight: Tensor, step: Tensor) -> Tensor:
    """Codes uint8 of weights [R, C] rounded to nearest with steps [R]."""
    centre = torch.full_like(step, CENTRE)
    return round_affine(weight, step, centre, full_width(len(step)))[0].to(torch.uint8)


def centred_grid(step: Tensor) -> AffineGrid:
    """The grid of steps [R] around the code 128."""
    return AffineGrid(step[:, None], torch.full_like(step, CENTRE)[:, None], full_width(len(step)))
