"""Methods run as a run does it, on layers made up by a test."""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

from bayesq.contract import Context, LayerProblem, Method
from bayesq.loop import quantize_layers
from bayesq.quant.tensor import QuantizedTensor


def rounded(
    method: Method, layers: Sequence[LayerProblem], allocate: Callable[..., Any]
) -> Iterator[tuple[LayerProblem, QuantizedTensor]]:
    """Every layer with its QuantizedTensor."""
    return quantize_layers(method, layers, allocate, Context.of_seed(0))
