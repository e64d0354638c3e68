"""A layer's inputs and output gradients as samples, a few examples at a time, so that temporaries stay small."""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from bayesq.quant.layers import Layer, groups_of, input_blocks, input_samples, mask_samples, sample_shape

# Elements of the largest temporary a hook may build: 16 MiB in float32, near the size of a core's cache.
PART_ELEMENTS = 2**22

# One use of a layer in a forward pass: the group of a stack (None elsewhere), its input, and the gradient of its output
# as samples [b, g, l, r].
Run = tuple[int | None, Tensor, Tensor]
# Iterates over blocks of positions of some examples: the positions, and the input samples [e, g, l, c] there.
Blocks = Callable[[], Iterator[tuple[slice, Tensor]]]


@dataclass(frozen=True)
class Pairs:
    """Inputs and output gradients at the same positions, of a few examples e.

    Attributes:
        groups: g of the layer.
        positions: l of its first run.
        whole: each block has all groups, not a single one of a stack.
        blocks: each call iterates over all blocks of positions: (group, d [e, g, l, r], x [e, g, l, c]).
    """

    groups: int
    positions: int
    whole: bool
    blocks: Callable[[], Iterator[Run]]

    def weight_gradients(self, q_g: Tensor | None = None, q_a: Tensor | None = None) -> Tensor:
        """sum_positions d xT [e, g, r, c] of each example; with bases given, Q_GT d (Q_AT x)T instead."""
        total: Tensor | None = None
        for group, d, x in self.blocks():
            if q_g is not None and q_a is not None:
                d, x = d @ q_g, x @ q_a
            term = in_stack(self.groups, group, d.transpose(2, 3) @ x, 1)
            if total is None:
                total = term
            else:
                total += term
        assert total is not None
        return total


def input_parts(
    layer: Layer, x: Tensor, examples: int, extra: int = 0, whole: bool = False
) -> Iterator[tuple[slice, Blocks]]:
    """Samples float32 of a few examples at a time, so that unfolding a convolution stays bounded.

    Args:
        extra: further elements needed for each example of a part.
        whole: keep an example's positions together, however many there are.

    Yields:
        the examples e of a part, and a function that iterates over its blocks: positions, and samples [e, g, l, c].
        There is one block, unless a part is one example that is larger than a part should be.
    """
    by_example = x.reshape(examples, -1, *x.shape[1:])
    size = math.prod(sample_shape(layer, by_example[0], 1))
    step = max(1, PART_ELEMENTS // max(size, extra))
    for start in range(0, examples, step):
        part = slice(start, min(start + step, examples))
        split = size > PART_ELEMENTS and not whole
        yield part, partial(_blocks, layer, by_example[part], split)


def counted_samples(
    layer: Layer, x: Tensor, examples: int, mask: Tensor | None
) -> Iterator[tuple[slice, Tensor, int | Tensor]]:
    """A few examples e at a time: which ones, their input samples [e, g, l, c] with zeros for padding, how many count.

    Args:
        x: input of one run of the layer.
        examples: in the batch.
        mask: [examples, positions], 1 for real tokens, or None.
    """
    for part, blocks in input_parts(layer, x, examples, whole=mask is not None):
        for _, block in blocks():
            yield part, *mask_samples(block, None if mask is None else mask[part])


def _blocks(layer: Layer, x: Tensor, split: bool) -> Iterator[tuple[slice, Tensor]]:
    """Samples of the examples x [e, ...]: all at once, or those of a single example block by block."""
    inputs = x.flatten(0, 1)
    if not split:
        yield slice(None), input_samples(layer, inputs, len(x)).to(torch.float32)
        return
    for positions, rows in input_blocks(layer, inputs, PART_ELEMENTS):
        yield positions, rows.to(torch.float32)


def paired_parts(layer: Layer, runs: Sequence[Run], examples: int) -> Iterator[Pairs]:
    """Inputs and output gradients of all runs of a layer: a few examples at a time, or one if it runs several times.

    Args:
        runs: of one forward pass.
        examples: in the batch.
    """
    first = runs[0][2]
    make = partial(Pairs, groups_of(layer), first.shape[2], groups_of(layer) == first.shape[1])
    if len(runs) == 1:
        ((group, x, d),) = runs
        for part, blocks in input_parts(layer, x, examples, extra=layer.weight.numel()):
            yield make(partial(_with_gradients, [(group, blocks, d[part])]))
        return
    for k in range(examples):
        split = [
            (group, blocks, d[k : k + 1])
            for group, x, d in runs
            for _, blocks in input_parts(layer, x.reshape(examples, -1, *x.shape[1:])[k], 1)
        ]
        yield make(partial(_with_gradients, split))


def _with_gradients(runs: Sequence[tuple[int | None, Blocks, Tensor]]) -> Iterator[Run]:
    """Each block of each run with the gradients d [e, g, l, r] at its positions."""
    for group, blocks, d in runs:
        for positions, rows in blocks():
            yield group, d[:, :, positions], rows


def in_stack(groups: int, group: int | None, value: Tensor, dim: int = 0) -> Tensor:
    """The value [.., 1, ..] of one group of a stack, with zeros for the other groups: [.., g, ..] in `dim`."""
    if group is None:
        return value
    shape = list(value.shape)
    shape[dim] = groups
    stack = value.new_zeros(shape)
    stack.select(dim, group).copy_(value.select(dim, 0))
    return stack
