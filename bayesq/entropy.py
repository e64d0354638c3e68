"""What all methods share with codec=entropy: row steps in place of widths, code tables, and the stream's length.

The budget buys steps. An allocator gives each row a relative step; one factor for the whole network scales them to the
budget. A layer's part of the budget is planned before its last rounding, and its steps are then scaled until the real
stream fits; later layers may use what a layer leaves over.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import TypeVar

import numpy as np
import torch
from torch import Tensor

from bayesq.budget import Allocator, Budget
from bayesq.codebook import normal_interval
from bayesq.contract import LayerProblem
from bayesq.errors import Refused
from bayesq.quant.accounting import LAYER_BITS
from bayesq.quant.codes import EntropyCode, RateTables
from bayesq.quant.codes.entropy import level_sets
from bayesq.quant.codes.rate_tables import ALPHABET, CENTRE, MOST_CLASSES, SETS
from bayesq.quant.grids import MAX_WIDTH, stored_scale
from bayesq.quant.tensor import QuantizedTensor
from bayesq.rotated import in_columns_of

T = TypeVar("T")

# Distance of neighbouring rate classes in bits, if MOST_CLASSES of them are enough.
CLASS_SPACING = 0.5
# A layer is rounded again if its stream is longer than its part of the budget, or shorter by more than this many bits
# per weight.
TOLERANCE = 0.01
ATTEMPTS = 24
# No step is 2**MOST_SHIFT times the planned one: this is the whole range of fp16.
MOST_SHIFT = 40
# The search ends once a stream fits and this many attempts have followed the first one.
MOST_REFINED = 5
# Bits per layer held back at first, because streams end with a whole word.
SPARE = 32
# No step is smaller than this part of the row's largest weight, so that its symbols fit a byte.
FINEST = 1 / 120


@dataclass(frozen=True)
class StreamAllocation:
    """A run's allocator with its budget for codec=entropy, see `bayesq.contract.StreamBudget`.

    Attributes:
        problems: the layers by name, which the allocator gets in place of a method's copies, in the same columns.
    """

    allocator: Allocator
    budget: Budget
    problems: Mapping[str, LayerProblem]

    def steps(self, layers: Sequence[LayerProblem]) -> dict[str, Tensor]:
        """See `bayesq.contract.StreamBudget`."""
        return self.allocator.steps([in_columns_of(layer, self.problems[layer.name]) for layer in layers])

    def capacity(self, layers: Sequence[LayerProblem], overhead: float, scales: float = 0) -> float:
        """See `bayesq.contract.StreamBudget`."""
        return self.budget.capacity(layers, overhead, scales)


def row_rate(ratio: Tensor) -> Tensor:
    """Approximate bits per weight of a normal row whose standard deviation is `ratio` steps.

    1/2 log2(1 + 2 pi e ratio^2): exact for small steps, and 0 for large ones.
    """
    rate: Tensor = 0.5 * torch.log2(1 + 2 * math.pi * math.e * ratio.square())
    return rate


@dataclass(frozen=True)
class RateClasses:
    """Which rows share a code table: those with about the same bits per weight.

    Attributes:
        lowest: rate of class 0.
        spacing: between classes, bits per weight.
        count: of classes.
        table: uint8 [count], the table that each class uses.
    """

    lowest: float
    spacing: float
    count: int
    table: Tensor

    @classmethod
    def covering(cls, ratios: Sequence[Tensor]) -> "RateClasses":
        """At most MOST_CLASSES for rows with these standard deviations in steps."""
        rates = row_rate(torch.cat(list(ratios)))
        low, high = float(rates.min()), float(rates.max())
        spacing = max(CLASS_SPACING, (high - low) / (MOST_CLASSES - 1))
        count = 1 + round((high - low) / spacing)
        return cls(low, spacing, count, torch.arange(count, dtype=torch.uint8))

    def of(self, ratio: Tensor) -> Tensor:
        """Class int64 [R] of each row."""
        nearest = torch.round((row_rate(ratio) - self.lowest) / self.spacing)
        return nearest.clamp(0, self.count - 1).long()

    def normal_tables(self) -> RateTables:
        """Tables for normal rows."""
        rate = self.lowest + self.spacing * torch.arange(self.count, dtype=torch.float64)
        ratio = ((2 ** (2 * rate) - 1).clamp(min=1e-6) / (2 * math.pi * math.e)).sqrt()
        symbol = torch.arange(ALPHABET, dtype=torch.float64) - CENTRE
        edge = torch.full((1,), torch.inf, dtype=torch.float64)
        counts = []
        for which in range(SETS):
            levels = symbol - symbol.sign() * which / 2
            middle = (levels[1:] + levels[:-1]) / 2
            low, high = torch.cat([-edge, middle]), torch.cat([middle, edge])
            mass = normal_interval(low / ratio[:, None], high / ratio[:, None])
            counts.append(torch.where(mass > 1e-7, 1e5 * mass, 0.0))
        return RateTables.of(torch.stack(counts, 1).numpy())


@dataclass
class SymbolSums:
    """Symbols of all rows of each class, and centroids of their targets.

    Attributes:
        counts: [classes, sets, 256].
        moments: [classes, sets, 256, 2] as in `RateTables.of`.
    """

    counts: np.ndarray
    moments: np.ndarray

    @classmethod
    def empty(cls, classes: int) -> "SymbolSums":
        """Nothing yet."""
        return cls(np.zeros((classes, SETS, ALPHABET)), np.zeros((classes, SETS, ALPHABET, 2)))

    def add(self, codes: Tensor, sets: np.ndarray, rate_class: Tensor, units: Tensor, weight: Tensor) -> None:
        """Add a layer.

        Args:
            codes: [R, C] uint8.
            sets: [R, C] of `level_sets`.
            rate_class: [R].
            units: [R, C] targets in steps.
            weight: [R, C] cost of a squared error of one step, in any unit.
        """
        place = ((SETS * rate_class.long()[:, None] + torch.from_numpy(sets).long()) * ALPHABET + codes).flatten()
        size = self.counts.size
        for sums, values in (
            (self.counts, None),
            (self.moments[..., 0], weight),
            (self.moments[..., 1], weight * units),
        ):
            part = torch.bincount(place, None if values is None else values.flatten(), minlength=size)
            sums += part.double().numpy().reshape(self.counts.shape)

    def tables(self) -> tuple[RateTables, Tensor]:
        """Tables for these symbols, and the table uint8 [classes] of each class.

        Neighbouring classes share a table where this saves more bits of the tables than it costs in the streams.
        """
        parts = [[k] for k in range(len(self.counts)) if self.counts[k].any()]
        while len(parts) > 1:
            saved = [self._bits(a) + self._bits(b) - self._bits(a + b) for a, b in pairwise(parts)]
            best = int(np.argmax(saved))
            if saved[best] < 0:
                break
            parts[best : best + 2] = [parts[best] + parts[best + 1]]
        table = []
        for k in range(len(self.counts)):
            distance = [min(abs(k - i) for i in part) for part in parts]
            table.append(distance.index(min(distance)))
        sums = [(self.counts[part].sum(0), self.moments[part].sum(0)) for part in parts]
        counts, moments = (np.stack(column) for column in zip(*sums, strict=True))
        return RateTables.of(counts, moments), torch.tensor(table, dtype=torch.uint8)

    def _bits(self, classes: list[int]) -> float:
        """Bits of some classes' symbols with one table, and of this table."""
        counts = self.counts[classes].sum(0)
        tables = RateTables.of(counts[None])
        return float((counts * tables.lengths()[0]).sum()) + 8 * (len(tables.buffer) - 1)


