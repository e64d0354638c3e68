"""How a network uses the weights of its layers, observed on two examples before any long work.

A layer can be called, or its weight can be passed to a function. It can run once or several times. Its input need not
have the batch as first dimension: all examples may share relative positions, a mixture of experts sends tokens of all
examples to one expert, and some networks put positions before the batch. All this decides how statistics are taken.
"""

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from itertools import groupby

import torch
from torch import Tensor, nn

from bayesq.errors import Refused
from bayesq.quant.layers import MASK, Layer, function_called, is_plain
from bayesq.quant.watch import Products, watching

# Largest difference of an input between an example alone and in a batch, relative to its norm: other orders of float32
# sums differ far less, inputs of other examples far more.
TOLERANCE = 1e-4
# The same on accelerators, whose products may be of lower precision.
ACCELERATOR_TOLERANCE = 1e-3


class OtherUseError(Refused):
    """A network uses weights in a way that no statistics describe."""


@dataclass(frozen=True)
class Usage:
    """How a network uses its layers.

    Attributes:
        layers: those that a forward pass uses, by name; a ParameterLayer if a function uses the weight.
        calls: how often each runs in a forward pass of one example.
        unreached: layers that no forward pass uses.
        alone: layers whose statistics need one example at a time: the batch is not the first dimension of their input,
            or the mask does not fit its positions.
        overwritten: layers whose inputs the network changes in place later, or may change.
    """

    layers: dict[str, Layer]
    calls: dict[str, int]
    unreached: tuple[str, ...]
    alone: tuple[str, ...]
    overwritten: frozenset[str] = frozenset()


@dataclass
class _Pass:
    """Observations of a forward pass: inputs by layer, one per call; number of hook calls; other uses of weights."""

    inputs: dict[str, list[Tensor]] = field(default_factory=dict)
    called: Counter[str] = field(default_factory=Counter)
    others: dict[str, str] = field(default_factory=dict)
    overwritten: set[str] = field(default_factory=set)


@torch.no_grad()
def usage_of(
    module: nn.Module,
    layers: Mapping[str, Layer],
    inputs: Mapping[str, Tensor],
    more: Iterable[Mapping[str, Tensor]] = (),
) -> Usage:
    """Watch the network on each of two examples alone, and on both together.

    Args:
        layers: of `quantizable_layers`.
        inputs: module arguments of two examples [2, ...], padded to one length; with one example [1, ...] nothing is
            known about batches, so every layer is in `alone`.
        more: further examples in batches, used as long as some layer is not reached. A layer that only they reach is in
            `alone`, and not in `calls`.

    Raises:
        OtherUseError: a weight is used in another way than as the matrix of a product; the message names the layers.
    """
    count = len(next(iter(inputs.values())))
    single = [_watch(module, layers, {name: x[k : k + 1] for name, x in inputs.items()}) for k in range(count)]
    together = _watch(module, layers, inputs) if count > 1 else single[0]
    _refuse_other_uses([*single, together])
    used = {name: max(len(one.inputs.get(name, ())) for one in (*single, together)) for name in layers}
    taking_part = {
        name: _as_used(layer, used[name], max(one.called[name] for one in (*single, together)))
        for name, layer in layers.items()
        if used[name]
    }
    mask = inputs.get(MASK)
    alone = tuple(name for name in taking_part if not _batch_first(name, layers[name], single, together, mask))
    calls = {name: used[name] for name in taking_part}
    late = _reached_by(module, {name: layer for name, layer in layers.items() if not used[name]}, more)
    taking_part |= late
    unreached = {name: layer for name, layer in layers.items() if name not in taking_part}
    _refuse_hidden_uses(module, unreached, inputs)
    overwritten = {name for one in (*single, together) for name in one.overwritten}
    return Usage(
        {name: taking_part[name] for name in layers if name in taking_part},
        calls,
        tuple(unreached),
        (*alone, *late),
        frozenset(overwritten | late.keys()),
    )


