"""The loop over layers that runs every method with the inputs it asks for (SPEC section 11)."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any, Protocol

import torch
from torch import Tensor

from bayesq.contract import INPUTS, Allocate, Context, CountedStatistics, LayerProblem, Method, naming
from bayesq.errors import Refused
from bayesq.quant.tensor import QuantizedTensor


class Prefix(Protocol):
    """The network whose layers are replaced one by one."""

    def statistic(self, name: str, kind: str) -> Tensor:
        """A statistic of a layer's inputs behind the layers replaced so far."""

    def replace(self, name: str, tensor: QuantizedTensor) -> None:
        """Give the layer its quantized weights."""


def quantize_layers(
    method: Method, layers: Sequence[LayerProblem], allocate: Allocate, context: Context, prefix: Prefix | None = None
) -> Iterator[tuple[LayerProblem, QuantizedTensor]]:
    """Run a method over all layers.

    Args:
        method: see `bayesq.contract.Method`.
        layers: in forward order; the method gets copies of them.
        allocate: the run's allocator with its budget.
        context: see `bayesq.contract.Context`.
        prefix: needed if `method.inputs` is "prefix".

    Yields:
        every layer of `layers` with its QuantizedTensor, in order.

    Raises:
        Refused: the method names an unknown kind of inputs, reads a statistic that it does not declare, or reads inputs
            behind the quantized prefix outside of the layer's turn; `prepare` returns widths that do not fit the
            layers, or `quantize_layer` returns a tensor of other widths.
    """
    reader = type(method).__name__
    if method.inputs not in INPUTS:
        raise Refused(f"{reader}.inputs={method.inputs}: choose one of {', '.join(INPUTS)}")
    if method.inputs == "prefix" and prefix is None:
        raise Refused(f"{reader}.inputs=prefix: needs the network whose layers are replaced")
    turn = _Turn(method, prefix if method.inputs == "prefix" else None)
    seen = [turn.view(layer) for layer in layers]
    widths = method.prepare(seen, _of_these(layers, allocate), context)
    _check_widths(method, layers, widths)
    for layer, view in zip(layers, seen, strict=True):
        turn.layer = layer.name
        with naming(layer):
            tensor = method.quantize_layer(view, widths[layer.name], context)
        if not isinstance(tensor, QuantizedTensor):
            kind = type(tensor).__name__
            raise Refused(f"layer {layer.name}: {reader}.quantize_layer returned {kind}")
        if not torch.equal(tensor.width, widths[layer.name]):
            raise Refused(
                f"layer {layer.name}: {reader}.quantize_layer returned other row widths than {reader}.prepare gave"
            )
        turn.layer = None
        if turn.prefix is not None:
            turn.prefix.replace(layer.name, tensor)
        yield layer, tensor


class _Turn:
    """Gives a method the statistics it declares, and prefix inputs only of the layer that is being quantized."""

    def __init__(self, method: Method, prefix: Prefix | None) -> None:
        self.method, self.prefix = method, prefix
        self.layer: str | None = None

    def view(self, layer: LayerProblem) -> LayerProblem:
        """The layer as the method sees it."""
        readable = frozenset(statistic.name for statistic in self.method.statistics)
        reader = type(self.method).__name__
        view = replace(layer, statistic=CountedStatistics.of(layer.statistic, layer).limited(readable, reader))
        if (prefix := self.prefix) is not None:
            behind = CountedStatistics(partial(self._behind, prefix, layer.name), layer.fallbacks)
            view.prefix_statistic = behind.limited(readable, reader)
        return view

    def _behind(self, prefix: Prefix, layer: str, kind: str) -> Tensor:
        if self.layer != layer:
            raise Refused(
                f"layer {layer}: its inputs behind the quantized prefix can only be read in the call of "
                "quantize_layer for this layer"
            )
        return prefix.statistic(layer, kind)


def _of_these(layers: Sequence[LayerProblem], allocate: Allocate) -> Allocate:
    """`allocate` for the method's copies: the allocator gets the original layers and may read all statistics."""
    by_name = {layer.name: layer for layer in layers}

    def allocate_these(layers: Sequence[LayerProblem], *rest: Any, **named: Any) -> Mapping[str, Tensor]:
        return allocate([by_name[layer.name] for layer in layers], *rest, **named)

    return allocate_these


def _check_widths(method: Method, layers: Sequence[LayerProblem], widths: Mapping[str, Tensor]) -> None:
    """Check widths before the first layer is rounded."""
    name = type(method).__name__
    if not isinstance(widths, Mapping):
        raise Refused(f"{name}.prepare returned {type(widths).__name__}: it must return row widths by layer name")
    for layer in layers:
        width = widths.get(layer.name)
        if not isinstance(width, Tensor) or width.dtype != torch.uint8 or width.shape != (layer.rows,):
            raise Refused(f"{name}.prepare: needs widths uint8 [{layer.rows}] for layer {layer.name}")
