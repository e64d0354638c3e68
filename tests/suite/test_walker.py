"""Passes that begin inside the network give the bits of passes from its input, and run less of it."""

from collections import Counter
from collections.abc import Callable
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from naive_fisher import TinyConvNet, TinyEncoder, seeded
from test_calibration import CPU, images, sentences
from torch import Tensor, nn

from bayesq import walker
from bayesq.quant.blocks import find_blocks
from bayesq.quant.layers import quantizable_layers
from bayesq.suite.calibration import INPUT_STATISTICS, Collector, forward_order
from bayesq.suite.models.base import TensorExamples
from bayesq.suite.prefix import PrefixInputs


class Block(nn.Module):
    """Residual, with an activation in place; `careless` ones overwrite what they were given."""

    def __init__(self, width: int, careless: bool = False) -> None:
        super().__init__()
        self.one, self.two = nn.Conv2d(width, width, 3, padding=1), nn.Conv2d(width, width, 1)
        self.careless = careless

    def forward(self, x: Tensor) -> Tensor:
        start = F.relu(x, inplace=self.careless)
        return x + self.two(F.relu(self.one(start), inplace=True))


class Deep(nn.Module):
    """Blocks one after the other, functions and an overwritten activation between some of them, and a head."""

    def __init__(self, careless: bool = False, overwrite: bool = False) -> None:
        super().__init__()
        self.stem = nn.Conv2d(2, 4, 3)
        self.first = nn.Sequential(*(Block(4, careless) for _ in range(3)))
        self.second = nn.ModuleList(Block(4) for _ in range(3))
        self.pool, self.head = nn.AdaptiveAvgPool2d(1), nn.Linear(4, 3)
        self.overwrite = overwrite

    def forward(self, image: Tensor) -> Tensor:
        x = F.silu(self.stem(image))
        y = self.first(x)
        if self.overwrite:
            x.mul_(2.0)  # what the first block was given changes after it ran
        y = F.relu_(y)  # the same tensor, changed
        for block in self.second:
            y = block(y)
        return self.head(self.pool(y).flatten(1) + 0.1 * x.mean())


class Masked(nn.Module):
    """Encoder layers that all get one mask, and hand on a tuple."""

    class Layer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.query, self.key, self.out = (nn.Linear(6, 6) for _ in range(3))

        def forward(self, x: Tensor, mask: Tensor | None, scale: float) -> tuple[Tensor, None]:
            score = self.query(x) @ self.key(x).transpose(1, 2) * scale
            if mask is not None:
                score = score.masked_fill(mask[:, None, :] == 0, -torch.inf)
            return x + self.out(score.softmax(-1) @ x), None

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.head = nn.Embedding(11, 6), nn.Linear(6, 2)
        self.layers = nn.ModuleList(self.Layer() for _ in range(3))

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        x, mask = self.embed(input_ids), attention_mask
        for layer in self.layers:
            x = layer(x, None if bool(mask.all()) else mask, scale=0.4)[0]  # batches differ in their arguments
        return self.head(x[:, 0])


NETWORKS: dict[str, tuple[Callable[[], nn.Module], Callable[[], TensorExamples]]] = {
    "deep": (Deep, images),
    "careless": (partial(Deep, careless=True), images),
    "overwrite": (partial(Deep, overwrite=True), images),
    "convolutions": (TinyConvNet, images),
    "encoder": (TinyEncoder, sentences),
    "masked": (Masked, sentences),
}


def from_the_input(module: nn.Module, group: list[str], examples: TensorExamples) -> dict[str, dict[str, Tensor]]:
    collector = Collector(module, quantizable_layers(module), INPUT_STATISTICS, None, torch.Generator())
    for batch in examples.batches(2, CPU):
        collector.add(batch, stop_after=group[-1])
    found = {kind: collector.statistics(kind)[0] for kind in INPUT_STATISTICS}
    return {name: {kind: found[kind][name] for kind in INPUT_STATISTICS} for name in group}


def rounded(module: nn.Module, names: list[str]) -> None:
    with torch.no_grad():
        for name in names:
            weight = module.get_submodule(name).weight
            weight.copy_(torch.round(4 * weight) / 4)


def setting(name: str) -> tuple[nn.Module, TensorExamples, list[list[str]], PrefixInputs]:
    build, data = NETWORKS[name]
    module, examples = seeded(build()), data()
    layers = quantizable_layers(module)
    groups = forward_order(module, layers, next(iter(examples.batches(2, CPU))))
    return (
        module,
        examples,
        groups,
        PrefixInputs(module, find_blocks(module), layers, groups, examples, 2, CPU, dict.fromkeys(layers, 1)),
    )


@pytest.mark.parametrize("name", NETWORKS)
@pytest.mark.parametrize("room", [0, 1500, 2**29])
def test_statistics_are_those_of_passes_from_the_input(name, room, monkeypatch):
    monkeypatch.setattr(walker, "STORED_BYTES", room)
    module, examples, groups, inputs = setting(name)
    for group in groups:
        expected = from_the_input(module, group, examples)
        for layer in group:
            for kind in INPUT_STATISTICS:
                torch.testing.assert_close(inputs.statistic(layer, kind), expected[layer][kind], rtol=1e-5, atol=1e-6)
        rounded(module, group)
    assert not any(child._forward_hooks or child._forward_pre_hooks for child in module.modules())


@pytest.mark.parametrize("name", ["deep", "masked"])
def test_layers_in_any_order_and_weights_that_change_behind_them(name):
    module, examples, groups, inputs = setting(name)
    for i in (0, 2, 5, 3, 3, 6, 7, 1, 5):
        group = groups[i % len(groups)]
        inputs._statistics = {}
        found, expected = inputs.statistic(group[0], "input_moment"), from_the_input(module, group, examples)
        torch.testing.assert_close(found, expected[group[0]]["input_moment"], rtol=1e-5, atol=1e-6)
        rounded(module, groups[(i * 3) % len(groups)])
        with torch.no_grad():
            module.get_submodule(groups[1][0]).bias.add_(0.1)


def test_blocks_run_a_few_times_not_once_for_every_layer():
    module, _, groups, inputs = setting("deep")
    calls: Counter[str] = Counter()
    for name, child in module.named_modules():
        if isinstance(child, Block):
            child.register_forward_pre_hook(lambda *_, name=name: calls.update([name]))
    for group in groups:
        inputs.statistic(group[0], "input_moment")
        rounded(module, group)
    batches = 3
    # watched and checked; then once for each of its layers and once to go on: a prefix would run it twelve times more
    assert max(calls.values()) <= 7 * batches + 4, calls
    assert calls["first.0"] <= 7 * batches + 4


def chains(name: str) -> list[list[str]]:
    _, _, groups, inputs = setting(name)
    for group in groups[:3]:
        inputs.statistic(group[0], "input_moment")
    return inputs.walker(2)._chains


def test_chains_follow_tensors_not_containers():
    first, second = [f"first.{k}" for k in range(3)], [f"second.{k}" for k in range(3)]
    assert chains("deep") == [["stem"], first, [*second, "pool"], ["head"]]
    assert chains("overwrite") == chains("deep")
    assert not any("first.0" in chain for chain in chains("careless"))  # it overwrites what would be stored
