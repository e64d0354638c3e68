"""Bit allocation: which block gets how many bits (SPEC section 4).

A block is a layer or a row. Every allocator turns an average budget into one width per row; every method accepts every
allocator. The budget is counted in code bits per weight, and a method whose format stores more beside its codes than a
plain affine layer pays for the difference with code bits: nobody stores more than the baseline at the same budget.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Protocol

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from bayesq.codebook import level_kind
from bayesq.posterior import Posterior
from bayesq.quant.accounting import LAYER_BITS, affine_overhead_bits, mixed_overhead_bits
from bayesq.quant.grids import MAX_WIDTH, MIN_WIDTH, mse_grid, round_affine
from bayesq.quant.method import LayerProblem, stack_groups
from bayesq.rounding import predicted_risk
from bayesq.whitening import whitening

# Bits a weight that a mix of whole layers may leave unspent: the promise of bits/code.
UNSPENT = 0.01
# Sums of bits that are told apart when a mix of whole layers is chosen exactly.
FILL_SUMS = 2**20


def lower_hull(risk: np.ndarray, bits: np.ndarray) -> list[list[int]]:
    """Choices on the lower convex hull of each block's (bits, risk) points, beginning with the cheapest.

    Args:
        risk: [B, W] finite.
        bits: [B, W] strictly increasing along W.
    """
    hulls = []
    for r, b in zip(risk.tolist(), bits.tolist(), strict=True):
        hull = [0]
        for k in range(1, len(r)):
            if r[k] >= r[hull[-1]]:
                continue
            while len(hull) > 1:
                i, j = hull[-2], hull[-1]
                if (r[i] - r[j]) * (b[k] - b[j]) > (r[j] - r[k]) * (b[j] - b[i]):
                    break
                hull.pop()
            hull.append(k)
        hulls.append(hull)
    return hulls


def greedy_knapsack(risk: Tensor, bits: Tensor, capacity: float) -> Tensor:
    """Spend `capacity` bits on the blocks, always where the risk falls most per bit.

    Every block starts at its cheapest width and moves along its lower convex hull. A step that does not fit ends its
    block; smaller steps of other blocks may still fit. The result is never over the capacity, its risk exceeds the
    optimum by less than one step's decrease, and a larger capacity never gives a higher risk. Ties go to the earlier
    block.

    Args:
        risk: [B, W] predicted risk of block B at width W.
        bits: [B, W] cost, increasing along W.
        capacity: total bits.

    Returns:
        [B] chosen index into W.

    Raises:
        ValueError: even the cheapest widths exceed the capacity, or a risk is not finite.
    """
    if not bool(torch.isfinite(risk).all()):
        raise ValueError("a predicted risk is NaN or infinite")
    r, b = risk.to(torch.float64).numpy(), bits.to(torch.float64).numpy()
    left = capacity - float(b[:, 0].sum())
    if left < 0:
        raise ValueError(f"the smallest widths need {b[:, 0].sum():.0f} bits, the budget has {capacity:.0f}")
    steps = [  # (gain per bit, block, from, to)
        ((r[block, i] - r[block, j]) / (b[block, j] - b[block, i]), block, i, j)
        for block, hull in enumerate(lower_hull(r, b))
        for i, j in pairwise(hull)
    ]
    # Along a hull gains per bit fall, so sorting keeps a block's steps in order; `from` breaks exact ties.
    steps.sort(key=lambda step: (-step[0], step[1], step[2]))
    choice = np.zeros(len(r), dtype=np.int64)
    cheapest = float((b[:, 1:] - b[:, :-1]).min()) if b.shape[1] > 1 else np.inf
    for _, block, i, j in steps:
        if left < cheapest:
            break
        cost = b[block, j] - b[block, i]
        if choice[block] == i and cost <= left:
            choice[block] = j
            left -= cost
    return torch.from_numpy(choice)


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
        weights = sum(layer.weight.numel() for layer in layers)
        if self.count == "stored":
            return self.bits * weights - overhead
        return self.bits * weights - max(0.0, overhead - affine_overhead_bits(layer.rows for layer in layers))


class Allocator(Protocol):
    """Chooses row widths for a budget."""

    statistics: frozenset[str]

    def allocate(self, layers: Sequence[LayerProblem], budget: Budget, codebook_bits: int = 0) -> dict[str, Tensor]:
        """Row widths uint8 [R] of every layer by name; `codebook_bits` are stored beside the plain affine format."""
        ...


class Uniform:
    """One width for all; a fractional budget mixes the two neighbouring widths over layers by plain weight MSE."""

    statistics: frozenset[str] = frozenset()

    def allocate(self, layers: Sequence[LayerProblem], budget: Budget, codebook_bits: int = 0) -> dict[str, Tensor]:
        """Row widths of every layer. An integer budget is met exactly, whatever codebooks the method stores."""
        capacity = budget.capacity(layers, affine_overhead_bits(layer.rows for layer in layers))
        weights = sum(layer.weight.numel() for layer in layers)
        low = min(int(capacity / weights), MAX_WIDTH)
        if low < MIN_WIDTH:
            raise ValueError(f"{MIN_WIDTH} bits a weight and what is stored beside them exceed the budget")
        if low == MAX_WIDTH or capacity == low * weights:
            return {layer.name: torch.full((layer.rows,), low, dtype=torch.uint8) for layer in layers}
        widths = [low, low + 1]
        risk = torch.tensor([[_rounding_error(layer, width) for width in widths] for layer in layers])
        bits = torch.tensor([[layer.weight.numel() * width for width in widths] for layer in layers])
        choice = _fill(risk, bits, capacity, UNSPENT * weights)
        return {
            layer.name: torch.full((layer.rows,), widths[k], dtype=torch.uint8)
            for layer, k in zip(layers, choice.tolist(), strict=True)
        }


def _fill(risk: Tensor, bits: Tensor, capacity: float, slack: float) -> Tensor:
    """Choice between two widths [B] by `greedy_knapsack`, or exactly where that leaves more than `slack` bits unspent.

    Whole layers are coarse: a small one bought early (a classifier's head) can cost the room for a large one. The
    least risk of every sum of bits then comes from a dynamic program, and the best sum within `slack` is taken.
    """
    choice = greedy_knapsack(risk, bits, capacity)
    if capacity - float(bits.gather(1, choice[:, None]).sum()) <= slack:
        return choice
    steps = (bits[:, 1] - bits[:, 0]).numpy()
    left = capacity - float(bits[:, 0].sum())
    unit = int(np.gcd.reduce(steps))
    unit *= -(-int(left) // (unit * FILL_SUMS))  # coarser where exact sums are too many; costs are then rounded up
    room, gain = int(left // unit), (risk[:, 1] - risk[:, 0]).numpy()
    least = np.full(room + 1, np.inf)
    least[0] = 0.0
    wide = np.zeros((len(steps), room + 1), dtype=bool)
    for block, step in enumerate(-(-steps // unit)):
        if step <= room:
            wider = np.full(room + 1, np.inf)
            wider[step:] = least[: room + 1 - step] + gain[block]
            wide[block] = wider < least
            least = np.minimum(least, wider)
    reached = np.flatnonzero(np.isfinite(least))
    enough = reached[reached >= min(reached[-1], room - slack / unit)]
    spent = int(enough[least[enough].argmin()])
    for block in range(len(steps) - 1, -1, -1):
        choice[block] = int(wide[block, spent])
        spent -= int(wide[block, spent]) * -(-int(steps[block]) // unit)
    return choice


def _rounding_error(layer: LayerProblem, width: int) -> float:
    weight = stack_groups(layer.weight).to(torch.float64)
    rows = torch.full((layer.rows,), width)
    return float((round_affine(weight, *mse_grid(weight, rows), rows)[1] - weight).square().sum())


class Knapsack:
    """Greedy knapsack on the closed-form predicted risk, whatever method rounds afterwards.

    Args:
        posterior: gives the risk.
        block: "layer" or "row".
        widths: allowed bits.
        damping: of the input moment, see `whitening`.
    """

    def __init__(self, posterior: Posterior, block: str, widths: Sequence[int], damping: float = 0.01) -> None:
        self.posterior, self.block, self.widths, self.damping = posterior, block, sorted(widths), damping
        self.statistics = posterior.statistics

    def allocate(self, layers: Sequence[LayerProblem], budget: Budget, codebook_bits: int = 0) -> dict[str, Tensor]:
        """Row widths of every layer; notes each layer's predicted risk.

        Raises:
            ValueError: no mix of the allowed widths fits the budget.
        """
        risks = [self.predict(layer) for layer in tqdm(layers, desc="predict risk", disable=None, leave=False)]
        # (A task-aware proxy multiplies each layer's risks here: "BayesQ in full".)
        rows = [layer.rows for layer in layers]
        if self.block == "row":
            overhead = mixed_overhead_bits(rows)
        else:  # codes that fill whole bytes at one width may need padding at another
            overhead = affine_overhead_bits(rows) + sum(LAYER_BITS for layer in layers if layer.weight.numel() % 8)
        capacity = budget.capacity(layers, overhead + codebook_bits)
        blocks = risks if self.block == "row" else [risk.sum(0, keepdim=True) for risk in risks]
        sizes = [layer.columns if self.block == "row" else layer.weight.numel() for layer in layers]
        costs = [
            size * torch.tensor(self.widths, dtype=torch.float64).expand(len(block), -1)
            for block, size in zip(blocks, sizes, strict=True)
        ]
        least = float(sum(cost[:, 0].sum() for cost in costs))
        if capacity < least <= budget.capacity(layers, affine_overhead_bits(rows)):
            capacity = least  # no room for a width map, and rows that all have the smallest width need none
        choice = greedy_knapsack(torch.cat(blocks), torch.cat(costs), capacity)
        allocated = {}
        for layer, risk, chosen in zip(layers, risks, choice.split([len(block) for block in blocks]), strict=True):
            chosen = chosen.expand(layer.rows)
            layer.notes["predicted_risk"] = float(risk.gather(1, chosen[:, None]).sum())
            allocated[layer.name] = torch.tensor(self.widths, dtype=torch.uint8)[chosen]
        return allocated

    def predict(self, layer: LayerProblem) -> Tensor:
        """Predicted risk [R, widths] of one layer under feedback rounding (nearest for a diagonal posterior)."""
        geometry = whitening(self.posterior.fit(layer), feedback=True, damping=self.damping)
        return predicted_risk(layer.weight, geometry, self.widths, [level_kind(width) for width in self.widths])


def make_allocator(name: str, posterior: Posterior | None, block: str, widths: Sequence[int]) -> Allocator:
    """The allocator a config names (keys allocator, allocation.block, allocation.widths)."""
    if name == "uniform":
        return Uniform()
    if posterior is None:
        raise ValueError("allocator=knapsack needs a posterior")
    return Knapsack(posterior, block, widths)
