"""Learned rounding (Nagel et al., arXiv 2004.10568): each weight learns whether it is rounded down or up.

    W(v) = s (clip(floor(W / s) + z + h(v), 0, top) - z),   h(v) = clip(1.2 sigmoid(v) - .1, 0, 1)
    loss = reconstruction error + strength sum (1 - |2 h(v) - 1|^beta)

In the first `WARM_UP` of the steps only the reconstruction error counts. Then beta falls from 20 to 2 along half a
cosine, and the regulariser drives every h to 0 or 1. AdaRound and BRECQ differ in the reconstruction error alone.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from bayesq.contract import LayerProblem, check_finite, stack_groups
from bayesq.errors import Refused
from bayesq.quant.grids import CLIP_RULES, top_code, zero_code
from bayesq.quant.tensor import QuantizedTensor

# Of the published code: stretch of the sigmoid, share of the steps without regulariser, first and last beta.
STRETCH_LOW, STRETCH_HIGH = -0.1, 1.1
WARM_UP = 0.2
BETA_FIRST, BETA_LAST = 20.0, 2.0


@dataclass(frozen=True)
class Schedule:
    """How rounding is learned.

    Attributes:
        steps: of Adam.
        learning_rate: of Adam.
        strength: weight lambda of the regulariser.
    """

    steps: int
    learning_rate: float
    strength: float

    def __post_init__(self) -> None:
        if self.steps < 1 or int(self.steps) != self.steps:
            raise Refused(f"method.steps={self.steps}: needs a whole number of at least 1")
        for key in ("learning_rate", "strength"):
            if not 0 < getattr(self, key) < math.inf:
                raise Refused(f"method.{key}={getattr(self, key)}: must be above 0")

    def beta(self, step: int) -> float | None:
        """Exponent of the regulariser at a step, counted from 0; None during the warm-up."""
        first = WARM_UP * self.steps
        if step < first:
            return None
        share = (step - first) / max(self.steps - first, 1)
        return BETA_LAST + 0.5 * (BETA_FIRST - BETA_LAST) * (1 + math.cos(math.pi * share))


class SoftLayer:
    """The learned rounding of one layer.

    Args:
        weight: [g, r, c].
        width: uint8 [R] bits.
        scale, zero: [R] of affine grids.
        device: where it is learned.

    Attributes:
        v: [R, c] float32, learned; begins where h(v) is the fractional part of W / s.
    """

    def __init__(
        self, weight: Tensor, width: Tensor, scale: Tensor, zero: Tensor, device: torch.device | str = "cpu"
    ) -> None:
        self.shape, self.width, self.scale, self.zero = weight.shape, width, scale, zero
        units = stack_groups(weight).to(torch.float64) / scale[:, None]
        floor = units.floor()
        share = ((units - floor - STRETCH_LOW) / (STRETCH_HIGH - STRETCH_LOW)).clamp(1e-6, 1 - 1e-6)
        self.v = torch.logit(share).to(device, torch.float32).requires_grad_(True)
        self._lower = (floor + zero[:, None]).to(device, torch.float32)
        self._top = top_code(width, torch.float64)[:, None].to(device, torch.float32)
        self._scale, self._zero = (part[:, None].to(device, torch.float32) for part in (scale, zero))

    @classmethod
    def of(cls, layer: LayerProblem, width: Tensor, clip: str, device: torch.device | str = "cpu") -> "SoftLayer":
        """The start for a layer, on the grids of a clip rule.

        Raises:
            Refused: NaN or infinite weights.
        """
        check_finite(layer)
        return cls(layer.weight, width, *CLIP_RULES[clip](stack_groups(layer.weight).double(), width), device)

    def share(self) -> Tensor:
        """h(v) [R, c]."""
        return (torch.sigmoid(self.v) * (STRETCH_HIGH - STRETCH_LOW) + STRETCH_LOW).clamp(0, 1)

    def weight(self) -> Tensor:
        """W(v) [g, r, c], differentiable."""
        code = (self._lower + self.share()).clamp(min=0).minimum(self._top)
        return (self._scale * (code - self._zero)).reshape(self.shape)

    def regulariser(self, beta: float) -> Tensor:
        """The sum of 1 - |2 h(v) - 1|^beta over all weights."""
        return (1 - (2 * self.share() - 1).abs().pow(beta)).sum()

    @torch.no_grad()
    def tensor(self) -> QuantizedTensor:
        """The layer with every weight rounded up if its h(v) is at least 1/2, else down."""
        codes = (self._lower + (self.v >= 0)).clamp(min=0).minimum(self._top)
        return QuantizedTensor(
            codes=codes.cpu().to(torch.uint8),
            width=self.width,
            scale=self.scale[:, None].to(torch.float16),
            zero=zero_code(self.zero, self.width)[:, None],
            groups=self.shape[0],
        )


def learn(layers: Sequence[SoftLayer], error: Callable[[int], Tensor], schedule: Schedule) -> None:
    """Learn the rounding of layers together.

    Args:
        layers: their `v` are changed.
        error: the reconstruction error at a step, as a differentiable scalar.
        schedule: see `Schedule`.
    """
    moving = [layer.v for layer in layers]
    optimizer = torch.optim.Adam(moving, lr=schedule.learning_rate)
    for step in range(schedule.steps):
        loss, beta = error(step), schedule.beta(step)
        if beta is not None:
            loss = loss + schedule.strength * sum(layer.regulariser(beta) for layer in layers)
        gradients = torch.autograd.grad(loss, moving)
        for v, gradient in zip(moving, gradients, strict=True):
            v.grad = gradient
        optimizer.step()
