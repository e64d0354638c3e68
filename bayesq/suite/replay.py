"""Forward passes that begin where finished work ends, for statistics behind a prefix that is quantized layer by layer.

Most networks hand their activations from module to module. A chain is a sequence of modules, each called once in a
pass, where every input of a module is an output or an input of the one before it, or a constant, untouched in between.
Calling them one after the other is then what the network itself does there, and a pass for a layer inside the chain can
begin with the module around it: what that module is given is kept for all batches until the prefix has grown beyond
it. So a pass costs one block of the network instead of all that lies before it.

Chains are found by watching the network once on every batch, for any network. What belongs to no chain, or would take
more than KEPT_BYTES, is reached by a pass from the network's input.
"""

import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import TreeSpec, tree_flatten, tree_leaves, tree_unflatten

from bayesq.batches import Batch
from bayesq.quant.layers import MASK

# Inputs of one module, for all batches together, kept in memory at most.
KEPT_BYTES = 512 * 2**20
CONSTANTS = (type(None), bool, int, float, str, torch.dtype, torch.device)
OUTPUT, INPUT, CONSTANT = "output", "input", "constant"

# Where a module's input comes from: output or input number k of the module before it, or a constant.
Source = tuple[str, Any]


@dataclass
class _Call:
    """What all batches agree on about the calls of one module.

    Attributes:
        entered, exited: times, counted in calls and returns.
        spec: structure of its arguments, whose leaves are numbered.
        links: by name of a module that may precede it in a chain: the source of each leaf.
        nbytes: of its inputs, all batches together.
        usable: called once, with tensors and constants, which it leaves as they are.
    """

    entered: int
    spec: TreeSpec | None = None
    exited: int = 0
    links: dict[str, tuple[Source, ...]] = field(default_factory=dict)
    nbytes: int = 0
    usable: bool = True


