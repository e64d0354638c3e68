"""Gaussian posteriors over weights: Laplace approximations with the true Fisher (SPEC section 1).

    q(w) = N(mu, (N P)^-1),   P = F + (tau / N) I

mu are the trained weights, F the Fisher of the loss in nats per example, N the number of data the posterior counts,
tau the prior precision. Deploying w_hat instead of w ~ q raises the expected loss by

    R(w_hat) = 1/2 E_q[(w - w_hat)T P (w - w_hat)] = 1/2 (mu - w_hat)T P (mu - w_hat) + const   nats per example,

the risk every later stage speaks of.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from bayesq.quant.feedback import output_error
from bayesq.quant.method import LayerProblem

EVIDENCE_STEPS = 100
EVIDENCE_TOLERANCE = 1e-6
# A layer whose weights are all zero says nothing about its prior; any finite precision keeps P invertible.
LARGEST_PRIOR_PRECISION = 1e12


def prior_precision_by_evidence(eigenvalues: Tensor, squared_norm: float, num_data: int) -> tuple[float, float]:
    """Prior precision tau that maximises the Laplace evidence, by MacKay's fixed point.

        tau <- gamma / ||mu||^2,   gamma = sum_i N f_i / (N f_i + tau)

    Args:
        eigenvalues: f_i of the Fisher, any shape, float64.
        squared_norm: ||mu||^2.
        num_data: N.

    Returns:
        tau, and gamma: how many parameters the data determine.
    """
    scaled = (num_data * eigenvalues.clamp(min=0)).flatten()
    if squared_norm <= 0 or float(scaled.amax()) <= 0:
        return LARGEST_PRIOR_PRECISION if squared_norm <= 0 else 1 / squared_norm, 0.0
    tau = len(scaled) / squared_norm
    gamma = 0.0
    for _ in range(EVIDENCE_STEPS):
        gamma = float((scaled / (scaled + tau)).sum())
        # gamma falls as tau grows, so the plain iteration swings about its fixed point, almost undamped where tau
        # outweighs the data. The geometric mean of old and new has the same fixed point and at least halves the error.
        # gamma vanishes when the likelihood is flat; the prior then keeps the scale of one parameter's evidence.
        updated = min(math.sqrt(tau * max(gamma, 1e-6) / squared_norm), LARGEST_PRIOR_PRECISION)
        done = abs(updated - tau) <= EVIDENCE_TOLERANCE * tau
        tau = updated
        if done:
            break
    return tau, gamma


class LayerPosterior(ABC):
    """Posterior of one layer W[g, r, c]."""

    prior_precision: float
    effective_parameters: float

    @abstractmethod
    def variance(self) -> Tensor:
        """[g, r, c] posterior variance of each weight, the diagonal of (N P)^-1."""

    @abstractmethod
    def risk(self, delta: Tensor) -> Tensor:
        """[g, r] contributions of the rows to 1/2 deltaT P delta, in nats per example.

        Args:
            delta: [g, r, c] weight error w_hat - mu.
        """

    @abstractmethod
    def row_risk(self, delta: Tensor) -> Tensor:
        """[g, r] risk of each row's error on its own, were all other rows exact."""


@dataclass
class DiagonalPosterior(LayerPosterior):
    """P_i = F_ii + tau / N."""

    precision: Tensor
    num_data: int
    prior_precision: float
    effective_parameters: float

    def variance(self) -> Tensor:
        """[g, r, c] posterior variance of each weight."""
        return 1 / (self.num_data * self.precision)

    def risk(self, delta: Tensor) -> Tensor:
        """[g, r] contributions of the rows to the risk."""
        return 0.5 * (self.precision * delta.to(self.precision.dtype).square()).sum(-1)

    def row_risk(self, delta: Tensor) -> Tensor:
        """[g, r], the same as `risk`: rows do not interact."""
        return self.risk(delta)


@dataclass
class KroneckerPosterior(LayerPosterior):
    """P = A (x) G with factored damping already added to both factors.

    Attributes:
        input_factor: [g, c, c] damped A, float64.
        gradient_factor: [g, r, r] damped G, float64.
    """

    input_factor: Tensor
    gradient_factor: Tensor
    num_data: int
    prior_precision: float
    effective_parameters: float

    def variance(self) -> Tensor:
        """[g, r, c] posterior variance of each weight: the inverse of a Kronecker product is that of its factors."""
        a = torch.cholesky_inverse(torch.linalg.cholesky(self.input_factor)).diagonal(dim1=-2, dim2=-1)
        g = torch.cholesky_inverse(torch.linalg.cholesky(self.gradient_factor)).diagonal(dim1=-2, dim2=-1)
        return g[:, :, None] * a[:, None, :] / self.num_data

    def risk(self, delta: Tensor) -> Tensor:
        """[g, r] contributions of the rows to 1/2 tr(G delta A deltaT)."""
        d = delta.to(torch.float64)
        return 0.5 * ((self.gradient_factor @ d @ self.input_factor) * d).sum(-1)

    def row_risk(self, delta: Tensor) -> Tensor:
        """[g, r] 1/2 G_rr delta_r A delta_rT."""
        return 0.5 * self.gradient_factor.diagonal(dim1=-2, dim2=-1) * output_error(delta, self.input_factor)


