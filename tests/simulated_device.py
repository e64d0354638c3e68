"""A second device without hardware: tensors that are marked, and an error where marked and other ones meet.

Values stay on the CPU and are real, so that code that depends on them runs as usual. A `TorchFunctionMode` of
torch.overrides sees every call: results of marked tensors are marked, `device` says so, `cpu()` and `to` change the
mark. As on a GPU, scalars and indices may be on the CPU, and numpy does not read marked tensors.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_iter, tree_map_only

DEVICE = torch.device("cuda", 0)
MOVES = {Tensor.to, Tensor.cpu, Tensor.cuda}
# They give no tensor that computes, or work on any device.
ANYWHERE = {Tensor.copy_, Tensor.__repr__, Tensor.__deepcopy__, Tensor.requires_grad_, torch.equal}
INDEXING = {Tensor.__getitem__, Tensor.__setitem__}
READS = {Tensor.numpy, Tensor.__array__}


def mark(x: Tensor, on: bool = True) -> Tensor:
    """Put the tensor on the simulated device, or back; in place."""
    x.simulated = on  # type: ignore[attr-defined]
    return x


def is_marked(x: Any) -> bool:
    return getattr(x, "simulated", False)


def place(module: nn.Module) -> nn.Module:
    """Put all parameters and buffers on the simulated device."""
    for x in (*module.parameters(), *module.buffers()):
        mark(x)
    return module


@contextmanager
def simulated_device() -> Iterator["SimulatedDevice"]:
    """While it lasts, mixing devices raises RuntimeError."""
    copy = nn.Parameter.__deepcopy__

    def marked(self: nn.Parameter, memo: dict) -> nn.Parameter:  # the one copy that no function mode sees
        return mark(copy(self, memo), is_marked(self))

    with pytest.MonkeyPatch.context() as patch, SimulatedDevice() as device:
        patch.setattr(nn.Parameter, "__deepcopy__", marked)
        yield device


class SimulatedDevice(TorchFunctionMode):
    """Attributes: calls, on the device."""

    def __init__(self) -> None:
        super().__init__()
        self.calls = 0

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        tensors = [x for x in tree_iter((args, kwargs)) if isinstance(x, Tensor)]
        name = getattr(func, "__name__", "")
        if func == Tensor.device.__get__:
            return DEVICE if is_marked(args[0]) else func(*args)
        if func is Tensor.register_hook:
            return func(args[0], self._hooked(args[1], is_marked(args[0])))
        if func in MOVES:
            return self._moved(func, args, kwargs)
        if func in READS and is_marked(args[0]):
            raise RuntimeError("numpy cannot read a tensor of the simulated device")
        asked = kwargs.get("device")
        if asked is not None and torch.device(asked).type == DEVICE.type:
            kwargs["device"] = "cpu"
            self.calls += 1
            return tree_map_only(Tensor, mark, func(*args, **kwargs))
        marks = {is_marked(x) for x in tensors if x.dim()}
        if func in INDEXING:
            marks = {is_marked(args[0])}
            if not is_marked(args[0]) and any(is_marked(x) for x in tensors):
                raise RuntimeError(f"{name}: an index or value of the simulated device meets a tensor of the CPU")
        if len(marks) > 1 and func not in ANYWHERE:
            shapes = ", ".join(f"{list(x.shape)} {'device' if is_marked(x) else 'cpu'}" for x in tensors)
            raise RuntimeError(f"{name}: tensors of two devices meet ({shapes})")
        result = func(*args, **kwargs)
        on = (
            is_marked(args[0])
            if func in ANYWHERE and args and isinstance(args[0], Tensor)
            else any(map(is_marked, tensors))
        )
        self.calls += on
        if on:
            for x in tree_iter(result):
                if isinstance(x, Tensor):
                    mark(x)
        return result

    def _moved(self, func: Any, args: Any, kwargs: Any) -> Any:
        source, on = args[0], is_marked(args[0])
        given = list(args[1:])
        for k, x in enumerate(given):
            if isinstance(x, Tensor):
                on, given[k] = is_marked(x), x.dtype
            elif isinstance(x, str | torch.device):
                on, given[k] = torch.device(x).type == "cuda", "cpu"
        if kwargs.get("device") is not None:
            on, kwargs["device"] = torch.device(kwargs["device"]).type == "cuda", "cpu"
        if func is Tensor.cpu:
            on = False
        result = func(source, *given, **kwargs)
        if result is source and on != is_marked(source):
            result = source.detach().clone()
        return mark(result, on)

    def _hooked(self, hook: Callable[[Tensor], Any], on: bool) -> Callable[[Tensor], Any]:
        def run(gradient: Tensor) -> Any:
            with self:  # a backward pass is one call, during which the mode is not active
                return hook(mark(gradient, on))

        return run
