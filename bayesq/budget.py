"""The budget of a run, and the allocator that spends it."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from torch import Tensor

from bayesq.calibration.statistic import Statistic
from bayesq.contract import Distortion, LayerProblem, RowBits
from bayesq.quant.accounting import affine_overhead_bits


@dataclass(frozen=True)
class Budget:
    """Average bits per weight.

    Attributes:
        bits: the target.
        count: "code" counts codes only, as the literature does; "stored" counts everything on disk.
    """

    bits: float
    count: str

    def capacity(self, layers: Sequence[LayerProblem], overhead: float, scales: float = 0) -> float:
        """Code bits the layers may spend in all.

        Args:
            overhead: bits the method stores beside its codes.
            scales: bits of column scales and group scales, which a budget of code bits does not pay for.
        """
        # rounded, because 4.35 * 100 is 434.99999999999994 in floating point
        total = round(self.bits * sum(layer.weight.numel() for layer in layers), 6)
        if self.count == "stored":
            return total - overhead - scales
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
        row_bits: RowBits | None = None,
        scales: int = 0,
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
        self,
        layers: Sequence[LayerProblem],
        codebook_bits: int = 0,
        distortion: Distortion | None = None,
        row_bits: RowBits | None = None,
        scales: int = 0,
    ) -> dict[str, Tensor]:
        """Row widths uint8 [R] of these layers by name; the budget is an average over them."""
        given = {"row_bits": row_bits, "scales": scales}
        # An allocator need not have these arguments: they are passed only with a value.
        more: dict[str, Any] = {key: value for key, value in given.items() if value}
        return self.allocator.allocate(layers, self.budget, codebook_bits, distortion, **more)
