"""Passes that begin inside the network give the bits of passes from its input, and run less of it."""

from collections import Counter
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
import timm
import torch
import torch.nn.functional as F
from naive_fisher import TinyConvNet, TinyEncoder, seeded
from tiny_sets import CPU, images, sentences
from torch import Tensor, nn
from transformers import BertConfig, BertForSequenceClassification

from bayesq import walker
from bayesq.batches import TensorExamples
from bayesq.calibration import prefix
from bayesq.calibration.collector import Collector
from bayesq.calibration.inputs import INPUT_MAGNITUDE, INPUT_MOMENT
from bayesq.calibration.order import forward_order
from bayesq.calibration.prefix import Network, PrefixInputs, inputs_of, last_of_each_block
from bayesq.hidden_states import HiddenStates
from bayesq.quant.blocks import find_blocks
from bayesq.quant.layers import quantizable_layers
from bayesq.quant.watch import watching
from bayesq.scratch_file import TensorFile

STATISTICS = {statistic.name: statistic for statistic in (INPUT_MOMENT, INPUT_MAGNITUDE)}


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
    collector = Collector(module, quantizable_layers(module), STATISTICS.values(), None, torch.Generator())
    for batch in examples.batches(2, CPU):
        collector.add(batch, stop_after=group[-1])
    found = {kind: dict(collector.finish(statistic)) for kind, statistic in STATISTICS.items()}
    return {name: {kind: found[kind][name] for kind in STATISTICS} for name in group}


def rounded(module: nn.Module, names: list[str]) -> None:
    with torch.no_grad():
        for name in names:
            weight = module.get_submodule(name).weight
            weight.copy_(torch.round(4 * weight) / 4)


def setting(name: str, folder: Path | None = None) -> tuple[nn.Module, TensorExamples, list[list[str]], PrefixInputs]:
    build, data = NETWORKS[name]
    module, examples = seeded(build()), data()
    layers = quantizable_layers(module)
    first = next(iter(examples.batches(2, CPU)))
    groups, calls = forward_order(module, layers, first), Counter[str]()
    with watching(layers, lambda name, *_: calls.update([name])):
        module(**first.inputs)
    network = Network(module, layers, find_blocks(module), calls)
    inputs = PrefixInputs(network, groups, examples, 2, CPU, STATISTICS.values(), folder=folder)
    return module, examples, groups, inputs


@pytest.mark.parametrize("name", NETWORKS)
@pytest.mark.parametrize("room", [0, 1500, 2**29])
def test_statistics_are_those_of_passes_from_the_input(name, room, monkeypatch):
    monkeypatch.setattr(walker, "STORED_BYTES", room)
    module, examples, groups, inputs = setting(name)
    for group in groups:
        expected = from_the_input(module, group, examples)
        for layer in group:
            for kind in STATISTICS:
                torch.testing.assert_close(inputs.statistic(layer, kind), expected[layer][kind], rtol=1e-5, atol=1e-6)
        rounded(module, group)
    assert not any(child._forward_hooks or child._forward_pre_hooks for child in module.modules())


def count(calls: Counter[str], name: str, *_: object) -> None:
    calls[name] += 1


def memory_of(states: HiddenStates) -> int:
    """Bytes of the inputs that are not in a file."""
    in_memory = (x for file, content, _ in states._entries if file is None for x in content)
    return sum(x.nbytes for x in in_memory if isinstance(x, Tensor))


@pytest.mark.parametrize("name", ["deep", "masked", "plain", "between"])
def test_inputs_that_go_to_disk_give_the_same_bits(name, monkeypatch, tmp_path):
    """The same runs of the same blocks as with inputs in memory; no file is left."""
    found, runs = [], []
    for room, folder in ((2**29, None), (0, tmp_path)):
        monkeypatch.setattr(walker, "STORED_BYTES", room)
        module, _, groups, inputs = setting(name, folder)
        calls: Counter[str] = Counter()
        for block in find_blocks(module):
            module.get_submodule(block).register_forward_pre_hook(partial(count, calls, block))
        found.append([])
        memory: list[int] = []
        for group in groups:
            found[-1].append(inputs.statistic(group[0], "input_moment"))
            rounded(module, group)
            stored = inputs.walkers(2)[0]._stored
            memory.append(memory_of(stored.arguments) if stored else 0)
        assert any(memory) == (folder is None)
        runs.append(calls)
    assert runs[0] == runs[1] and all(map(torch.equal, *found))
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("room", [0, 2, 5, 9])
def test_a_disk_that_fills_up_costs_time_only(room, monkeypatch, tmp_path):
    monkeypatch.setattr(walker, "STORED_BYTES", 0)
    module, examples, groups, inputs = setting("plain", tmp_path)
    written, write = [0], TensorFile.write

    def full(self: TensorFile, value: list[Tensor]) -> object:
        written[0] += 1
        if written[0] > room:
            raise OSError(28, "No space left on device")
        return write(self, value)

    monkeypatch.setattr(TensorFile, "write", full)
    for group in groups:
        expected = from_the_input(module, group, examples)[group[0]]["input_moment"]
        torch.testing.assert_close(inputs.statistic(group[0], "input_moment"), expected, rtol=1e-5, atol=1e-6)
        rounded(module, group)
    assert written[0] == room + 1 and inputs.walkers(2)[0].folder is None


