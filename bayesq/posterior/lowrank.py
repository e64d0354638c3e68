"""Diagonal plus low rank: P = D + U UT, U the main directions of the examples' gradients."""

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from bayesq.contract import LayerProblem
from bayesq.errors import Refused
from bayesq.fisher import FISHER_DIAGONAL, GradientDirections
from bayesq.posterior.base import Laplace, LayerPosterior, Shape
from bayesq.posterior.factors import standard_normal
from bayesq.whitening import FLOAT64_BYTES


@dataclass
class LowRankPosterior(LayerPosterior):
    """P = D + U UT, D = diag(max(F_ii - sum_k U_ik^2, 0) + tau/N).

    With V = D^-1/2 U it is D^1/2 (I + V VT) D^1/2, whose powers only need the eigenvalues s and eigenvectors Q of the
    small matrix VT V [k, k]:  f(I + V VT) = f(1) I + V Q diag((f(1 + s) - f(1)) / s) QT VT.

    Attributes:
        residual: [g, r, c] d > 0, including tau / N, float64.
        directions: [k, g, r, c] columns of U, float64.
    """

    residual: Tensor
    directions: Tensor
    num_data: int
    prior_precision: float
    effective_parameters: float | None

    @cached_property
    def _inner(self) -> tuple[Tensor, Tensor, Tensor]:
        """V [k, D], and s [k], Q [k, k] of its Gram matrix."""
        v = (self.directions / self.residual.sqrt()).flatten(1)
        s, q = torch.linalg.eigh(v @ v.T)
        return v, s.clamp(min=0), q

    def diagonal(self) -> Tensor:
        """[g, r, c] d_i + sum_k U_ik^2."""
        return self.residual + self.directions.square().sum(0)

    def variance(self) -> Tensor:
        """[g, r, c] posterior variance of each weight, (1 - sum_k (V Q)_ik^2 / (1 + s_k)) / (N d_i)."""
        v, s, q = self._inner
        explained = ((q / (1 + s).sqrt()).T @ v).square().sum(0).reshape(self.residual.shape)
        # The subtraction may lose all digits of a weight that the directions determine; 1 / P_ii is a lower bound.
        return torch.maximum((1 - explained) / self.residual, 1 / self.diagonal()) / self.num_data

    def risk(self, delta: Tensor) -> Tensor:
        """[g, r] contributions of the rows to the risk."""
        d = delta.to(torch.float64)
        along = self.directions.flatten(1) @ d.flatten()
        coupled: Tensor = torch.tensordot(along, self.directions, dims=1)
        return 0.5 * ((self.residual * d + coupled) * d).sum(-1)

    def row_risk(self, delta: Tensor) -> Tensor:
        """[g, r] 1/2 (sum_c d_rc delta_rc^2 + sum_k (sum_c U_krc delta_rc)^2)."""
        d = delta.to(torch.float64)
        return 0.5 * ((self.residual * d.square()).sum(-1) + (self.directions * d).sum(-1).square().sum(0))

    def whiten(self, weight: Tensor) -> Tensor:
        """z = (I + V VT)^1/2 D^1/2 w, V = D^-1/2 U."""
        scaled = self.residual.sqrt() * weight.to(torch.float64)
        _, s, _ = self._inner
        return self._along_directions(scaled, 1 / (1 + (1 + s).sqrt()))

    def sample(self, generator: torch.Generator) -> Tensor:
        """[g, r, c] one draw D^-1/2 (I + V VT)^-1/2 e / sqrt(N) of w - mu, e standard normal."""
        _, s, _ = self._inner
        root = (1 + s).sqrt()
        draw = self._along_directions(standard_normal(self.residual.shape, generator), -1 / (root * (1 + root)))
        return draw / (self.num_data * self.residual).sqrt()

    def _along_directions(self, x: Tensor, factor: Tensor) -> Tensor:
        """(I + V Q diag(factor) QT VT) x for x [g, r, c]."""
        v, _, q = self._inner
        moved: Tensor = x + (v.T @ (q @ (factor * (q.T @ (v @ x.flatten()))))).reshape(x.shape)
        return moved


class LowRank(Laplace):
    """Diagonal plus low rank: the main directions of the examples' gradients keep their correlations.

    Args:
        rank: k, directions of each layer.

    The others as in `Laplace`; prior_precision must not be 0: P would be singular where the directions explain all of a
    weight's Fisher.
    """

    def __init__(
        self,
        prior_precision: float | None,
        num_data: int,
        samples: int | None,
        rank: int,
        examples: int | None = None,
        prior_scope: str = "layer",
        likelihood: str = "categorical",
        draws: str = "signs",
    ) -> None:
        super().__init__(prior_precision, num_data, samples, examples, prior_scope, likelihood, draws)
        if prior_precision == 0:
            raise Refused("posterior.prior_precision=0: must be above 0 for posterior=lowrank")
        self.rank = rank
        self.statistics = frozenset({FISHER_DIAGONAL, GradientDirections(rank)})

    def _parts(self, layer: LayerProblem) -> tuple[Tensor, Tensor]:
        """F_ii - sum_k U_ik^2 [g, r, c] and U [k, g, r, c].

        Raises:
            Refused: the statistic has fewer directions than asked for.
        """
        directions = layer.statistic("gradient_directions")
        if len(directions) < self.rank:
            raise Refused(f"posterior.rank={self.rank}: the calibration has {len(directions)} gradient directions")
        directions = directions[: self.rank].to(torch.float64)
        fisher = layer.statistic("fisher_diagonal").to(torch.float64)
        return (fisher - directions.square().sum(0)).clamp(min=0), directions

    def spectrum(self, layer: LayerProblem) -> Tensor:
        """[D + k] eigenvalues of the two parts of F = D + U UT, one after the other.

        gamma = tr f(F) with f(x) = N x / (N x + tau), which is concave and rises from f(0) = 0. So the gamma of these
        eigenvalues is at least that of F (Rotfel'd's inequality), and at most k larger, since U UT adds at most k.
        """
        residual, directions = self._parts(layer)
        flat = directions.flatten(1)
        return torch.cat([residual.flatten(), torch.linalg.eigvalsh(flat @ flat.T)])

    def fit_bytes(self, shape: Shape) -> int:
        """Memory of a fit: the directions, as the statistic and in float64, and the diagonals."""
        g, r, c = shape
        return FLOAT64_BYTES * g * (2 * self.rank + 3) * r * c

    def fit(self, layer: LayerProblem) -> LowRankPosterior:
        """Posterior of one layer."""
        tau, gamma = self.prior(layer)
        residual, directions = self._parts(layer)
        return LowRankPosterior(residual + tau / self.num_data, directions, self.num_data, tau, gamma)
