"""Statistics of a layer's inputs x [g, c] over samples n = (example, position)."""

from abc import abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from bayesq.calibration.statistic import Source, Statistic


@dataclass(frozen=True)
class InputStatistic(Statistic):
    """A mean over input samples."""

    source: ClassVar[Source] = Source.INPUTS

    @abstractmethod
    def contribution(self, values: Tensor) -> Tensor:
        """Sum [g, ...] over the samples [g, n, c]."""

    def finish(self, total: Tensor, count: Tensor | int, shape: tuple[int, int, int]) -> Tensor:
        """Mean over the samples; a group of a stack that no sample reached gets the mean over all groups."""
        counts = torch.as_tensor(count)
        if counts.numel() == 1:
            return total.div_(int(counts))
        counts = counts.reshape(-1, *[1] * (total.dim() - 1)).to(total.device)
        pooled = total.sum(0, keepdim=True) / counts.sum()
        return torch.where(counts > 0, total / counts.clamp_min(1), pooled)


@dataclass(frozen=True)
class InputMoment(InputStatistic):
    """A = E_n[x xT]  [g, c, c]."""

    name: ClassVar[str] = "input_moment"

    def shape(self, groups: int, rows: int, columns: int) -> tuple[int, ...]:
        """[g, c, c]."""
        return groups, columns, columns

    def neutral(self, groups: int, rows: int, columns: int) -> Tensor:
        """The identity."""
        return identities(groups, columns)

    def contribution(self, values: Tensor) -> Tensor:
        """sum_n x xT."""
        return values.transpose(1, 2) @ values

    def squares(self, tensor: Tensor) -> Tensor:
        """The diagonal."""
        return tensor.diagonal(dim1=-2, dim2=-1)


@dataclass(frozen=True)
class InputMagnitude(InputStatistic):
    """E_n[|x|]  [g, c]."""

    name: ClassVar[str] = "input_magnitude"

    def shape(self, groups: int, rows: int, columns: int) -> tuple[int, ...]:
        """[g, c]."""
        return groups, columns

    def contribution(self, values: Tensor) -> Tensor:
        """sum_n |x|."""
        return values.abs().sum(1)

    def squares(self, tensor: Tensor) -> Tensor:
        """All entries."""
        return tensor


INPUT_MOMENT, INPUT_MAGNITUDE = InputMoment(), InputMagnitude()


@dataclass(frozen=True)
class Eigenbasis(Statistic):
    """Q, whose columns are the eigenvectors of the one moment it requires.

    They are stored, not recomputed: eigenvectors of nearly equal eigenvalues are arbitrary up to a rotation, and the
    Fisher's eigenvalues are only valid in the basis in which they were measured.
    """

    source: ClassVar[Source] = Source.STATISTICS

    def shape(self, groups: int, rows: int, columns: int) -> tuple[int, ...]:
        """The shape of the moment."""
        return self.requires[0].shape(groups, rows, columns)

    def neutral(self, groups: int, rows: int, columns: int) -> Tensor:
        """The identity."""
        return self.requires[0].neutral(groups, rows, columns)

    def derive(self, required: Mapping[str, Tensor]) -> Tensor:
        """Eigenvectors of the moment, group by group."""
        moment = required[self.requires[0].name]
        vectors: Tensor = torch.linalg.eigh(moment.to(torch.float64))[1]
        return vectors.to(torch.float32)


@dataclass(frozen=True)
class InputBasis(Eigenbasis):
    """Q_A  [g, c, c], eigenvectors of A."""

    name: ClassVar[str] = "input_basis"
    requires: ClassVar[tuple[Statistic, ...]] = (INPUT_MOMENT,)


INPUT_BASIS = InputBasis()


def identities(groups: int, size: int) -> Tensor:
    """Identity matrices [g, n, n]."""
    return torch.eye(size).expand(groups, size, size).contiguous()
