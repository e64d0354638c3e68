"""Samples of a whole block: its inputs behind the quantized prefix, and its outputs in full precision.

For methods that reconstruct several layers together (BRECQ). A block is a part of the network that `find_blocks` names,
or a single layer outside of all of them. The memory is that of one block's inputs and outputs, for all calibration
examples.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils._pytree import tree_flatten, tree_leaves, tree_map, tree_unflatten

from bayesq.batches import Batch
from bayesq.calibration.prefix import PrefixInputs
from bayesq.calibration.statistic import Source, Statistic
from bayesq.errors import Refused
from bayesq.likelihood import Likelihood
from bayesq.memory import halving
from bayesq.quant.layers import MASK, Layer, matrix_to_weight, weight_key
from bayesq.quant.watch import contiguous_gradients


@dataclass(frozen=True)
class BlockSamples(Statistic):
    """Declared by a method that reads `LayerProblem.block`; it has no tensor."""

    name: ClassVar[str] = "block_samples"
    source: ClassVar[Source] = Source.PAIRED_INPUTS

    def shape(self, groups: int, rows: int, columns: int) -> tuple[int, ...]:
        """[0]."""
        return (0,)


BLOCK_SAMPLES = BlockSamples()


@dataclass(frozen=True)
class BlockBatch:
    """One call of a block with a batch of calibration examples.

    Attributes:
        arguments: args and kwargs of the block behind the quantized prefix.
        target: its output in the full-precision network; the first tensor, if there are several.
        fisher: squared gradients of the log-likelihood at this output, of its shape: the diagonal of the output's
            Fisher.
    """

    arguments: tuple[tuple[Any, ...], dict[str, Any]]
    target: Tensor
    fisher: Tensor


@dataclass(frozen=True)
class Block:
    """A part of the network behind the quantized prefix, and all calls of it.

    Attributes:
        name: module name.
        module: the block; its layers are not quantized yet.
        layers: those inside it, by name, in forward order.
        batches: one for each call.
    """

    name: str
    module: nn.Module
    layers: Mapping[str, Layer]
    batches: Sequence[BlockBatch]

    def output(self, weights: Mapping[str, Tensor], batch: BlockBatch) -> Tensor:
        """The block's output with other weights, differentiable in them.

        Args:
            weights: by layer name, [g, r, c] each.
            batch: whose arguments the block gets, as copies that it may overwrite.
        """
        replaced = {
            weight_key(name, self.layers[name]).removeprefix(f"{self.name}."): matrix_to_weight(self.layers[name], w)
            for name, w in weights.items()
        }
        args, kwargs = tree_map(_copy, batch.arguments)
        return _first_tensor(functional_call(self.module, replaced, args, kwargs))


class BlockSource:
    """Collects the samples of the block that a layer belongs to.

    Args:
        inputs: of both networks in step.
        likelihood: of the outputs, for the Fisher.
        seed: of the draws for the Fisher.
    """

    def __init__(self, inputs: PrefixInputs, likelihood: Likelihood, seed: int) -> None:
        self.inputs, self.likelihood, self.seed = inputs, likelihood, seed

    def block(self, layer: str) -> Block:
        """The block that a layer belongs to, with its samples.

        Raises:
            Refused: the network calls no module that contains the layer.
        """
        name, names = self._place(layer)
        network = self.inputs.networks[0]
        collected, retries = halving(
            self.inputs.batch_size, lambda size: list(self._collect(name, names, size)), "calibration"
        )
        if not collected:
            raise Refused(self._not_called(layer))
        self.inputs.oom_retries += retries
        self.inputs.batch_size >>= retries
        module = network.module.get_submodule(name)
        return Block(name, module, {each: network.layers[each] for each in names}, collected)

    def _place(self, layer: str) -> tuple[str, list[str]]:
        """Name of the layer's block and of the layers inside it, in forward order."""
        network = self.inputs.networks[0]
        for block in network.blocks:
            if f"{layer}.".startswith(f"{block}."):
                inside = [name for group in self.inputs.groups for name in group if f"{name}.".startswith(f"{block}.")]
                return block, inside
        if layer not in dict(network.module.named_modules()):
            raise Refused(self._not_called(layer))
        return layer, [layer]

    def _not_called(self, layer: str) -> str:
        return (
            f"layer {layer}: the network calls no block that contains it, so its outputs cannot be reconstructed: "
            f"set layers.exclude=[{layer}], or choose another method"
        )

    def _collect(self, name: str, names: Sequence[str], batch_size: int) -> Iterator[BlockBatch]:
        """Run the full-precision network to its end and back, and the other one up to the block."""
        inputs, generator = self.inputs, torch.Generator().manual_seed(self.seed)
        prefix = inputs.walkers(batch_size)[0]
        batches = inputs.examples.batches(batch_size, inputs.device)
        for batch, (_, run) in zip(batches, prefix.passes(names), strict=True):
            outputs = self._outputs(name, batch, generator)
            with torch.no_grad():
                calls = arguments_of(prefix.module.get_submodule(name), len(outputs), run)
            if len(calls) != len(outputs):
                raise Refused(f"layer {names[0]}: its block {name} runs less often behind the quantized prefix")
            for arguments, (target, fisher) in zip(calls, outputs, strict=True):
                yield BlockBatch(arguments, target, fisher)

    def _outputs(self, name: str, batch: Batch, generator: torch.Generator) -> list[tuple[Tensor, Tensor]]:
        """The full-precision outputs of each call of the block, and their squared gradients."""
        module = self.inputs.networks[-1].module
        leaves: list[Tensor] = []

        def keep(_: nn.Module, __: object, output: Any) -> Any:
            tensors, spec = tree_flatten(output)
            k = next(k for k, x in enumerate(tensors) if isinstance(x, Tensor))
            leaves.append(tensors[k] if tensors[k].requires_grad else tensors[k].detach().requires_grad_(True))
            tensors[k] = leaves[-1].clone()  # the network may overwrite it
            return tree_unflatten(tensors, spec)

        handle = module.get_submodule(name).register_forward_hook(keep)
        try:
            with torch.enable_grad(), contiguous_gradients(module):
                outputs = module(**batch.inputs)
                if not leaves:
                    return []
                mask = batch.inputs.get(MASK)
                counted = None if mask is None else mask.bool()
                directions = self.likelihood.fisher_directions(outputs, None, generator, mask=counted)
                squares = [torch.zeros_like(leaf, requires_grad=False) for leaf in leaves]
                for k, direction in enumerate(directions):
                    loss = (outputs * direction.to(outputs.dtype)).sum()
                    more = k + 1 < len(directions)
                    gradients = torch.autograd.grad(loss, leaves, retain_graph=more, allow_unused=True)
                    for square, gradient in zip(squares, gradients, strict=True):
                        if gradient is not None:
                            square += gradient.square()
        finally:
            handle.remove()
        return [(leaf.detach(), square) for leaf, square in zip(leaves, squares, strict=True)]


def arguments_of(module: nn.Module, count: int, run: Callable[[], Any]) -> list[tuple[tuple[Any, ...], dict[str, Any]]]:
    """Copies of the args and kwargs of a module's first `count` calls in a pass, which then ends."""
    calls: list[tuple[tuple[Any, ...], dict[str, Any]]] = []

    def keep(_: nn.Module, args: Any, kwargs: Any) -> None:
        calls.append(tree_map(_copy, (args, kwargs)))
        if len(calls) == count:
            raise _Reached

    handle = module.register_forward_pre_hook(keep, with_kwargs=True)
    try:
        with suppress(_Reached):
            run()
    finally:
        handle.remove()
    return calls


class _Reached(Exception):
    """The block has been called as often as needed; the rest of the pass is not needed."""


def _copy(x: Any) -> Any:
    return x.clone() if isinstance(x, Tensor) else x


def _first_tensor(output: Any) -> Tensor:
    return next(x for x in tree_leaves(output) if isinstance(x, Tensor))
