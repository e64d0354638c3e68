"""What GPTAQ and Qronos share: GPTQ that reads its inputs in full precision and behind the quantized prefix."""

from torch import Tensor

from baselines.gptq import GPTQ
from bayesq.calibration.inputs import INPUT_MOMENT
from bayesq.calibration.paired import CROSS_MOMENT
from bayesq.contract import LayerProblem


class TwoInputs(GPTQ):
    """GPTQ with H = E[x' x'T] and C = E[x x'T] of the current layer; clip rules are judged by E|w x - q x'|^2.

    A column may be zero in x' but not in x. Its weights become zero, but its part of W x stays in E[W x x'T].
    """

    statistics = frozenset({INPUT_MOMENT, CROSS_MOMENT})
    together = False

    def _begin(self, layer: LayerProblem) -> None:
        self._moment = layer.input_statistic("input_moment").double()
        self._cross = layer.input_statistic("cross_moment").double()
        self._aim = layer.weight.double() @ self._cross  # E[W x x'T] [g, r, c]

    def _error(self, value: Tensor, weight: Tensor, moments: Tensor) -> Tensor:
        """E|w x - q x'|^2 of each row [g, r], up to the constant E|w x|^2."""
        return ((value @ moments.double() - 2 * self._aim) * value).sum(-1)
