"""Bit allocation: which block gets how many bits (SPEC section 4).

A block is a layer, a row or a group of rows. Every allocator turns an average budget into one width per row; every
method accepts every allocator. The budget is counted in code bits per weight, and a method whose format stores more
beside its codes than a plain affine layer pays for the difference with code bits: nobody stores more than the baseline
at the same budget.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Protocol

import torch
from torch import Tensor
from tqdm import tqdm

from bayesq.calibration.statistic import Statistic
from bayesq.codebook import level_kind, normal_distortion
from bayesq.contract import Distortion, LayerProblem, check_finite, stack_groups
from bayesq.errors import Refused
from bayesq.knapsack import greedy_knapsack
from bayesq.posterior import WhiteningStore
from bayesq.quant.accounting import LAYER_BITS, affine_overhead_bits, mixed_overhead_bits
from bayesq.quant.grids import MAX_WIDTH, MIN_WIDTH, mse_grid, round_affine
from bayesq.rounding import predicted_risk, round_layer

# Damping of the input moment if the method that will round has no such argument.
DAMPING = 0.01


@dataclass(frozen=True)
class Budget:
    """Average bits per weight.

    Attributes:
        bits: the target.
        count: "code" counts codes only, as the literature does; "stored" counts everything on disk.
    """

    bits: float
    count: str

    def capacity(self, layers: Sequence[LayerProblem], overhead: float) -> float:
        """Code bits the layers may spend in all.

        Args:
            overhead: bits the method stores beside its codes.
        """
        # 4.35 bits of 100 weights are 435, not the 434.99999999999994 of floating point
        total = round(self.bits * sum(layer.weight.numel() for layer in layers), 6)
        if self.count == "stored":
            return total - overhead
        return total - max(0.0, overhead - affine_overhead_bits(layer.rows for layer in layers))


class Allocator(Protocol):
    """Chooses row widths for a budget."""

    statistics: frozenset[Statistic]

    def allocate(
        self,
        layers: Sequence[LayerProblem],
        budget: Budget,
        codebook_bits: int = 0,
        distortion: Distortion | None = None,
    ) -> dict[str, Tensor]:
        """Row widths uint8 [R] of every layer by name; arguments as in `bayesq.contract.Allocate`."""
        ...


@dataclass(frozen=True)
class Allocation:
    """A run's allocator with its budget; what methods get as `allocate`, see `bayesq.contract.Allocate`."""

    allocator: Allocator
    budget: Budget

    def __call__(
        self, layers: Sequence[LayerProblem], codebook_bits: int = 0, distortion: Distortion | None = None
    ) -> dict[str, Tensor]:
        """Row widths uint8 [R] of the layers that are given, by name; the budget is an average over these."""
        return self.allocator.allocate(layers, self.budget, codebook_bits, distortion)


