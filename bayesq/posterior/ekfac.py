"""Eigenvalue-corrected K-FAC: P = (Q_A (x) Q_G) diag(lambda + tau / N) (Q_A (x) Q_G)T."""

from dataclasses import dataclass

import torch
from torch import Tensor

from bayesq.calibration.inputs import INPUT_BASIS, INPUT_MOMENT
from bayesq.contract import LayerProblem
from bayesq.fisher import FISHER_EIGENVALUES, GRADIENT_BASIS
from bayesq.posterior.base import Laplace, LayerPosterior, Shape
from bayesq.posterior.factors import standard_normal
from bayesq.whitening import Whitening, feedback_bytes, feedback_whitening, nearest_whitening


@dataclass
class EkfacPosterior(LayerPosterior):
    """P = (Q_A (x) Q_G) diag(lambda + tau / N) (Q_A (x) Q_G)T, lambda_i = E_example[(Q_GT dl/dW Q_A)_i^2].

    Attributes:
        input_moment: [g, c, c] A, undamped, float64; read by `whitening` for error feedback.
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
        row_eigenvalues = self.gradient_basis.square() @ self.eigenvalues
        return 0.5 * (row_eigenvalues * (delta.to(torch.float64) @ self.input_basis).square()).sum(-1)

    def sample(self, generator: torch.Generator) -> Tensor:
        """[g, r, c] one draw of w - mu."""
        noise = standard_normal(self.eigenvalues.shape, generator)
        return self.rotate_back(noise / (self.num_data * self.eigenvalues).sqrt())

    def whiten(self, weight: Tensor) -> Tensor:
        """z_i = sqrt(eigenvalue_i) (Q_GT W Q_A)_i."""
        return self.eigenvalues.sqrt() * self.rotate(weight)

    def whitening(self, feedback: bool, damping: float) -> Whitening:
        """h_rc = g_r D_c, U D UT = A, g_r = sum_c P_rc,rc / tr A; to nearest the diagonal of P.

        In P each row has a different metric, but feedback needs one factor for all rows of a group. So row r gets the
        metric g_r A, with the trace that the row has in P. This is exact if P = A (x) G.
        """
        if not feedback:
            return nearest_whitening(self.diagonal())
        trace = self.input_moment.diagonal(dim1=-2, dim2=-1).sum(-1)
        # `feedback_factors` treats a group without inputs as the identity.
        trace = torch.where(trace > 0, trace, float(self.input_moment.shape[-1]))
        return feedback_whitening(self.diagonal().sum(-1) / trace[:, None], self.input_moment, damping)


class Ekfac(Laplace):
    """Eigenvalue-corrected K-FAC (George et al., arXiv 1806.03884): K-FAC's eigenvectors, with the diagonal of F in
    them.

    The prior adds exactly tau / N to each eigenvalue; `Kfac` adds it to its factors instead: to both, or to G alone.
    Arguments as in `Laplace`.
    """

    statistics = frozenset({INPUT_MOMENT, INPUT_BASIS, GRADIENT_BASIS, FISHER_EIGENVALUES})

    def spectrum(self, layer: LayerProblem) -> Tensor:
        """[g, r, c] lambda."""
        return layer.statistic("fisher_eigenvalues").to(torch.float64)

    def whitening_bytes(self, shape: Shape) -> int:
        """Memory of a whitening: a factor [c, c], and the vectors beside it."""
        return feedback_bytes(shape)

    def fit(self, layer: LayerProblem) -> EkfacPosterior:
        """Posterior of one layer."""
        tau, gamma = self.prior(layer)
        a, q_a, q_g = (
            layer.statistic(kind).to(torch.float64) for kind in ("input_moment", "input_basis", "gradient_basis")
        )
        return EkfacPosterior(a, q_a, q_g, self.spectrum(layer) + tau / self.num_data, self.num_data, tau, gamma)