@pytest.mark.parametrize("name", ["deep", "masked"])
def test_layers_in_any_order_and_weights_that_change_behind_them(name):
    module, examples, groups, inputs = setting(name)
    for i in (0, 2, 5, 3, 3, 6, 7, 1, 5):
        group = groups[i % len(groups)]
        inputs._sums = {}
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
    return inputs.walkers(2)[0]._chains


def test_chains_follow_tensors_not_containers():
    first, second = [f"first.{k}" for k in range(3)], [f"second.{k}" for k in range(3)]
    assert chains("deep") == [["stem"], first, [*second, "pool"], ["head"]]
    assert chains("overwrite") == chains("deep")
    assert not any("first.0" in chain for chain in chains("careless"))  # it overwrites what would be stored


class Odd(nn.Module):
    """Blocks of which one is not to be run alone: `mode` tells why."""

    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(6, 6)
            self.register_buffer("count", torch.zeros(()))
            self.mode = ""

        def forward(self, x: Tensor) -> Tensor:
            if self.mode == "state":
                self.count += 1
            if self.mode == "noise":
                x = x + torch.rand(x.shape)
            return torch.tanh(self.layer(x)) + x * (self.count if self.mode == "state" else 1)

    def __init__(self, mode: str) -> None:
        super().__init__()
        self.embed, self.head = nn.Embedding(11, 6), nn.Linear(6, 2)
        self.blocks = nn.ModuleList(self.Block() for _ in range(5))
        self.blocks[2].mode = self.mode = mode
        if mode == "shared module":
            self.blocks[2] = self.blocks[0]
        if mode == "shared weight":
            self.blocks[2].layer.weight = self.blocks[0].layer.weight

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        x = self.embed(input_ids)
        for k, block in enumerate(self.blocks):
            if self.mode == "between" and k == 3:
                x = x * 2
            if self.mode == "skipped" and k == 2 and x.shape[1] < 3:  # the last batch
                continue
            x = block(x)
        if self.mode == "layer outside":
            x = self.blocks[2].layer(x)
        if self.mode == "weight outside":
            x = F.linear(x, self.blocks[2].layer.weight)
        return self.head(x[:, 0])


NETWORKS |= {
    mode: (partial(Odd, mode), sentences)
    for mode in ("plain", "shared module", "shared weight", "between", "skipped", "layer outside", "weight outside")
}
BLOCKS = [f"blocks.{k}" for k in range(5)]


@pytest.mark.parametrize("name", list(NETWORKS)[-7:])
def test_blocks_that_do_not_stand_alone(name):
    module, examples, groups, inputs = setting(name)
    for group in groups:
        expected = from_the_input(module, group, examples)
        for kind in STATISTICS:
            torch.testing.assert_close(inputs.statistic(group[0], kind), expected[group[0]][kind])
        rounded(module, group)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("plain", [["embed", *BLOCKS], ["head"]]),
        ("between", [["embed", *BLOCKS[:3]], BLOCKS[3:], ["head"]]),
        ("shared module", [["embed"], BLOCKS[1:2], BLOCKS[3:], ["head"]]),
        ("skipped", []),
    ],
)
def test_chains_end_where_something_lies_between(name, expected):
    assert chains(name) == expected


@pytest.mark.parametrize("mode", ["state", "noise"])
def test_a_block_that_gives_something_else_each_time_is_in_no_chain(mode):
    NETWORKS["changing"] = partial(Odd, mode), sentences
    assert not any("blocks.2" in chain for chain in chains("changing"))


def test_layers_used_outside_of_their_block_are_reached_from_the_input():
    for name in ("layer outside", "shared module"):
        _, _, groups, inputs = setting(name)
        walk = inputs.walkers(2)[0]
        for group in groups[:2]:
            list(walk.passes(group))
        shared = "blocks.2.layer" if name == "layer outside" else "blocks.0.layer"
        assert walk._place([shared]) is None and walk._place(["blocks.3.layer"]) is not None


