"""The protocol of a quantization method: matrices and calibration statistics in, QuantizedTensors out."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor

from bayesq.quant.tensor import QuantizedTensor


@dataclass
class LayerProblem:
    """One layer to quantize.

    Attributes:
        name: module name.
        kind: class name, Linear or Conv2d.
        weight: [g, r, c] float32.
        prefix_statistic: the same with the layer's inputs taken behind its already quantized predecessors; None for
            methods that are not sequential.
        positions_per_channel: kernel positions kh * kw: that many neighbouring columns read one input channel.
        statistic: loads one of the layer's calibration statistics by name, from disk, when asked; see `STATISTICS`.
            Each is checked when it is read, see `check_statistic`.
        fallbacks: counters a method raises when it had to do something else than asked (result keys fallback/*);
            dead_columns, those that no calibration input reached, are counted whenever the input moment is read.
        notes: numbers about the layer for layers.csv: predicted_risk, achieved_risk, prior_precision and the like.
    """

    name: str
    kind: str
    weight: Tensor
    statistic: Callable[[str], Tensor]
    positions_per_channel: int = 1
    prefix_statistic: Callable[[str], Tensor] | None = None
    fallbacks: dict[str, int] = field(default_factory=dict)
    notes: dict[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.statistic = _Checked.of(self.statistic, self)
        if self.prefix_statistic is not None:
            self.prefix_statistic = _Checked.of(self.prefix_statistic, self)

    @property
    def rows(self) -> int:
        """All rows R = g * r."""
        return self.weight.shape[0] * self.weight.shape[1]

    @property
    def columns(self) -> int:
        """Columns c of each row."""
        return self.weight.shape[2]

    def input_statistic(self, kind: str) -> Tensor:
        """A statistic of the inputs that the layer will meet: behind the quantized prefix for sequential methods."""
        return (self.prefix_statistic or self.statistic)(kind)

    def count(self, fallback: str, times: int = 1) -> None:
        """Count a fallback."""
        self.fallbacks[fallback] = self.fallbacks.get(fallback, 0) + times


@dataclass(frozen=True)
class _Checked:
    """Loads a layer's statistics and checks each; a copy of the layer (`dataclasses.replace`) checks them once."""

    load: Callable[[str], Tensor]
    layer: str
    fallbacks: dict[str, int]

    @classmethod
    def of(cls, load: Callable[[str], Tensor], layer: LayerProblem) -> "_Checked":
        return load if isinstance(load, cls) else cls(load, layer.name, layer.fallbacks)

    def __call__(self, kind: str) -> Tensor:
        tensor = self.load(kind)
        check_statistic(self.layer, kind, tensor)
        if kind == "input_moment":
            self.fallbacks["dead_columns"] = int((tensor.diagonal(dim1=-2, dim2=-1) == 0).sum())
        return tensor


# Statistic name -> shape, for layers W[g, r, c]:
STATISTICS = {
    "input_moment": "[g, c, c]  A = E_n[x xT] over samples n = (example, position)",
    "input_magnitude": "[g, c]  E_n[|x|]",
    "gradient_moment": "[g, r, r]  G = E_example[sum_positions d dT]",
    "fisher_diagonal": "[g, r, c]  E_example[(dl/dW)^2], labels from the model's own predictive",
    "gradient_directions": "[k, g, r, c]  U with U UT close to the best rank-k part of E_example[g gT], g = dl/dW",
    "input_basis": "[g, c, c]  Q_A, eigenvectors of A in its columns",
    "gradient_basis": "[g, r, r]  Q_G, eigenvectors of G in its columns",
    "fisher_eigenvalues": "[g, r, c]  E_example[(Q_GT dl/dW Q_A)^2]",
}


# Expected squared error T_b of a code of so many bits in a layer, for weights of unit variance.
Distortion = Callable[[LayerProblem, int], float]


class Allocate(Protocol):
    """The run's allocator with its budget, the same for every method."""

    def __call__(
        self, layers: Sequence[LayerProblem], codebook_bits: int = 0, distortion: Distortion | None = None
    ) -> Mapping[str, Tensor]:
        """Row widths uint8 [R] of every layer by name.

        Args:
            codebook_bits: what the method's codebooks will take on disk; counted against the budget.
            distortion: of the method's codes, for allocators that predict risk; None = of plain scalar ones.
        """
        ...


class Method(Protocol):
    """What a method's YAML instantiates.

    Attributes:
        statistics: names of the statistics it reads.
        sequential: `LayerProblem.input_statistic` has the inputs behind the layers quantized before.
    """

    statistics: frozenset[str]
    sequential: bool

    def quantize(
        self, layers: Sequence[LayerProblem], allocate: Allocate
    ) -> Iterator[tuple[LayerProblem, QuantizedTensor]]:
        """Yield every layer with its QuantizedTensor, in forward order."""
        ...


def stack_groups(matrices: Tensor) -> Tensor:
    """[g, r, ...] -> [g * r, ...]: rows of all groups under one another."""
    return matrices.reshape(matrices.shape[0] * matrices.shape[1], *matrices.shape[2:])


# Statistics that are means of squares or of absolute values; of moments the diagonals are.
NOT_NEGATIVE = ("input_magnitude", "fisher_diagonal", "fisher_eigenvalues")
MOMENTS = ("input_moment", "gradient_moment")


def check_statistic(layer: str, kind: str, tensor: Tensor) -> None:
    """Refuse statistics no method can use, without a mask of their size.

    Args:
        layer: its name, for the message.
        kind: one of STATISTICS.

    Raises:
        ValueError: NaN or infinite entries, or a mean square below zero.
    """
    if not tensor.numel():
        return
    lowest, highest = torch.aminmax(tensor)
    if not (torch.isfinite(lowest) and torch.isfinite(highest)):
        what = "gradients" if "gradient" in kind or "fisher" in kind else "inputs"
        raise ValueError(
            f"layer {layer}: its {kind} has NaN or infinite entries: with these calibration examples its {what} are "
            "too large for float32, or the network computes NaN"
        )
    squares = tensor.diagonal(dim1=-2, dim2=-1) if kind in MOMENTS else tensor if kind in NOT_NEGATIVE else None
    if squares is not None and bool((squares < 0).any()):
        raise ValueError(f"layer {layer}: its {kind} has a mean square below zero")


@contextmanager
def naming(layer: LayerProblem) -> Iterator[None]:
    """Put the layer's name before what a numerical routine refuses.

    Raises:
        ValueError: what the block raised, a failed factorization of LAPACK's included.
    """
    try:
        yield
    except (ValueError, torch.linalg.LinAlgError) as error:  # type: ignore[attr-defined]
        text = str(error)
        if f"layer {layer.name}" in text:
            raise
        raise ValueError(f"layer {layer.name}: {text}") from error


def check_finite(layer: LayerProblem) -> None:
    """Refuse weights no grid can hold.

    Raises:
        ValueError: NaN or infinite weights.
    """
    if not torch.isfinite(layer.weight).all():
        raise ValueError(f"layer {layer.name}: the weights have NaN or infinite entries")
