"""Kronecker-factored Laplace: P = A (x) G, both factors damped by the prior."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from bayesq.calibration.inputs import INPUT_MOMENT
from bayesq.contract import LayerProblem
from bayesq.errors import Refused
from bayesq.fisher import GRADIENT_MOMENT
from bayesq.posterior.base import Laplace, LayerPosterior, Shape
from bayesq.posterior.factors import (
    eigenvalues,
    factored_damping,
    gradient_damping,
    proper_root,
    shrink,
    standard_normal,
)
from bayesq.quant.feedback import output_error
from bayesq.whitening import FLOAT64_BYTES, Whitening, feedback_bytes, feedback_whitening

PRIOR_SHARES = ("factored", "gradient")
EVIDENCES = ("diagonal", "eigenvalues")


@dataclass
class KroneckerPosterior(LayerPosterior):
    """P = (A + pi sqrt(tau/N) I) (x) (G + sqrt(tau/N)/pi I), pi = sqrt(mean eig A / mean eig G).

    Below, A and G stand for these damped factors; the variant prior_share=gradient damps G alone.

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
        """[g, r, c] posterior variance of each weight: the inverse of A (x) G is A^-1 (x) G^-1."""
        factors = (self.input_factor, self.gradient_factor)
        a, g = (torch.cholesky_inverse(proper_root(x)).diagonal(dim1=-2, dim2=-1) for x in factors)
        return g[:, :, None] * a[:, None, :] / self.num_data

    def risk(self, delta: Tensor) -> Tensor:
        """[g, r] contributions of the rows to 1/2 tr(G delta A deltaT).

        The products have the precision of delta: float64 takes twice as long as float32, which matters in wide layers.
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
        draw: Tensor = standard_normal((groups, rows, columns), generator)
        draw = torch.linalg.solve_triangular(l_g.transpose(-1, -2), draw, upper=True)
        draw = torch.linalg.solve_triangular(l_a, draw, upper=False, left=False)
        return draw / math.sqrt(self.num_data)

    def whiten(self, weight: Tensor) -> Tensor:
        """Z = L_GT W L_A with A = L_A L_AT, G = L_G L_GT."""
        l_a, l_g = proper_root(self.input_factor), proper_root(self.gradient_factor)
        z: Tensor = l_g.transpose(-1, -2) @ weight.to(torch.float64) @ l_a
        return z

    def whitening(self, feedback: bool, damping: float) -> Whitening:
        """h_rc = G_rr D_c, U D UT = A; to nearest G_rr A_cc. No feedback from row to row."""
        # a copy: a view would hold all of G in memory
        row_curvature = self.gradient_factor.diagonal(dim1=-2, dim2=-1).clone()
        if feedback:
            return feedback_whitening(row_curvature, self.input_factor, damping)
        return Whitening(row_curvature, self.input_factor.diagonal(dim1=-2, dim2=-1)[:, None, :].clone(), None)


class Kfac(Laplace):
    """Kronecker-factored Laplace (Martens and Grosse, arXiv 1503.05671), the whole Fisher of a layer as A (x) G.

    With few examples G is noisy, and an allocation by its diagonal overfits; `shrinkage` first pulls G towards the mean
    of its diagonal.

    Args:
        shrinkage: weight in [0, 1] of mean(diag G) I in G.
        prior_share: where tau / N goes: "factored" damps A and G, see `factored_damping`; "gradient" damps G alone, see
            `gradient_damping`.
        evidence: the numbers f_i from which the evidence chooses tau: the "diagonal" of A (x) G, or its "eigenvalues",
            which take more time.

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
            raise Refused(f"posterior.evidence={evidence}: choose from {', '.join(EVIDENCES)}")
        self.evidence = evidence
        if prior_share not in PRIOR_SHARES:
            raise Refused(f"posterior.prior_share={prior_share}: choose from {', '.join(PRIOR_SHARES)}")
        self.prior_share = prior_share
        if not 0 <= shrinkage <= 1:
            raise Refused(f"posterior.shrinkage={shrinkage}: must be in [0, 1]")
        self.shrinkage = shrinkage

    def _factors(self, layer: LayerProblem) -> tuple[Tensor, Tensor]:
        a = layer.statistic("input_moment").to(torch.float64)
        return a, shrink(layer.statistic("gradient_moment").to(torch.float64), self.shrinkage)

    def spectrum(self, layer: LayerProblem) -> Tensor:
        """[g, r, c] products of the factors' eigenvalues, or of their diagonals."""
        if self.evidence == "eigenvalues":
            values_a, values_g = map(eigenvalues, self._factors(layer))
        else:  # diagonal first: converting the whole factors of a wide layer would double the time
            values_a, values_g = (
                layer.statistic(kind).diagonal(dim1=-2, dim2=-1).to(torch.float64)
                for kind in ("input_moment", "gradient_moment")
            )
            values_g = (1 - self.shrinkage) * values_g + self.shrinkage * values_g.mean()
        products: Tensor = values_g[:, :, None] * values_a[:, None, :]
        return products

    def fit_bytes(self, shape: Shape) -> int:
        """Memory of a fit: A and G, converted, damped and factored."""
        g, r, c = shape
        return FLOAT64_BYTES * g * (4 * c * c + 2 * r * r)

    def whitening_bytes(self, shape: Shape) -> int:
        """Memory of a whitening: a factor [c, c], and the vectors beside it."""
        return feedback_bytes(shape)

    def fit(self, layer: LayerProblem) -> KroneckerPosterior:
        """Posterior of one layer."""
        tau, gamma = self.prior(layer)
        damped = factored_damping if self.prior_share == "factored" else gradient_damping
        a, g = damped(*self._factors(layer), tau / self.num_data)
        return KroneckerPosterior(a, g, self.num_data, tau, gamma)
