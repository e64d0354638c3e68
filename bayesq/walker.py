"""The calibration set carried through a network block by block, for statistics behind a prefix that changes.

Blocks are parts that a network runs once each, one after the other; `bayesq.quant.blocks` finds them in most networks.
The inputs of one block are stored for all batches, in a file if they are large. A pass for the layers inside it then
runs that block alone; when layers of the next one are asked for, the block turns the stored inputs into its outputs. So
a pass costs one block, and the memory is that of one block's inputs, never that of the network times the calibration
set. In a network that never changes, the last pass for a block also returns the inputs of the next one. Within a block,
a pass reuses outputs of the pass before (`bayesq.kept_outputs`).

Blocks are chained only if this changes nothing. One pass over all batches checks that a block is called once, does not
change its arguments or its buffers, and reads only outputs and arguments of the block before it, or constants. One
batch checks that the chain's outputs are bit-identical to the network's. Everything else, such as a stem, a head or a
layer that several blocks use, is reached by passes from the network's input.
"""

import shutil
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, nullcontext
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Generic, Protocol, TypeVar

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_unflatten

from bayesq.hidden_states import HiddenStates
from bayesq.kept_outputs import KeptOutputs
from bayesq.quant.layers import Layer, ParameterLayer, groups_of
from bayesq.visits import ARGUMENT, CONSTANT, OUTPUT, Visit, Watch, is_inside

# Most bytes in memory: inputs of one block and cached outputs of its modules, for all batches together.
STORED_BYTES = 512 * 2**20
# Part of STORED_BYTES for inputs of the next layers in the full-precision network: `bayesq.calibration.prefix`.
KEPT_BYTES = STORED_BYTES // 2
# Larger inputs go to a file if this many times their size is free on the disk: two networks, two blocks each.
SPARE_DISK = 4


class HasInputs(Protocol):
    """A batch: `module(**batch.inputs)` runs the network."""

    @property
    def inputs(self) -> Mapping[str, Tensor]:
        """The network's arguments by name."""
        ...


B = TypeVar("B", bound=HasInputs)


@dataclass
class _Stored(Generic[B]):
    """Arguments of the block chain[at] for every batch, and the state of the network that they belong to.

    Attributes:
        kept: cached outputs of the block's modules; None before its first pass.
    """

    chain: list[str]
    at: int
    batches: list[B] = field(default_factory=list)
    arguments: HiddenStates = field(default_factory=HiddenStates)
    state: list[tuple[int, int]] = field(default_factory=list)
    kept: KeptOutputs | None = None