def row_bits(codes: Tensor, sets: np.ndarray, tables: RateTables) -> Tensor:
    """Ideal code length of each row [R, C] with the table of each class: float64 [R, classes]."""
    lengths = torch.from_numpy(tables.lengths()).flatten(1)  # [classes, sets * 256]
    symbol = torch.from_numpy(sets).long() * ALPHABET + codes
    counts = torch.zeros(len(codes), SETS * ALPHABET, dtype=torch.float64)
    counts.scatter_add_(1, symbol, torch.ones((), dtype=torch.float64).expand(symbol.shape))
    return counts @ lengths.T


def coded_tensor(
    codes: Tensor,
    scale: Tensor,
    tables: RateTables,
    states: int | None,
    groups: int,
    column_scale: Tensor | None = None,
) -> QuantizedTensor:
    """A layer of these codes [R, C] and steps [R]; each row gets the class with the shortest code."""
    rate_class = row_bits(codes, level_sets(codes.numpy(), states, groups), tables).argmin(1).to(torch.uint8)
    return QuantizedTensor(
        codes=codes,
        width=full_width(len(codes)),
        scale=scale[:, None].to(torch.float16),
        zero=torch.full((len(codes), 1), CENTRE, dtype=torch.uint8),
        groups=groups,
        code=EntropyCode(tables, rate_class, states),
        column_scale=column_scale,
    )