@pytest.mark.parametrize("name", ["deep", "masked", "careless", "encoder", "between"])
def test_two_networks_in_step(name):
    """x and x' of the same examples, behind rounded layers and in full precision; one of the networks is watched."""
    module, examples, groups, inputs = setting(name)
    full = seeded(NETWORKS[name][0]())
    first = inputs.walkers(2)[0]
    layers = quantizable_layers(full)
    other = walker.Walker(full, find_blocks(full), layers, first.batches, calls=first.calls, like=first)
    for group in groups:
        seen = list(zip(first.passes(group), other.passes(group), strict=True))
        assert len(seen) == 3
    for group in groups:
        for (batch, run), (_, run_full), whole in zip(
            first.passes(group), other.passes(group), examples.batches(2, CPU), strict=True
        ):
            assert torch.equal(batch.index, whole.index)
            for network, found in ((full, inputs_of(other, group, run_full)), (module, inputs_of(first, group, run))):
                for layer in group:
                    expected = given_to(network, layer, whole.inputs)
                    assert len(found[layer]) == 1 and torch.equal(found[layer][0][1], expected)
        rounded(module, group)
    assert other._visits is first._visits


@pytest.mark.parametrize("room", [0, 2**29])
@pytest.mark.parametrize("name", ["deep", "masked", "careless", "encoder", "between", "plain"])
def test_a_network_that_never_changes_gives_the_next_blocks_inputs_in_its_last_pass(name, room, monkeypatch, tmp_path):
    """The same inputs, bit for bit, in fewer runs of blocks; `room` 0: through a file."""
    monkeypatch.setattr(walker, "STORED_BYTES", room)
    groups, first = setting(name)[2], setting(name)[3].walkers(2)[0]
    walks, runs = [], []
    for last in (frozenset[str](), last_of_each_block(groups, first._blocks)):
        full, calls = seeded(NETWORKS[name][0]()), Counter[str]()
        for block in find_blocks(full):
            full.get_submodule(block).register_forward_pre_hook(partial(count, calls, block))
        layers, folder = quantizable_layers(full), tmp_path / f"{len(walks)}"
        folder.mkdir()
        blocks = find_blocks(full)
        walks.append(walker.Walker(full, blocks, layers, first.batches, calls=first.calls, folder=folder, last=last))
        runs.append(calls)
    stops, goes_on = walks
    for group in groups:
        for (_, run), (_, other) in zip(stops.passes(group), goes_on.passes(group), strict=True):
            expected, found = inputs_of(stops, group, run), inputs_of(goes_on, group, other)
            for layer in group:
                assert [*map(torch.equal, *([x for _, x in each[layer]] for each in (found, expected)))] == [True]
    assert set(runs[1]) == set(runs[0]) and all(runs[1][block] <= runs[0][block] for block in runs[0])
    saved = runs[0].total() - runs[1].total()
    assert saved == 0 if name in ("encoder", "between") else saved >= 3, runs  # these two have no chain of such blocks


class Bert(nn.Module):
    """Three blocks of four groups each: query, key and value; output; up; down."""

    def __init__(self) -> None:
        super().__init__()
        sizes = {"hidden_size": 8, "intermediate_size": 12, "vocab_size": 11, "num_labels": 2}
        config = BertConfig(num_hidden_layers=3, num_attention_heads=2, attn_implementation="eager", **sizes)
        self.bert = BertForSequenceClassification(config).eval()

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        return self.bert(input_ids=input_ids, attention_mask=attention_mask).logits


NETWORKS["bert"] = Bert, sentences


@pytest.mark.parametrize("name", ["deep", "masked", "careless", "encoder", "between", "layer outside", "bert"])
def test_one_pass_gives_the_inputs_of_a_blocks_groups(name, monkeypatch):
    """The same inputs, bit for bit, with room for all groups, for one of two, and for none."""
    _, examples, groups, inputs = setting(name)
    held, runs = [], []
    for room in (2**29, 1000, 0):
        monkeypatch.setattr(prefix, "KEPT_BYTES", room)
        full, calls = seeded(NETWORKS[name][0]()), Counter[str]()
        layers, blocks = quantizable_layers(full), find_blocks(full)
        settings = partial(examples.batches, 2, CPU), lambda batch: batch, inputs.networks[0].calls
        walk = walker.Walker(full, blocks, layers, *settings, last=last_of_each_block(groups, blocks))
        kept = prefix._FullInputs(walk, groups, blocks)
        for block in blocks:
            full.get_submodule(block).register_forward_pre_hook(partial(count, calls, block))
        held.append([])
        for group in groups:
            before = calls.total()
            with torch.no_grad():
                found = list(kept.of(group))
                runs.append(calls.total() - before)
                found = list(kept.of(group)) if room == 1000 else found  # a second time
            for seen, batch in zip(found, examples.batches(2, CPU), strict=True):
                assert all(torch.equal(seen[layer][0][1], given_to(full, layer, batch.inputs)) for layer in group)
            sizes = [x.nbytes for parts in kept._kept.values() for one in parts for (_, x), *_ in one.values()]
            held[-1].append(len(kept._kept))
            assert sum(sizes) <= room
    if name == "bert":  # three batches run through the third block for its first and last group, or for each of four
        assert list(map(max, held)) == [2, 1, 0]
        assert runs[8:12] == [3, 0, 0, 3] and runs[-6:-2] == [3, 3, 3, 3], runs


