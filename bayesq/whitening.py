"""Whitening by the posterior: coordinates in which risk is plain squared distance (SPEC section 2).

    diag     z_i = sqrt(P_i) w_i
    kfac     Z = L_GT W L_A,   A = L_A L_AT,  G = L_G L_GT
    ekfac    z_i = sqrt(eigenvalue_i) (Q_GT W Q_A)_i
    lowrank  z = (I + V VT)^1/2 D^1/2 w,   V = D^-1/2 U

so that |z - z_hat|^2 = 2 R. Rounding never forms Z. What it needs is the gain: by how much twice the risk grows per
squared rounding error of a weight, once all feedback has been given.

    nearest          gain_rc = P_rc,rc            (kfac: G_rr A_cc); always for diag and lowrank
    kfac, feedback   gain_rc = G_rr D_c,      U D UT = A, U unit upper, columns visited in decreasing diag(A)
    kfac, two-sided  gain_rc = E_r D_c,       V E VT = G, V unit upper, rows visited in decreasing diag(G)
    ekfac, feedback  gain_rc = g_r D_c,       g_r = sum_c P_rc,rc / tr A

Each row of an ekfac posterior has a metric of its own, but rows that share one factor are rounded together: feedback
takes A for the metric of all of them, each times the g_r that leaves the row its trace. Exact where P = A (x) G.

With e the rounding errors at the moment of rounding, row r's risk is 1/2 sum_c gain_rc e_rc^2.
"""

import time
from collections.abc import MutableMapping
from dataclasses import dataclass

import torch
from torch import Tensor

from bayesq.posterior import (
    DiagonalPosterior,
    EkfacPosterior,
    KroneckerPosterior,
    LayerPosterior,
    LowRankPosterior,
    Posterior,
)
from bayesq.quant.feedback import FeedbackFactor, feedback_factors
from bayesq.quant.method import LayerProblem, naming


@dataclass
class Whitening:
    """Geometry of one layer's risk.

    Attributes:
        row_gain: [g, r] the rows' own factor of the gain (ones where column_gain has it all).
        column_gain: [g, r, c], or [g, 1, c] where all rows share it.
        factors: feedback factor of each group; None where rounding is to nearest.
        row_factors: factor of each group's G for feedback from row to row; None without it.
        seconds: what it took to make, the posterior's fit included.
    """

    row_gain: Tensor
    column_gain: Tensor
    factors: list[FeedbackFactor] | None
    row_factors: list[FeedbackFactor] | None = None
    seconds: float = 0.0

    @property
    def retries(self) -> int:
        """How often a factorization needed more damping than asked for."""
        return sum(factor.retries for factor in (self.factors or []) + (self.row_factors or []))

    @property
    def nbytes(self) -> int:
        """Memory its tensors take."""
        factors = (self.factors or []) + (self.row_factors or [])
        gains = self.row_gain.nbytes + self.column_gain.nbytes
        return gains + sum(factor.upper.nbytes + factor.column_gain.nbytes for factor in factors)


class Shelf(dict[tuple[object, ...], Whitening]):
    """Geometries by layer and settings, as many as fit; what comes when it is full goes elsewhere or is not kept.

    Args:
        limit: in bytes.
        beyond: takes what does not fit, until it raises OSError; None: nothing is kept beyond the limit.
    """

    def __init__(self, limit: int, beyond: MutableMapping[tuple[object, ...], Whitening] | None = None) -> None:
        super().__init__()
        self.room, self.beyond, self._accepts = limit, beyond, True

    def __setitem__(self, key: tuple[object, ...], geometry: Whitening) -> None:
        """Keep a geometry where there is room."""
        if geometry.nbytes <= self.room:
            self.room -= geometry.nbytes
            super().__setitem__(key, geometry)
        elif self.beyond is not None and self._accepts:
            try:
                self.beyond[key] = geometry
            except OSError:  # the disk is full: what is made again costs time only
                self._accepts = False

    def __contains__(self, key: object) -> bool:
        """Whether it is kept, here or beyond."""
        return super().__contains__(key) or (self.beyond is not None and key in self.beyond)

    def __missing__(self, key: tuple[object, ...]) -> Whitening:
        """What was put beyond; KeyError if nothing was."""
        if self.beyond is None:
            raise KeyError(key)
        return self.beyond[key]


