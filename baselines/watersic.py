"""WaterSIC (Lifar et al., arXiv 2603.04956): GPTQ with a step for each column, and entropy-coded integers.

    step_rc = step_r / s_c,   s_c in proportion to sqrt(D_c) = L_cc

D_c is the increase of the layer's output error per squared error of column c after feedback to later columns, the
squared diagonal entry of the input moment's Cholesky factor. Then every column adds the same error, as water-filling
asks for, and columns of small D_c cost few bits. Rates vary along rows and columns, and so do the code tables
(`bayesq.quant.codes.column_entropy`). One constant per layer scales all its steps until the stream fits.

At low rates, rounded values have a larger norm than the weights. After the rounding, least squares fit a factor for
each class of columns and one for each row to the layer's output error. They go into the stored scales and cost no bits.
The published factors are of single columns, which for few rows would store weights in scales.
"""

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import one_hot

from baselines.gptq import GPTQ
from bayesq.contract import Context, LayerProblem, check_finite
from bayesq.entropy import coded_tensor, usable_step
from bayesq.entropy_scalar import ScalarRounds, nearest_codes, scaled_weight
from bayesq.quant.codes import RateTables
from bayesq.quant.codes.column_entropy import ColumnEntropyCode
from bayesq.quant.codes.rate_tables import ALPHABET, MOST_CLASSES, SETS
from bayesq.quant.feedback import FeedbackFactor, feedback_factors, output_error
from bayesq.quant.grids import stored_scale
from bayesq.quant.tensor import QuantizedTensor

# Distance of neighbouring classes in log2 of the steps per standard deviation. A table half a class away from its
# weights costs .02 bit each.
SPACING = 0.5
# Steps are scaled by these powers of two when the tables are made, so that each class sees weights of its rate.
SHIFTS = (-3.0, -2.0, -1.0, 0.0, 1.0, 2.0, 3.0)
# Tables are made from about this many weights.
SAMPLE = 2_000_000
# Rounds of choosing classes of rows, then of columns.
CLASS_ROUNDS = 2
# Column scales lie between 1 / MOST_SCALE and this, so that fp16 represents them.
MOST_SCALE = 2.0**12
# Factors of the refit beyond this or its inverse are not used.
MOST_REFIT = 2.0


class WaterSIC(GPTQ):
    """GPTQ with column steps by water-filling.

    Args:
        act_order: visit columns in decreasing input energy; the product of all D_c is the same in any order.
        damping: fraction of the mean diagonal added to the input moment.
    """

    fixed = False

    def __init__(self, act_order: bool, damping: float) -> None:
        super().__init__("minmax", act_order, damping, None)
        self.rounds = ColumnRounds

    def column_scale_bits(self, layer: LayerProblem) -> int:
        """An fp16 scale for each column of each group."""
        return 16 * len(layer.weight) * layer.columns

    def quantize_layer(self, layer: LayerProblem, width: Tensor, context: Context) -> QuantizedTensor:
        """Factor the input moment, scale the columns and round them one by one."""
        check_finite(layer)
        moments = layer.input_statistic("input_moment")
        factors = feedback_factors(moments, self.damping, self.act_order)
        layer.count("damping_retries", sum(factor.retries for factor in factors))
        scale = torch.stack([column_scale(factor) for factor in factors])
        weight = scaled_weight(layer, scale)
        scaled = [scaled_factor(factor, s.double()) for factor, s in zip(factors, scale, strict=True)]
        assert self._coded is not None
        tensor = self._coded.fit(layer, lambda step: self.round_steps(weight, scaled, step), scale)
        return refitted(tensor, layer.weight.double(), moments.double())


def column_scale(factor: FeedbackFactor) -> Tensor:
    """s [c] fp16: the square root of D over its geometric mean; 1 for dead columns."""
    root = factor.column_curvature.sqrt()
    scale = root / root[~factor.dead].log().mean().exp() if bool((~factor.dead).any()) else torch.ones_like(root)
    return scale.masked_fill(factor.dead, 1.0).clamp(1 / MOST_SCALE, MOST_SCALE).to(torch.float16)


def scaled_factor(factor: FeedbackFactor, scale: Tensor) -> FeedbackFactor:
    """The factor of the input moment for weights whose columns are multiplied by `scale` [c] float64."""
    s = scale[factor.order]
    upper = factor.upper * s / s[:, None]
    return replace(factor, upper=upper, column_curvature=factor.column_curvature / scale.square())


def refitted(tensor: QuantizedTensor, weight: Tensor, moments: Tensor) -> QuantizedTensor:
    """The tensor with the factors of column classes and rows of least output error, where they lower it.

        min over f_k, t_r of sum_gr (w_gr - t_r f * q_gr)T A_g (w_gr - t_r f * q_gr)

    Args:
        weight: [g, r, c] float64.
        moments: [g, c, c] float64.
    """
    assert tensor.column_scale is not None and isinstance(tensor.code, ColumnEntropyCode)
    error = output_error(tensor.dequantize().double() - weight, moments).sum()
    values = tensor.dequantize().double()
    member = one_hot(tensor.code.column_class.long()).double()
    of_columns = (moments * (values.mT @ values)).sum(0)
    right = ((weight @ moments) * values).sum((0, 1)) @ member
    factor = torch.linalg.lstsq(member.T @ of_columns @ member, right[:, None], driver="gelsd").solution[:, 0]
    factor = torch.where((factor > 1 / MOST_REFIT) & (factor < MOST_REFIT), factor, 1.0)
    columns = (tensor.column_scale.double() / (member @ factor)).to(torch.float16)
    values = values * (tensor.column_scale.double() / columns.double())[:, None]
    moved = values @ moments
    rows = (moved * weight).sum(2) / (moved * values).sum(2).clamp(min=torch.finfo(torch.float64).tiny)
    rows = torch.where((rows > 1 / MOST_REFIT) & (rows < MOST_REFIT), rows, 1.0).flatten()
    scale = stored_scale(tensor.scale.double() * rows[:, None]).to(torch.float16)
    other = replace(tensor, scale=scale, column_scale=columns)
    return other if output_error(other.dequantize().double() - weight, moments).sum() < error else tensor


