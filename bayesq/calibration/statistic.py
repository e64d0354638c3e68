"""The base class of all calibration statistics.

A layer is a stack of matrices W[g, r, c]. At a sample n = (example, position) it reads x [g, c], and d [g, r] is the
gradient at its output. An example's weight gradient is dl/dW = sum_positions d xT, [g, r, c].

A statistic is a sum over samples or examples, turned into the result by `finish`; or it follows from other statistics.
To add one, write a class and declare an instance in the `statistics` of a method, posterior or allocator, which then
reads it by name: `layer.statistic("input_moment")`. No other code has to change.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, fields
from enum import Enum
from typing import Any, ClassVar

import torch
from torch import Tensor

from bayesq.calibration.samples import Pairs
from bayesq.errors import Refused


class Source(Enum):
    """What a statistic is computed from, with the shape of the argument of `Statistic.contribution`."""

    INPUTS = "inputs"  # input samples [g, n, c]
    OUTPUT_GRADIENTS = "output gradients"  # gradients at the output [g, n, r]
    WEIGHT_GRADIENTS = "weight gradients"  # weight gradients of single examples [e, g, r, c]
    STATISTICS = "statistics"  # other statistics; no pass over the examples
    PAIRED_INPUTS = "paired inputs"  # inputs in full precision and behind the quantized prefix; `inputs=paired` only


@dataclass(frozen=True)
class Statistic(ABC):
    """One kind of calibration statistic; fields of a subclass are its parameters.

    Attributes:
        name: used by methods, and as file name.
        source: what it is computed from.
        requires: statistics that are computed first: this one follows from them, or reads their values while it is
            collected.
        alone: its sums are many times larger than others'; it gets separate passes.
        format: part of the cache's key. Change it when the statistic's numbers change.
    """

    name: ClassVar[str]
    source: ClassVar[Source]
    requires: ClassVar[tuple["Statistic", ...]] = ()
    alone: ClassVar[bool] = False
    format: ClassVar[str] = "6"

    @abstractmethod
    def shape(self, groups: int, rows: int, columns: int) -> tuple[int, ...]:
        """Shape of the finished statistic of a layer W[g, r, c]."""

    def neutral(self, groups: int, rows: int, columns: int) -> Tensor:
        """Statistic of a layer that no example reached: ones; second moments return the identity."""
        return torch.ones(self.shape(groups, rows, columns))

    def derive(self, required: Mapping[str, Tensor]) -> Tensor:
        """The statistic of a layer from its `requires` by name, for Source.STATISTICS."""
        raise NotImplementedError(f"{type(self).__name__} does not follow from other statistics")

    def gradients(self, pairs: Pairs, required: Mapping[str, Tensor]) -> Tensor:
        """Weight gradients [e, g, r, c] for `contribution`, in any coordinates; the caller may change them.

        Args:
            pairs: inputs and output gradients of a few examples.
            required: the layer's `requires` by name, on the device of the gradients.
        """
        return pairs.weight_gradients()

    def contribution(self, values: Tensor) -> Tensor:
        """What some samples or examples add to the running sum; `Source` has the shape of `values`.

        The result is [g, ...] for INPUTS and OUTPUT_GRADIENTS. Weight gradients may be overwritten.
        """
        raise NotImplementedError(f"{type(self).__name__} is not a sum over samples or examples")

    def add(self, total: Tensor | None, contribution: Tensor) -> Tensor:
        """The running sum with a contribution; `total` is None at first and may be overwritten."""
        if total is None:
            return contribution
        total += contribution
        return total

    def finish(self, total: Tensor, count: Tensor | int, shape: tuple[int, int, int]) -> Tensor:
        """The statistic from the running sum; by default the mean.

        Args:
            total: running sum; may be overwritten.
            count: number of examples; for INPUTS, of samples, or numbers [g] of samples of each group.
            shape: g, r, c of the layer.
        """
        return total.div_(count)

    def squares(self, tensor: Tensor) -> Tensor | None:
        """The entries of the statistic that cannot be negative, if any."""
        return None

    def sum_bytes(self, groups: int, rows: int, columns: int) -> int:
        """Memory of a layer's running sum, and of the statistics read while it is collected."""
        reads = self.requires if self.source is not Source.STATISTICS else ()
        shapes = [statistic.shape(groups, rows, columns) for statistic in (self, *reads)]
        return 4 * sum(map(math.prod, shapes))

    @property
    def backward(self) -> bool:
        """Whether it depends on gradients, and so on all settings of the backward passes."""
        gradients = self.source in (Source.OUTPUT_GRADIENTS, Source.WEIGHT_GRADIENTS)
        return gradients or any(statistic.backward for statistic in self.requires)

    @property
    def depth(self) -> int:
        """How many statistics have to be computed before it, one after the other."""
        return max((1 + statistic.depth for statistic in self.requires), default=0)

    @property
    def parameters(self) -> dict[str, Any]:
        """The fields by name."""
        return {field.name: getattr(self, field.name) for field in fields(self)}

    def check(self, layer: str, tensor: Tensor) -> None:
        """Refuse values that no method can use, without the memory of a mask.

        Args:
            layer: its name, for the message.
            tensor: the layer's statistic.

        Raises:
            Refused: NaN or infinite entries, or a mean square below zero.
        """
        if not tensor.numel():
            return
        lowest, highest = torch.aminmax(tensor)
        if not (torch.isfinite(lowest) and torch.isfinite(highest)):
            what = "gradients" if self.backward else "inputs"
            raise Refused(
                f"layer {layer}: its {self.name} has NaN or infinite entries: with these calibration examples its "
                f"{what} are too large for float32, or the network computes NaN"
            )
        squares = self.squares(tensor)
        if squares is not None and bool((squares < 0).any()):
            raise Refused(f"layer {layer}: its {self.name} has a mean square below zero")