class _Watch:
    """Hooks that follow tensors through one forward pass."""

    def __init__(self, module: nn.Module) -> None:
        self.module = module
        self.calls: dict[str, _Call] = {}
        self._time = 0
        # id of a tensor -> itself, and as what each module that has returned knows it: (name, kind, k, version)
        self._known: dict[int, tuple[weakref.ref[Tensor], list[tuple[str, str, int, int]]]] = {}
        self._versions: dict[str, list[int]] = {}

    def run(self, batch: Batch) -> dict[str, _Call]:
        """The calls of a forward pass."""
        with ExitStack() as hooks:
            for name, child in self.module.named_modules():
                if name:
                    hooks.callback(child.register_forward_pre_hook(partial(self._enter, name), with_kwargs=True).remove)
                    hooks.callback(child.register_forward_hook(partial(self._exit, name), with_kwargs=True).remove)
            self.module(**batch.inputs)
        return self.calls

    def _enter(self, name: str, _: nn.Module, args: Any, kwargs: Any) -> None:
        self._time += 1
        leaves, spec = tree_flatten((args, kwargs))
        if name in self.calls:
            self.calls[name].usable = False
            return
        call = self.calls[name] = _Call(self._time, spec)
        call.usable = all(isinstance(leaf, (Tensor, *CONSTANTS)) for leaf in leaves)
        self._versions[name] = [leaf._version for leaf in leaves if isinstance(leaf, Tensor)]
        call.nbytes = sum(leaf.nbytes for leaf in leaves if isinstance(leaf, Tensor))
        roles = [self._roles(leaf) for leaf in leaves]
        for before in dict.fromkeys(role[0] for known in roles for role in known if role[1] == OUTPUT):
            found = [_source(before, leaf, known) for leaf, known in zip(leaves, roles, strict=True)]
            sources = tuple(source for source in found if source is not None)
            if len(sources) == len(leaves):
                call.links[before] = sources

    def _exit(self, name: str, _: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        self._time += 1
        call, leaves = self.calls[name], tree_leaves((args, kwargs))
        call.exited = self._time
        call.usable &= self._versions[name] == [leaf._version for leaf in leaves if isinstance(leaf, Tensor)]
        for kind, group in ((OUTPUT, tree_leaves(output)), (INPUT, leaves)):
            for k, leaf in enumerate(group):
                if isinstance(leaf, Tensor):
                    self._roles(leaf, remember=True).append((name, kind, k, leaf._version))

    def _roles(self, leaf: Any, remember: bool = False) -> list[tuple[str, str, int, int]]:
        """As what a tensor is known; roles of an earlier version are no longer true."""
        if not isinstance(leaf, Tensor):
            return []
        itself, roles = self._known.get(id(leaf), (None, []))
        if itself is None or itself() is not leaf:  # the id may be that of a tensor that is gone
            roles = []
            if remember:
                self._known[id(leaf)] = weakref.ref(leaf), roles
        return roles if remember else [role for role in roles if role[3] == leaf._version]


def _source(before: str, leaf: Any, roles: Sequence[tuple[str, str, int, int]]) -> Source | None:
    """Where `leaf` comes from if it is given by the module `before`; None if it is not."""
    if not isinstance(leaf, Tensor):
        return CONSTANT, leaf
    return next(((kind, k) for name, kind, k, _ in roles if name == before), None)


def _agree(calls: dict[str, _Call], others: Mapping[str, _Call]) -> None:
    """Keep in `calls` what holds for another batch as well."""
    for name, call in calls.items():
        other = others.get(name)
        if other is None or other.spec != call.spec or not other.usable:
            call.usable = False
            continue
        call.nbytes += other.nbytes
        call.links = {before: sources for before, sources in call.links.items() if other.links.get(before) == sources}


def find_chains(calls: Mapping[str, _Call], layers: Sequence[str]) -> list[list[str]]:
    """Chains that lie behind one another, the one with the most layers first, then what it leaves over."""
    times = [calls[around].entered for name in layers if (around := _around(name, calls)) in calls]
    inside = {name: sum(call.entered <= time <= call.exited for time in times) for name, call in calls.items()}
    left = sorted((name for name, call in calls.items() if call.usable), key=lambda name: calls[name].exited)
    chains: list[list[str]] = []
    while True:
        best: dict[str, tuple[int, int, str | None]] = {}  # layers and modules up to here, and the module before
        for name in left:
            found: list[tuple[int, int, str | None]] = [(0, 0, None)]
            found += [(*best[before][:2], before) for before in calls[name].links if before in best]
            most = max(found, key=lambda way: way[:2])
            best[name] = most[0] + inside[name], most[1] + 1, most[2]
        last = max(best, key=lambda name: best[name][:2], default=None)
        if last is None or best[last][0] < 2 or best[last][1] < 2:
            return chains
        chain = [last]
        while (before := best[chain[0]][2]) is not None:
            chain.insert(0, before)
        chains.append(chain)
        first = calls[chain[0]].entered
        left = [name for name in left if calls[name].exited < first or calls[name].entered > calls[last].exited]


def _around(name: str, calls: Mapping[str, _Call]) -> str:
    """The layer itself if it is called, else the innermost module around it that is, whose name begins the layer's."""
    while name and name not in calls:
        name = name.rpartition(".")[0]
    return name


@dataclass
class _Kept:
    """Inputs of the module chain[begin] for every batch, and the state of the network they belong to."""

    chain: list[str]
    begin: int
    batches: list[Batch] = field(default_factory=list)
    inputs: list[list[Any]] = field(default_factory=list)
    versions: list[int] = field(default_factory=list)


class Replay(nn.Module):
    """A network whose forward passes over the same batches skip what has not changed since the last ones.

        for batch in replay.batches(group):
            replay(**batch.inputs)      # runs at least from the layers of `group` to wherever the pass is ended

    Outputs are bit for bit those of the network. Parameters and buffers may change between passes; whatever was kept
    is dropped when one of them did that the kept inputs depend on.

    Args:
        module: the network.
        layers: names of the layers that passes will be asked for.
        examples: yields the batches anew.
    """

    def __init__(self, module: nn.Module, layers: Sequence[str], examples: Callable[[], Iterator[Batch]]) -> None:
        super().__init__()
        self.module, self.layers, self.examples = module, layers, examples
        self._submodules = dict(module.named_modules())
        self._calls: dict[str, _Call] | None = None
        self._chains: list[list[str]] = []
        self._kept: _Kept | None = None
        self._pass: Callable[[dict[str, Tensor]], Any] | None = None
        self._asked: Sequence[str] | None = None

    def forward(self, **inputs: Tensor) -> Any:
        """The pass prepared for this batch: all of the network, or the rest of a chain."""
        assert self._pass is not None
        return self._pass(inputs)

    def batches(self, group: Sequence[str]) -> Iterator[Batch]:
        """Batches of passes that run the layers of `group`; of their inputs, only a mask is sure to be there."""
        place = self._place(group)
        kept, self._kept = self._kept, None  # whoever stops half-way leaves nothing
        if place is None:
            for batch in self.examples():
                self._pass = self._whole
                yield batch
            return
        chain, begin = place
        if kept and kept.chain is chain and kept.begin <= begin and kept.versions == self._versions(chain, kept.begin):
            for i, batch in enumerate(kept.batches):
                self._pass = partial(self._rest, kept, i, begin)
                yield batch
        else:
            kept = _Kept(chain, begin)
            for batch in self.examples():
                self._pass = partial(self._record, kept)
                yield batch
                mask = {name: x for name, x in batch.inputs.items() if name == MASK}
                kept.batches.append(Batch(mask, batch.labels, batch.index))
        self._pass = None
        if chain in self._chains:
            kept.begin, kept.versions = begin, self._versions(chain, begin)
            self._kept = kept

    def _whole(self, inputs: dict[str, Tensor]) -> Any:
        return self.module(**inputs)

    def _record(self, kept: _Kept, inputs: dict[str, Tensor]) -> Any:
        """A pass of the whole network that keeps what chain[begin] is given."""
        given: list[Any] = []

        def keep(_: nn.Module, args: Any, kwargs: Any) -> None:
            given.extend(tree_leaves((args, kwargs)))
            versions.extend(_versions_of(given))

        versions: list[int] = []
        handle = self._submodules[kept.chain[kept.begin]].register_forward_pre_hook(keep, with_kwargs=True)
        try:
            return self.module(**inputs)
        finally:  # also when a hook ends the pass
            handle.remove()
            kept.inputs.append(given)
            if _versions_of(given) != versions and kept.chain in self._chains:
                self._chains.remove(kept.chain)  # the network overwrites them afterwards: nothing to begin with

    def _rest(self, kept: _Kept, i: int, begin: int, inputs: dict[str, Tensor]) -> Any:
        """Bring kept inputs from chain[kept.begin] to chain[begin], and run the chain from there."""
        for k in range(kept.begin, begin):
            kept.inputs[i] = self._step(kept.chain, k, kept.inputs[i])[1]
        return self._run(kept.chain, begin, kept.inputs[i])

    def _run(self, chain: Sequence[str], begin: int, leaves: list[Any]) -> Any:
        output = None
        for k in range(begin, len(chain)):
            output, leaves = self._step(chain, k, leaves)
        return output

    def _step(self, chain: Sequence[str], k: int, leaves: list[Any]) -> tuple[Any, list[Any]]:
        """Call chain[k]: its output, and the inputs of the module after it."""
        assert self._calls is not None
        spec = self._calls[chain[k]].spec
        assert spec is not None
        args, kwargs = tree_unflatten(leaves, spec)
        output = self._submodules[chain[k]](*args, **kwargs)
        if k + 1 == len(chain):
            return output, []
        pools = {OUTPUT: tree_leaves(output), INPUT: leaves}
        sources = self._calls[chain[k + 1]].links[chain[k]]
        return output, [at if kind == CONSTANT else pools[kind][at] for kind, at in sources]

    def _place(self, group: Sequence[str]) -> tuple[list[str], int] | None:
        """The chain around a group of layers, and its last module that a pass for them can begin with."""
        if self._calls is None:
            # Of the first pass nothing could be kept yet, and watching is worth it for a second one only.
            if self._asked in (None, list(group)):
                self._asked = list(group)
                return None
            self._trace()
        assert self._calls is not None
        called = [self._calls.get(_around(name, self._calls)) for name in group]
        times = [call.entered for call in called if call is not None and call.usable]
        if len(times) < len(group):
            return None
        for chain in self._chains:
            spans = [(self._calls[name].entered, self._calls[name].exited) for name in chain]
            if not (spans[0][0] <= min(times) and max(times) <= spans[-1][1]):
                continue
            if any(not any(start <= time <= end for start, end in spans) for time in times):
                return None  # beside the chain, not in it
            first = next(k for k, (_, end) in enumerate(spans) if min(times) <= end)
            fitting = [k for k in range(first + 1) if self._calls[chain[k]].nbytes <= KEPT_BYTES]
            return (chain, fitting[-1]) if fitting else None
        return None

    @torch.no_grad()
    def _trace(self) -> None:
        """Watch the network on every batch, and check on one that chains give what the network does."""
        first: Batch | None = None
        for batch in self.examples():
            calls = _Watch(self.module).run(batch)
            if self._calls is None:
                first, self._calls = batch, calls
            else:
                _agree(self._calls, calls)
        if self._calls is None:  # no examples
            self._calls = {}
        chains = find_chains(self._calls, self.layers)
        self._chains = [chain for chain in chains if first is not None and self._reproduces(chain, first)]

    def _reproduces(self, chain: Sequence[str], batch: Batch) -> bool:
        """Whether a chain on its own gives the bits that it gives inside the network."""
        given: list[Any] = []
        expected: list[Any] = []
        begin = self._submodules[chain[0]].register_forward_pre_hook(
            lambda _, args, kwargs: given.extend(_copies((args, kwargs))), with_kwargs=True
        )
        end = self._submodules[chain[-1]].register_forward_hook(lambda _, __, out: expected.extend(_copies(out)))
        try:
            self.module(**batch.inputs)
        finally:
            begin.remove()
            end.remove()
        found = tree_leaves(self._run(chain, 0, given))
        return len(found) == len(expected) and all(map(_same, found, expected))

    def _versions(self, chain: Sequence[str], begin: int) -> list[int]:
        """Versions of all parameters and buffers but those that only what begins with chain[begin] can read."""
        later = {id(x) for name in chain[begin:] for x in _state(self._submodules[name])}
        return [x._version for x in _state(self.module) if id(x) not in later]


def _state(module: nn.Module) -> list[Tensor]:
    return [*module.parameters(), *module.buffers()]


def _versions_of(leaves: Sequence[Any]) -> list[int]:
    return [leaf._version for leaf in leaves if isinstance(leaf, Tensor)]


def _copies(tree: Any) -> list[Any]:
    return [leaf.clone() if isinstance(leaf, Tensor) else leaf for leaf in tree_leaves(tree)]


def _same(found: Any, expected: Any) -> bool:
    if isinstance(found, Tensor) and isinstance(expected, Tensor):
        return torch.equal(found, expected)
    return type(found) is type(expected)