class Posterior(Protocol):
    """What a posterior's YAML instantiates.

    Attributes:
        statistics: names of the calibration statistics it reads.
        samples: labels drawn per example for the Fisher; None = exact where classes are few.
    """

    statistics: frozenset[str]
    samples: int | None

    def fit(self, layer: LayerProblem) -> LayerPosterior:
        """Posterior of one layer from its calibration statistics; notes the prior precision it found."""
        ...


def _prior_precision(
    layer: LayerProblem, given: float | None, num_data: int, eigenvalues: Callable[[], Tensor]
) -> tuple[float, float]:
    """tau and gamma; the eigenvalues are only asked for on the first fit of a layer, which notes both."""
    if "prior_precision" not in layer.notes:
        f = eigenvalues()
        if given is None:
            tau, gamma = prior_precision_by_evidence(f, float(layer.weight.to(torch.float64).square().sum()), num_data)
        else:
            scaled = num_data * f.clamp(min=0)
            tau, gamma = given, float((scaled / (scaled + given)).nan_to_num(0.0).sum())
        layer.notes["prior_precision"], layer.notes["effective_parameters"] = tau, gamma
    return layer.notes["prior_precision"], layer.notes["effective_parameters"]


def _check(prior_precision: float | None, num_data: int, samples: int | None) -> None:
    if samples is not None and samples < 1:
        raise ValueError(f"posterior.samples={samples}: must be at least 1, or null for the exact Fisher")
    if prior_precision is not None and not prior_precision >= 0:
        raise ValueError(f"posterior.prior_precision={prior_precision}: must be 0 or more, or null for evidence")
    if num_data < 1:
        raise ValueError(f"posterior.num_data={num_data}: must be at least 1")


class Diagonal:
    """Diagonal Laplace, the paper's default.

    Args:
        prior_precision: tau; None = by evidence, layer by layer.
        num_data: N.
        samples: labels drawn per example for the Fisher; None = the exact expectation where classes are few.
    """

    statistics = frozenset({"fisher_diagonal"})

    def __init__(self, prior_precision: float | None, num_data: int, samples: int | None) -> None:
        _check(prior_precision, num_data, samples)
        self.prior_precision, self.num_data, self.samples = prior_precision, num_data, samples

    def fit(self, layer: LayerProblem) -> DiagonalPosterior:
        """Posterior of one layer."""
        n = self.num_data
        fisher = layer.statistic("fisher_diagonal").to(torch.float64)
        tau, gamma = _prior_precision(layer, self.prior_precision, n, lambda: fisher)
        return DiagonalPosterior(fisher + tau / n, n, tau, gamma)


class Kfac:
    """Kronecker-factored Laplace (Martens and Grosse, arXiv 1503.05671), the whole Fisher of a layer as A (x) G.

    With few examples G is noisy, and an allocation that trusts its diagonal overfits; `shrinkage` pulls G towards the
    mean of its diagonal before anything else is done with it.

    Args:
        prior_precision: tau; None = by evidence, layer by layer.
        num_data: N.
        samples: labels drawn per example for the Fisher; None = the exact expectation where classes are few.
        shrinkage: weight in [0, 1] of mean(diag G) I in G.
    """

    statistics = frozenset({"input_moment", "gradient_moment"})

    def __init__(self, prior_precision: float | None, num_data: int, samples: int | None, shrinkage: float) -> None:
        _check(prior_precision, num_data, samples)
        if not 0 <= shrinkage <= 1:
            raise ValueError(f"posterior.shrinkage={shrinkage}: must be in [0, 1]")
        self.prior_precision, self.num_data = prior_precision, num_data
        self.samples, self.shrinkage = samples, shrinkage

    def fit(self, layer: LayerProblem) -> KroneckerPosterior:
        """Posterior of one layer."""
        n = self.num_data
        a = layer.statistic("input_moment").to(torch.float64)
        g = shrink(layer.statistic("gradient_moment").to(torch.float64), self.shrinkage)
        tau, gamma = _prior_precision(
            layer,
            self.prior_precision,
            n,
            lambda: torch.linalg.eigvalsh(a)[:, None, :] * torch.linalg.eigvalsh(g)[:, :, None],
        )
        a, g = factored_damping(a, g, tau / n)
        return KroneckerPosterior(a, g, n, tau, gamma)


def shrink(moment: Tensor, amount: float) -> Tensor:
    """(1 - amount) G + amount mean(diag G) I for [g, r, r]; the mean is over all groups."""
    mean = moment.diagonal(dim1=-2, dim2=-1).mean()
    return (1 - amount) * moment + amount * mean * torch.eye(moment.shape[-1], dtype=moment.dtype)


def factored_damping(a: Tensor, g: Tensor, damping: float) -> tuple[Tensor, Tensor]:
    """(A + pi sqrt(damping) I, G + sqrt(damping)/pi I), pi = sqrt(mean eig A / mean eig G), group by group.

    Args:
        a: [g, c, c].
        g: [g, r, r].
        damping: tau / N.
    """
    mean_a = a.diagonal(dim1=-2, dim2=-1).mean(-1).clamp(min=torch.finfo(a.dtype).tiny)
    mean_g = g.diagonal(dim1=-2, dim2=-1).mean(-1).clamp(min=torch.finfo(g.dtype).tiny)
    pi = (mean_a / mean_g).sqrt()
    root = damping**0.5
    eye_a, eye_g = torch.eye(a.shape[-1], dtype=a.dtype), torch.eye(g.shape[-1], dtype=g.dtype)
    return a + (pi * root)[:, None, None] * eye_a, g + (root / pi)[:, None, None] * eye_g
