"""Bit allocation: which block gets how many bits.

A block is a layer, a row or a group of rows. Every allocator turns an average budget into one width per row; every
method accepts every allocator. The budget is counted in code bits per weight. A method that stores more beside its
codes than a plain affine layer gets that many code bits less, so no method stores more than the baseline at the same
budget.
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

# Damping of the input moment for methods that have no such argument.
DAMPING = 0.01
# Rows whose errors cost less than this part of the most expensive row's count as that expensive.
LEAST_CURVATURE = 1e-12


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
        # rounded, because 4.35 * 100 is 434.99999999999994 in floating point
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

    def steps(self, layers: Sequence[LayerProblem]) -> dict[str, Tensor]:
        """Relative steps of every layer's rows by name, see `bayesq.contract.StreamBudget`."""
        ...


@dataclass(frozen=True)
class Allocation:
    """A run's allocator with its budget; what methods get as `allocate`, see `bayesq.contract.Allocate`."""

    allocator: Allocator
    budget: Budget

    def __call__(
        self, layers: Sequence[LayerProblem], codebook_bits: int = 0, distortion: Distortion | None = None
    ) -> dict[str, Tensor]:
        """Row widths uint8 [R] of these layers by name; the budget is an average over them."""
        return self.allocator.allocate(layers, self.budget, codebook_bits, distortion)


class Uniform:
    """One width for all; a fractional budget mixes the two neighbouring widths by plain weight MSE.

    `greedy_knapsack` chooses whole layers for the wider codes. Leftover bits widen rows of one further layer: the layer
    and the rows where the error falls most. With few large layers many bits may be left over. What the mix stores
    beyond plain affine layers (the width map of that layer, padding, codebooks) is paid with code bits.

    This is the plain baseline: the keys under `allocation` apply to the knapsack only.
    """

    statistics: frozenset[Statistic] = frozenset()

    def allocate(
        self,
        layers: Sequence[LayerProblem],
        budget: Budget,
        codebook_bits: int = 0,
        distortion: Distortion | None = None,
    ) -> dict[str, Tensor]:
        """Row widths of every layer. An integer budget of code bits is met exactly, with any codebooks.

        Raises:
            Refused: the budget does not allow the smallest width, or weights are not finite and the budget is
                fractional.
        """
        sizes = [layer.weight.numel() for layer in layers]
        padding = sum(LAYER_BITS for size in sizes if size % 8)  # codes need not fill whole bytes
        plain = affine_overhead_bits(layer.rows for layer in layers)
        capacity = budget.capacity(layers, plain + padding + codebook_bits)
        low = min(int(budget.bits if budget.count == "code" else capacity / sum(sizes)), MAX_WIDTH)
        if low < MIN_WIDTH:
            raise Refused(
                f"bits={budget.bits:g}: {MIN_WIDTH} bits a weight and what is stored beside them exceed the budget"
            )
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

        # Try each remaining layer with the leftover bits, and also with those of all layers that gain less per bit.
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

    def steps(self, layers: Sequence[LayerProblem]) -> dict[str, Tensor]:
        """One step per layer, in proportion to the root mean square of its weights: about the same bits for all."""
        tiny = torch.finfo(torch.float32).tiny
        sizes = [layer.weight.double().square().mean().sqrt().clamp(min=tiny) for layer in layers]
        return {layer.name: size.expand(layer.rows).clone() for layer, size in zip(layers, sizes, strict=True)}