class Uniform:
    """One width for all; a fractional budget mixes the two neighbouring widths by plain weight MSE.

    The wider codes go to whole layers, by `greedy_knapsack`. What these leave unspent, much where layers are few and
    large, widens some rows of one more layer: the rows whose error falls most, in the layer where that is worth most.
    A mix pays with code bits for what it stores beyond plain affine layers: that layer's width map, padding, codebooks.

    It is the plain baseline: the constraints under `allocation` are the knapsack's and mean nothing here.
    """

    statistics: frozenset[Statistic] = frozenset()

    def allocate(
        self,
        layers: Sequence[LayerProblem],
        budget: Budget,
        codebook_bits: int = 0,
        distortion: Distortion | None = None,
    ) -> dict[str, Tensor]:
        """Row widths of every layer. An integer budget of codes is met exactly, whatever codebooks the method stores.

        Raises:
            Refused: the budget does not allow the smallest width, or weights that choose widths are not finite.
        """
        sizes = [layer.weight.numel() for layer in layers]
        padding = sum(LAYER_BITS for size in sizes if size % 8)  # codes need not fill whole bytes
        plain = affine_overhead_bits(layer.rows for layer in layers)
        capacity = budget.capacity(layers, plain + padding + codebook_bits)
        low = min(int(budget.bits if budget.count == "code" else capacity / sum(sizes)), MAX_WIDTH)
        if low < MIN_WIDTH:
            raise Refused(f"{MIN_WIDTH} bits a weight and what is stored beside them exceed the budget")
        widths = {layer.name: torch.full((layer.rows,), low, dtype=torch.uint8) for layer in layers}
        left = capacity - low * sum(sizes)
        if low == MAX_WIDTH or left <= 0:
            return widths

        for layer in layers:
            check_finite(layer)
        drops = [_row_errors(layer, low) - _row_errors(layer, low + 1) for layer in layers]
        saved, size = torch.stack([drop.sum() for drop in drops]), torch.tensor(sizes, dtype=torch.float64)
        zero = torch.zeros_like(saved)
        wide = greedy_knapsack(torch.stack([zero, -saved], 1), torch.stack([zero, size], 1), left) == 1

        # A layer that did not fit gets the rest, or also what the greedy spent afterwards, on layers that gain less.
        most, whole, split, some = float(saved[wide].sum()), wide, 0, torch.tensor([], dtype=torch.int64)
        for k in (~wide).nonzero().flatten().tolist():
            for wider in (wide, wide & (saved / size >= saved[k] / size[k])):
                rows = _affordable_rows(layers[k], drops[k], left - float(size[wider].sum()))
                total = float(saved[wider].sum() + drops[k][rows].sum())
                if total > most:
                    most, whole, split, some = total, wider, k, rows
        for layer, one_more in zip(layers, whole.tolist(), strict=True):
            widths[layer.name] += one_more
        widths[layers[split].name][some] += 1
        return widths


