"""Methods run as a run does it, on layers made up by a test."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any

from bayesq.contract import Context, LayerProblem, Method
from bayesq.loop import quantize_layers
from bayesq.quant.tensor import QuantizedTensor


class GivenInputs:
    """Inputs behind the prefix that the layers themselves bring; nothing depends on what is replaced."""

    def take(self, layer: LayerProblem) -> LayerProblem:
        return replace(layer, prefix_statistic=layer.input_statistic)

    def give(self, layer: LayerProblem, tensor: QuantizedTensor) -> QuantizedTensor:
        return tensor


def rounded(
    method: Method, layers: Sequence[LayerProblem], allocate: Callable[..., Any]
) -> Iterator[tuple[LayerProblem, QuantizedTensor]]:
    """Every layer with its QuantizedTensor."""
    return quantize_layers(method, layers, allocate, Context.of_seed(0), GivenInputs())
