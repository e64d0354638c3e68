"""Passes in step: every stop sees all batches, nothing computes twice, nothing wrong is ever read."""

import signal
from collections import Counter

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bayesq.quant.blocks import find_blocks
from bayesq.quant.resume import INPUT, OUTPUT, Readers, Resumable


class Part(nn.Module):
    """Two layers with an operation between them; `mode` tells what becomes of the tensors in between.

    plain: relu and a residual sum; after: an output is read once more after the next module has finished; output and
    input: an activation overwrites an output, or the part's input; module: an in-place activation that is a module.
    """

    def __init__(self, mode: str) -> None:
        super().__init__()
        self.mode = mode
        self.one, self.two, self.last = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4)
        self.act = nn.ReLU(inplace=True)

    def forward(self, x: Tensor, scale: float = 1.0) -> Tensor:
        start = F.relu_(x) if self.mode == "input" else F.relu(x)
        y = self.one(start)
        if self.mode == "output":
            z = F.relu_(y)
        elif self.mode == "module":
            z = self.act(y)
        else:
            z = y
        z = self.last(self.two(z)) * scale
        return z + y if self.mode == "after" else z + x


class Network(nn.Module):
    """Parts in a container, one beside it that runs twice; what the first part is given is overwritten at the end."""

    def __init__(self, mode: str) -> None:
        super().__init__()
        self.parts = nn.Sequential(Part(mode), Part(mode))
        self.twice, self.pair = Part(mode), Pair()
        self.mode = mode

    def forward(self, x: Tensor) -> Tensor:
        if self.mode == "network input":
            x.mul_(0.5)
        start = x + 0.25
        y = self.parts(start)
        start.zero_()
        y = self.twice(self.twice(y), scale=0.5)
        one, rest = self.pair(y)
        return one + rest["two"]


