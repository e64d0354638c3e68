"""Gaussian posteriors over weights: Laplace approximations with the true Fisher (SPEC section 1).

    q(w) = N(mu, (N P)^-1),   P = F + (tau / N) I

mu are the trained weights, F the Fisher of the loss in nats per example, N the number of data the posterior counts,
tau the prior precision. Deploying w_hat instead of w ~ q raises the expected loss by

    R(w_hat) = 1/2 E_q[(w - w_hat)T P (w - w_hat)] = 1/2 (mu - w_hat)T P (mu - w_hat) + const   nats per example,

the risk every later stage speaks of. Structures of P, all with weights flattened from W[g, r, c]:

    diag      diag(F_ii + tau/N)
    kfac      (A + pi sqrt(tau/N) I) (x) (G + sqrt(tau/N)/pi I)
    ekfac     (Q_A (x) Q_G) diag(lambda + tau/N) (Q_A (x) Q_G)T,   lambda_i = E_example[(Q_GT dl/dW Q_A)_i^2]
    lowrank   diag(max(F_ii - sum_k U_ik^2, 0) + tau/N) + U UT,    U the main directions of the examples' gradients
"""

import math
from abc import ABC, abstractmethod
from collections.abc import MutableMapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Protocol

import torch
from torch import Tensor

from bayesq.calibration.inputs import INPUT_BASIS, INPUT_MOMENT
from bayesq.calibration.statistic import Statistic
from bayesq.fisher import FISHER_DIAGONAL, FISHER_EIGENVALUES, GRADIENT_BASIS, GRADIENT_MOMENT, GradientDirections
from bayesq.likelihood import LIKELIHOODS as LIKELIHOODS
from bayesq.quant.feedback import DAMPING_RETRIES, LEAST_DAMPING, output_error
from bayesq.quant.method import LayerProblem

EVIDENCE_STEPS = 100
EVIDENCE_TOLERANCE = 1e-6
# A layer whose weights are all zero says nothing about its prior; any finite precision keeps P invertible.
LARGEST_PRIOR_PRECISION = 1e12
PRIOR_SCOPES = ("layer", "global")
PRIOR_SHARES = ("factored", "gradient")
DRAWS = ("signs", "labels")
# The likelihood is the data set's.
AUTO = "auto"
EVIDENCES = ("diagonal", "eigenvalues")


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
        gamma = effective_parameters(scaled, tau)
        # gamma falls as tau grows, so the plain iteration swings about its fixed point, almost undamped where tau
        # outweighs the data. The geometric mean of old and new has the same fixed point and at least halves the error.
        # gamma vanishes when the likelihood is flat; the prior then keeps the scale of one parameter's evidence.
        updated = min(math.sqrt(tau * max(gamma, 1e-6) / squared_norm), LARGEST_PRIOR_PRECISION)
        done = abs(updated - tau) <= EVIDENCE_TOLERANCE * tau
        tau = updated
        if done:
            break
    return tau, gamma


def effective_parameters(scaled: Tensor, tau: float) -> float:
    """gamma = sum_i N f_i / (N f_i + tau), the number of parameters the data determine.

    Args:
        scaled: N f_i >= 0, any shape.
        tau: prior precision; with 0, eigenvalues of 0 count nothing.
    """
    share = scaled + tau
    torch.div(scaled, share, out=share)
    if tau == 0:
        share.nan_to_num_(0.0)
    return float(share.sum(dtype=torch.float64))


class LayerPosterior(ABC):
    """Posterior of one layer W[g, r, c]."""

    num_data: int
    prior_precision: float
    effective_parameters: float | None

    @abstractmethod
    def diagonal(self) -> Tensor:
        """[g, r, c] diagonal of P: twice the risk of a unit error in one weight alone."""

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

    @abstractmethod
    def sample(self, generator: torch.Generator) -> Tensor:
        """[g, r, c] float64, one draw of delta = w - mu ~ N(0, (N P)^-1).

        Args:
            generator: CPU generator.
        """


