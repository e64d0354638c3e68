"""GPTAQ (Li et al., arXiv 2504.02692): GPTQ whose layers make up for the inputs that earlier rounding has changed.

With H = E[x' x'T] behind the quantized prefix, C = E[x x'T] from both networks, V the upper Cholesky factor of H^-1
and P = alpha triu((C - H) VT, 1) V, column i moves the later ones by its error and by its own drift:

    W[:, i:] -= e_i V[i, i:] - w_i P[i, i:]
"""

import torch
from torch import Tensor

from baselines.two_inputs import TwoInputs
from bayesq.errors import Refused
from bayesq.quant.feedback import BlockObserver, FeedbackFactor, feedback_round
from bayesq.quant.grids import AffineGrid


class GPTAQ(TwoInputs):
    """The published algorithm, with the grids and clip rules of `GPTQ`.

    Args:
        alpha: share of the drift; 1 in the paper, .25 in its code.

    The others as in `GPTQ`.
    """

    def __init__(
        self,
        clip: str,
        act_order: bool,
        damping: float,
        group_size: int | None,
        alpha: float,
        symmetric: bool = False,
    ) -> None:
        super().__init__(clip, act_order, damping, group_size, symmetric=symmetric)
        if not 0 <= alpha <= 1:
            raise Refused(f"method.alpha={alpha}: must be in [0, 1]")
        self.alpha = alpha

    def _feedback(
        self, weight: Tensor, group: int, factor: FeedbackFactor, grid: AffineGrid, follow: BlockObserver | None
    ) -> tuple[Tensor, Tensor]:
        drift = self.drift(factor, self._cross[group] - self._moment[group])
        codes, values, _ = feedback_round(weight, factor, grid, follow, drift)
        return codes, values

    def drift(self, factor: FeedbackFactor, change: Tensor) -> Tensor:
        """P [c, c] in visiting order; change is C - H in the columns' own order."""
        v = inverse_factor(factor)
        change = change[factor.order][:, factor.order]
        drift: Tensor = (change @ v.T).triu(1).mul(self.alpha) @ v
        return drift


def inverse_factor(factor: FeedbackFactor) -> Tensor:
    """V [c, c], upper triangular, VT V = H^-1 in visiting order: D^-1/2 U^-1 of H = U D UT."""
    eye = torch.eye(len(factor.upper), dtype=factor.upper.dtype)
    inverse: Tensor = torch.linalg.solve_triangular(factor.upper, eye, upper=True, unitriangular=True)
    return inverse / factor.column_curvature[factor.order].sqrt()[:, None]