class Pair(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        return self.one(x), {"two": self.two(x), "none": None}


MODES = ["plain", "after", "output", "input", "module", "network input"]


def network(mode: str) -> Network:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return Network(mode).eval()


def batches(count: int = 3) -> list[dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(1)
    return [{"x": torch.randn(k + 1, 4, generator=generator)} for k in range(count)]


def stops_of(module: nn.Module, which: str) -> dict[str, str]:
    return {name: which for name, child in module.named_modules() if isinstance(child, nn.Linear)}


def seen_in_whole_passes(module: nn.Module, which: str) -> list[tuple[str, list[Tensor]]]:
    """What hooks see at each stop, by plain passes."""
    ways = []
    for batch in batches():
        way: list[tuple[str, Tensor]] = []
        handles = []
        for name in stops_of(module, which):
            child = module.get_submodule(name)
            if which == INPUT:
                handles.append(child.register_forward_pre_hook(lambda _, x, n=name, w=way: w.append((n, x[0].clone()))))
            else:
                handles.append(child.register_forward_hook(lambda _, __, x, n=name, w=way: w.append((n, x.clone()))))
        with torch.no_grad():
            module(**batch)
        for handle in handles:
            handle.remove()
        ways.append(way)
    return [(stop[0][0], [x for _, x in stop]) for stop in zip(*ways, strict=True)]


@pytest.mark.parametrize("learnt", [True, False])
@pytest.mark.parametrize("with_blocks", [True, False])
@pytest.mark.parametrize("which", [INPUT, OUTPUT])
@pytest.mark.parametrize("mode", MODES)
def test_every_stop_sees_what_whole_passes_see(mode, which, with_blocks, learnt):
    module = network(mode)
    expected = seen_in_whole_passes(module, which)
    resumable = Resumable(module, stops_of(module, which), find_blocks(module) if with_blocks else ())
    readers, found = Readers(), []
    if learnt:
        first = []
        begin = lambda: first.clear() or (lambda name, x: first.append((name, x.clone())))  # noqa: E731
        readers = resumable.learn(batches()[0], begin)
        assert [name for name, _ in first] == [name for name, _ in expected]
        assert all(torch.equal(x, tensors[0]) for (_, x), (_, tensors) in zip(first, expected, strict=True))
    elif mode == "network input":
        with pytest.raises(ValueError, match="overwrites"):
            resumable.in_step(batches(), lambda name, x: None, readers)
        return
    resumable.in_step(batches(), lambda name, x: found.append((name, [y.clone() for y in x])), readers)
    assert [name for name, _ in found] == [name for name, _ in expected]
    for (_, tensors), (_, others) in zip(found, expected, strict=True):
        assert all(map(torch.equal, tensors, others)) and len(tensors) == 3
    assert not any("forward" in child.__dict__ for child in module.modules())
    through = []
    resumable.pass_through(batches()[1], lambda name, x: through.append(x.clone()))
    assert all(torch.equal(x, tensors[1]) for x, (_, tensors) in zip(through, expected, strict=True))


@pytest.mark.parametrize("mode", MODES)
def test_no_layer_computes_twice(mode, monkeypatch):
    module, runs = network(mode), Counter()
    resumable = Resumable(module, stops_of(module, OUTPUT), find_blocks(module))
    readers = resumable.learn(batches()[0], lambda: lambda name, x: None)
    linear = F.linear
    monkeypatch.setattr(F, "linear", lambda x, weight, bias: runs.update([id(weight)]) or linear(x, weight, bias))
    resumable.in_step(batches(), lambda name, x: None, readers)
    assert set(runs.values()) <= {3, 6} and len(runs) == 11  # once for each batch, twice in the part that runs twice


@pytest.mark.parametrize("mode", MODES)
def test_what_is_written_at_a_stop_is_what_the_passes_go_on_with(mode):
    module = network(mode)
    resumable = Resumable(module, stops_of(module, OUTPUT), find_blocks(module))
    readers = resumable.learn(batches()[0], lambda: lambda name, x: None)
    found = []

    def add(name: str, tensors: list[Tensor]) -> None:
        for x in tensors:
            x += 0.5
        found.append([x.clone() for x in tensors])

    resumable.in_step(batches(), add, readers)
    for name in stops_of(module, OUTPUT):
        module.get_submodule(name).register_forward_hook(lambda _, __, x: x.add_(0.5))
    expected = seen_in_whole_passes(module, OUTPUT)
    for tensors, (_, others) in zip(found, expected, strict=True):
        assert all(map(torch.equal, tensors, others))


def test_only_what_is_read_again_stays():
    """At a stop, the activations of finished modules that only finished modules read are gone."""
    module = nn.Sequential(*(nn.Linear(4, 4) for _ in range(6)))
    resumable = Resumable(module, stops_of(module, INPUT))
    readers = resumable.learn({"input": torch.ones(2, 4)}, lambda: lambda name, x: None)
    alive: list[tuple[str, int]] = []

    def count(name: str, tensors: list[Tensor]) -> None:
        calls = resumable._pass.root.inside.values()
        alive.append((name, sum(type(x) is Tensor for call in calls for x in call.leaves)))

    resumable.in_step([{"input": torch.ones(2, 4)}], count, readers)
    assert alive == [("0", 0), *((str(k), 1) for k in range(1, 6))]


class Steps(nn.Module):
    """A layer as often as a batch has rows, and another one."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.other = nn.Linear(2, 2), nn.Linear(2, 2)

    def forward(self, x: Tensor) -> Tensor:
        for _ in x:
            x = self.layer(x)
        return self.other(x)


@pytest.mark.parametrize("times", [(2, 1, 2), (1, 2, 2), (2, 2, 1), (1, 1, 2), (2, 1, 1), (0, 1, 1)])
def test_batches_that_take_different_ways_are_refused(times):
    module = Steps()
    with pytest.raises(ValueError, match=r"(layer|other): not every batch calls it"):
        given = [{"x": torch.zeros(count, 2)} for count in times]
        Resumable(module, stops_of(module, OUTPUT)).in_step(given, lambda name, x: None, Readers())


def fail(name: str, _: list[Tensor]) -> None:
    raise MemoryError(name)


def interrupt(name: str, _: list[Tensor]) -> None:
    signal.raise_signal(signal.SIGINT)


@pytest.fixture
def interruptible():
    """SIGINT raises KeyboardInterrupt, also where the shell that started the tests ignores it."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.parametrize(("on_stop", "error"), [(fail, MemoryError), (interrupt, KeyboardInterrupt)])
def test_an_error_at_a_stop_leaves_the_network_as_it_was(on_stop, error, interruptible):
    module = network("plain")
    resumable = Resumable(module, stops_of(module, OUTPUT), find_blocks(module))
    with pytest.raises(error):
        resumable.in_step(batches(), on_stop, Readers())
    assert not any("forward" in child.__dict__ for child in module.modules()) and torch.is_grad_enabled()


@pytest.mark.parametrize("place", [0, 1, 2])
def test_an_error_in_one_pass_ends_all(place):
    module, given = network("plain"), batches()
    given[place] = {"x": torch.zeros(1, 5)}
    with pytest.raises(RuntimeError, match=r"must match|shapes cannot"):
        Resumable(module, stops_of(module, OUTPUT)).in_step(given, lambda name, x: None, Readers())
    assert not any("forward" in child.__dict__ for child in module.modules())


def test_there_are_no_gradients():
    module, grads = network("plain"), []
    resumable = Resumable(module, stops_of(module, OUTPUT))
    given = [{"x": torch.ones(1, 4, requires_grad=True)}]
    resumable.in_step(given, lambda name, x: grads.extend(y.requires_grad for y in x), Readers())
    assert grads and not any(grads) and torch.is_grad_enabled()