@dataclass
class DiagonalPosterior(LayerPosterior):
    """P_i = F_ii + tau / N."""

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
        return _normal(self.precision.shape, generator) * self.variance().sqrt()


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
    effective_parameters: float | None

    def diagonal(self) -> Tensor:
        """[g, r, c] G_rr A_cc."""
        a, g = (x.diagonal(dim1=-2, dim2=-1) for x in (self.input_factor, self.gradient_factor))
        return g[:, :, None] * a[:, None, :]

    def variance(self) -> Tensor:
        """[g, r, c] posterior variance of each weight: the inverse of a Kronecker product is that of its factors."""
        factors = (self.input_factor, self.gradient_factor)
        a, g = (torch.cholesky_inverse(proper_root(x)).diagonal(dim1=-2, dim2=-1) for x in factors)
        return g[:, :, None] * a[:, None, :] / self.num_data

    def risk(self, delta: Tensor) -> Tensor:
        """[g, r] contributions of the rows to 1/2 tr(G delta A deltaT).

        The products are as precise as delta: float64 takes twice as long as float32, and wide layers feel it.
        """
        g, a = self.gradient_factor.to(delta.dtype), self.input_factor.to(delta.dtype)
        return 0.5 * ((g @ delta @ a) * delta).sum(-1, dtype=torch.float64)

    def row_risk(self, delta: Tensor) -> Tensor:
        """[g, r] 1/2 G_rr delta_r A delta_rT."""
        return 0.5 * self.gradient_factor.diagonal(dim1=-2, dim2=-1) * output_error(delta, self.input_factor)

    def sample(self, generator: torch.Generator) -> Tensor:
        """[g, r, c] one draw L_G^-T E L_A^-1 / sqrt(N) of w - mu, E standard normal."""
        l_a, l_g = proper_root(self.input_factor), proper_root(self.gradient_factor)
        groups, rows, columns = len(l_a), l_g.shape[-1], l_a.shape[-1]
        draw: Tensor = _normal((groups, rows, columns), generator)
        draw = torch.linalg.solve_triangular(l_g.transpose(-1, -2), draw, upper=True)
        draw = torch.linalg.solve_triangular(l_a, draw, upper=False, left=False)
        return draw / math.sqrt(self.num_data)


@dataclass
class EkfacPosterior(LayerPosterior):
    """P = (Q_A (x) Q_G) diag(eigenvalues) (Q_A (x) Q_G)T, the prior's share in the eigenvalues.

    Attributes:
        input_moment: [g, c, c] A, undamped, float64; error feedback works with it (see `bayesq.whitening`).
        input_basis: [g, c, c] Q_A.
        gradient_basis: [g, r, r] Q_G.
        eigenvalues: [g, r, c] lambda + tau / N.
    """

    input_moment: Tensor
    input_basis: Tensor
    gradient_basis: Tensor
    eigenvalues: Tensor
    num_data: int
    prior_precision: float
    effective_parameters: float | None

    def rotate(self, delta: Tensor) -> Tensor:
        """Q_GT delta Q_A [g, r, c], coordinates in which P is diagonal."""
        rotated: Tensor = self.gradient_basis.transpose(-1, -2) @ delta.to(torch.float64) @ self.input_basis
        return rotated

    def rotate_back(self, rotated: Tensor) -> Tensor:
        """Inverse of `rotate`."""
        delta: Tensor = self.gradient_basis @ rotated @ self.input_basis.transpose(-1, -2)
        return delta

    def _diagonal(self, eigenvalues: Tensor) -> Tensor:
        diagonal: Tensor = self.gradient_basis.square() @ eigenvalues @ self.input_basis.square().transpose(-1, -2)
        return diagonal

    def diagonal(self) -> Tensor:
        """[g, r, c] sum_ij (Q_G)_ri^2 eigenvalue_ij (Q_A)_cj^2."""
        return self._diagonal(self.eigenvalues)

    def variance(self) -> Tensor:
        """[g, r, c] posterior variance of each weight."""
        return self._diagonal(1 / (self.num_data * self.eigenvalues))

    def risk(self, delta: Tensor) -> Tensor:
        """[g, r] contributions of the rows to the risk."""
        return 0.5 * (self.rotate_back(self.eigenvalues * self.rotate(delta)) * delta).sum(-1)

    def row_risk(self, delta: Tensor) -> Tensor:
        """[g, r] 1/2 sum_ij (Q_G)_ri^2 eigenvalue_ij (delta_r Q_A)_j^2."""
        own = self.gradient_basis.square() @ self.eigenvalues
        return 0.5 * (own * (delta.to(torch.float64) @ self.input_basis).square()).sum(-1)

    def sample(self, generator: torch.Generator) -> Tensor:
        """[g, r, c] one draw of w - mu."""
        return self.rotate_back(_normal(self.eigenvalues.shape, generator) / (self.num_data * self.eigenvalues).sqrt())