def _refuse_hidden_uses(module: nn.Module, unreached: Mapping[str, Layer], inputs: Mapping[str, Tensor]) -> None:
    """Refuse layers that seem unused, but whose weights change the outputs.

    A scripted function or numpy may compute with a weight, and another parameter may share its memory. Then no product
    is seen, but the outputs change with the weights.
    """
    if not unreached:
        return
    before, weights = module(**inputs), {name: layer.weight.clone() for name, layer in unreached.items()}
    try:
        for layer in unreached.values():
            layer.weight.add_(1.0)
        after = module(**inputs)
    finally:
        for name, layer in unreached.items():
            layer.weight.copy_(weights[name])
    if (after - before).norm() > ACCELERATOR_TOLERANCE * before.norm():
        raise OtherUseError(
            f"the network computes with the weights of layer {', '.join(unreached)} in a way that cannot be watched (a "
            f"scripted function, numpy, shared memory): add them to layers.exclude"
        )


def _reached_by(
    module: nn.Module, layers: Mapping[str, Layer], batches: Iterable[Mapping[str, Tensor]]
) -> dict[str, Layer]:
    """The layers that at least one of the batches reaches, as the network uses them."""
    waiting, reached = dict(layers), dict[str, Layer]()
    for inputs in batches if waiting else ():
        seen = _watch(module, waiting, inputs)
        _refuse_other_uses([seen])
        for name, xs in seen.inputs.items():
            reached[name] = _as_used(waiting.pop(name), len(xs), seen.called[name])
        if not waiting:
            break
    return reached


def _watch(module: nn.Module, layers: Mapping[str, Layer], inputs: Mapping[str, Tensor]) -> _Pass:
    seen = _Pass()
    versions: list[tuple[str, Tensor, int]] = []

    def use(name: str, group: int | None, x: Tensor, _: Tensor) -> None:
        seen.inputs.setdefault(name, []).append(x.detach().clone())
        versions.append((name, x, x._version))

    def call(name: str, *_: object) -> None:
        seen.called[name] += 1

    def other(name: str, function: str) -> None:
        seen.others.setdefault(name, function)

    modules = {name: layer for name, layer in layers.items() if isinstance(layer, nn.Module)}
    with watching(modules, call), Products(layers, use, other):
        module(**inputs)
    seen.overwritten = {name for name, x, version in versions if x._version != version}
    for name, layer in layers.items():
        if isinstance(layer, nn.Conv2d) and len(seen.inputs.get(name, ())) > seen.called[name]:
            seen.others.setdefault(name, "conv2d")  # stride and padding may then differ from the layer's
    return seen


def _as_used(layer: Layer, used: int, called: int) -> Layer:
    """The layer, as ParameterLayer if it runs without being called, or does more than a Linear when it is called."""
    watched_as_product = isinstance(layer, nn.Linear) and (used > called or not is_plain(layer))
    return function_called(layer) if watched_as_product else layer  # type: ignore[arg-type]


def _refuse_other_uses(passes: list[_Pass]) -> None:
    """Refuse layers whose weights are used in a way that no statistics describe."""
    others: dict[str, str] = {}
    for one in passes:
        others |= one.others
    if not others:
        return
    named = sorted((function, name) for name, function in others.items())
    parts = [
        f"{', '.join(name for _, name in group)} by {function}"
        for function, group in groupby(named, key=lambda pair: pair[0])
    ]
    raise OtherUseError(
        f"the network uses weights not only in products with inputs (layer {'; '.join(parts)}): add these layers to "
        f"layers.exclude"
    )


def _batch_first(name: str, layer: Layer, single: list[_Pass], together: _Pass, mask: Tensor | None) -> bool:
    """Whether every input of the layer in a batch is the concatenation of the inputs of its examples.

    With a mask, each example must also have as many positions as the mask, or a single one.
    """
    count = len(single)
    calls = [together.inputs[name], *(one.inputs.get(name, []) for one in single)]
    if count < 2 or len({len(xs) for xs in calls}) > 1:
        return False
    for x, *alone in zip(*calls, strict=True):
        if x.shape[-1] == 0 or any(one.numel() * count != x.numel() for one in alone):
            return False
        positions = x.numel() // (count * x.shape[-1])
        if mask is not None and not isinstance(layer, nn.Conv2d) and positions not in (1, mask.shape[1]):
            return False
        rows = x.reshape(count, -1)
        tolerance = TOLERANCE if x.device.type == "cpu" else ACCELERATOR_TOLERANCE
        if any((row - one.flatten()).norm() > tolerance * one.norm() for row, one in zip(rows, alone, strict=True)):
            return False
    return True
