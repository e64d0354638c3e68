"""Test whether padding changes a network's logits or layer inputs.

Three texts go through the full-precision network alone and in one padded batch. Padding is safe if the logits agree,
and if the inputs of every layer agree at the positions that calibration uses. Otherwise the logits would depend on the
batch size, or padding would enter the calibration statistics. Causes are pooling, Fourier transforms or convolutions
over positions, and positions counted from the wrong end.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import cast

import torch
from torch import Tensor, nn

from bayesq.batches import ALONE, EQUAL, Batch, Layout, TensorExamples
from bayesq.quant.layers import MASK, Layer, input_samples, is_layer, mask_samples
from bayesq.suite.config import one_line

# Largest relative difference that counts as rounding noise.
TOLERANCE = 1e-4


@dataclass
class _Seen:
    """Logits [classes] by example; and by layer and example, a pair for each call of the layer.

    The pair has the sums [c] of |x| over the example's positions, and over all positions of the call (for an input that
    the whole batch shares).
    """

    logits: dict[int, Tensor] = field(default_factory=dict)
    inputs: dict[tuple[str, int], list[tuple[Tensor, Tensor]]] = field(default_factory=dict)


def find_layout(module: nn.Module, encode: Callable[[Layout], TensorExamples], side: str) -> tuple[Layout, str | None]:
    """The first safe layout: padded on `side`, padded on the other side, of equal length, of one example.

    Args:
        encode: returns the same examples in any layout. Some have equal length, and some do not.
        side: the tokenizer's side of padding.

    Returns:
        the layout, and the fault of padding on `side` (None: no fault).

    Raises:
        ValueError: the network cannot run an example alone, or its outputs are random.
    """
    single = Layout(side, ALONE)
    try:
        alone = _watch(module, encode(single))
    except Exception as error:  # a network may raise anything
        raise ValueError(f"the network cannot run ({type(error).__name__}: {one_line(str(error))[:200]})") from error
    if not all(bool(torch.isfinite(logits).all()) for logits in alone.logits.values()):
        return Layout(side), None  # no comparison is possible; the run reports the NaN or infinity later
    first: str | None = None
    for layout in (Layout(side), Layout("left" if side == "right" else "right"), Layout(side, EQUAL)):
        fault = _fault(module, encode(layout), alone)
        if fault is None:
            return layout, first
        first = first or fault
    if _fault(module, encode(single), alone) is not None:
        raise ValueError("the network gives other outputs each time for the same text, so nothing can be compared")
    return single, first


def _fault(module: nn.Module, examples: TensorExamples, alone: _Seen) -> str | None:
    """The fault in batches of these examples; None if their logits and layer inputs agree with `alone`."""
    side = examples.layout.side
    try:
        seen = _watch(module, examples)
    except Exception as error:  # as above
        return f"batches padded on the {side} do not run ({type(error).__name__}: {one_line(str(error))[:200]})"
    largest = max(float(logits.abs().max()) for logits in alone.logits.values())
    difference = max(float((seen.logits[k] - logits).abs().max()) for k, logits in alone.logits.items())
    if not difference <= TOLERANCE * largest:  # also for NaN
        return f"padding on the {side} changes its outputs by up to {difference:.2g}"
    keys = seen.inputs.keys() | alone.inputs.keys()
    wrong = {name for name, k in keys if not _agree(seen.inputs.get((name, k), []), alone.inputs.get((name, k), []))}
    if wrong:
        names = [name for name in dict(module.named_modules()) if name in wrong]
        more = f" and {len(names) - 1} more" if len(names) > 1 else ""
        return f"padding on the {side} cannot be distinguished from tokens in the input of layer {names[0]}{more}"
    return None


def _agree(seen: list[tuple[Tensor, Tensor]], alone: list[tuple[Tensor, Tensor]]) -> bool:
    """Whether a layer's inputs for an example are the same in a batch as alone; they may be shared by the batch."""

    def near(x: Tensor, expected: Tensor) -> bool:
        return x.shape == expected.shape and float((x - expected).norm()) <= TOLERANCE * float(expected.norm())

    pairs = zip(seen, alone, strict=False)
    return len(seen) == len(alone) and all(near(x, one) or near(shared, one) for (x, shared), (one, _) in pairs)


@torch.no_grad()
def _watch(module: nn.Module, examples: TensorExamples) -> _Seen:
    """Run all examples, in batches as large as their layout allows."""
    seen = _Seen()
    layers = {name: child for name, child in module.named_modules() if is_layer(child)}
    for batch in examples.batches(len(examples), "cpu"):
        handles = [
            layer.register_forward_pre_hook(_recorder(seen, name, batch), with_kwargs=True)
            for name, layer in layers.items()
        ]
        try:
            logits = module(**batch.inputs)
        finally:
            for handle in handles:
                handle.remove()
        seen.logits |= dict(zip(batch.index.tolist(), logits.float(), strict=True))
    return seen


def _recorder(
    seen: _Seen, name: str, batch: Batch
) -> Callable[[nn.Module, tuple[Tensor, ...], dict[str, Tensor]], None]:
    def record(layer: nn.Module, arguments: tuple[Tensor, ...], keywords: dict[str, Tensor]) -> None:
        x = arguments[0] if arguments else next(iter(keywords.values()))
        sampled, examples = partial(input_samples, cast(Layer, layer), x), len(batch.index)
        shared = sampled(1).abs().double().sum((0, 2)).flatten()
        try:
            samples, _ = mask_samples(sampled(examples), batch.inputs.get(MASK))
            sums_by_example = list(samples.abs().double().sum(2).flatten(1))
        except RuntimeError:  # its size is not a multiple of the batch size
            sums_by_example = [torch.full_like(shared, torch.nan)] * examples
        for k, sums in zip(batch.index.tolist(), sums_by_example, strict=True):
            seen.inputs.setdefault((name, k), []).append((sums, shared))

    return record