@dataclass
class LowRankPosterior(LayerPosterior):
    """P = D + U UT, D = diag(residual).

    With V = D^-1/2 U it is D^1/2 (I + V VT) D^1/2, whose powers only need the eigenvalues s and eigenvectors Q of the
    small matrix VT V [k, k]:  f(I + V VT) = f(1) I + V Q diag((f(1 + s) - f(1)) / s) QT VT.

    Attributes:
        residual: [g, r, c] d > 0, the prior's share included, float64.
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
        # The subtraction loses all digits of a weight that the directions determine: 1 / P_ii bounds it from below.
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
        """(I + V VT)^1/2 D^1/2 w for w [g, r, c]."""
        scaled = self.residual.sqrt() * weight.to(torch.float64)
        _, s, _ = self._inner
        return self._along_directions(scaled, 1 / (1 + (1 + s).sqrt()))

    def sample(self, generator: torch.Generator) -> Tensor:
        """[g, r, c] one draw D^-1/2 (I + V VT)^-1/2 e / sqrt(N) of w - mu, e standard normal."""
        _, s, _ = self._inner
        root = (1 + s).sqrt()
        draw = self._along_directions(_normal(self.residual.shape, generator), -1 / (root * (1 + root)))
        return draw / (self.num_data * self.residual).sqrt()

    def _along_directions(self, x: Tensor, factor: Tensor) -> Tensor:
        """(I + V Q diag(factor) QT VT) x for x [g, r, c]."""
        v, _, q = self._inner
        moved: Tensor = x + (v.T @ (q @ (factor * (q.T @ (v @ x.flatten()))))).reshape(x.shape)
        return moved


def _normal(shape: Sequence[int], generator: torch.Generator) -> Tensor:
    return torch.randn(tuple(shape), generator=generator, dtype=torch.float64)


class Posterior(Protocol):
    """What a posterior's YAML instantiates.

    Attributes:
        statistics: the calibration statistics it reads.
        samples: draws per example for the Fisher; None = exact where classes are few.
        examples: so many calibration examples, spread over the set, give the Fisher; None = all.
        likelihood: of the outputs, one of LIKELIHOODS, or AUTO.
        draws: one of DRAWS.
        whitenings: where `bayesq.whitening.layer_whitening` keeps what it has made; None = nowhere.
    """

    statistics: frozenset[Statistic]
    samples: int | None
    examples: int | None
    likelihood: str
    draws: str
    whitenings: MutableMapping[tuple[object, ...], Any] | None

    def prepare(self, layers: Sequence[LayerProblem]) -> None:
        """What needs all layers at once; to be called before the first `fit`."""
        ...

    def fit(self, layer: LayerProblem) -> LayerPosterior:
        """Posterior of one layer from its calibration statistics; notes the prior precision it found."""
        ...


class Laplace(ABC):
    """What all posteriors share: the settings, and the choice of the prior precision.

    Args:
        prior_precision: tau; None = by evidence.
        num_data: N.
        samples: draws per example for the Fisher; None = the exact expectation where classes are few.
        examples: so many calibration examples, spread over the set, give the Fisher; None = all.
        prior_scope: "layer" maximises the evidence of each layer on its own, "global" that of all layers together.
        likelihood: of the outputs: "categorical" for classifiers, "gaussian" of unit variance for regression heads,
            "auto" for what the data set says.
        draws: what stands for the model's predictive where it is not summed exactly: "signs" or "labels"; see
            `bayesq.likelihood.Likelihood.fisher_directions`.

    Raises:
        ValueError: an argument is out of its range.
    """

    statistics: frozenset[Statistic]
    whitenings: MutableMapping[tuple[object, ...], Any] | None = None

    def __init__(
        self,
        prior_precision: float | None,
        num_data: int,
        samples: int | None,
        examples: int | None = None,
        prior_scope: str = "layer",
        likelihood: str = "categorical",
        draws: str = "signs",
    ) -> None:
        if likelihood not in (AUTO, *LIKELIHOODS):
            raise ValueError(f"posterior.likelihood={likelihood}: choose from {', '.join((AUTO, *LIKELIHOODS))}")
        if draws not in DRAWS:
            raise ValueError(f"posterior.draws={draws}: choose from {', '.join(DRAWS)}")
        if samples is not None and samples < 1:
            raise ValueError(f"posterior.samples={samples}: must be at least 1, or null for the exact Fisher")
        if examples is not None and examples < 1:
            raise ValueError(f"posterior.examples={examples}: must be at least 1, or null for all calibration examples")
        if prior_precision is not None and not prior_precision >= 0:
            raise ValueError(f"posterior.prior_precision={prior_precision}: must be 0 or more, or null for evidence")
        if num_data < 1:
            raise ValueError(f"posterior.num_data={num_data}: must be at least 1")
        if prior_scope not in PRIOR_SCOPES:
            raise ValueError(f"posterior.prior_scope={prior_scope}: choose from {', '.join(PRIOR_SCOPES)}")
        self.prior_precision, self.num_data, self.prior_scope = prior_precision, num_data, prior_scope
        self.samples, self.examples, self.likelihood, self.draws = samples, examples, likelihood, draws

    @abstractmethod
    def spectrum(self, layer: LayerProblem) -> Tensor:
        """Eigenvalues f_i of the layer's F, any shape."""

    def prepare(self, layers: Sequence[LayerProblem]) -> None:
        """With prior_scope=global: choose the one tau of all layers and note it in each.

        The eigenvalues of all layers are held at once, in float32.
        """
        if self.prior_scope == "layer" or self.prior_precision is not None:
            return
        if all("prior_precision" in layer.notes for layer in layers):
            return
        spectra = [self.spectrum(layer).flatten().to(torch.float32) for layer in layers]
        tau, _ = prior_precision_by_evidence(torch.cat(spectra), sum(map(_squared_norm, layers)), self.num_data)
        for layer, spectrum in zip(layers, spectra, strict=True):
            self._note(layer, spectrum, tau)

    def _prior(self, layer: LayerProblem) -> tuple[float, float | None]:
        """tau, and gamma where the evidence chose it: a tau that is given needs no eigenvalues.

        The first fit of a layer computes both and notes them.

        Raises:
            RuntimeError: prior_scope=global and `prepare` has not seen the layer.
        """
        if self.prior_precision is not None:
            layer.notes["prior_precision"] = self.prior_precision
            return self.prior_precision, None
        if "prior_precision" not in layer.notes:
            if self.prior_scope == "global":
                raise RuntimeError(f"posterior.prior_scope=global: prepare() has not seen layer {layer.name}")
            f = self.spectrum(layer)
            self._note(layer, f, prior_precision_by_evidence(f, _squared_norm(layer), self.num_data)[0])
        return layer.notes["prior_precision"], layer.notes["effective_parameters"]

    def _note(self, layer: LayerProblem, spectrum: Tensor, tau: float) -> None:
        layer.notes["prior_precision"] = tau
        layer.notes["effective_parameters"] = effective_parameters(self.num_data * spectrum.clamp(min=0), tau)


