"""Outputs of the modules inside a block, cached between the passes for its layers.

The layers of a block get their inputs one after the other, each from a pass that runs the block up to the layer. A
module whose output has not changed since the last pass need not run again: the attention of a transformer, once its
layers are rounded, or the first convolution of a residual block.
"""

from collections.abc import Callable, Collection, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import TreeSpec, tree_flatten, tree_leaves, tree_unflatten

from bayesq.memory import give_back_freed
from bayesq.quant.blocks import CONSTANTS
from bayesq.visits import is_inside

Output = tuple[list[Any], TreeSpec]


@dataclass
class _Run:
    """What the first batch shows about a module's run.

    Attributes:
        began, ended: numbers of the events at which it first began and last ended; None if it did not end.
        versions: of its arguments, parameters and buffers when it began.
        usable: it ran once, changed none of these, and returned constants and tensors that share no memory with each
            other or with its arguments.
    """

    began: int
    versions: list[int]
    usable: bool
    ended: int | None = None


class KeptOutputs:
    """Outputs of the modules inside a block for every batch.

    A pass is `start`, and then `running` around the block's run for the batches 0, 1, ... in this order.

    Args:
        block: it gets the same arguments in every pass.
        batches: their number.
        room: most bytes of cached outputs, for all batches together.
        constant: the block never changes; else the layers of a pass are replaced after it.
    """

    def __init__(self, block: nn.Module, batches: int, room: int, constant: bool = False) -> None:
        self.block, self.batches, self.room, self.constant = block, batches, room, constant
        self._modules = {name: module for name, module in block.named_modules() if name}
        self._state = _state(block)
        self._kept: dict[str, list[Output | None]] = {}
        self._new: dict[str, list[Output | None]] = {}  # of this pass, for the next
        self._runs: dict[str, _Run] = {}
        self._events = 0
        self._watched: Collection[str] = ()
        self._record = False

    def start(self, watched: Collection[str], record: bool) -> None:
        """Begin a pass: forget outputs that may have changed.

        Args:
            watched: names of the layers that have to run, relative to the block.
            record: cache outputs for a further pass; otherwise this is the last one.
        """
        give_back_freed()  # every pass allocates and frees many small tensors
        before, self._state = self._state, _state(self.block)
        changed = [name for name, state in self._state.items() if before[name] != state]
        known = self._kept | self._new
        self._kept = {
            name: outputs
            for name, outputs in known.items()
            if len(outputs) == self.batches
            and None not in outputs
            and not any(is_inside(layer, name) for layer in watched)
            and not any(self._depends(name, other) for other in changed)
        }
        self._new, self._watched, self._record = {}, watched, record

    def _depends(self, name: str, changed: str) -> bool:
        """Whether a module's output may depend on a changed one: one inside it, or one that began before it ended.

        A module without a run may have parameters that its parent reads, so it counts as the parent does.
        """
        if is_inside(changed, name):
            return True
        while changed and changed not in self._runs:
            changed = changed.rpartition(".")[0]
        ended = self._runs[name].ended
        return not changed or ended is None or self._runs[changed].began < ended

    @contextmanager
    def running(self, i: int) -> Iterator[None]:
        """While batch i runs through the block, cached outputs replace runs, and new ones are cached."""
        if torch.is_grad_enabled():
            yield
            return
        found: dict[str, Output] = {}
        replaced = _outermost(self._kept)
        asked = self._modules if i == 0 else self._new
        with ExitStack() as stack:
            for name in replaced:
                stack.enter_context(_forward(self._modules[name], partial(self._give, name, i)))
            for name in asked if self._record else ():
                if any(is_inside(name, other) for other in replaced):
                    continue
                module = self._modules[name]
                if i == 0:
                    enter = partial(self._enter, name, set())
                    stack.callback(module.register_forward_pre_hook(enter, with_kwargs=True).remove)
                leave = partial(self._leave, name, i, found)
                # before the network's own hooks, which also run on a cached output
                stack.callback(module.register_forward_hook(leave, with_kwargs=True, prepend=True).remove)
            try:
                yield
            finally:
                self._take(i, found)

    def _give(self, name: str, i: int, *_: Any, **__: Any) -> Any:
        """A copy of a cached output, which the network may overwrite."""
        output = self._kept[name][i]
        assert output is not None
        return tree_unflatten(_copies(output[0]), output[1])

    def _enter(self, name: str, ran: set[bool], module: nn.Module, args: Any, kwargs: Any) -> None:
        versions = _versions([*tree_leaves((args, kwargs)), *module.parameters(), *module.buffers()])
        began = self._runs[name].began if name in self._runs else self._events
        self._runs[name] = _Run(began, versions, usable=not ran)
        self._events += 1
        ran.add(True)

    def _leave(self, name: str, i: int, found: dict[str, Output], module: nn.Module, *run: Any) -> None:
        args, kwargs, output = run
        leaves, spec = tree_flatten(output)
        if i == 0:
            first, given = self._runs[name], tree_leaves((args, kwargs))
            first.ended = self._events
            self._events += 1
            first.usable &= first.versions == _versions([*given, *module.parameters(), *module.buffers()])
            first.usable &= all(isinstance(x, (Tensor, *CONSTANTS)) for x in leaves) and _separate(leaves, given)
            if not first.usable:
                found.pop(name, None)
                return
        found[name] = _copies(leaves), spec

    def _take(self, i: int, found: dict[str, Output]) -> None:
        """Cache the outputs found for batch i, and free those that no further pass needs."""
        if i == 0 and self._record:
            self._new = {name: [] for name in self._chosen(found)}
        for name, outputs in self._new.items():
            if name in found:
                outputs.append(found[name])
        for name, outputs in self._kept.items():
            if not self._record or any(is_inside(name, other) for other in self._new):
                outputs[i] = None

    def _chosen(self, found: dict[str, Output]) -> list[str]:
        """Names of the outputs to cache, chosen by the first batch: of outermost modules, up to the limit `room`."""
        changing = () if self.constant else self._watched
        names = [name for name in _outermost(found) if not any(is_inside(layer, name) for layer in changing)]
        stay = [
            outputs[0] for name, outputs in self._kept.items() if not any(is_inside(name, other) for other in names)
        ]
        room, chosen = self.room - self.batches * sum(_nbytes(output) for output in stay if output is not None), []
        for name in names:
            size = self.batches * _nbytes(found[name])
            if size <= room:
                chosen.append(name)
                room -= size
        return chosen