def layer_whitening(
    posterior: Posterior, layer: LayerProblem, feedback: bool, damping: float, row_damping: float | None = None
) -> Whitening:
    """`whitening` of a layer's posterior; a posterior with a shelf has each geometry made once for all who ask.

    Allocation and every round of rounding need the same geometry, whose factorization is the dear part of a fit.
    """
    shelf, key = posterior.whitenings, (layer.name, feedback, damping, row_damping)
    if shelf is not None and key in shelf:
        kept: Whitening = shelf[key]
        return kept
    start = time.perf_counter()
    with naming(layer):
        geometry = whitening(posterior.fit(layer), feedback, damping, row_damping)
    geometry.seconds = time.perf_counter() - start
    if shelf is not None:
        shelf[key] = geometry
    return geometry


def whitening(posterior: LayerPosterior, feedback: bool, damping: float, row_damping: float | None = None) -> Whitening:
    """Geometry in which a layer is rounded.

    Args:
        posterior: of the layer.
        feedback: whether rounding errors are fed to later columns. A diagonal posterior couples no columns: nearest
            rounding is then optimal and there is nothing to feed back. A low-rank one couples all rows, and is
            rounded to nearest as well.
        damping: fraction of the mean diagonal added to A before it is factored, against the noise of few calibration
            examples; on top of the prior's share.
        row_damping: the same for G, to feed errors from row to row as well; None = columns only. Only a plain
            Kronecker posterior allows it.

    Raises:
        ValueError: row feedback for another posterior.
    """
    if row_damping is not None and not isinstance(posterior, KroneckerPosterior):
        raise ValueError("method.rounding=two_sided needs a Kronecker-factored posterior: choose posterior=kfac")
    if isinstance(posterior, DiagonalPosterior | LowRankPosterior):
        return _nearest(posterior)
    if isinstance(posterior, KroneckerPosterior):
        # a copy: a view would keep all of G
        row_gain = posterior.gradient_factor.diagonal(dim1=-2, dim2=-1).clone()
        if not feedback:
            return Whitening(row_gain, posterior.input_factor.diagonal(dim1=-2, dim2=-1)[:, None, :].clone(), None)
        geometry = _feedback(row_gain, posterior.input_factor, damping)
        if row_damping is not None:
            geometry.row_factors = feedback_factors(posterior.gradient_factor, row_damping)
            geometry.row_gain = torch.stack([factor.column_gain for factor in geometry.row_factors])
        return geometry
    if isinstance(posterior, EkfacPosterior):
        if not feedback:
            return _nearest(posterior)
        trace = posterior.input_moment.diagonal(dim1=-2, dim2=-1).sum(-1)
        # A group without inputs is factored as the identity.
        trace = torch.where(trace > 0, trace, float(posterior.input_moment.shape[-1]))
        return _feedback(posterior.diagonal().sum(-1) / trace[:, None], posterior.input_moment, damping)
    raise TypeError(f"no whitening for {type(posterior).__name__}")


def _nearest(posterior: LayerPosterior) -> Whitening:
    gain = posterior.diagonal()
    return Whitening(torch.ones_like(gain[..., 0]), gain, None)


def _feedback(row_gain: Tensor, moment: Tensor, damping: float) -> Whitening:
    factors = feedback_factors(moment, damping)
    return Whitening(row_gain, torch.stack([factor.column_gain for factor in factors])[:, None, :], factors)


def whiten(posterior: LayerPosterior, weight: Tensor) -> Tensor:
    """Whitened coordinates z [g, r, c] of weights [g, r, c], float64: |z(w) - z(w_hat)|^2 = 2 R."""
    w = weight.to(torch.float64)
    if isinstance(posterior, DiagonalPosterior):
        return posterior.precision.sqrt() * w
    if isinstance(posterior, KroneckerPosterior):
        l_a = torch.linalg.cholesky(posterior.input_factor)
        l_g = torch.linalg.cholesky(posterior.gradient_factor)
        z: Tensor = l_g.transpose(-1, -2) @ w @ l_a
        return z
    if isinstance(posterior, EkfacPosterior):
        return posterior.eigenvalues.sqrt() * posterior.rotate(w)
    if isinstance(posterior, LowRankPosterior):
        return posterior.whiten(w)
    raise TypeError(f"no whitening for {type(posterior).__name__}")
