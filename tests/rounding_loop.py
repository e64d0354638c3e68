"""Methods run as a run does it, on layers made up by a test."""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

from torch import Tensor

from bayesq.contract import Context, LayerProblem, Method
from bayesq.loop import quantize_layers
from bayesq.quant.tensor import QuantizedTensor


class GivenInputs:
    """Inputs behind the prefix that the layers themselves bring; nothing depends on what is replaced."""

    def __init__(self, layers: Sequence[LayerProblem]) -> None:
        self.layers = {layer.name: layer for layer in layers}

    def statistic(self, name: str, kind: str) -> Tensor:
        return self.layers[name].input_statistic(kind)

    def replace(self, name: str, tensor: QuantizedTensor) -> None:
        pass


def rounded(
    method: Method, layers: Sequence[LayerProblem], allocate: Callable[..., Any]
) -> Iterator[tuple[LayerProblem, QuantizedTensor]]:
    """Every layer with its QuantizedTensor."""
    return quantize_layers(method, layers, allocate, Context.of_seed(0), GivenInputs(layers))
