"""The protocol of a quantization method: matrices and calibration statistics in, QuantizedTensors out."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor

from bayesq.calibration.inputs import INPUT_MOMENT
from bayesq.calibration.statistic import Statistic
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
        statistic: loads one of the layer's calibration statistics by name, when asked.
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
        self.statistic = _Counted.of(self.statistic, self)
        if self.prefix_statistic is not None:
            self.prefix_statistic = _Counted.of(self.prefix_statistic, self)

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
class _Counted:
    """Loads a layer's statistics and counts its dead columns."""

    load: Callable[[str], Tensor]
    fallbacks: dict[str, int]

    @classmethod
    def of(cls, load: Callable[[str], Tensor], layer: LayerProblem) -> "_Counted":
        return load if isinstance(load, cls) else cls(load, layer.fallbacks)

    def __call__(self, name: str) -> Tensor:
        tensor = self.load(name)
        if name == INPUT_MOMENT.name:
            self.fallbacks["dead_columns"] = int((tensor.diagonal(dim1=-2, dim2=-1) == 0).sum())
        return tensor


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
        statistics: those it reads, see `bayesq.calibration.statistic`.
        sequential: `LayerProblem.input_statistic` has the inputs behind the layers quantized before.
    """

    statistics: frozenset[Statistic]
    sequential: bool

    def quantize(
        self, layers: Sequence[LayerProblem], allocate: Allocate
    ) -> Iterator[tuple[LayerProblem, QuantizedTensor]]:
        """Yield every layer with its QuantizedTensor, in forward order."""
        ...


def stack_groups(matrices: Tensor) -> Tensor:
    """[g, r, ...] -> [g * r, ...]: rows of all groups under one another."""
    return matrices.reshape(matrices.shape[0] * matrices.shape[1], *matrices.shape[2:])


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