def test_layers_whose_inputs_were_dropped_run_again(monkeypatch):
    """The room runs out in the last batch, when outputs of modules around these layers are kept already."""
    _, examples, groups, inputs = setting("bert")
    full = seeded(Bert())
    layers, blocks = quantizable_layers(full), find_blocks(full)
    settings = partial(examples.batches, 2, CPU), lambda batch: batch, inputs.networks[0].calls
    walk = walker.Walker(full, blocks, layers, *settings, last=last_of_each_block(groups, blocks))
    kept, third = prefix._FullInputs(walk, groups, blocks), groups[8:12]
    with torch.no_grad():
        for group in groups[:8]:
            list(kept.of(group))
        with monkeypatch.context() as room:
            for i, _ in enumerate(kept.of(third[0])):
                if i == 1:
                    room.setattr(prefix, "KEPT_BYTES", 0)
        assert not kept._kept
        for group in third[1:]:
            for seen, batch in zip(kept.of(group), examples.batches(2, CPU), strict=True):
                assert all(torch.equal(seen[layer][0][1], given_to(full, layer, batch.inputs)) for layer in group)


def given_to(module: nn.Module, layer: str, inputs: dict[str, Tensor]) -> Tensor:
    given: list[Tensor] = []
    handle = module.get_submodule(layer).register_forward_pre_hook(lambda _, x: given.append(x[0].clone()))
    with torch.no_grad():
        module(**inputs)
    handle.remove()
    return given[0]


def test_a_walk_that_is_left_half_way_begins_anew():
    module, examples, groups, inputs = setting("plain")
    walk = inputs.walkers(2)[0]
    for group in groups[:3]:
        for _, run in walk.passes(group):
            run()
    passes = walk.passes(groups[3])
    next(passes)[1]()
    passes.close()
    expected = from_the_input(module, groups[4], examples)[groups[4][0]]["input_moment"]
    torch.testing.assert_close(inputs.statistic(groups[4][0], "input_moment"), expected)


def test_only_one_block_is_stored():
    _, examples, groups, inputs = setting("plain")
    walk = inputs.walkers(2)[0]
    for group in groups[:5]:
        for _, run in walk.passes(group):
            run()
        stored = memory_of(walk._stored.arguments) if walk._stored else 0
        assert stored <= sum(batch.inputs["input_ids"].numel() * 6 * 4 for batch in examples.batches(2, CPU))
    assert stored and walk._stored.at == walk._stored.chain.index("blocks.4")


def test_blocks_are_the_children_of_containers_and_what_lies_beside_them():
    assert find_blocks(Deep()) == (
        *("stem", "first.0", "first.1", "first.2", "second.0", "second.1", "second.2", "pool", "head"),
    )
    resnet = timm.create_model("resnet18", num_classes=3)
    stages = [f"layer{k}.{j}" for k in (1, 2, 3, 4) for j in (0, 1)]
    assert find_blocks(resnet) == ("conv1", "bn1", "act1", "maxpool", *stages, "global_pool", "fc")
    lite = find_blocks(timm.create_model("tf_efficientnet_lite0", num_classes=3))
    assert lite[:4] == ("conv_stem", "bn1", "blocks.0.0", "blocks.1.0") and lite[-3] == "bn2"
    convnext = find_blocks(timm.create_model("convnext_atto", num_classes=3))
    assert "stages.1.blocks.0" in convnext and "stages.1" not in convnext
    vit = find_blocks(timm.create_model("vit_tiny_patch16_224", num_classes=3))
    assert [name for name in vit if name.startswith("blocks")] == [f"blocks.{k}" for k in range(12)]
    bert = BertForSequenceClassification(BertConfig(num_hidden_layers=2, hidden_size=4, num_attention_heads=2))
    layers = [f"bert.encoder.layer.{k}" for k in range(2)]
    assert find_blocks(bert) == ("bert.embeddings", *layers, "bert.pooler", "dropout", "classifier")
