"""Watch the inputs and outputs of layers in a forward pass, for any way of using their weights.

A Linear or Conv2d that is called is watched by a hook. A `ParameterLayer` is not called, so its use is recognised where
torch multiplies with its weight: `F.linear(x, W)`, `x @ W`, `torch.addmm(b, x, W)`.
"""

import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves
from torch.utils.hooks import RemovableHandle

from bayesq.quant.attention import attention
from bayesq.quant.layers import Layer, ParameterLayer

# (name, group, input, output) -> replacement of the output, or None. The group is that of a stack, None elsewhere.
Seen = Callable[[str, int | None, Tensor, Tensor], Tensor | None]
# Functions that take a weight and read its shape or type only.
READS_NO_VALUES = re.compile(r"new_\w+|\w+_like|__get__")
# Functions that multiply an input with a weight: position and name of the input, position and name of the weight, and
# whether the function expects the weight transposed, [columns, rows].
PRODUCTS: dict[Any, tuple[int, str, int, str, bool]] = {
    F.linear: (0, "input", 1, "weight", False),
    F.conv2d: (0, "input", 1, "weight", False),
    torch.addmm: (1, "mat1", 2, "mat2", True),
    torch.mm: (0, "input", 1, "mat2", True),
    torch.matmul: (0, "input", 1, "other", True),
    Tensor.matmul: (0, "self", 1, "other", True),
    Tensor.__matmul__: (0, "self", 1, "other", True),
}


@contextmanager
def watching(layers: Mapping[str, Layer], seen: Seen) -> Iterator[None]:
    """Call `seen` for every use of a layer in the forward passes of the block."""
    with _hooked(layers, lambda name, layer: layer.register_forward_hook(_hook(name, seen), with_kwargs=True), seen):
        yield


@contextmanager
def watching_inputs(layers: Mapping[str, Layer], seen: Callable[[str, int | None, Tensor], None]) -> Iterator[None]:
    """Call `seen` with name, group and input whenever a layer is used in the block; a called layer has not run yet."""

    def before(name: str, _: nn.Module, args: tuple[Tensor, ...], kwargs: dict[str, Tensor]) -> None:
        seen(name, None, args[0] if args else next(iter(kwargs.values())))

    def after(name: str, group: int | None, x: Tensor, _: Tensor) -> None:
        seen(name, group, x)

    def hook(name: str, layer: nn.Module) -> RemovableHandle:
        return layer.register_forward_pre_hook(partial(before, name), with_kwargs=True)

    with _hooked(layers, hook, after):
        yield


@contextmanager
def _hooked(
    layers: Mapping[str, Layer], hook: Callable[[str, nn.Module], RemovableHandle], seen: Seen
) -> Iterator[None]:
    """Hooks on the layers that are modules, and `Products` for the others."""
    others = {name: layer for name, layer in layers.items() if isinstance(layer, ParameterLayer)}
    with ExitStack() as stack:
        for name, layer in layers.items():
            if isinstance(layer, nn.Module):
                stack.callback(hook(name, layer).remove)
        if others:
            stack.enter_context(Products(others, seen))
        yield


@contextmanager
def contiguous_gradients(module: nn.Module) -> Iterator[None]:
    """Inside the block, give batch norms contiguous gradients.

    On the CPU in evaluation mode, torch's backward pass reads the gradient of a batch of one example as if it were
    contiguous. This is wrong if tokens are made from the norm's output, because its gradient is then not contiguous.
    """

    def hook(_: nn.Module, __: object, output: Tensor) -> None:
        if output.requires_grad:
            output.register_hook(Tensor.contiguous)

    norms = [part for part in module.modules() if isinstance(part, nn.BatchNorm2d)]
    handles = [norm.register_forward_hook(hook) for norm in norms]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _hook(name: str, seen: Seen) -> Callable[..., Tensor | None]:
    def hook(_: nn.Module, args: tuple[Tensor, ...], kwargs: dict[str, Tensor], output: Tensor) -> Tensor | None:
        return seen(name, None, args[0] if args else next(iter(kwargs.values())), output)

    return hook


class Products(TorchFunctionMode):
    """Recognises products with the weights of some layers by the memory addresses of the weights.

    Args:
        layers: by name; their weights must not move while the mode is active.
        seen: called for each product.
        other: called with the layer's name and the function's for every other function that computes with a weight.
    """

    def __init__(
        self, layers: Mapping[str, Layer], seen: Seen, other: Callable[[str, str], None] | None = None
    ) -> None:
        super().__init__()
        self.seen, self.other = seen, other
        self._weights: dict[int, tuple[str, int | None, tuple[int, ...], tuple[int, ...], bool]] = {}
        self._storages: dict[int, str] = {}
        for name, layer in layers.items():
            transposed = isinstance(layer, ParameterLayer) and layer.transposed
            parts = layer.parts if isinstance(layer, ParameterLayer) else [layer.weight.detach()]
            for k, part in enumerate(parts):
                group = k if len(parts) > 1 else None
                self._weights[part.data_ptr()] = name, group, tuple(part.shape), part.stride(), transposed
            self._storages[layer.weight.untyped_storage().data_ptr()] = name

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is F.multi_head_attention_forward:
            with self:  # products inside torch's function cannot be watched
                written_out = attention(*args, **kwargs)
            if written_out is not None:
                return written_out
        output = func(*args, **kwargs)
        if func in PRODUCTS:
            at, keyword, weight_at, weight_keyword, transposed = PRODUCTS[func]
            weight = args[weight_at] if len(args) > weight_at else kwargs.get(weight_keyword)
            use = self._find(weight, transposed)
            if use is not None:
                x = args[at] if len(args) > at else kwargs[keyword]
                replaced = self.seen(*use, x, output)
                return output if replaced is None else replaced
        if self.other is not None and self._storages:
            self._report(func, args, kwargs, output)
        return output

    def _find(self, weight: Any, transposed: bool) -> tuple[str, int | None] | None:
        """Layer and group of this matrix, as stored or as a transposed view."""
        if not isinstance(weight, Tensor) or not weight.numel():
            return None
        known = self._weights.get(weight.data_ptr())
        if known is None:
            return None
        name, group, shape, stride, stored_transposed = known
        if transposed != stored_transposed:  # x @ W.T equals F.linear(x, W)
            shape, stride = shape[::-1], stride[::-1]
        return (name, group) if (tuple(weight.shape), weight.stride()) == (shape, stride) else None

    def _report(self, func: Any, args: Any, kwargs: Any, output: Any) -> None:
        name = getattr(func, "__name__", str(func))
        made = {_memory(x) for x in tree_leaves(output) if isinstance(x, Tensor) and x.layout == torch.strided}
        if not made or READS_NO_VALUES.fullmatch(name):  # a shape, a dtype, a device
            return
        for x in tree_leaves((args, kwargs)):
            if isinstance(x, Tensor) and x.layout == torch.strided:
                layer = self._storages.get(_memory(x))
                if layer is not None and made != {_memory(x)}:  # a view computes nothing
                    assert self.other is not None
                    self.other(layer, name)


def _memory(x: Tensor) -> int:
    return x.untyped_storage().data_ptr()