def full_width(rows: int) -> Tensor:
    """The width of entropy-coded rows."""
    return torch.full((rows,), MAX_WIDTH, dtype=torch.uint8)


def usable_step(step: Tensor, weight: Tensor) -> Tensor:
    """Steps [R] that fp16 holds and whose symbols fit a byte, for rows weight [R, C]."""
    return stored_scale(torch.maximum(step, weight.abs().amax(1) * FINEST))


def factor_for(sigma: Sequence[Tensor], steps: Sequence[Tensor], columns: Sequence[int], bits: float) -> float:
    """The factor of all steps at which normal rows take `bits` in all, see `row_rate`.

    Args:
        sigma: standard deviations [R] of the rows of each layer.
        steps: their relative steps [R].
        columns: of each layer.
    """
    low, high = -60.0, 60.0
    for _ in range(80):
        middle = (low + high) / 2
        taken = sum(
            c * float(row_rate(s / (step * 2**middle)).sum()) for s, step, c in zip(sigma, steps, columns, strict=True)
        )
        low, high = (middle, high) if taken > bits else (low, middle)
    return float(2**high)


def overhead_bits(layers: Sequence[LayerProblem], tables: RateTables) -> int:
    """Bits stored beside the streams: steps, classes, width bytes and tables."""
    rows = sum((16 + tables.class_bits) * layer.rows + 2 * LAYER_BITS for layer in layers)
    return rows + 8 * len(tables.buffer)


@dataclass
class StreamPlan:
    """Parts of the budget, and rounding until the streams fit them.

    Attributes:
        planned: bits of each layer's stream by name.
        spare: bits that no layer has been given, or that earlier layers left over.
        shift: log2 of the factor by which the last layer's steps had to be scaled.
    """

    planned: Mapping[str, float]
    spare: float
    shift: float = field(default=0.0)

    @classmethod
    def of(cls, expected: Mapping[str, float], capacity: float) -> "StreamPlan":
        """A plan for a capacity in bits; layers share it in proportion to these expected bits."""
        total, spare = sum(expected.values()), min(SPARE * len(expected), 0.1 * capacity)
        return cls({name: bits * (capacity - spare) / total for name, bits in expected.items()}, spare)

    def fit(self, layer: LayerProblem, attempt: Callable[[float], tuple[T, int]]) -> T:
        """The rounding of a layer with the finest steps whose stream fits.

        Args:
            attempt: rounds with all steps times a factor; returns the result and the bits of its stream.

        Raises:
            Refused: no step gives a stream that fits. With few bits left, the tables take too much of the budget. Else
                symbols are so few or so equally frequent that coarser steps do not shorten the stream.
        """
        planned, weights = self.planned[layer.name], layer.weight.numel()
        allowed = planned + self.spare
        best: tuple[T, int, float] | None = None
        too_fine, shift, least = -math.inf, self.shift, math.inf
        for k in range(ATTEMPTS):
            result, bits = attempt(2**shift)
            least = min(least, bits)
            if bits > allowed:
                too_fine = max(too_fine, shift)
            elif best is None or bits > best[1]:
                best = (result, bits, shift)
            if best is None:
                shift += max((bits - planned) / weights, TOLERANCE) * (1 + k / 2)
                if shift > MOST_SHIFT:
                    break
                continue
            result, bits, coarse = best
            if bits >= planned - TOLERANCE * weights or coarse - too_fine < TOLERANCE or k >= MOST_REFINED:
                break
            shift = max(coarse - (planned - bits) / weights, (coarse + too_fine) / 2)
        if best is None:
            remedy = "choose other bits, higher or lower" if allowed >= weights / 2 else "raise bits"
            raise Refused(
                f"layer {layer.name}: its shortest stream has {least:.0f} bits, and the budget leaves "
                f"{int(max(allowed, 0))} beside the code tables; {remedy}, or choose codec=fixed"
            )
        result, bits, self.shift = best
        self.spare = allowed - bits
        return result
