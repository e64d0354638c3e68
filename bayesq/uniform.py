"""Uniform widths: the plain baseline of bit allocation."""

from collections.abc import Sequence

import torch
from torch import Tensor

from bayesq.budget import Budget
from bayesq.calibration.statistic import Statistic
from bayesq.contract import Distortion, LayerProblem, RowBits, check_finite, stack_groups
from bayesq.errors import Refused
from bayesq.knapsack import greedy_knapsack
from bayesq.quant.accounting import LAYER_BITS, affine_overhead_bits, mixed_overhead_bits
from bayesq.quant.grids import MAX_WIDTH, MIN_WIDTH, mse_grid, round_affine


class Uniform:
    """One width for all; a fractional budget mixes the two neighbouring widths by plain weight MSE.

    `greedy_knapsack` chooses whole layers for the wider codes. Leftover bits widen rows of one further layer: the layer
    and the rows where the error falls most. With few large layers many bits may be left over. What the mix stores
    beyond plain affine layers (the width map of that layer, padding, codebooks) is paid with code bits.

    This is the plain baseline: the keys under `allocation` apply to knapsack and ilp only.
    """

    statistics: frozenset[Statistic] = frozenset()

    def allocate(
        self,
        layers: Sequence[LayerProblem],
        budget: Budget,
        codebook_bits: int = 0,
        distortion: Distortion | None = None,
        row_bits: RowBits | None = None,
        scales: int = 0,
    ) -> dict[str, Tensor]:
        """Row widths of every layer. An integer budget of code bits is met exactly, with any codebooks.

        A budget of code bits does not pay for `row_bits`.

        Raises:
            Refused: the budget does not allow the smallest width, or weights are not finite and the budget is
                fractional.
        """
        sizes = [layer.weight.numel() for layer in layers]
        padding = sum(LAYER_BITS for size in sizes if size % 8)  # codes need not fill whole bytes
        plain = affine_overhead_bits(layer.rows for layer in layers)
        capacity = budget.capacity(layers, plain + padding + codebook_bits, scales)
        stored = beside(layers, row_bits if budget.count == "stored" else None)
        low = min(int(budget.bits if budget.count == "code" else capacity / sum(sizes)), MAX_WIDTH)
        while low >= MIN_WIDTH and low * sum(sizes) + sum(stored[low]) > capacity and budget.count == "stored":
            low -= 1
        if low < MIN_WIDTH:
            raise Refused(
                f"bits={budget.bits:g}: {MIN_WIDTH} bits a weight and what is stored beside them exceed the budget"
            )
        widths = {layer.name: torch.full((layer.rows,), low, dtype=torch.uint8) for layer in layers}
        left = capacity - low * sum(sizes) - sum(stored[low])
        if low == MAX_WIDTH or left <= 0:
            return widths

        for layer in layers:
            check_finite(layer)
        drops = [_row_errors(layer, low) - _row_errors(layer, low + 1) for layer in layers]
        steps = [size + wide - narrow for size, wide, narrow in zip(sizes, stored[low + 1], stored[low], strict=True)]
        saved, size = torch.stack([drop.sum() for drop in drops]), torch.tensor(steps, dtype=torch.float64)
        zero = torch.zeros_like(saved)
        wide = greedy_knapsack(torch.stack([zero, -saved], 1), torch.stack([zero, size], 1), left) == 1

        # Try each remaining layer with the leftover bits, and also with the bits of chosen layers that save less per
        # bit than it.
        most, whole, split, some = float(saved[wide].sum()), wide, 0, torch.tensor([], dtype=torch.int64)
        for k in (~wide).nonzero().flatten().tolist():
            for wider in (wide, wide & (saved / size >= saved[k] / size[k])):
                bits = left - float(size[wider].sum())
                rows = _affordable_rows(layers[k], drops[k], bits, steps[k] // layers[k].rows)
                total = float(saved[wider].sum() + drops[k][rows].sum())
                if total > most:
                    most, whole, split, some = total, wider, k, rows
        for layer, one_more in zip(layers, whole.tolist(), strict=True):
            widths[layer.name] += one_more
        widths[layers[split].name][some] += 1
        return widths

    def steps(self, layers: Sequence[LayerProblem]) -> dict[str, Tensor]:
        """One step per layer, in proportion to the root mean square of its weights: about the same bits for all."""
        tiny = torch.finfo(torch.float32).tiny
        sizes = [layer.weight.double().square().mean().sqrt().clamp(min=tiny) for layer in layers]
        return {layer.name: size.expand(layer.rows).clone() for layer, size in zip(layers, sizes, strict=True)}


def _affordable_rows(layer: LayerProblem, drop: Tensor, bits: float, step: int) -> Tensor:
    """Rows that `bits` can widen by one bit, width map included: those with the largest drop [R] >= 0 in error.

    Args:
        step: bits for one row.
    """
    bits -= mixed_overhead_bits([layer.rows]) - affine_overhead_bits([layer.rows])
    rows = drop.argsort(descending=True, stable=True)[: max(0, int(bits // step))]
    return rows[drop[rows] >= 0]


def beside(layers: Sequence[LayerProblem], row_bits: RowBits | None) -> list[list[int]]:
    """What each layer stores beside its codes at the widths 0 to MAX_WIDTH, by `row_bits`."""
    widths = range(MAX_WIDTH + 1)
    return [[0 if row_bits is None else layer.rows * row_bits(layer, width) for layer in layers] for width in widths]


def _row_errors(layer: LayerProblem, width: int) -> Tensor:
    """Squared error [R] of each row rounded to nearest."""
    weight = stack_groups(layer.weight).to(torch.float64)
    rows = torch.full((layer.rows,), width)
    return (round_affine(weight, *mse_grid(weight, rows), rows)[1] - weight).square().sum(1)
