"""Whitening: the part of a layer's risk that rounding needs.

In whitened coordinates z the risk is plain squared distance, |z - z_hat|^2 = 2 R; each posterior structure has its
equation in `whiten` (`bayesq.posterior`). Rounding does not compute z, only the curvature h: the risk of row r is 1/2
sum_c h_rc e_rc^2, where e_rc is the error of weight (r, c) when it is rounded, after all feedback from earlier columns.

    nearest             h_rc = P_rc,rc       always for diag and lowrank
    feedback, kfac      h_rc = G_rr D_c      U D UT = A, U unit upper, columns visited in decreasing diag(A)
    feedback, ekfac     h_rc = g_r D_c       g_r = sum_c P_rc,rc / tr A
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from bayesq.quant.feedback import FeedbackFactor, feedback_factors

FLOAT64_BYTES = 8


@dataclass
class Whitening:
    """What rounding needs of a layer's metric: curvatures and feedback factors, not z.

    Attributes:
        row_curvature: [g, r] factor of each row: h = row_curvature * column_curvature.
        column_curvature: [g, r, c], or [g, 1, c] where all rows share it.
        factors: feedback factor of each group; None where rounding is to nearest.
        seconds: time to make it, including the posterior's fit.
    """

    row_curvature: Tensor
    column_curvature: Tensor
    factors: list[FeedbackFactor] | None
    seconds: float = 0.0

    @property
    def retries(self) -> int:
        """How often a factorization needed more damping than configured."""
        return sum(factor.retries for factor in self.factors or [])

    @property
    def nbytes(self) -> int:
        """Memory its tensors take."""
        factors = sum(factor.upper.nbytes + factor.column_curvature.nbytes for factor in self.factors or [])
        return self.row_curvature.nbytes + self.column_curvature.nbytes + factors


def nearest_whitening(curvature: Tensor) -> Whitening:
    """Whitening for rounding to nearest: the curvature [g, r, c] is the diagonal of P."""
    return Whitening(torch.ones_like(curvature[..., 0]), curvature, None)


def feedback_whitening(row_curvature: Tensor, moment: Tensor, damping: float) -> Whitening:
    """Whitening for feedback from column to column, with the metric row_curvature_r A in row r.

    Args:
        row_curvature: [g, r].
        moment: [g, c, c] A.
        damping: fraction of A's mean diagonal added before it is factored, against the noise of few examples.
    """
    factors = feedback_factors(moment, damping)
    return Whitening(row_curvature, torch.stack([factor.column_curvature for factor in factors])[:, None, :], factors)


def nearest_bytes(shape: tuple[int, int, int]) -> int:
    """Memory of a `nearest_whitening` for a layer [g, r, c]: a curvature for each weight and each row."""
    g, r, c = shape
    return FLOAT64_BYTES * g * (r * c + r)


def feedback_bytes(shape: tuple[int, int, int]) -> int:
    """Memory of a `feedback_whitening` for a layer [g, r, c]: U [c, c] of each group, and the vectors beside it."""
    g, r, c = shape
    return FLOAT64_BYTES * g * (c * c + r + 3 * c)