@dataclass(frozen=True)
class LayerStatistics:
    """One layer's statistics by name, each checked when it is read.

    Attributes:
        layer: its name.
        statistics: by name.
        load: reads one.
    """

    layer: str
    statistics: Mapping[str, Statistic]
    load: Callable[[Statistic], Tensor]

    def __call__(self, name: str) -> Tensor:
        """A statistic by its name.

        Raises:
            Refused: it was not declared, or see `Statistic.check`.
        """
        if name not in self.statistics:
            raise Refused(
                f"layer {self.layer}: statistic {name} was not computed, only {', '.join(self.statistics) or 'none'}: "
                "declare it in `statistics` of the method, posterior or allocator"
            )
        tensor = self.load(self.statistics[name])
        self.statistics[name].check(self.layer, tensor)
        return tensor


def with_required(statistics: Iterable[Statistic]) -> dict[str, Statistic]:
    """The statistics and all they need, by name.

    Raises:
        Refused: two different statistics have the same name.
    """
    by_name: dict[str, Statistic] = {}
    waiting = list(statistics)
    while waiting:
        statistic = waiting.pop()
        if by_name.setdefault(statistic.name, statistic) != statistic:
            raise Refused(f"two statistics are called {statistic.name}: {statistic} and {by_name[statistic.name]}")
        waiting += statistic.requires
    return by_name


def families(statistics: Iterable[Statistic]) -> list[list[Statistic]]:
    """The statistics and all they need, in groups that are computed together, each after those it needs.

    Within a family, those of inputs come first, then those of output gradients, then by name.
    """
    ordered: dict[tuple[int, bool, bool], list[Statistic]] = {}
    every = with_required(statistics).values()
    for one in sorted(every, key=lambda one: (one.depth, one.alone, one.source.value, one.name)):
        ordered.setdefault((one.depth, one.alone, one.source is Source.STATISTICS), []).append(one)
    return list(ordered.values())