def _squared_norm(layer: LayerProblem) -> float:
    return float(layer.weight.to(torch.float64).square().sum())


class Diagonal(Laplace):
    """Diagonal Laplace, the paper's default; arguments as in `Laplace`."""

    statistics = frozenset({FISHER_DIAGONAL})

    def spectrum(self, layer: LayerProblem) -> Tensor:
        """[g, r, c] F_ii."""
        return layer.statistic("fisher_diagonal").to(torch.float64)

    def fit(self, layer: LayerProblem) -> DiagonalPosterior:
        """Posterior of one layer."""
        tau, gamma = self._prior(layer)
        return DiagonalPosterior(self.spectrum(layer) + tau / self.num_data, self.num_data, tau, gamma)


class Kfac(Laplace):
    """Kronecker-factored Laplace (Martens and Grosse, arXiv 1503.05671), the whole Fisher of a layer as A (x) G.

    With few examples G is noisy, and an allocation that trusts its diagonal overfits; `shrinkage` pulls G towards the
    mean of its diagonal before anything else is done with it.

    Args:
        shrinkage: weight in [0, 1] of mean(diag G) I in G.
        prior_share: where tau / N goes: "factored" splits it over both factors (SPEC section 1), whose cross terms
            damp A as well; "gradient" gives it to G alone, see `gradient_damping`.
        evidence: whose evidence chooses tau: that of the "diagonal" of A (x) G, or that of all of it by its
            "eigenvalues", which take more time.

    The others as in `Laplace`.
    """

    statistics = frozenset({INPUT_MOMENT, GRADIENT_MOMENT})

    def __init__(
        self,
        prior_precision: float | None,
        num_data: int,
        samples: int | None,
        shrinkage: float,
        examples: int | None = None,
        prior_scope: str = "layer",
        prior_share: str = "factored",
        likelihood: str = "categorical",
        draws: str = "signs",
        evidence: str = "diagonal",
    ) -> None:
        super().__init__(prior_precision, num_data, samples, examples, prior_scope, likelihood, draws)
        if evidence not in EVIDENCES:
            raise ValueError(f"posterior.evidence={evidence}: choose from {', '.join(EVIDENCES)}")
        self.evidence = evidence
        if prior_share not in PRIOR_SHARES:
            raise ValueError(f"posterior.prior_share={prior_share}: choose from {', '.join(PRIOR_SHARES)}")
        self.prior_share = prior_share
        if not 0 <= shrinkage <= 1:
            raise ValueError(f"posterior.shrinkage={shrinkage}: must be in [0, 1]")
        self.shrinkage = shrinkage

    def _factors(self, layer: LayerProblem) -> tuple[Tensor, Tensor]:
        a = layer.statistic("input_moment").to(torch.float64)
        return a, shrink(layer.statistic("gradient_moment").to(torch.float64), self.shrinkage)

    def spectrum(self, layer: LayerProblem) -> Tensor:
        """[g, r, c] products of the factors' eigenvalues, or of their diagonals."""
        if self.evidence == "eigenvalues":
            values_a, values_g = map(eigenvalues, self._factors(layer))
        else:  # taken first: a wide layer's factors take as long to convert as the rest of this
            values_a, values_g = (
                layer.statistic(kind).diagonal(dim1=-2, dim2=-1).to(torch.float64)
                for kind in ("input_moment", "gradient_moment")
            )
            values_g = (1 - self.shrinkage) * values_g + self.shrinkage * values_g.mean()
        products: Tensor = values_g[:, :, None] * values_a[:, None, :]
        return products

    def fit(self, layer: LayerProblem) -> KroneckerPosterior:
        """Posterior of one layer."""
        tau, gamma = self._prior(layer)
        damped = factored_damping if self.prior_share == "factored" else gradient_damping
        a, g = damped(*self._factors(layer), tau / self.num_data)
        return KroneckerPosterior(a, g, self.num_data, tau, gamma)