def _affordable_rows(layer: LayerProblem, drop: Tensor, bits: float) -> Tensor:
    """Rows that `bits` make one bit wider, width map included: those of largest drop [R] in error, none of a rise."""
    bits -= mixed_overhead_bits([layer.rows]) - affine_overhead_bits([layer.rows])
    rows = drop.argsort(descending=True, stable=True)[: max(0, int(bits // layer.columns))]
    return rows[drop[rows] >= 0]


def _row_errors(layer: LayerProblem, width: int) -> Tensor:
    """Squared error [R] of each row rounded plainly."""
    weight = stack_groups(layer.weight).to(torch.float64)
    rows = torch.full((layer.rows,), width)
    return (round_affine(weight, *mse_grid(weight, rows), rows)[1] - weight).square().sum(1)


class Knapsack:
    """Greedy knapsack on the closed-form predicted risk, whatever method rounds afterwards.

    What hardware asks for is in the blocks and in their widths. Rows that must share a width form one block:
    neighbours for kernels that work on tiles of rows (block="group"), rows of like risk for `row_multiple`, which only
    counts rows. With curves of one shape, risk_rb = e_r T_b, the latter costs nothing beyond the multiples themselves:
    for given counts the least sum_r e_r T_{b_r} gives wide codes to large e_r, so sorted rows never need to part.

    Args:
        whitenings: give the risk.
        block: "layer", "row" or "group".
        widths: bits of layers that no pattern of `pinned` or `allowed` names.
        damping: of the input moment, see `WhiteningStore.whitening`.
        group_rows: consecutive rows of a layer in one block of block="group"; the last one may have fewer.
        row_multiple: the rows a layer has at each width are a multiple of it, but for one width that also has the
            layer's rows % row_multiple left over.
        min_width: no row gets fewer bits; None = no such limit.
        pinned: layer name pattern (fnmatch) -> its width; the first match counts, and before `allowed`.
        allowed: layer name pattern -> its widths in place of `widths`; the first match counts.

    Attributes:
        widths: all widths some layer may get, ascending.

    Raises:
        Refused: an unknown block, or groups that are no multiple of `row_multiple`.
    """

    def __init__(
        self,
        whitenings: WhiteningStore,
        block: str,
        widths: Sequence[int],
        damping: float = DAMPING,
        *,
        group_rows: int = 8,
        row_multiple: int = 1,
        min_width: int | None = None,
        pinned: Mapping[str, int] | None = None,
        allowed: Mapping[str, Sequence[int]] | None = None,
    ) -> None:
        if block not in ("layer", "row", "group"):
            raise Refused(f"allocation.block={block}: choose one of layer, row, group")
        if block == "group" and group_rows % row_multiple:
            raise Refused(f"allocation.row_multiple={row_multiple}: is no divisor of group_rows={group_rows}")
        self.whitenings, self.block, self.damping = whitenings, block, damping
        self.group_rows, self.row_multiple = group_rows, row_multiple
        self.min_width = MIN_WIDTH if min_width is None else min_width
        # YAML reads a layer called 0 as a number
        self.pinned = {str(pattern): [width] for pattern, width in (pinned or {}).items()}
        self.allowed = {str(pattern): list(choices) for pattern, choices in (allowed or {}).items()}
        self.default_widths = list(widths)
        candidates = {*widths, *(w for choices in (*self.pinned.values(), *self.allowed.values()) for w in choices)}
        self.widths = sorted(width for width in candidates if width >= self.min_width)
        self.statistics = whitenings.statistics

    def choices(self, names: Sequence[str]) -> dict[str, list[int]]:
        """Widths each layer may get, ascending, by name.

        Raises:
            Refused: a pattern matches no layer, or min_width leaves a layer no width.
        """
        for key, patterns in (("pinned", self.pinned), ("allowed", self.allowed)):
            for pattern in patterns:
                if not any(fnmatchcase(name, pattern) for name in names):
                    raise Refused(f"allocation.{key}: pattern {pattern!r} matches no layer that is quantized")
        rules = [*self.pinned.items(), *self.allowed.items(), ("*", self.default_widths)]
        choices = {}
        for name in names:
            named = next(widths for pattern, widths in rules if fnmatchcase(name, pattern))
            choices[name] = sorted({width for width in named if width >= self.min_width})
            if not choices[name]:
                raise Refused(f"allocation.min_width={self.min_width}: leaves layer {name} none of its widths {named}")
        return choices

    def allocate(
        self,
        layers: Sequence[LayerProblem],
        budget: Budget,
        codebook_bits: int = 0,
        distortion: Distortion | None = None,
    ) -> dict[str, Tensor]:
        """Row widths of every layer; notes each layer's predicted risk.

        A factor kappa among a layer's notes (the task-aware proxy's) multiplies its risks.

        Raises:
            Refused: no mix of the allowed widths fits the budget, a predicted risk is not finite, or see `choices`.
        """
        choices = self.choices([layer.name for layer in layers])
        self.whitenings.prepare(layers)
        widths = torch.tensor(self.widths, dtype=torch.float64)
        risks, blocks, totals, costs = [], [], [], []
        overhead = padding = least = 0
        for layer in tqdm(layers, desc="predict risk", disable=None, leave=False):
            risk = self.predict(layer, distortion) * layer.notes.get("kappa", 1.0)
            if not bool(torch.isfinite(risk).all()):
                raise Refused(f"layer {layer.name}: a predicted risk is NaN or infinite")
            block = self._blocks(risk)
            rows = torch.bincount(block)
            total = risk.new_zeros(len(rows), len(widths)).index_add_(0, block, risk)
            total[:, [width not in choices[layer.name] for width in self.widths]] = torch.inf
            risks.append(risk)
            blocks.append(block)
            totals.append(total)
            costs.append(layer.columns * rows[:, None] * widths)
            smallest = layer.weight.numel() * choices[layer.name][0]
            least += smallest
            padding += -smallest % 8
            if len(rows) > 1 and len(choices[layer.name]) > 1:
                overhead += mixed_overhead_bits([layer.rows])
            else:  # codes that fill whole bytes at one width may need padding at another
                overhead += affine_overhead_bits([layer.rows]) + (LAYER_BITS if layer.weight.numel() % 8 else 0)
        capacity = budget.capacity(layers, overhead + codebook_bits)
        if capacity < least:
            # no room for a width map, and layers that have their smallest width all over need none
            plain = affine_overhead_bits(layer.rows for layer in layers)
            if budget.count == "stored":
                plain += padding + codebook_bits
            if budget.capacity(layers, plain) < least:
                weights = sum(layer.weight.numel() for layer in layers)
                needed = (least + (plain if budget.count == "stored" else 0)) / weights
                raise Refused(
                    f"bits={budget.bits:g}: the smallest widths that the keys under allocation permit average "
                    f"{math.ceil(needed * 1000) / 1000:g} bits a weight (budget.count={budget.count})"
                )
            capacity = least
        choice = greedy_knapsack(torch.cat(totals), torch.cat(costs), capacity)
        allocated = {}
        by_layer = choice.split([len(total) for total in totals])
        for layer, risk, block, of_blocks in zip(layers, risks, blocks, by_layer, strict=True):
            chosen = of_blocks[block]
            layer.notes["predicted_risk"] = float(risk.gather(1, chosen[:, None]).sum())
            allocated[layer.name] = widths[chosen].to(torch.uint8)
        return allocated

    def _blocks(self, risk: Tensor) -> Tensor:
        """The block [R] of each of a layer's rows, from their risks [R, widths]."""
        rows = torch.arange(len(risk))
        if self.block == "layer":
            return torch.zeros_like(rows)
        if self.block == "group":
            return rows // self.group_rows
        if self.row_multiple == 1:
            return rows  # sorted they would be the same blocks, but ties should go to the earlier row
        rank = torch.empty_like(rows)
        rank[risk[:, 0].argsort(descending=True, stable=True)] = rows
        return rank // self.row_multiple

    def predict(self, layer: LayerProblem, distortion: Distortion | None = None) -> Tensor:
        """Predicted risk [R, widths] of one layer under feedback rounding (nearest without input correlations).

        Args:
            distortion: T_b of the method's codes; None = of scalar ones, non-uniform up to 4 bits.
        """
        whitening = self.whitenings.whitening(layer, feedback=True, damping=self.damping)
        expected = scalar_distortion if distortion is None else distortion
        return predicted_risk(layer.weight, whitening, [expected(layer, width) for width in self.widths])

    def rounded(self, layer: LayerProblem, width: int) -> Tensor:
        """A layer's weights [g, r, c] rounded once at one width, on each row's affine grid."""
        whitening = self.whitenings.whitening(layer, feedback=True, damping=self.damping)
        rows = torch.full((layer.rows,), width, dtype=torch.uint8)
        grid = mse_grid(stack_groups(layer.weight).to(torch.float64), rows)
        return round_layer(layer.weight, whitening, *grid, rows, {}).values.reshape(layer.weight.shape)


def scalar_distortion(layer: LayerProblem, width: int) -> float:
    """Expected squared error of a scalar code for weights of unit variance: Lloyd-Max up to 4 bits, then uniform."""
    return normal_distortion(level_kind(width), width)


def make_allocator(
    name: str,
    whitenings: WhiteningStore | None,
    block: str,
    widths: Sequence[int],
    group_rows: int = 8,
    row_multiple: int = 1,
    min_width: int | None = None,
    pinned: Mapping[str, int] | None = None,
    allowed: Mapping[str, Sequence[int]] | None = None,
    damping: float = DAMPING,
) -> Allocator:
    """The allocator a config names: the key allocator, and the keys under allocation as they are called there.

    Args:
        damping: of the method that will round, see `Knapsack`.

    Raises:
        Refused: allocator=knapsack without a posterior, or see `Knapsack`.
    """
    if name == "uniform":
        return Uniform()
    if whitenings is None:
        raise Refused("allocator=knapsack needs a posterior")
    return Knapsack(
        whitenings,
        block,
        widths,
        damping,
        group_rows=group_rows,
        row_multiple=row_multiple,
        min_width=min_width,
        pinned=pinned,
        allowed=allowed,
    )
