"""Forward passes of several batches that stop together at chosen modules, and continue from there.

A hook that needs the tensors of all batches at once (the moments of an activation, for example) needs every pass to
reach a module before any pass goes beyond it. A pass is ended there, and later run again from its current block; a
module that has finished returns its earlier output, so no module computes twice. Batches stay small: their sequences
are padded to their own longest one, and between two stops only one batch has intermediate activations.

At a stop only what the rest of the pass reads is stored. The output of a module is dropped once the module that takes
it as argument has finished, unless a first batch showed that something else reads it: an operation between modules,
such as a residual sum. A placeholder replaces a dropped output. If the placeholder is read, the pass computes the
output again, so no number is wrong.
"""

from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import TreeSpec, tree_flatten, tree_leaves, tree_map, tree_unflatten

from bayesq.errors import Refused
from bayesq.quant.blocks import CONSTANTS

INPUT, OUTPUT = "input", "output"
LEAF = tree_flatten(0)[1]


class _Stopped(BaseException):  # no Exception: a network that catches those must not catch this
    """A pass has reached a stop."""


class _Missing(BaseException):
    """A pass reads an output that is no longer stored."""


@dataclass
class Readers:
    """Modules whose output is read by operations between modules, by name.

    Attributes:
        stored: their outputs are stored until the enclosing module has finished.
        copied: their outputs are changed in place later, so a copy is stored; "" stands for the network's input.
        learning: dropped outputs can still be read, and `stored` and `copied` record their readers.
    """

    stored: set[str] = field(default_factory=set)
    copied: set[str] = field(default_factory=set)
    learning: bool = False


class _Absent(Tensor):
    """Placeholder of an output that is not stored; every read of it is detected.

    Attributes:
        source: module that returned the output.
        changed: the output was overwritten, not dropped.
        value: the output while `Readers.learning`, else None.
    """

    source: str
    changed: bool
    value: Tensor | None
    readers: Readers

    def read(self) -> Tensor:
        """The value; from now on, passes store this output."""
        self.readers.stored.add(self.source)
        if self.changed:
            self.readers.copied.add(self.source)
        if self.value is None:
            raise _Missing
        return self.value

    @classmethod
    def of(cls, source: str, readers: Readers, value: Tensor | None, changed: bool = False) -> "_Absent":
        """A placeholder of an output of the module `source`."""
        absent = torch.empty(0).as_subclass(cls)
        absent.source, absent.readers, absent.value, absent.changed = source, readers, value, changed
        return absent

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        args, kwargs = tree_map(lambda x: x.read() if isinstance(x, _Absent) else x, (args, kwargs or {}))
        return func(*args, **kwargs)


@dataclass
class _Call:
    """One call of a module in a pass; it holds its inner calls until it has finished.

    Attributes:
        path: (name, number of earlier calls of that module) of the enclosing calls and of this one.
        leaves: tensors of its output, with placeholders for dropped ones.
        versions: of the leaves when the call finished.
        spec: structure of the output; None until the call has finished, or if it has to run each time.
        copied: the leaves are copies, because the output is changed in place later.
    """

    path: tuple[tuple[str, int], ...] = ()
    inside: "dict[tuple[str, int], _Call]" = field(default_factory=dict)
    leaves: list[Any] = field(default_factory=list)
    versions: list[int | None] = field(default_factory=list)
    spec: TreeSpec | None = None
    copied: bool = False

    @property
    def name(self) -> str:
        """Name of the module."""
        return self.path[-1][0]


@dataclass
class _Frame:
    """A running module: its number of calls of each module, and the call that returned each tensor (by id)."""

    call: _Call
    counts: Counter[str] = field(default_factory=Counter)
    sources: dict[int, tuple[_Call, int]] = field(default_factory=dict)


@dataclass
class _Block:
    """A running block and its arguments, from which a pass can continue without the blocks before it.

    Attributes:
        frame: of the module that called it.
        key: (name, number of earlier calls of it).
    """

    frame: _Frame
    key: tuple[str, int]
    args: Any
    kwargs: Any
    versions: list[int | None]


