"""Qronos (Zhang et al., arXiv 2505.11695): column 1 corrects earlier errors, the rest adapts, then GPTQ.

With H = E[x' x'T] behind the quantized prefix and C = E[x x'T] from both networks, in visiting order:

    q_1 = Q[(w C[:, 1] - w_2: H[2:, 1]) / H_11],   w_2: = (w (C + l I)[:, 2:] - q_1 H[1, 2:]) (H_22 + l I)^-1

with l = 1e-6 of the largest eigenvalue of H; the remaining columns are rounded as GPTQ does.
"""

import torch
from torch import Tensor

from baselines.two_inputs import TwoInputs
from bayesq.errors import Refused
from bayesq.quant.feedback import BlockObserver, FeedbackFactor, feedback_round
from bayesq.quant.grids import AffineGrid


class Qronos(TwoInputs):
    """The published algorithm, with the grids and clip rules of `GPTQ`.

    Args:
        ridge: l as a fraction of the largest eigenvalue of H.

    The others as in `GPTQ`.
    """

    def __init__(self, clip: str, act_order: bool, damping: float, ridge: float) -> None:
        super().__init__(clip, act_order, damping, group_size=None)
        if not ridge > 0:
            raise Refused(f"method.ridge={ridge}: must be above 0")
        self.ridge = ridge

    def _feedback(
        self, weight: Tensor, group: int, factor: FeedbackFactor, grid: AffineGrid, follow: BlockObserver | None
    ) -> tuple[Tensor, Tensor]:
        order = factor.order
        h = self._moment[group][order][:, order]
        w, aim = weight[:, order], self._aim[group][:, order]
        corrected = torch.empty_like(w)
        corrected[:, 0] = self._first(w, aim, h, grid, int(order[0]))
        corrected[:, 1:] = self._rest(w, aim, corrected[:, 0], h)
        codes, values, _ = feedback_round(corrected[:, torch.argsort(order)], factor, grid, follow)
        return codes, values

    def _first(self, w: Tensor, aim: Tensor, h: Tensor, grid: AffineGrid, column: int) -> Tensor:
        """q_1 [R]: the grid value that best reproduces W x, with the other columns unchanged; aim = W C."""
        if not h[0, 0] > 0:
            return w[:, 0]
        best = (aim[:, 0] - w[:, 1:] @ h[1:, 0]) / h[0, 0]
        return grid.round(best, column)[1]

    def _rest(self, w: Tensor, aim: Tensor, first: Tensor, h: Tensor) -> Tensor:
        """w_2: [R, c - 1]: the least squares solution, given q_1."""
        size = self.ridge * float(torch.linalg.matrix_norm(h, 2)) or 1.0
        damped = h[1:, 1:].clone()
        damped.diagonal().add_(size)
        right = aim[:, 1:] + size * w[:, 1:] - first[:, None] * h[0, 1:]
        solved, failed = torch.linalg.solve_ex(damped, right.T)
        if int(failed):
            raise Refused("H + l I is singular: raise method.ridge")
        rest: Tensor = solved.T
        return rest
