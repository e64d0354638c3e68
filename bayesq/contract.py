"""The protocol of a quantization method: matrices and calibration statistics in, QuantizedTensors out."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Protocol, TypeVar

import torch
from torch import Tensor

from bayesq.calibration.block_samples import Block
from bayesq.calibration.inputs import INPUT_MOMENT
from bayesq.calibration.statistic import Statistic
from bayesq.errors import Refused
from bayesq.progress import bar
from bayesq.quant.rotation import Rotation
from bayesq.quant.tensor import QuantizedTensor

T = TypeVar("T")


@dataclass
class LayerProblem:
    """One layer to quantize.

    Attributes:
        name: module name.
        kind: of the layer, such as Linear, Conv2d or Experts; see `bayesq.quant.layers.kind_of`.
        weight: [g, r, c] float32.
        statistic: loads one of the layer's calibration statistics by name, when asked.
        prefix_statistic: the same for statistics of the layer's inputs behind its already quantized predecessors; None
            where the method reads full-precision inputs.
        positions_per_channel: kernel positions kh * kw, the number of neighbouring columns that read one channel.
        rotation: of the columns; weight and statistics are rotated already (`bayesq.rotated`). None: not rotated.
        block: collects the samples of the block that the layer belongs to; None unless it is the layer's turn and the
            method declares BLOCK_SAMPLES.
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
    block: Callable[[], Block] | None = None
    rotation: Rotation | None = None
    fallbacks: dict[str, int] = field(default_factory=dict)
    notes: dict[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.statistic = CountedStatistics.of(self.statistic, self)
        if self.prefix_statistic is not None:
            self.prefix_statistic = CountedStatistics.of(self.prefix_statistic, self)

    @property
    def rows(self) -> int:
        """All rows R = g * r."""
        return self.weight.shape[0] * self.weight.shape[1]

    @property
    def columns(self) -> int:
        """Columns c of each row."""
        return self.weight.shape[2]

    def input_statistic(self, kind: str) -> Tensor:
        """A statistic of the inputs for rounding: behind the quantized prefix if the run's `inputs` ask for it."""
        return (self.prefix_statistic or self.statistic)(kind)

    def count(self, fallback: str, times: int = 1) -> None:
        """Count a fallback."""
        self.fallbacks[fallback] = self.fallbacks.get(fallback, 0) + times


@dataclass(frozen=True)
class CountedStatistics:
    """Loads a layer's statistics and counts its dead columns.

    Attributes:
        load: gives a statistic by name.
        fallbacks: of the layer.
        readable: names that may be read; None = all.
        reader: who reads, for the message.
    """

    load: Callable[[str], Tensor]
    fallbacks: dict[str, int]
    readable: frozenset[str] | None = None
    reader: str = ""

    @classmethod
    def of(cls, load: Callable[[str], Tensor], layer: LayerProblem) -> "CountedStatistics":
        """The statistics as CountedStatistics, unless they already are."""
        return load if isinstance(load, cls) else cls(load, layer.fallbacks)

    def limited(self, readable: frozenset[str], reader: str) -> "CountedStatistics":
        """The same for a reader that declared only some of them."""
        return replace(self, readable=readable, reader=reader)

    def __call__(self, name: str) -> Tensor:
        """The statistic of that name.

        Raises:
            Refused: the reader did not declare it.
        """
        if self.readable is not None and name not in self.readable:
            raise Refused(f"{self.reader} reads {name}: add it to {self.reader}.statistics")
        tensor = self.load(name)
        if name == INPUT_MOMENT.name:
            self.fallbacks["dead_columns"] = int((tensor.diagonal(dim1=-2, dim2=-1) == 0).sum())
        return tensor


# From a layer and a width to the expected squared error T_b of the code, for weights of unit variance.
Distortion = Callable[[LayerProblem, int], float]
# From a layer and a width to the bits that a row stores beside its codes, beyond an affine row's scale and zero point.
RowBits = Callable[[LayerProblem, int], int]


class Allocate(Protocol):
    """The run's allocator with its budget, the same for every method."""

    def __call__(
        self,
        layers: Sequence[LayerProblem],
        codebook_bits: int = 0,
        distortion: Distortion | None = None,
        row_bits: RowBits | None = None,
        scales: int = 0,
    ) -> Mapping[str, Tensor]:
        """Row widths uint8 [R] of every layer by name.

        Args:
            codebook_bits: what the method's codebooks will take on disk; counted against the budget.
            distortion: of the method's codes, for allocators that predict risk; None = of uniform levels.
            row_bits: what rows of each width cost beside their codes, for the same allocators and for budgets of
                stored bits; None = nothing.
            scales: bits of column scales, and of group scales beyond one a row; see `Budget.capacity`.
        """
        ...


class StreamBudget(Protocol):
    """The budget of a run with codec=entropy, in place of `Allocate`."""

    def steps(self, layers: Sequence[LayerProblem]) -> Mapping[str, Tensor]:
        """Relative steps float64 [R] > 0 of every layer's rows by name, from the run's allocator."""
        ...

    def capacity(self, layers: Sequence[LayerProblem], overhead: float, scales: float = 0) -> float:
        """Bits that all streams together may take, if `overhead` bits are stored beside them; see `Budget.capacity`."""
        ...


class Progress(Protocol):
    """Shows how far a loop is; see `bayesq.progress.bar`."""

    def __call__(self, items: Iterable[T], what: str) -> Iterable[T]:
        """The items, one after the other."""
        ...


@dataclass(frozen=True)
class Context:
    """What a method gets besides layers and budget.

    Attributes:
        device: where the network is, and heavy work may take place.
        generator: CPU generator for everything random, seeded by the run's seed; nothing else draws from it.
        progress: wraps a loop to show how far it is.
        stream: the budget with codec=entropy; all widths are then 8, and `allocate` is not called. Else None.
    """

    device: torch.device
    generator: torch.Generator
    progress: Progress = bar
    stream: StreamBudget | None = None

    @classmethod
    def of_seed(cls, seed: int, device: torch.device | str = "cpu") -> "Context":
        """A context whose generator starts from `seed`."""
        return cls(torch.device(device), torch.Generator().manual_seed(seed))


# Which inputs of a layer `LayerProblem.input_statistic` describes: those in the full-precision network, those behind
# the layers that are quantized before it, or the latter with the target of `bayesq.target` as the weight.
INPUTS = ("full", "prefix", "paired")
# How codes are stored: with the same bits for all codes of a row, or entropy coded (`bayesq.entropy`).
CODECS = ("fixed", "entropy")


class Method(Protocol):
    """What a method's YAML instantiates. `bayesq.loop.quantize_layers` calls it.

    Attributes:
        statistics: those it reads, see `bayesq.calibration.statistic`; no other can be read.

    Optional attributes: `entropy = True` if the method can read `Context.stream` (codec=entropy), `fixed = False` if it
    cannot do without it, `rotates = True` if it rotates weights itself. With codec=entropy, `prepare` can also read the
    full-precision statistics of the optional attribute `entropy_statistics`, whatever the run's `inputs`, but not those
    of rotated columns.
    """

    statistics: frozenset[Statistic]

    def prepare(self, layers: Sequence[LayerProblem], allocate: Allocate, context: Context) -> Mapping[str, Tensor]:
        """Choose the row widths of all layers, and whatever else needs all of them: tables, grids, refits.

        Args:
            layers: in forward order. Inputs behind the quantized prefix do not exist yet and cannot be read.
            allocate: the run's allocator with its budget.
            context: see `Context`.

        Returns:
            row widths uint8 [R] of every layer by name, as `allocate` gives them.
        """
        ...

    def quantize_layer(self, layer: LayerProblem, width: Tensor, context: Context) -> QuantizedTensor:
        """Round one layer; called once for each, in forward order.

        A run first rehearses with a second instance of the method, on small random layers.

        Args:
            layer: its `input_statistic` gives what the run's `inputs` ask for, during this call only; with paired
                inputs its weight is the target.
            width: uint8 [R] of `prepare`.
            context: see `Context`.
        """
        ...


def stack_groups(matrices: Tensor) -> Tensor:
    """[g, r, ...] -> [g * r, ...]: rows of all groups under one another."""
    return matrices.reshape(matrices.shape[0] * matrices.shape[1], *matrices.shape[2:])


@contextmanager
def naming(layer: LayerProblem) -> Iterator[None]:
    """Put the layer's name before what a numerical routine refuses.

    Raises:
        Refused: what the block raised, a failed factorization of LAPACK's included.
    """
    try:
        yield
    except (Refused, torch.linalg.LinAlgError) as error:  # type: ignore[attr-defined]
        text = str(error)
        if f"layer {layer.name}" in text:
            raise
        raise Refused(f"layer {layer.name}: {text}") from error


def check_finite(layer: LayerProblem) -> None:
    """Refuse weights that no grid can represent.

    Raises:
        Refused: NaN or infinite weights.
    """
    if not torch.isfinite(layer.weight).all():
        raise Refused(f"layer {layer.name}: the weights have NaN or infinite entries")