class _Pass:
    """One batch's way through the network."""

    def __init__(self, inputs: Mapping[str, Tensor], readers: Readers, blocks: Mapping[str, nn.Module]) -> None:
        self.inputs, self.readers, self.blocks = inputs, readers, blocks
        self.root, self.frames = _Call(), [_Frame(_Call())]
        self.block: _Block | None = None
        self.left_stops: set[tuple[tuple[str, int], ...]] = set()
        self.waiting: tuple[str, _Call | None, Tensor] | None = None

    def advance(self, module: nn.Module) -> str | None:
        """Run to the next stop; returns its name, or None at the end of the pass.

        Raises:
            Refused: the network overwrites its input in this batch, but did not in that of `Resumable.learn`.
        """
        while True:
            try:
                block = self.block
                if block is not None and block.versions == _versions(_leaves(block.args, block.kwargs)):
                    self.frames = [block.frame]
                    block.frame.counts[block.key[0]] = block.key[1]
                    self.blocks[block.key[0]](*block.args, **block.kwargs)
                self._run_from_input(module)
                return None
            except _Stopped:
                assert self.waiting is not None
                return self.waiting[0]
            except _Missing:
                if self.readers.learning:  # the caller starts again, because what it saw at the stops is lost too
                    raise
                self.root, self.block = _Call(), None

    def _run_from_input(self, module: nn.Module) -> None:
        self.frames, self.block = [_Frame(self.root)], None
        copied = self.readers.learning or "" in self.readers.copied
        inputs = {name: x.clone() if copied else x for name, x in self.inputs.items()}
        versions = _versions(inputs.values())
        try:
            module(**inputs)
        finally:
            if versions != _versions(inputs.values()):
                if not copied:
                    raise Refused("the network overwrites its inputs in some batches only")
                self.readers.copied.add("")

    def release(self) -> Tensor:
        """Leave the stop, and store its tensor, which may have been overwritten there."""
        assert self.waiting is not None
        (_, call, x), self.waiting = self.waiting, None
        if call is not None:
            self._store(call, x)
        return x

    def run(self, name: str, site: str | None, forward: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        """Call a module: return its stored output or run it, and stop if it is a stop."""
        frame = self.frames[-1]
        key = name, frame.counts[name]
        frame.counts[name] += 1
        call = frame.call.inside.get(key)
        if call is None:
            call = frame.call.inside[key] = _Call((*frame.call.path, key))
        if call.spec is not None:
            return self._stored_output(call, frame)
        stops_here = site is not None and call.path not in self.left_stops
        if stops_here and site == INPUT:
            self._stop(name, call, None, first_argument(args, kwargs))
        arguments = _leaves(args, kwargs)
        versions = _versions(arguments)
        if name in self.blocks and self.block is None:
            self.block = _Block(frame, key, args, kwargs, versions)
        self.frames.append(_Frame(call))
        try:
            output = forward(*args, **kwargs)
        finally:
            self.frames.pop()
        if versions == _versions(arguments):  # a stored output would not repeat changes to the arguments
            self._store(call, output)
        if call.spec is not None:
            call.inside.clear()
            self._drop(arguments, frame)
            self._note_source(call, call.leaves, frame)
        if self.block is not None and self.block.frame is frame and self.block.key == key:
            self.block = None
        if stops_here and site == OUTPUT:
            self._stop(name, call, call, output)
        return output

    def _stop(self, name: str, call: _Call, output_of: _Call | None, x: Tensor) -> None:
        self.left_stops.add(call.path)
        self.waiting = name, output_of, x.read() if isinstance(x, _Absent) else x
        raise _Stopped

    def _store(self, call: _Call, output: Any) -> None:
        leaves, spec = ([output], LEAF) if isinstance(output, Tensor) else tree_flatten(output)
        if not all(isinstance(x, (Tensor, *CONSTANTS)) and not isinstance(x, _Absent) for x in leaves):
            return
        call.copied = call.name in self.readers.copied
        call.leaves = [x.clone() if call.copied and isinstance(x, Tensor) else x for x in leaves]
        call.spec, call.versions = spec, _versions(call.leaves)

    def _note_source(self, call: _Call, leaves: Sequence[Any], frame: _Frame) -> None:
        for k, x in enumerate(leaves):
            if isinstance(x, Tensor) and not isinstance(x, _Absent):
                frame.sources[id(x)] = call, k

    def _drop(self, arguments: Sequence[Any], frame: _Frame) -> None:
        """Drop the outputs that a finished call got as arguments directly from other calls of the same module."""
        for x in arguments:
            source_call, k = frame.sources.pop(id(x), (None, 0))
            if source_call is None or source_call.leaves[k] is not x or source_call.name in self.readers.stored:
                continue
            if x._version == source_call.versions[k]:  # else an operation that also reads it has overwritten it
                source_call.leaves[k] = _Absent.of(source_call.name, self.readers, x if self.readers.learning else None)

    def _stored_output(self, call: _Call, frame: _Frame) -> Any:
        """The stored output of a finished call."""
        assert call.spec is not None
        leaves = list(call.leaves)
        for k, (x, version) in enumerate(zip(leaves, call.versions, strict=True)):
            if version is None or isinstance(x, _Absent):
                continue
            if call.copied:
                leaves[k] = x.clone()
            elif x._version != version:
                leaves[k] = _Absent.of(call.name, self.readers, None, changed=True)
        self._note_source(call, leaves, frame)
        return tree_unflatten(leaves, call.spec)


class Resumable:
    """A network whose passes stop at some modules until all batches have reached them.

    Args:
        module: called with each batch's tensors as arguments; it must be deterministic.
        stops: by name of a module INPUT or OUTPUT, the tensor that is shown there.
        blocks: names of modules from which a pass can continue, instead of from the network's input.
    """

    def __init__(self, module: nn.Module, stops: Mapping[str, str], blocks: Collection[str] = ()) -> None:
        self.module, self.stops = module, stops
        self.blocks = {name: module.get_submodule(name) for name in blocks}
        self._pass: _Pass | None = None
        self._look: Callable[[str, Tensor], None] = lambda name, x: None

    def pass_through(self, inputs: Mapping[str, Tensor], look: Callable[[str, Tensor], None]) -> None:
        """One pass from end to end; `look` is called at every stop."""
        self._pass, self._look = None, look
        with self._intercepted(), torch.no_grad():
            self.module(**{name: x.clone() for name, x in inputs.items()})  # it may overwrite its input

    def learn(self, inputs: Mapping[str, Tensor], begin: Callable[[], Callable[[str, Tensor], None]]) -> Readers:
        """`pass_through` with stops, to learn which outputs are read by operations between modules.

        Args:
            begin: returns the function for the stops; called again whenever the pass starts again.
        """
        readers = Readers(learning=True)
        while readers.learning:
            look = begin()
            with suppress(_Missing):
                together = partial(lambda look, name, x: look(name, x[0]), look)
                self._in_step([_Pass(inputs, readers, self.blocks)], together)
                readers.learning = False
        return readers

    def in_step(
        self,
        batches: Sequence[Mapping[str, Tensor]],
        together: Callable[[str, list[Tensor]], None],
        readers: Readers,
    ) -> None:
        """Pass all batches through the network without gradients; at every stop each pass waits for the others.

        Args:
            batches: one at least.
            together: called at a stop with the tensors of all batches in their order; may write into outputs.
            readers: result of `learn` for a network of the same structure.

        Raises:
            Refused: the batches call the stops in different orders.
        """
        self._in_step([_Pass(batch, readers, self.blocks) for batch in batches], together)

    @torch.no_grad()
    def _in_step(self, passes: Sequence[_Pass], together: Callable[[str, list[Tensor]], None]) -> None:
        with self._intercepted():
            while True:
                names = []
                for self._pass in passes:
                    names.append(self._pass.advance(self.module))
                name = next((name for name in names if name is not None), None)
                if name is None:
                    return
                if any(other != name for other in names):
                    raise Refused(f"{name}: not every batch calls it, or not in the same order")
                together(name, [one.waiting[2] for one in passes if one.waiting is not None])
                for one in passes:
                    one.release()

    @contextmanager
    def _intercepted(self) -> Iterator[None]:
        """Route calls of modules through the current pass."""
        replaced: list[tuple[nn.Module, Any]] = []
        try:
            for name, child in self.module.named_modules():
                if name and not isinstance(child, torch.jit.ScriptModule):
                    replaced.append((child, child.__dict__.get("forward")))
                    child.forward = partial(self._call, name, child.forward)
            yield
        finally:
            self._pass = None
            for child, forward in replaced:
                if forward is None:
                    del child.forward
                else:
                    child.forward = forward

    def _call(self, name: str, forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        site = self.stops.get(name)
        if self._pass is not None:
            return self._pass.run(name, site, forward, args, kwargs)
        if site == INPUT:
            self._look(name, first_argument(args, kwargs))
        output = forward(*args, **kwargs)
        if site == OUTPUT:
            self._look(name, output)
        return output


def first_argument(args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
    """The argument of a module with one input."""
    return args[0] if args else next(iter(kwargs.values()))


def _leaves(args: Sequence[Any], kwargs: Mapping[str, Any]) -> list[Any]:
    values = [*args, *kwargs.values()]
    return values if all(isinstance(x, (Tensor, *CONSTANTS)) for x in values) else tree_leaves(values)


def _versions(leaves: Iterable[Any]) -> list[int | None]:
    return [x._version if isinstance(x, Tensor) and not isinstance(x, _Absent) else None for x in leaves]
