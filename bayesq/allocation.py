"""Bit allocation: which block gets how many bits.

A block is a layer, a row or a group of rows. Every allocator turns an average budget into one width per row; every
method accepts every allocator. The budget counts code bits per weight, or all stored bits. If it counts code bits, what
a method stores beyond a plain affine layer is taken from its code bits. Exceptions: column and group scales; row tables
with allocator=uniform; codebooks that the fraction of a uniform budget does not cover, or with the smallest widths.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from fnmatch import fnmatchcase

import torch
from torch import Tensor
from tqdm import tqdm

from bayesq.budget import Allocator, Budget
from bayesq.codebook import normal_distortion
from bayesq.contract import Distortion, LayerProblem, RowBits, stack_groups
from bayesq.errors import Refused
from bayesq.ilp import ilp_knapsack
from bayesq.knapsack import greedy_knapsack
from bayesq.posterior import WhiteningStore
from bayesq.quant.accounting import LAYER_BITS, affine_overhead_bits, mixed_overhead_bits
from bayesq.quant.grids import MIN_WIDTH, mse_grid
from bayesq.rounding import predicted_risk, round_layer
from bayesq.uniform import Uniform

# The values of the key allocator that predict risks, with their solvers.
SOLVERS = {"knapsack": greedy_knapsack, "ilp": ilp_knapsack}
# Damping of the input moment for methods that have no such argument.
DAMPING = 0.01
# Floor of a row's cost in `steps`, as a share of the largest row cost, so that no step is infinite.
LEAST_CURVATURE = 1e-12


class Knapsack:
    """Knapsack on the closed-form predicted risk, for any method that rounds afterwards.

    Rows of one block share a width. With block="group" they are neighbours, for kernels that work on tiles of rows.
    With block="row" and a `row_multiple` they have similar risk, because only the number of rows at each width is
    restricted. With risk_rb = e_r T_b (e_r of the row, T_b of the width) and given numbers of rows per width, the least
    risk gives the widest codes to the rows with the largest e_r. So sorting rows by risk before they form blocks costs
    no risk.

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
        solve: chooses a width for each block, see `greedy_knapsack` and `ilp_knapsack`.

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
        solve: Callable[[Tensor, Tensor, float], Tensor] = greedy_knapsack,
    ) -> None:
        if block not in ("layer", "row", "group"):
            raise Refused(f"allocation.block={block}: choose one of layer, row, group")
        if block == "group" and group_rows % row_multiple:
            raise Refused(f"allocation.row_multiple={row_multiple}: must divide allocation.group_rows={group_rows}")
        self.whitenings, self.block, self.damping, self.solve = whitenings, block, damping, solve
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
        row_bits: RowBits | None = None,
        scales: int = 0,
    ) -> dict[str, Tensor]:
        """Row widths of every layer; notes its predicted risk, times its note `kappa` of the task-aware proxy.

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
            costs.append(rows[:, None] * self._row_costs(layer, row_bits))
            smallest = int(costs[-1][:, self.widths.index(choices[layer.name][0])].sum())
            least += smallest
            padding += -smallest % 8
            if len(rows) > 1 and len(choices[layer.name]) > 1:
                overhead += mixed_overhead_bits([layer.rows])
            else:  # codes that fill whole bytes at one width may need padding at another
                overhead += affine_overhead_bits([layer.rows]) + (LAYER_BITS if layer.weight.numel() % 8 else 0)
        capacity = budget.capacity(layers, overhead + codebook_bits, scales)
        if capacity < least:
            # too few bits for width maps, which layers of a single width do not need
            plain = affine_overhead_bits(layer.rows for layer in layers)
            if budget.count == "stored":
                plain += padding + codebook_bits
            if budget.capacity(layers, plain, scales) < least:
                weights = sum(layer.weight.numel() for layer in layers)
                needed = (least + (plain + scales if budget.count == "stored" else 0)) / weights
                raise Refused(
                    f"bits={budget.bits:g}: the smallest widths that the keys under allocation permit average "
                    f"{math.ceil(needed * 1000) / 1000:g} bits a weight (budget.count={budget.count})"
                )
            capacity = least
        choice = self.solve(torch.cat(totals), torch.cat(costs), capacity)
        allocated = {}
        by_layer = choice.split([len(total) for total in totals])
        for layer, risk, block, of_blocks in zip(layers, risks, blocks, by_layer, strict=True):
            chosen = of_blocks[block]
            layer.notes["predicted_risk"] = float(risk.gather(1, chosen[:, None]).sum())
            allocated[layer.name] = widths[chosen].to(torch.uint8)
        return allocated

    def steps(self, layers: Sequence[LayerProblem]) -> dict[str, Tensor]:
        """Steps at which one more bit saves the same risk in every row: step^2 kappa mean_c h_rc = const.

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

    def _row_costs(self, layer: LayerProblem, row_bits: RowBits | None) -> Tensor:
        """Bits of one row at each width [widths]."""
        beside = [0 if row_bits is None else row_bits(layer, width) for width in self.widths]
        return layer.columns * torch.tensor(self.widths, dtype=torch.float64) + torch.tensor(beside)

    def predict(self, layer: LayerProblem, distortion: Distortion | None = None) -> Tensor:
        """Predicted risk [R, widths] of one layer under feedback rounding (to nearest without input correlations).

        Args:
            distortion: T_b of the method's codes; None = `uniform_distortion`.
        """
        whitening = self.whitenings.whitening(layer, feedback=True, damping=self.damping)
        expected = uniform_distortion if distortion is None else distortion
        return predicted_risk(layer.weight, whitening, [expected(layer, width) for width in self.widths])

    def rounded(self, layer: LayerProblem, width: int) -> Tensor:
        """A layer's weights [g, r, c] rounded once at one width, on each row's affine grid."""
        whitening = self.whitenings.whitening(layer, feedback=True, damping=self.damping)
        rows = torch.full((layer.rows,), width, dtype=torch.uint8)
        grid = mse_grid(stack_groups(layer.weight).to(torch.float64), rows)
        return round_layer(layer.weight, whitening, *grid, rows, {}).values.reshape(layer.weight.shape)


def uniform_distortion(layer: LayerProblem, width: int) -> float:
    """Expected squared error of uniform levels for weights of unit variance."""
    return normal_distortion("uniform", width)


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
        Refused: an unknown name, an allocator that predicts risks without a posterior, or see `Knapsack`.
    """
    if name == "uniform":
        return Uniform()
    if name not in SOLVERS:
        raise Refused(f"allocator={name}: choose one of uniform, {', '.join(SOLVERS)}")
    if whitenings is None:
        raise Refused(f"allocator={name} needs a posterior")
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
        solve=SOLVERS[name],
    )
