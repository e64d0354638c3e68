"""BayesQ with codec=entropy: row steps by risk, codes by risk + lambda x bits, and one factor for the whole network.

With a step s / sqrt(h_r) in every row r, h_r its mean curvature, one more bit would save the same risk in every row.
The step of a row is a weighted geometric mean of this one (weight RISK_SHARE) and the standard deviation of its
weights. The risk is then lower, because rates are low in many rows, and the divergence is much lower. Within a row,
symbols minimise risk + lambda bits, lambda_r = PRICE h_r step_r^2 / 2. One factor of all steps meets the budget.

All layers are rounded `refits` + 1 times with a short trellis. Each round gives code tables, levels and steps to the
next one, and the bits of each layer. The last rounding, with the long trellis, is fitted to the budget layer by layer
(`bayesq.entropy.StreamPlan`).
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from bayesq.contract import Context, LayerProblem, StreamBudget, check_finite, stack_groups
from bayesq.entropy import (
    RateClasses,
    StreamPlan,
    SymbolSums,
    coded_tensor,
    factor_for,
    overhead_bits,
    row_bits,
    usable_step,
)
from bayesq.quant.codes import EntropyCode
from bayesq.quant.codes.entropy import level_sets
from bayesq.quant.entropy_search import EntropyGrid
from bayesq.quant.feedback import feedback_round
from bayesq.quant.tensor import QuantizedTensor
from bayesq.rounding import rounding_curvature
from bayesq.whitening import Whitening

# Price of a bit in squared steps: the best of .03 to .25 for normal weights at 1 to 4 bits. With 64 states the third
# rounding is then .07 bit above the bound at 3 bits and .09 at 2; later ones are .05 above it (test_entropy_code.py).
PRICE = 0.13
# Exponent of the equal-slope step in `between`. At 1, rows of low predicted risk are rounded almost to zero, and there
# the risk does not predict the divergence.
RISK_SHARE = 0.75
# States of the trellis, in the last rounding and in the others, which only serve the refits. A trellis runs down the
# rows of a group; with fewer than LEAST_ROWS rows it has no more choices than a scalar code.
STATES, REFIT_STATES, LEAST_ROWS = 64, 8, 4


GetWhitening = Callable[[LayerProblem], Whitening]


@dataclass
class CodedRows:
    """State of a layer between the rounds.

    Attributes:
        step: [R] before the common factor.
        slope: [R] least-squares factor of the rounding targets on the levels.
        spread: [R] standard deviation of the targets.
    """

    step: Tensor
    slope: Tensor
    spread: Tensor


def between(step: Tensor, spread: Tensor) -> Tensor:
    """Steps [R] between those that save equal risk per bit and those of equal bits, for standard deviations [R]."""
    tiny = torch.finfo(torch.float32).tiny
    mixed: Tensor = step**RISK_SHARE * spread.clamp(min=tiny) ** (1 - RISK_SHARE)
    return mixed


@dataclass
class CodedLayer:
    """One rounding of a layer: codes, values, target and sets [R, C]; scale and rate_class [R]."""

    codes: Tensor
    values: Tensor
    target: Tensor
    scale: Tensor
    sets: Tensor
    rate_class: Tensor


class CodedRounds:
    """The rounds of one network.

    Args:
        stream: the run's budget.
        trellis: codes run along a trellis; otherwise they are scalar.
    """

    def __init__(self, stream: StreamBudget, trellis: bool) -> None:
        self.stream, self.trellis = stream, trellis

    def prepare(self, layers: Sequence[LayerProblem], context: Context, refits: int, whitening: GetWhitening) -> None:
        """All rounds but the last.

        Args:
            whitening: of a layer.
        """
        self.start(layers)
        for k in range(refits + 1):
            sums, bits = SymbolSums.empty(self.classes.count), {}
            for layer in context.progress(layers, f"round {k + 1} of {refits + 2}"):
                white = whitening(layer)
                rounded = self.round(layer, white, REFIT_STATES)
                bits[layer.name] = self.collect(layer, rounded, white, sums)
                del white, rounded  # two wide layers would not fit in memory
            self.finish_round(layers, bits, sums)

    def start(self, layers: Sequence[LayerProblem]) -> None:
        """Steps, factor, classes and tables for normal rows."""
        for layer in layers:
            check_finite(layer)
        steps = self.stream.steps(layers)
        spreads = [stack_groups(layer.weight).double().square().mean(1).sqrt() for layer in layers]
        ones = [torch.ones_like(spread) for spread in spreads]
        self.rows = {
            layer.name: CodedRows(between(steps[layer.name], spread), one, spread)
            for layer, one, spread in zip(layers, ones, spreads, strict=True)
        }
        relative, columns = [self.rows[layer.name].step for layer in layers], [layer.columns for layer in layers]
        self.factor = factor_for(spreads, relative, columns, self.stream.capacity(layers, 0))
        self.classes = RateClasses.covering([self._ratio(layer) for layer in layers])
        self.tables = self.classes.normal_tables()

    def _trellis(self, layer: LayerProblem, states: int) -> int | None:
        return states if self.trellis and layer.weight.shape[1] >= LEAST_ROWS else None

    def _ratio(self, layer: LayerProblem) -> Tensor:
        rows = self.rows[layer.name]
        return rows.spread / usable_step(rows.step * self.factor, stack_groups(layer.weight))

    def round(self, layer: LayerProblem, whitening: Whitening, states: int, more: float = 1.0) -> CodedLayer:
        """One rounding, with all steps times `more`."""
        rows, groups = self.rows[layer.name], len(layer.weight)
        weight = stack_groups(layer.weight).double()
        trellis = self._trellis(layer, states)
        plain = rows.step * self.factor * more
        scale = usable_step(plain * rows.slope, weight)
        rate_class = self.classes.of(rows.spread / scale)
        table = self.classes.table[rate_class]
        curvature = rounding_curvature(whitening, layer.weight.shape[1])
        mean = curvature.mean(1)
        # a step that `usable_step` changed must not change the price of a bit
        cost = (scale / plain).square() / (PRICE * mean.clamp(min=torch.finfo(mean.dtype).tiny))
        parts = []
        for g, part in enumerate(torch.arange(len(weight)).chunk(groups)):
            grid = EntropyGrid(scale[part], cost[part], curvature[part], table[part], self.tables, trellis)
            if whitening.factors is None:
                parts.append((*grid.round_matrix(weight[part]), weight[part]))
            else:
                parts.append(feedback_round(weight[part], whitening.factors[g], grid))
        codes, values, target = (torch.cat(part) for part in zip(*parts, strict=True))
        sets = torch.from_numpy(level_sets(codes.numpy(), trellis, groups))
        return CodedLayer(codes, values, target, scale, sets, rate_class)

    def collect(self, layer: LayerProblem, rounded: CodedLayer, whitening: Whitening, sums: SymbolSums) -> int:
        """Add a layer's symbols to the sums, refit its rows, and return its bits."""
        curvature = rounding_curvature(whitening, layer.weight.shape[1])
        risk = curvature * stack_groups(whitening.row_curvature)[:, None]
        error = (rounded.target - rounded.values).square()
        layer.notes["predicted_risk"] = float((0.5 * risk * error).sum())
        rows = self.rows[layer.name]
        used = (curvature * rounded.values.square()).sum(1)
        slope = (curvature * rounded.target * rounded.values).sum(1) / used.clamp(min=torch.finfo(used.dtype).tiny)
        usable = (used > 0) & (slope > 0.5) & (slope < 2)
        rows.slope = rows.slope * torch.where(usable, slope, 1.0)
        rows.spread = rounded.target.square().mean(1).sqrt()
        units = rounded.target / (rounded.scale * torch.where(usable, slope, 1.0))[:, None]
        cost = risk * rounded.scale.square()[:, None]
        sums.add(rounded.codes, rounded.sets.numpy(), rounded.rate_class, units, cost)
        best = row_bits(rounded.codes, rounded.sets.numpy(), self.tables).argmin(1).to(torch.uint8)
        code = EntropyCode(self.tables, best, self._trellis(layer, REFIT_STATES))
        return code.code_bits(rounded.codes, best, len(layer.weight))

    def finish_round(self, layers: Sequence[LayerProblem], bits: dict[str, int], sums: SymbolSums) -> None:
        """Tables of the next round, and the factor that meets the budget."""
        self.tables, table = sums.tables()
        self.classes = replace(self.classes, table=table)
        weights = sum(layer.weight.numel() for layer in layers)
        capacity = self.stream.capacity(layers, overhead_bits(layers, self.tables))
        shift = (sum(bits.values()) - capacity) / weights
        self.factor *= 2**shift
        # doubling the steps saves one bit per weight, less in layers of few bits
        expected = {
            layer.name: max(bits[layer.name] - shift * layer.weight.numel(), bits[layer.name] / 2) for layer in layers
        }
        self.plan = StreamPlan.of(expected, capacity)

    def last(self, layer: LayerProblem, whitening: Whitening) -> QuantizedTensor:
        """The last rounding of a layer, within its part of the budget."""
        states = self._trellis(layer, STATES)

        def attempt(more: float) -> tuple[QuantizedTensor, int]:
            rounded = self.round(layer, whitening, STATES, more)
            groups = len(layer.weight)
            tensor = coded_tensor(rounded.codes, rounded.scale, self.tables, states, groups)
            return tensor, tensor.code.code_bits(tensor.codes, tensor.width, groups)

        return self.plan.fit(layer, attempt)
