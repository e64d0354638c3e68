"""What absorbs a shift of the mean of a layer's outputs: the layer's bias, or the BatchNorm that reads them."""

from collections import Counter
from collections.abc import Collection, Mapping
from contextlib import ExitStack
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from bayesq.quant.layers import is_layer, is_plain
from bayesq.quant.resume import INPUT, OUTPUT


def moment_stops(module: nn.Module, layers: Collection[str]) -> dict[str, str]:
    """Where activations are looked at: the inputs of every BatchNorm and the outputs of every layer in `layers`."""
    stops = {}
    for name, child in module.named_modules():
        # Without running statistics a norm standardises its own batch: nothing is left to correct.
        if isinstance(child, nn.BatchNorm1d | nn.BatchNorm2d) and child.running_mean is not None:
            stops[name] = INPUT
        elif name in layers and is_layer(child):
            stops[name] = OUTPUT
    return stops


def movable_layers(module: nn.Module, layers: Collection[str]) -> set[str]:
    """Those of `layers` whose bias shifts the mean of their outputs one to one and belongs to no other module."""
    biased = {name: child for name, child in module.named_modules() if getattr(child, "bias", None) is not None}
    users = Counter(id(child.bias) for child in biased.values())
    return {
        name
        for name, child in biased.items()
        if name in layers
        and is_layer(child)
        and users[id(child.bias)] == 1
        and (not isinstance(child, nn.Linear) or is_plain(child))
    }


@torch.no_grad()
def mean_takers(module: nn.Module, layers: Collection[str], inputs: Mapping[str, Tensor]) -> dict[str, str]:
    """By layer, the module that can absorb a shift of its outputs' mean: the BatchNorm that reads them, or itself.

    Args:
        module: in eval mode.
        layers: names of layers.
        inputs: one batch.
    """
    outputs: list[tuple[str, Tensor, int]] = []
    read_by: dict[str, str] = {}
    calls: Counter[str] = Counter()

    def gave(name: str, _: nn.Module, __: Any, output: Any) -> None:
        calls[name] += 1
        if isinstance(output, Tensor):  # a router gives several tensors
            outputs.append((name, output, output._version))

    def read(name: str, _: nn.Module, args: tuple[Tensor, ...]) -> None:
        calls[name] += 1
        for layer, output, version in outputs:
            # An in-place activation keeps the tensor and raises its version: the norm then reads something else.
            if args and output is args[0] and output._version == version:
                read_by[layer] = name

    places = moment_stops(module, layers)
    with ExitStack() as hooks:
        for name, which in places.items():
            part = module.get_submodule(name)
            if which == INPUT:
                hooks.callback(part.register_forward_pre_hook(partial(read, name)).remove)
            else:
                hooks.callback(part.register_forward_hook(partial(gave, name)).remove)
        module(**inputs)
    movable = movable_layers(module, layers)
    takers = {name: read_by.get(name, name if name in movable else "") for name in layers}
    return {name: taker for name, taker in takers.items() if taker and calls[name] == 1 and calls[taker] == 1}
