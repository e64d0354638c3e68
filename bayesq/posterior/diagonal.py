"""Diagonal Laplace, the paper's default: P = diag(F_ii + tau / N)."""

from dataclasses import dataclass

import torch
from torch import Tensor

from bayesq.contract import LayerProblem
from bayesq.fisher import FISHER_DIAGONAL
from bayesq.posterior.base import Laplace, LayerPosterior, Shape
from bayesq.posterior.factors import standard_normal
from bayesq.whitening import FLOAT64_BYTES


@dataclass
class DiagonalPosterior(LayerPosterior):
    """P_i = F_ii + tau / N.

    Attributes:
        precision: [g, r, c] P, float64.
    """

    precision: Tensor
    num_data: int
    prior_precision: float
    effective_parameters: float | None

    def diagonal(self) -> Tensor:
        """[g, r, c] P itself."""
        return self.precision

    def variance(self) -> Tensor:
        """[g, r, c] posterior variance of each weight."""
        return 1 / (self.num_data * self.precision)

    def risk(self, delta: Tensor) -> Tensor:
        """[g, r] contributions of the rows to the risk."""
        return 0.5 * (self.precision * delta.to(self.precision.dtype).square()).sum(-1)

    def row_risk(self, delta: Tensor) -> Tensor:
        """[g, r], the same as `risk`: rows do not interact."""
        return self.risk(delta)

    def sample(self, generator: torch.Generator) -> Tensor:
        """[g, r, c] one draw of w - mu."""
        return standard_normal(self.precision.shape, generator) * self.variance().sqrt()

    def whiten(self, weight: Tensor) -> Tensor:
        """z_i = sqrt(P_i) w_i."""
        return self.precision.sqrt() * weight.to(torch.float64)


class Diagonal(Laplace):
    """Diagonal Laplace, the paper's default; arguments as in `Laplace`."""

    statistics = frozenset({FISHER_DIAGONAL})

    def spectrum(self, layer: LayerProblem) -> Tensor:
        """[g, r, c] F_ii."""
        return layer.statistic("fisher_diagonal").to(torch.float64)

    def fit_bytes(self, shape: Shape) -> int:
        """Memory of a fit: the Fisher, the precision and a temporary."""
        g, r, c = shape
        return FLOAT64_BYTES * g * 3 * r * c

    def fit(self, layer: LayerProblem) -> DiagonalPosterior:
        """Posterior of one layer."""
        tau, gamma = self.prior(layer)
        return DiagonalPosterior(self.spectrum(layer) + tau / self.num_data, self.num_data, tau, gamma)
