"""Second moments of a layer's inputs in two networks in step: the full-precision one, and the one behind the prefix.

x [g, c] is the layer's input in full precision and x' its input behind the layers that are quantized already, at the
same example and position.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import groupby
from typing import ClassVar

import torch
from torch import Tensor

from bayesq.calibration.statistic import Source, Statistic

# Of every 4 RUN examples, the second RUN ones are held out: lambda is chosen on examples to which the targets were
# not fitted. Neighbours stay together, because a slice needs no copy.
RUN = 4


@dataclass
class PairedSums:
    """Running sums over the samples that are not held out, and over those that are (the first dimension).

    Attributes:
        prefix: sum of x' x'T [2, g, c, c].
        cross: sum of x x'T [2, g, c, c].
        full_sum, prefix_sum: sums of x and of x' [2, g, c].
        count: samples [2].
    """

    prefix: Tensor | None = None
    cross: Tensor | None = None
    full_sum: Tensor | None = None
    prefix_sum: Tensor | None = None
    count: list[int] = field(default_factory=lambda: [0, 0])
    _all: dict[bool, "PairedMoments"] = field(default_factory=dict)

    def add(self, x: Tensor, prefix: Tensor, count: Tensor, first: int) -> None:
        """Add the samples of some examples.

        Args:
            x, prefix: x and x' [e, g, l, c], zero where padding is.
            count: samples of each example [e].
            first: how many examples came before them.
        """
        if self.prefix is None:
            g, c = x.shape[1], x.shape[3]
            self.prefix, self.cross = x.new_zeros(2, g, c, c), x.new_zeros(2, g, c, c)
            self.full_sum, self.prefix_sum = x.new_zeros(2, g, c), x.new_zeros(2, g, c)
        assert self.cross is not None and self.full_sum is not None and self.prefix_sum is not None
        self._all = {}
        for held_out, examples in groupby(range(len(x)), lambda i: is_held_out(first + i)):
            k, indices = int(held_out), list(examples)
            chosen = slice(indices[0], indices[-1] + 1)
            a, b = (part[chosen].transpose(0, 1).flatten(1, 2) for part in (x, prefix))
            self.prefix[k] += b.transpose(1, 2) @ b
            self.cross[k] += a.transpose(1, 2) @ b
            self.full_sum[k] += a.sum(1)
            self.prefix_sum[k] += b.sum(1)
            self.count[k] += int(count[chosen].sum())

    def moments(self, centred: bool) -> "PairedMoments":
        """Means over all samples, computed once."""
        if centred not in self._all:
            self._all[centred] = self._moments(centred, (0, 1))
        return self._all[centred]

    def split(self, centred: bool) -> tuple["PairedMoments", "PairedMoments"]:
        """Means over the samples that are not held out, and over those that are; without either, both are over all."""
        if 0 in self.count:
            return (self.moments(centred),) * 2
        return self._moments(centred, (0,)), self._moments(centred, (1,))

    def _moments(self, centred: bool, parts: Sequence[int]) -> "PairedMoments":
        """Means of some parts in float64 on the CPU; if asked for, about the means over all samples."""
        assert self.prefix is not None and self.cross is not None
        assert self.full_sum is not None and self.prefix_sum is not None
        count = sum(self.count[k] for k in parts)
        sums = self.prefix, self.cross, self.full_sum, self.prefix_sum
        m, c, a, b = (_total(x, parts).cpu().div_(count) for x in sums)
        full_mean, prefix_mean = (x.double().sum(0).cpu() / sum(self.count) for x in (self.full_sum, self.prefix_sum))
        if centred:  # E[(x' - p)(x' - p)T] and E[(x - f)(x' - p)T] of a part with means a and b
            half = b - prefix_mean / 2
            _subtract(m, (half, prefix_mean), (prefix_mean, half))
            _subtract(c, (a, full_mean), (prefix_mean, b - prefix_mean))
        return PairedMoments(m, c, full_mean, prefix_mean)


@dataclass(frozen=True)
class CrossMoment(Statistic):
    """C = E[x x'T] [g, c, c]: a method that reads it handles both inputs itself, and gets W, not a target."""

    name: ClassVar[str] = "cross_moment"
    source: ClassVar[Source] = Source.PAIRED_INPUTS

    def shape(self, groups: int, rows: int, columns: int) -> tuple[int, ...]:
        """[g, c, c]."""
        return groups, columns, columns


CROSS_MOMENT = CrossMoment()


@dataclass(frozen=True)
class PairedMoments:
    """Mean moments of a layer's inputs in two networks, float64 on the CPU.

    Attributes:
        prefix: M = E[x' x'T] [g, c, c].
        cross: C = E[x x'T] [g, c, c].
        full_mean, prefix_mean: E[x] and E[x'] [g, c].
    """

    prefix: Tensor
    cross: Tensor
    full_mean: Tensor
    prefix_mean: Tensor


def is_held_out(example: int) -> bool:
    """Whether an example, by its place among all, is in the part on which lambda is chosen."""
    return example // RUN % 4 == 1


def _total(sums: Tensor, parts: Sequence[int]) -> Tensor:
    """sum_k sums[k] in float64. `Tensor.sum` over the first dimension gives the same and takes longer."""
    total = sums[parts[0]].to(torch.float64, copy=True)
    for k in parts[1:]:
        total += sums[k]
    return total


def _subtract(matrix: Tensor, left: Sequence[Tensor], right: Sequence[Tensor]) -> None:
    """matrix [g, c, c] -= sum_k left_k right_kT, in place."""
    matrix.baddbmm_(torch.stack(tuple(left), -1), torch.stack(tuple(right), -2), alpha=-1)