def _affordable_rows(layer: LayerProblem, drop: Tensor, bits: float) -> Tensor:
    """Rows that `bits` can widen by one bit, width map included: those with the largest drop [R] >= 0 in error."""
    bits -= mixed_overhead_bits([layer.rows]) - affine_overhead_bits([layer.rows])
    rows = drop.argsort(descending=True, stable=True)[: max(0, int(bits // layer.columns))]
    return rows[drop[rows] >= 0]


def _row_errors(layer: LayerProblem, width: int) -> Tensor:
    """Squared error [R] of each row rounded to nearest."""
    weight = stack_groups(layer.weight).to(torch.float64)
    rows = torch.full((layer.rows,), width)
    return (round_affine(weight, *mse_grid(weight, rows), rows)[1] - weight).square().sum(1)


class Knapsack:
    """Greedy knapsack on the closed-form predicted risk, for any method that rounds afterwards.

    Rows of one block share a width, as hardware asks: neighbouring rows for kernels that work on tiles of rows
    (block="group"), rows of similar risk for `row_multiple`, which only restricts how many rows have each width. With
    risk_rb = e_r T_b (e_r of the row, T_b of the width) and given numbers of rows per width, the least risk gives the
    widest codes to the rows with the largest e_r. So blocks of rows sorted by risk lose nothing.

    Args:
        whitenings: the risk is predicted from these.
        block: "layer", "row" or "group".
        widths: candidate bits of layers that match no pattern of `pinned` or `allowed`.
        damping: of the input moment, see `WhiteningStore.whitening`.
        group_rows: consecutive rows of a layer in one block of block="group"; the last one may have fewer.
        row_multiple: the number of a layer's rows at each width is a multiple of it; one width also has the remaining
            rows % row_multiple rows.
        min_width: no row gets fewer bits; None = no such limit.
        pinned: layer name pattern (fnmatch) -> its width; the first match counts; read before `allowed`.
        allowed: layer name pattern -> its widths in place of `widths`; the first match counts.

    Attributes:
        widths: all widths that any layer may get, ascending.

    Raises:
        Refused: an unknown block, or `group_rows` is no multiple of `row_multiple`.
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
            raise Refused(f"allocation.row_multiple={row_multiple}: must divide allocation.group_rows={group_rows}")
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

        The note `kappa` of a layer, the factor of the task-aware proxy, multiplies its risks.

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
            # no bits are left for width maps, and layers with a single width need none
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

    def steps(self, layers: Sequence[LayerProblem]) -> dict[str, Tensor]:
        """Steps at which a bit more saves the same risk in every row: step^2 kappa mean_c h_rc = const.

        h is the curvature of `bayesq.whitening`. The keys under `allocation` are not read.

        Raises:
            Refused: a curvature is not finite.
        """
        self.whitenings.prepare(layers)
        cost = {}
        for layer in layers:
            whitening = self.whitenings.whitening(layer, feedback=True, damping=self.damping)
            mean = stack_groups(whitening.row_curvature * whitening.column_curvature.mean(-1)).double()
            if not bool(torch.isfinite(mean).all()):
                raise Refused(f"layer {layer.name}: a curvature is NaN or infinite")
            cost[layer.name] = mean * layer.notes.get("kappa", 1.0)
        largest = max(float(mean.max()) for mean in cost.values()) or 1.0
        return {name: (mean / largest).clamp(min=LEAST_CURVATURE).rsqrt() for name, mean in cost.items()}

    def _blocks(self, risk: Tensor) -> Tensor:
        """The block [R] of each of a layer's rows, from their risks [R, widths]."""
        rows = torch.arange(len(risk))
        if self.block == "layer":
            return torch.zeros_like(rows)
        if self.block == "group":
            return rows // self.group_rows
        if self.row_multiple == 1:
            return rows  # not sorted, so that ties go to the earlier row
        rank = torch.empty_like(rows)
        rank[risk[:, 0].argsort(descending=True, stable=True)] = rows
        return rank // self.row_multiple

    def predict(self, layer: LayerProblem, distortion: Distortion | None = None) -> Tensor:
        """Predicted risk [R, widths] of one layer under feedback rounding (to nearest without input correlations).

        Args:
            distortion: T_b of the method's codes; None = `scalar_distortion`.
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
    """The allocator of a config: `name` is the key allocator, the others have the names of the keys under allocation.

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