class ColumnRounds(ScalarRounds):
    """As `ScalarRounds`, with a code table for each sum of a row's and a column's class."""

    def column_class_bits(self, layers: Sequence[LayerProblem]) -> int:
        """Bits of the columns' classes, each layer's padded to whole bytes."""
        return sum(self.tables.class_bits * layer.columns + 8 for layer in layers)

    def _nearest(
        self, layers: Sequence[LayerProblem], weights: Sequence[Tensor], spreads: Sequence[Tensor]
    ) -> tuple[RateTables, dict[str, float]]:
        """See `ScalarRounds`; a weight's class follows from the sizes of its row and column."""
        sizes = {layer.name: log_sizes(weight) for layer, weight in zip(layers, weights, strict=True)}
        steps = {
            layer.name: usable_step(self.steps[layer.name] * self.factor, weight)
            for layer, weight in zip(layers, weights, strict=True)
        }
        every = max(1, round(sum(weight.numel() for weight in weights) / SAMPLE))
        # rows and columns of zeros are left out; a mean over none is NaN
        live = [
            sizes[layer.name][rows][:, weight.any(0)].mean(1) - steps[layer.name][rows].log2()
            for layer, weight, rows in zip(layers, weights, (weight.any(1) for weight in weights), strict=True)
        ]
        mean = torch.cat(live).mean().nan_to_num()
        lowest = float(mean) - SPACING * MOST_CLASSES / 2
        counts = torch.zeros(MOST_CLASSES * ALPHABET, dtype=torch.float64)
        for shift in SHIFTS:
            for layer, weight in zip(layers, weights, strict=True):
                part = slice(None, None, min(every, layer.rows))
                step = steps[layer.name][part] * 2**shift
                place = _class_of(sizes[layer.name][part], step, lowest) * ALPHABET + nearest_codes(weight[part], step)
                counts += torch.bincount(place.flatten(), minlength=len(counts))
        by_set = np.zeros((MOST_CLASSES, SETS, ALPHABET))
        by_set[:, 0] = counts.reshape(MOST_CLASSES, ALPHABET).numpy()
        tables = RateTables.of(by_set)
        lengths = torch.from_numpy(tables.lengths()[:, 0]).flatten()
        expected = {}
        for layer, weight in zip(layers, weights, strict=True):
            step = steps[layer.name]
            place = _class_of(sizes[layer.name], step, lowest) * ALPHABET + nearest_codes(weight, step)
            expected[layer.name] = float(lengths[place].sum())
        return tables, expected

    def coded(self, codes: Tensor, step: Tensor, groups: int, column_scale: Tensor | None) -> QuantizedTensor:
        """As in `ScalarRounds`, with the cheapest classes of rows and columns."""
        lengths = torch.from_numpy(self.tables.lengths()[:, 0])
        column = (log_sizes(codes.double() - ALPHABET // 2)[0] / SPACING).round()
        column_class = (column - column.min()).clamp(max=self.tables.classes - 1).to(torch.uint8)
        for _ in range(CLASS_ROUNDS):
            row_class = cheapest_classes(codes, column_class, lengths)
            column_class = cheapest_classes(codes.T, row_class, lengths)
        row_class = cheapest_classes(codes, column_class, lengths)
        tensor = coded_tensor(codes, step, self.tables, None, groups, column_scale)
        return replace(tensor, code=ColumnEntropyCode(self.tables, row_class, column_class=column_class))


def log_sizes(x: Tensor) -> Tensor:
    """log2 of the standard deviations [R, C] of a model of x [R, C] whose variance is a row's times a column's."""
    energy = x.double().square()
    tiny = torch.finfo(torch.float32).tiny
    rows, columns, mean = (part.clamp(min=tiny).log2() for part in (energy.mean(1), energy.mean(0), energy.mean()))
    return 0.5 * (rows[:, None] + columns - mean)


def _class_of(sizes: Tensor, step: Tensor, lowest: float) -> Tensor:
    """Class int64 [R, C] of weights of these log2 standard deviations [R, C] with steps [R]."""
    place = (sizes - step.log2()[:, None] - lowest) / SPACING
    return place.round().clamp(0, MOST_CLASSES - 1).long()


def cheapest_classes(codes: Tensor, other: Tensor, lengths: Tensor) -> Tensor:
    """The class uint8 [n] of each row with the shortest code, for codes uint8 [n, m] and column classes [m].

    Args:
        lengths: float64 [classes, 256] of the codes in bits.
    """
    classes = len(lengths)
    cost = torch.zeros(len(codes), classes, dtype=torch.float64)
    for k in other.unique().tolist():
        part = codes[:, other == k].long()
        counts = torch.zeros(len(codes), ALPHABET, dtype=torch.float64)
        counts.scatter_add_(1, part, torch.ones((), dtype=torch.float64).expand(part.shape))
        cost += counts @ lengths[(torch.arange(classes) + k).clamp(max=classes - 1)].T
    return cost.argmin(1).to(torch.uint8)
