"""AdaRound (Nagel et al., arXiv 2004.10568): learned rounding, layer by layer.

The layer's error E|W x - W(v) x|^2 is quadratic in the weights, so the input moment A = E[x xT] replaces the samples:

    tr((W(v) - W) A (W(v) - W)T)

The published method reconstructs W x from the input x' behind the quantized prefix. With inputs=paired the weight is
the target T of `bayesq.target`, which makes E|W x - T x'|^2 least, and the error is that of T under E[x' x'T].
"""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from baselines.learned_rounding import Schedule, SoftLayer, learn
from bayesq.calibration.inputs import INPUT_MOMENT
from bayesq.calibration.statistic import Statistic
from bayesq.contract import Allocate, Context, LayerProblem
from bayesq.errors import Refused
from bayesq.quant.grids import CLIP_RULES
from bayesq.quant.tensor import QuantizedTensor


class AdaRound:
    """The published algorithm with the exact error over all calibration samples in every step.

    Args:
        clip: of the grids, "minmax" or "mse".
        steps, learning_rate, strength: see `Schedule`.
    """

    statistics: frozenset[Statistic] = frozenset({INPUT_MOMENT})

    def __init__(self, clip: str, steps: int, learning_rate: float, strength: float) -> None:
        if clip not in CLIP_RULES:
            raise Refused(f"method.clip={clip}: choose from {', '.join(CLIP_RULES)}")
        self.clip = clip
        self.schedule = Schedule(steps, learning_rate, strength)

    def prepare(self, layers: Sequence[LayerProblem], allocate: Allocate, context: Context) -> Mapping[str, Tensor]:
        """Choose the widths; nothing else needs all layers."""
        return allocate(layers)

    def quantize_layer(self, layer: LayerProblem, width: Tensor, context: Context) -> QuantizedTensor:
        """Learn the layer's rounding."""
        soft = SoftLayer.of(layer, width, self.clip, context.device)
        moment = layer.input_statistic("input_moment").to(context.device, torch.float32)
        weight = layer.weight.to(context.device)

        def error(step: int) -> Tensor:
            delta = soft.weight() - weight
            with torch.no_grad():  # the gradient 2 (W(v) - W) A from one product instead of two
                gradient = 2 * delta @ moment
            return (delta * gradient).sum()

        learn([soft], error, self.schedule)
        return soft.tensor()