def _outermost(names: Iterable[str]) -> list[str]:
    """The modules that lie inside no other one of them."""
    every = list(names)
    return [name for name in every if not any(is_inside(name, other) for other in every if other != name)]


@contextmanager
def _forward(module: nn.Module, function: Callable[..., Any]) -> Iterator[None]:
    """The function in place of the module's own forward."""
    own = vars(module).get("forward")
    vars(module)["forward"] = function
    try:
        yield
    finally:
        del vars(module)["forward"]
        if own is not None:
            vars(module)["forward"] = own


def _state(block: nn.Module) -> dict[str, list[tuple[int, int]]]:
    """Memory and versions of the parameters and buffers of every module in a block, the block itself as ""."""
    return {
        name: [(x.data_ptr(), x._version) for x in (*module.parameters(recurse=False), *module.buffers(recurse=False))]
        for name, module in block.named_modules()
    }


def _versions(leaves: Iterable[Any]) -> list[int]:
    return [x._version for x in leaves if isinstance(x, Tensor)]


def _separate(outputs: Iterable[Any], given: Iterable[Any]) -> bool:
    """Whether no two outputs share memory, and none shares it with an argument."""
    memory = [x.untyped_storage().data_ptr() for x in outputs if isinstance(x, Tensor)]
    before = {x.untyped_storage().data_ptr() for x in given if isinstance(x, Tensor)}
    return len(set(memory)) == len(memory) and not before.intersection(memory)


def _copies(leaves: Iterable[Any]) -> list[Any]:
    return [x.clone() if isinstance(x, Tensor) else x for x in leaves]


def _nbytes(output: Output) -> int:
    return sum(x.nbytes for x in output[0] if isinstance(x, Tensor))
