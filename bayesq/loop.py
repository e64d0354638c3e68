"""The loop over layers that runs every method with the inputs it asks for."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from typing import Any, Protocol

import torch
from torch import Tensor

from bayesq.contract import Allocate, Context, CountedStatistics, LayerProblem, Method, naming
from bayesq.errors import Refused
from bayesq.quant.tensor import QuantizedTensor
from bayesq.rotated import in_columns_of


class Prefix(Protocol):
    """The network whose layers are replaced one by one."""

    def take(self, layer: LayerProblem) -> LayerProblem:
        """The layer with its inputs behind the layers replaced so far, and its target as the weight."""

    def give(self, layer: LayerProblem, tensor: QuantizedTensor) -> QuantizedTensor:
        """Put the quantized weights into the network; returns them as stored."""


def quantize_layers(
    method: Method,
    layers: Sequence[LayerProblem],
    allocate: Allocate,
    context: Context,
    prefix: Prefix | None = None,
    most_bits: float | None = None,
) -> Iterator[tuple[LayerProblem, QuantizedTensor]]:
    """Run a method over all layers.

    Args:
        method: see `bayesq.contract.Method`.
        layers: in forward order; the method gets copies of them.
        allocate: the run's allocator with its budget.
        context: see `bayesq.contract.Context`.
        prefix: the network behind which layers are rounded; None = inputs of the full-precision network.
        most_bits: bits that the codes of all layers may take; None = any number.

    Yields:
        every layer of `layers` with its QuantizedTensor, in order.

    Raises:
        Refused: the method reads a statistic that it does not declare, or reads inputs behind the quantized prefix
            outside of the layer's turn; it changes a weight in place; `prepare` returns widths that do not fit the
            layers or take more than `most_bits`, or `quantize_layer` a tensor of other widths.
    """
    reader = type(method).__name__
    turn = _Turn(method, prefix is not None)
    seen = [turn.view(layer) for layer in layers]
    with unchanged(reader, *seen):
        widths = method.prepare(seen, _of_these(layers, allocate), context)
    _check_widths(method, layers, widths, most_bits)
    for layer, view in zip(layers, seen, strict=True):
        with naming(layer):
            if prefix is not None:
                view = turn.begin(view, prefix.take(layer))
            with unchanged(reader, view):
                tensor = method.quantize_layer(view, widths[layer.name].clone(), context)
        if not isinstance(tensor, QuantizedTensor):
            kind = type(tensor).__name__
            raise Refused(f"layer {layer.name}: {reader}.quantize_layer returned {kind}")
        if not torch.equal(tensor.width, widths[layer.name]):
            raise Refused(
                f"layer {layer.name}: {reader}.quantize_layer returned other row widths than {reader}.prepare gave"
            )
        turn.layer = None
        yield layer, tensor if prefix is None else prefix.give(layer, tensor)


@contextmanager
def unchanged(reader: str, *layers: LayerProblem) -> Iterator[None]:
    """Raise Refused if the block changes the weight of a layer in place: it may be the caller's network."""
    counted = [layer for layer in layers if not layer.weight.is_inference()]  # inference tensors have no counter
    versions = [layer.weight._version for layer in counted]
    yield
    for layer, version in zip(counted, versions, strict=True):
        if layer.weight._version != version:
            raise Refused(f"layer {layer.name}: {reader} changed its weight in place; work on a copy (weight.clone())")


class _Turn:
    """Gives a method the statistics it declares, and prefix inputs only of the layer that is being quantized."""

    def __init__(self, method: Method, has_prefix: bool) -> None:
        self.method, self.has_prefix = method, has_prefix
        self.layer: LayerProblem | None = None

    def view(self, layer: LayerProblem) -> LayerProblem:
        """The layer as the method sees it."""
        readable = frozenset(statistic.name for statistic in self.method.statistics)
        planning = frozenset(statistic.name for statistic in getattr(self.method, "entropy_statistics", ()))
        reader = type(self.method).__name__
        counted = CountedStatistics.of(layer.statistic, layer)
        view = replace(layer, statistic=counted.limited(readable | planning, reader))
        if self.has_prefix:
            behind = CountedStatistics(partial(self._behind, layer.name), layer.fallbacks)
            view.prefix_statistic = behind.limited(readable, reader)
        return view

    def begin(self, view: LayerProblem, taken: LayerProblem) -> LayerProblem:
        """The view of the layer whose turn it is, with its target and its block."""
        self.layer = taken
        return replace(view, weight=taken.weight, block=taken.block)

    def _behind(self, layer: str, kind: str) -> Tensor:
        if self.layer is None or self.layer.name != layer or self.layer.prefix_statistic is None:
            raise Refused(
                f"layer {layer}: its inputs behind the quantized prefix can only be read in the call of "
                "quantize_layer for this layer"
            )
        return self.layer.prefix_statistic(kind)


def _of_these(layers: Sequence[LayerProblem], allocate: Allocate) -> Allocate:
    """`allocate` for copies of layers: it gets the originals, rotated alike, with all their statistics."""
    by_name = {layer.name: layer for layer in layers}

    def allocate_these(layers: Sequence[LayerProblem], *rest: Any, **named: Any) -> Mapping[str, Tensor]:
        return allocate([in_columns_of(layer, by_name[layer.name]) for layer in layers], *rest, **named)

    return allocate_these


def _check_widths(
    method: Method, layers: Sequence[LayerProblem], widths: Mapping[str, Tensor], most_bits: float | None
) -> None:
    """Check widths before the first layer is rounded."""
    name = type(method).__name__
    if not isinstance(widths, Mapping):
        raise Refused(f"{name}.prepare returned {type(widths).__name__}: it must return row widths by layer name")
    for layer in layers:
        width = widths.get(layer.name)
        if not isinstance(width, Tensor) or width.dtype != torch.uint8 or width.shape != (layer.rows,):
            raise Refused(f"{name}.prepare: needs widths uint8 [{layer.rows}] for layer {layer.name}")
    taken = sum(layer.columns * int(widths[layer.name].sum()) for layer in layers)
    if most_bits is not None and taken > most_bits * (1 + 1e-9):
        weights = sum(layer.weight.numel() for layer in layers)
        raise Refused(
            f"{name}.prepare: its widths take {taken / weights:.3f} bits per weight, and the budget is "
            f"{most_bits / weights:.3f}: return the widths of `allocate`"
        )
