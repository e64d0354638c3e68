"""What one pass of a network shows about its blocks: how each is called, and where its arguments come from."""

from collections.abc import Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from typing import Any

from torch import Tensor, nn
from torch.utils._pytree import TreeSpec, tree_flatten, tree_leaves

from bayesq.quant.blocks import CONSTANTS
from bayesq.quant.layers import Layer
from bayesq.quant.watch import watching

OUTPUT, ARGUMENT, CONSTANT = "output", "argument", "constant"

# Where an argument of a block comes from: output or argument number k of the block before it, or a constant.
Source = tuple[str, Any]


@dataclass
class Visit:
    """One batch's run of one block.

    Attributes:
        spec: structure of the arguments, whose leaves are numbered.
        before: the block that ran just before, or "".
        sources: where that block has each leaf; None if it lacks one.
        nbytes: of the arguments.
        alone: called once, outside of other blocks, with tensors and constants, and changes neither these nor buffers.
    """

    spec: TreeSpec
    before: str
    sources: list[Source] | None
    nbytes: int
    alone: bool


class Watch:
    """Hooks on the blocks, and on the layers inside them, during one batch's pass."""

    def __init__(self, module: nn.Module, blocks: Mapping[str, nn.Module], layers: Mapping[str, Layer]) -> None:
        self.module, self.blocks, self.layers = module, blocks, layers
        self.visits: dict[str, Visit] = {}
        self.outside: set[str] = set()  # layers that run while the block of their name does not
        self._open: list[str] = []
        self._versions: dict[str, list[int]] = {}
        # the last block, with its outputs, its arguments and their versions when it ended
        self._before = ""
        self._last: dict[str, tuple[list[Any], list[int]]] = {}

    def run(self, inputs: Mapping[str, Tensor]) -> None:
        """One pass from end to end."""
        with ExitStack() as hooks:
            for name, block in self.blocks.items():
                enter, leave = partial(self._enter, name), partial(self._leave, name)
                hooks.callback(block.register_forward_pre_hook(enter, with_kwargs=True).remove)
                hooks.callback(block.register_forward_hook(leave, with_kwargs=True).remove)
            hooks.enter_context(watching(self.layers, self._seen))
            self.module(**inputs)
        self._last = {}

    def _seen(self, name: str, *_: Any) -> None:
        if not self._open or not is_inside(name, self._open[-1]):
            self.outside.add(name)

    def _enter(self, name: str, block: nn.Module, args: Any, kwargs: Any) -> None:
        leaves, spec = tree_flatten((args, kwargs))
        simple = all(isinstance(x, (Tensor, *CONSTANTS)) for x in leaves)
        for around in self._open:
            self.visits[around].alone = False
        again = name in self.visits
        self._versions[name] = _versions([*leaves, *_state(block)])
        nbytes = sum(x.nbytes for x in leaves if isinstance(x, Tensor))
        alone = simple and not again and not self._open
        self.visits[name] = Visit(spec, self._before, self._sources(leaves), nbytes, alone)
        self._open.append(name)

    def _leave(self, name: str, block: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        self._open.pop()
        leaves = tree_leaves((args, kwargs))
        if self._versions.pop(name) != _versions([*leaves, *_state(block)]):
            self.visits[name].alone = False
        self._before = name
        self._last = {
            kind: (group, _versions(group)) for kind, group in ((OUTPUT, tree_leaves(output)), (ARGUMENT, leaves))
        }

    def _sources(self, leaves: Sequence[Any]) -> list[Source] | None:
        """Where the leaves lie in the block that ran last; None if one does not, or was overwritten since."""
        unchanged = {
            id(x): (kind, k)
            for kind, (group, versions) in reversed(self._last.items())
            if versions == _versions(group)
            for k, x in enumerate(group)
            if isinstance(x, Tensor)
        }
        sources = [unchanged.get(id(x)) if isinstance(x, Tensor) else (CONSTANT, x) for x in leaves]
        return [source for source in sources if source is not None] if None not in sources else None


def is_inside(name: str, block: str) -> bool:
    """Whether a layer is the block or a part of it."""
    return name == block or name.startswith(block + ".")


def _state(module: nn.Module) -> list[Tensor]:
    return [*module.parameters(), *module.buffers()]


def _versions(leaves: Iterable[Any]) -> list[int]:
    return [x._version for x in leaves if isinstance(x, Tensor)]