class Ekfac(Laplace):
    """Eigenvalue-corrected K-FAC (George et al., arXiv 1806.03884): K-FAC's eigenvectors, F's own diagonal in them.

    The prior adds tau / N to each eigenvalue, exactly, where `Kfac` has to split it over two factors and so changes A.
    Arguments as in `Laplace`.
    """

    statistics = frozenset({INPUT_MOMENT, INPUT_BASIS, GRADIENT_BASIS, FISHER_EIGENVALUES})

    def spectrum(self, layer: LayerProblem) -> Tensor:
        """[g, r, c] lambda."""
        return layer.statistic("fisher_eigenvalues").to(torch.float64)

    def fit(self, layer: LayerProblem) -> EkfacPosterior:
        """Posterior of one layer."""
        tau, gamma = self._prior(layer)
        a, q_a, q_g = (
            layer.statistic(kind).to(torch.float64) for kind in ("input_moment", "input_basis", "gradient_basis")
        )
        return EkfacPosterior(a, q_a, q_g, self.spectrum(layer) + tau / self.num_data, self.num_data, tau, gamma)


class LowRank(Laplace):
    """Diagonal plus low rank: the main directions of the examples' gradients keep their correlations.

    Args:
        rank: k, directions of each layer.

    The others as in `Laplace`; prior_precision must not be 0, which would leave P singular wherever the directions
    explain a weight's whole Fisher.
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
            raise ValueError("posterior.prior_precision=0: must be above 0 for posterior=lowrank")
        self.rank = rank
        self.statistics = frozenset({FISHER_DIAGONAL, GradientDirections(rank)})

    def _parts(self, layer: LayerProblem) -> tuple[Tensor, Tensor]:
        """F_ii - sum_k U_ik^2 [g, r, c] and U [k, g, r, c].

        Raises:
            ValueError: the statistic has fewer directions than asked for.
        """
        directions = layer.statistic("gradient_directions")
        if len(directions) < self.rank:
            raise ValueError(f"posterior.rank={self.rank}: the calibration kept {len(directions)} gradient directions")
        directions = directions[: self.rank].to(torch.float64)
        fisher = layer.statistic("fisher_diagonal").to(torch.float64)
        return (fisher - directions.square().sum(0)).clamp(min=0), directions

    def spectrum(self, layer: LayerProblem) -> Tensor:
        """[D + k] eigenvalues of the two parts of F = D + U UT, one after the other.

        gamma is the trace of a concave function of F that vanishes at 0, and it grows with F. So that of the parts'
        eigenvalues exceeds the true one (Rotfel'd's inequality), by no more than the k that the directions contribute.
        """
        residual, directions = self._parts(layer)
        flat = directions.flatten(1)
        return torch.cat([residual.flatten(), torch.linalg.eigvalsh(flat @ flat.T)])

    def fit(self, layer: LayerProblem) -> LowRankPosterior:
        """Posterior of one layer."""
        tau, gamma = self._prior(layer)
        residual, directions = self._parts(layer)
        return LowRankPosterior(residual + tau / self.num_data, directions, self.num_data, tau, gamma)


def eigenvalues(moments: Tensor) -> Tensor:
    """Eigenvalues [g, n] float64 of moments [g, n, n], to a float32 of the largest entry.

    The evidence sums over all of them, and in float64 they would cost as much as a rounding. LAPACK's float32 routine
    gives up on some matrices of low rank, which float64 then solves.
    """
    size = moments.abs().amax().clamp(min=torch.finfo(torch.float64).tiny)
    values: Tensor
    try:
        values = torch.linalg.eigvalsh((moments / size).to(torch.float32)).to(torch.float64)
    except torch.linalg.LinAlgError:  # type: ignore[attr-defined]
        values = torch.linalg.eigvalsh(moments / size)
    return values * size


def proper_root(moments: Tensor) -> Tensor:
    """Lower Cholesky factors of moments [g, n, n], damped where singular.

    Inputs that no example reached leave A singular where the prior does not reach it (prior_share=gradient), and the
    posterior without bounds. Damping by LEAST_DAMPING of the mean diagonal, tenfold more until it suffices, bounds it.

    Raises:
        ValueError: no retry made a moment positive definite.
    """
    mean = moments.diagonal(dim1=-2, dim2=-1).mean(-1)
    mean = torch.where(mean > 0, mean, torch.ones_like(mean))
    damping = torch.zeros_like(mean)
    for retry in range(DAMPING_RETRIES):
        damped = moments + damping[:, None, None] * torch.eye(moments.shape[-1], dtype=moments.dtype)
        root, failed = torch.linalg.cholesky_ex(damped)
        if not bool(failed.any()):
            factors: Tensor = root
            return factors
        damping = torch.where(failed > 0, LEAST_DAMPING * 10**retry * mean, damping)
    raise ValueError("the posterior's factors are not positive definite, whatever is added to their diagonals")


def shrink(moment: Tensor, amount: float) -> Tensor:
    """(1 - amount) G + amount mean(diag G) I for [g, r, r]; the mean is over all groups."""
    mean = moment.diagonal(dim1=-2, dim2=-1).mean()
    shrunk = (1 - amount) * moment
    shrunk.diagonal(dim1=-2, dim2=-1).add_(amount * mean)
    return shrunk


def gradient_damping(a: Tensor, g: Tensor, damping: float) -> tuple[Tensor, Tensor]:
    """(A, G + damping / (mean eig A) I), group by group: the prior's share as the rows feel it on average.

    Trace and row traces of A (x) G + damping I are kept exactly, and the input correlations stay what they are.

    Args:
        a: [g, c, c].
        g: [g, r, r].
        damping: tau / N.
    """
    mean_a = a.diagonal(dim1=-2, dim2=-1).mean(-1)
    # A group that no input reached has no scale of its own.
    share = torch.where(mean_a > 0, damping / mean_a.clamp(min=torch.finfo(a.dtype).tiny), 0.0)
    return a, _plus_diagonal(g, share)


def factored_damping(a: Tensor, g: Tensor, damping: float) -> tuple[Tensor, Tensor]:
    """(A + pi sqrt(damping) I, G + sqrt(damping)/pi I), pi = sqrt(mean eig A / mean eig G), group by group.

    Args:
        a: [g, c, c].
        g: [g, r, r].
        damping: tau / N.
    """
    mean_a, mean_g = (factor.diagonal(dim1=-2, dim2=-1).mean(-1) for factor in (a, g))
    # A group without inputs or without gradients has no ratio to keep.
    pi = torch.where((mean_a > 0) & (mean_g > 0), mean_a / mean_g, 1.0).sqrt()
    root = damping**0.5
    return _plus_diagonal(a, pi * root), _plus_diagonal(g, root / pi)


def _plus_diagonal(moments: Tensor, amount: Tensor) -> Tensor:
    """[g, n, n] plus amount [g] times the identity."""
    moments = moments.clone()
    moments.diagonal(dim1=-2, dim2=-1).add_(amount[:, None])
    return moments
