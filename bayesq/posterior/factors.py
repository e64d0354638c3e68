"""Linear algebra that the posteriors' factors share: square roots, spectra, shrinkage, damping."""

from collections.abc import Sequence

import torch
from torch import Tensor

from bayesq.errors import Refused
from bayesq.quant.feedback import DAMPING_RETRIES, LEAST_DAMPING


def eigenvalues(moments: Tensor) -> Tensor:
    """Eigenvalues [g, n] float64 of moments [g, n, n], with float32 precision relative to the largest entry.

    This is enough for the evidence, a sum over all of them; in float64 they would take as long as a rounding. Where
    LAPACK's float32 routine fails, as for some matrices of low rank, float64 is used.
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

    With prior_share=gradient the prior does not damp A. If some inputs are always zero, A is singular and the posterior
    variance infinite, so LEAST_DAMPING of the mean diagonal is added, ten times more in each retry.

    Raises:
        Refused: no retry made a moment positive definite.
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
    raise Refused("the posterior's factors are not positive definite, even with damping")


def shrink(moment: Tensor, amount: float) -> Tensor:
    """(1 - amount) G + amount mean(diag G) I for [g, r, r]; the mean is over all groups."""
    mean = moment.diagonal(dim1=-2, dim2=-1).mean()
    shrunk = (1 - amount) * moment
    shrunk.diagonal(dim1=-2, dim2=-1).add_(amount * mean)
    return shrunk


def gradient_damping(a: Tensor, g: Tensor, damping: float) -> tuple[Tensor, Tensor]:
    """(A, G + damping / (mean eig A) I) of each group: all of the prior goes to G.

    The trace, and the trace of each row, are those of A (x) G + damping I, and A does not change.

    Args:
        a: [g, c, c].
        g: [g, r, r].
        damping: tau / N.
    """
    mean_a = a.diagonal(dim1=-2, dim2=-1).mean(-1)
    # The mean eigenvalue of a group that no input reached is 0.
    share = torch.where(mean_a > 0, damping / mean_a.clamp(min=torch.finfo(a.dtype).tiny), 0.0)
    return a, _plus_diagonal(g, share)


def factored_damping(a: Tensor, g: Tensor, damping: float) -> tuple[Tensor, Tensor]:
    """(A + pi sqrt(damping) I, G + sqrt(damping)/pi I), pi = sqrt(mean eig A / mean eig G), of each group.

    Martens and Grosse, arXiv 1503.05671, section 6.3.

    Args:
        a: [g, c, c].
        g: [g, r, r].
        damping: tau / N.
    """
    mean_a, mean_g = (factor.diagonal(dim1=-2, dim2=-1).mean(-1) for factor in (a, g))
    # A group without inputs or without gradients has no such ratio.
    pi = torch.where((mean_a > 0) & (mean_g > 0), mean_a / mean_g, 1.0).sqrt()
    root = damping**0.5
    return _plus_diagonal(a, pi * root), _plus_diagonal(g, root / pi)


def _plus_diagonal(moments: Tensor, amount: Tensor) -> Tensor:
    """[g, n, n] plus amount [g] times the identity."""
    moments = moments.clone()
    moments.diagonal(dim1=-2, dim2=-1).add_(amount[:, None])
    return moments


def standard_normal(shape: Sequence[int], generator: torch.Generator) -> Tensor:
    """Standard normal numbers of a shape, float64."""
    return torch.randn(tuple(shape), generator=generator, dtype=torch.float64)