class Walker(Generic[B]):
    """Passes over the same batches that run one block of a network where that is enough.

        for batch, run in walker.passes(group):
            run()      # runs all of the layers of `group`, as the network does; hooks on them see their inputs

    Parameters and buffers may change between passes: what was stored is dropped if it depends on them.

    Args:
        module: the network, in eval mode.
        blocks: names of parts that run one after the other, see bayesq.quant.blocks.
        layers: those that passes will be asked for, by name.
        batches: iterates over the batches; every call begins with the first one.
        shorten: reduces a batch whose inputs are no longer needed.
        calls: how often a layer runs in a pass, which then ends with the last run of what is asked for.
        like: a walker of another copy of the network over the same batches, whose trace serves both.
        folder: existing folder for a temporary file of large inputs; None = such passes begin at an earlier block.
        last: for a network that never changes, the layers that are read last in each block.
    """

    def __init__(
        self,
        module: nn.Module,
        blocks: Collection[str],
        layers: Mapping[str, Layer],
        batches: Callable[[], Iterable[B]],
        shorten: Callable[[B], B] = lambda batch: batch,
        calls: Mapping[str, int] | None = None,
        like: "Walker[B] | None" = None,
        folder: Path | None = None,
        last: frozenset[str] = frozenset(),
    ) -> None:
        self.module, self.layers, self.batches, self.shorten, self.like = module, layers, batches, shorten, like
        self.calls, self.folder, self.last = calls or {}, folder, last
        self._blocks = {name: module.get_submodule(name) for name in blocks}
        self._parts = list(module.named_modules(remove_duplicate=False))
        self._visits: list[dict[str, Visit]] | None = None  # by batch
        self._outside: set[str] = set()
        self._chains: list[list[str]] = []
        self._stored: _Stored[B] | None = None
        self._asked: Sequence[str] | None = None
        self._to_the_end = False  # whether the passes now given run their block to its end

    def passes(self, group: Sequence[str]) -> Iterator[tuple[B, Callable[[], Any]]]:
        """Every batch with a function that runs at least the layers of `group`, with or without gradients."""
        place = self._place(group)
        stored, self._stored = self._stored, None  # dropped if the caller stops before the last batch
        self._to_the_end = False
        if place is None:
            for batch in self.batches():
                yield batch, partial(self.module, **batch.inputs)
            self._stored = stored
            return
        chain, begin, end, folder = place
        if stored is None or not self._serves(stored, chain, begin):
            stored = _Stored(chain, begin)
            for i, batch in enumerate(self.batches()):
                given: list[Any] = []
                yield batch, partial(self._record, stored, batch, given)
                stored.batches.append(self.shorten(batch))
                if len(given) == 1:
                    stored.arguments.put(i, given[0], folder)
            if len(stored.arguments) < len(stored.batches):
                self.folder = None if stored.arguments.disk_is_full else self.folder
                return
        else:
            self._to_the_end = self._gives_the_next(group, chain, begin, end)
            kept = {stored.at: stored.kept} if stored.kept is not None else {}
            if stored.at < begin and stored.kept is not None:
                stored.kept.start((), record=False)
            if begin not in kept:
                room = STORED_BYTES - (self._nbytes(chain[begin]) if folder is None else 0)
                room -= KEPT_BYTES if self.last else 0
                kept[begin] = KeptOutputs(self._blocks[chain[begin]], len(stored.batches), room, bool(self.last))
            watched = [name.removeprefix(f"{chain[begin]}.") for name in group if is_inside(name, chain[begin])]
            kept[begin].start(watched, record=begin == end and not self._to_the_end)
            for i, batch in enumerate(stored.batches):
                arguments, after = stored.arguments[i], list[Any]()
                with torch.no_grad():
                    for k in range(stored.at, begin):
                        arguments = self._step(i, chain, k, arguments, kept.get(k))[1]
                if stored.at < begin and not self._to_the_end:
                    stored.arguments.put(i, arguments, folder)
                yield batch, partial(self._run, i, chain, begin, end, arguments, after, kept[begin])
                if self._to_the_end:
                    assert after, "the pass for a group that is asked for last was not run"
                    stored.arguments.put(i, after, folder)
            if stored.arguments.disk_is_full:
                self.folder = None
                return
            stored.kept = None if self._to_the_end else kept[begin]
            begin += self._to_the_end
            stored.at = begin
        stored.state = self._state(chain, begin)
        self._stored = stored

    def _serves(self, stored: _Stored[B], chain: Sequence[str], begin: int) -> bool:
        """Whether passes that begin with chain[begin] can go on from what is stored."""
        return stored.chain is chain and stored.at <= begin and stored.state == self._state(chain, stored.at)

    def last_run(self, group: Sequence[str]) -> tuple[str, int] | None:
        """The layer and the number of its run after which all of the group has run.

        None if that is not known (experts run as often as tokens are sent to them), or if the pass goes on.
        """
        if self._to_the_end:
            return None
        calls = [self.calls.get(name) for name in group]
        if any(isinstance(self.layers[name], ParameterLayer) and groups_of(self.layers[name]) > 1 for name in group):
            return None
        if len(group) == 1 and calls[0] is not None:
            return group[0], calls[0]
        return (group[-1], 1) if set(calls) == {1} else None

    def _record(self, stored: _Stored[B], batch: B, given: list[Any]) -> Any:
        """A pass of the whole network that gives a copy of a block's inputs, which the network may overwrite later."""

        def store(_: nn.Module, args: Any, kwargs: Any) -> None:
            given.append(_copies((args, kwargs)))

        # in front of hooks that end the pass at this very block
        handle = self._blocks[stored.chain[stored.at]].register_forward_pre_hook(store, prepend=True, with_kwargs=True)
        try:
            return self.module(**batch.inputs)
        finally:  # also when a hook ends the pass
            handle.remove()

    def _gives_the_next(self, group: Sequence[str], chain: Sequence[str], begin: int, end: int) -> bool:
        """Whether the passes for a group also give the inputs of the next block, if there is room for these."""
        if begin < end or end + 1 == len(chain) or not self.last.issuperset(group):
            return False
        return self._nbytes(chain[end + 1]) <= max(self._nbytes(chain[end]), STORED_BYTES)

    def _nbytes(self, block: str) -> int:
        """Memory of a block's arguments for all batches."""
        assert self._visits is not None
        return sum(visits[block].nbytes for visits in self._visits)

    def _run(
        self,
        i: int,
        chain: Sequence[str],
        begin: int,
        end: int,
        arguments: list[Any],
        after: list[Any],
        kept: KeptOutputs,
    ) -> Any:
        """Run chain[begin] to chain[end] for batch i: the output. `after` gets the arguments of the next block."""
        output = None
        for k in range(begin, end + 1):
            output, arguments = self._step(i, chain, k, arguments, kept if k == begin else None)
        after[:] = arguments
        return output

    def _step(
        self, i: int, chain: Sequence[str], k: int, arguments: list[Any], kept: KeptOutputs | None = None
    ) -> tuple[Any, list[Any]]:
        """Run chain[k] for batch i: its output, and the arguments of the block after it."""
        assert self._visits is not None
        args, kwargs = tree_unflatten(arguments, self._visits[i][chain[k]].spec)
        with kept.running(i) if kept is not None else nullcontext():
            output = self._blocks[chain[k]](*args, **kwargs)
        if k + 1 == len(chain):
            return output, []
        pools = {OUTPUT: tree_leaves(output), ARGUMENT: arguments}
        sources = self._visits[i][chain[k + 1]].sources
        assert sources is not None
        return output, [at if kind == CONSTANT else pools[kind][at] for kind, at in sources]

    def _place(self, group: Sequence[str]) -> tuple[list[str], int, int, Path | None] | None:
        """Where a pass for a group of layers runs; None: the whole network runs.

        Returns:
            a chain of blocks, the first and last of them to run, and the folder for the inputs of the first.
        """
        if self._visits is None:
            # Tracing costs a pass, so it waits until a second group is asked for.
            if self._asked in (None, list(group)):
                self._asked = list(group)
                return None
            self._trace()
        assert self._visits is not None
        if self._outside & set(group):
            return None
        blocks = {next((block for block in self._blocks if is_inside(name, block)), "") for name in group}
        for chain in self._chains:
            if blocks <= set(chain):
                places = sorted(map(chain.index, blocks))
                sizes = [self._nbytes(name) for name in chain[: places[0] + 1]]
                fitting = [k for k, size in enumerate(sizes) if size <= STORED_BYTES or self._fits_on_disk(size)]
                if not fitting:
                    return None
                folder = self.folder if sizes[fitting[-1]] > STORED_BYTES else None
                return chain, fitting[-1], places[-1], folder
        return None

    def _fits_on_disk(self, size: int) -> bool:
        return self.folder is not None and SPARE_DISK * size <= shutil.disk_usage(self.folder).free

    @torch.no_grad()
    def _trace(self) -> None:
        """Watch the network on every batch, and check on one that chains of blocks give what the network does."""
        if self.like is not None:
            if self.like._visits is None:
                self.like._trace()
            self._visits, self._outside, self._chains = self.like._visits, self.like._outside, self.like._chains
            return
        first: B | None = None
        self._visits = []
        for batch in self.batches():
            watch = Watch(self.module, self._blocks, self.layers)
            watch.run(batch.inputs)
            first = batch if first is None else first
            self._visits.append(watch.visits)
            self._outside |= watch.outside
        if first is not None:
            self._chains = [chain for chain in self._linked() if self._reproduces(chain, first)]

    def _linked(self) -> list[list[str]]:
        """Chains of blocks that every batch runs one after the other with nothing in between."""
        assert self._visits is not None
        order = list(self._visits[0])
        chains: list[list[str]] = []
        if any(list(visits) != order for visits in self._visits):
            return chains
        for name in order:
            visits = [one[name] for one in self._visits]
            if not all(visit.alone for visit in visits):
                continue
            if chains and all(visit.before == chains[-1][-1] and visit.sources is not None for visit in visits):
                chains[-1].append(name)
            else:
                chains.append([name])
        return chains

    def _reproduces(self, chain: Sequence[str], batch: B) -> bool:
        """Whether each block of a chain on its own gives the bits that it gives inside the network.

        Each is compared while the network runs, so that the memory is that of one block's outputs.
        """
        given: list[Any] = []
        compared: list[bool] = []
        running = False

        def begin(_: nn.Module, args: Any, kwargs: Any) -> None:
            if not running:
                given[:] = _copies((args, kwargs))

        def check(_: nn.Module, __: Any, expected: Any) -> None:
            nonlocal running
            if running or not all(compared):
                return
            running = True  # the block runs again, with these hooks
            output, given[:] = self._step(0, chain, len(compared), list(given))
            running = False
            ours, theirs = tree_leaves(output), tree_leaves(expected)
            compared.append(len(ours) == len(theirs) and all(map(_same, ours, theirs)))

        with ExitStack() as hooks:
            handle = self._blocks[chain[0]].register_forward_pre_hook(begin, with_kwargs=True)
            hooks.callback(handle.remove)
            for name in chain:
                hooks.callback(self._blocks[name].register_forward_hook(check).remove)
            self.module(**batch.inputs)
        return len(compared) == len(chain) and all(compared)

    def _state(self, chain: Sequence[str], at: int) -> list[tuple[int, int]]:
        """Memory and versions of all parameters and buffers but those that only chain[at] and later blocks have."""
        left_out = tuple(f"{block}." for block in chain[at:])
        return [
            (x.data_ptr(), x._version)
            for name, child in self._parts
            if not f"{name}.".startswith(left_out)
            for x in (*child.parameters(recurse=False), *child.buffers(recurse=False))
        ]


def _copies(tree: Any) -> list[Any]:
    return [x.clone() if isinstance(x, Tensor) else x for x in tree_leaves(tree)]


def _same(x: Any, expected: Any) -> bool:
    if isinstance(x, Tensor) and isinstance(expected, Tensor):
        return torch.equal(x, expected)
    return type(x) is type(expected)
