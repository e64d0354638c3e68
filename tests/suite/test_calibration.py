"""Calibration statistics against dense references, and their cache on disk."""

import dataclasses
import logging
import subprocess
import sys
import textwrap
from pathlib import Path

import numpy as np
import pytest
import torch
from naive_fisher import Dense, TinyConvNet, TinyEncoder, dense_statistics, seeded
from torch import Tensor, nn

from bayesq.quant.layers import quantizable_layers, weight_to_matrix
from bayesq.quant.method import STATISTICS
from bayesq.suite import calibration
from bayesq.suite.calibration import (
    DEFAULT_SAMPLES,
    EXACT_CLASSES,
    Calibration,
    CalibrationSettings,
    Collector,
    SequentialInputs,
    fisher_directions,
    forward_order,
)
from bayesq.suite.models.base import Batch, TensorExamples, state_checksum

CPU = torch.device("cpu")
LENGTHS = torch.tensor([3, 5, 1, 4, 2, 5])


def images(count: int = 5) -> TensorExamples:
    generator = torch.Generator().manual_seed(1)
    return TensorExamples({"image": torch.randn(count, 2, 6, 6, generator=generator)}, torch.zeros(count).long())


def sentences(padded: int = 5, trimmed: bool = True) -> TensorExamples:
    """Token ids with other ids, not zeros, beyond each sentence's end."""
    ids = torch.randint(11, (6, 20), generator=torch.Generator().manual_seed(2))[:, :padded]
    mask = (torch.arange(padded) < LENGTHS[:, None]).long()
    inputs = {"input_ids": ids, "attention_mask": mask}
    return TensorExamples(inputs, torch.zeros(6).long(), LENGTHS if trimmed else None)


def one_by_one(examples: TensorExamples) -> list[dict[str, Tensor]]:
    """Each example alone, without any padding."""
    found = []
    for i in range(len(examples)):
        inputs = {name: value[i : i + 1] for name, value in examples.inputs.items()}
        if "attention_mask" in inputs:
            inputs = {name: value[:, : int(LENGTHS[i])] for name, value in inputs.items()}
        found.append(inputs)
    return found


def collect(
    module: nn.Module,
    examples: TensorExamples,
    batch_size: int = 2,
    samples: int | None = None,
    kinds=tuple(STATISTICS),
    seed: int = 0,
) -> dict[str, dict[str, Tensor]]:
    """Kind -> layer -> statistic."""
    layers = quantizable_layers(module)
    collector = Collector(module, layers, kinds, samples, torch.Generator().manual_seed(seed))
    for batch in examples.batches(batch_size, CPU):
        collector.add(batch)
    return {kind: collector.statistics(kind)[0] for kind in kinds}


def assert_equal(found: dict[str, dict[str, Tensor]], name: str, dense: Dense, layer: nn.Module) -> None:
    expected = {
        "input_moment": dense.input_moment,
        "input_magnitude": dense.input_magnitude,
        "gradient_moment": dense.gradient_moment,
        "fisher_diagonal": np.diag(dense.fisher).reshape(weight_to_matrix(layer).shape),
    }
    for kind, value in expected.items():
        assert found[kind][name].dtype == torch.float32
        np.testing.assert_allclose(found[kind][name], value, rtol=2e-4, atol=2e-5 * np.abs(value).max(), err_msg=kind)
        assert np.abs(value).max() > 1e-4


# ---------------------------------------------------------------------------------------------------- the statistics


@pytest.mark.parametrize("classes", [2, 3])
@pytest.mark.parametrize("name", ["stem", "grouped", "head"])
def test_convolutional_statistics_are_the_dense_ones(name, classes):
    module = seeded(TinyConvNet(classes))
    dense = dense_statistics(module, name, one_by_one(images()))
    assert_equal(collect(module, images()), name, dense, module.get_submodule(name))


@pytest.mark.parametrize("name", ["query", "key", "value", "out", "up", "down", "head"])
def test_transformer_statistics_are_the_dense_ones_of_unpadded_sentences(name):
    module = seeded(TinyEncoder(classes=3))
    dense = dense_statistics(module, name, one_by_one(sentences()))
    assert_equal(collect(module, sentences()), name, dense, module.get_submodule(name))


def test_a_layer_called_twice_adds_up_its_calls():
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner, self.head = nn.Linear(4, 4), nn.Linear(4, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.inner(torch.tanh(self.inner(x))))

    module = seeded(Twice())
    x = torch.randn(6, 4, generator=torch.Generator().manual_seed(3))
    dense = dense_statistics(module, "inner", [{"x": row[None]} for row in x])
    found = collect(module, TensorExamples({"x": x}, torch.zeros(6).long()))
    for kind in ("input_moment", "input_magnitude", "gradient_moment"):
        np.testing.assert_allclose(found[kind]["inner"], getattr(dense, kind), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("padded", [7, 20])
def test_padding_enters_no_statistic(padded):
    module = seeded(TinyEncoder())
    trimmed, long = collect(module, sentences()), collect(module, sentences(padded, trimmed=False), batch_size=4)
    for kind in STATISTICS:
        for name in trimmed[kind]:
            torch.testing.assert_close(long[kind][name], trimmed[kind][name], rtol=1e-5, atol=1e-6)


def test_padding_excluded_from_a_layer_fed_flattened_tokens():
    """Some blocks flatten [b, l, c] to [b * l, c] before a linear layer."""

    class Flattened(TinyEncoder):
        def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
            x = self.embed(input_ids)
            x = self.up(x.flatten(0, 1)).reshape(*x.shape[:2], -1)
            mask = attention_mask[:, :, None].to(x.dtype)
            return self.head(self.down((torch.tanh(x) * mask).sum(1)))

    module = seeded(Flattened())
    found = collect(module, sentences(9, trimmed=False), batch_size=3)
    for name in ("up", "down"):
        dense = dense_statistics(module, name, one_by_one(sentences()))
        assert_equal(found, name, dense, module.get_submodule(name))


@pytest.mark.parametrize("limit", [1, 300])
def test_parts_of_a_batch_add_up_to_the_batch(limit, monkeypatch):
    for module, examples in ((seeded(TinyConvNet()), images()), (seeded(TinyEncoder()), sentences())):
        whole = collect(module, examples, batch_size=5)
        with monkeypatch.context() as patch:
            patch.setattr(calibration, "PART_ELEMENTS", limit)
            parts = collect(module, examples, batch_size=5)
        for kind in STATISTICS:
            for name in whole[kind]:
                torch.testing.assert_close(parts[kind][name], whole[kind][name], rtol=1e-5, atol=1e-6)


def test_labels_of_the_data_never_matter():
    module = seeded(TinyConvNet())
    relabelled = dataclasses.replace(images(), labels=torch.tensor([2, 0, 1, 2, 1]))
    for samples in (None, 2):
        one, other = collect(module, images(), samples=samples), collect(module, relabelled, samples=samples)
        for kind in STATISTICS:
            assert all(torch.equal(one[kind][name], other[kind][name]) for name in one[kind])


def test_batch_size_changes_nothing_but_round_off():
    module = seeded(TinyConvNet())
    one, other = collect(module, images(), batch_size=1), collect(module, images(), batch_size=5)
    for kind in STATISTICS:
        for name in one[kind]:
            torch.testing.assert_close(one[kind][name], other[kind][name], rtol=1e-5, atol=1e-6)


# -------------------------------------------------------------------------------------------------------- directions


def outer(directions: list[Tensor]) -> Tensor:
    return sum(v[:, :, None] * v[:, None, :] for v in directions)


def label_covariance(logits: Tensor) -> Tensor:
    """E_{y ~ p}[(e_y - p)(e_y - p)T], label by label."""
    p, classes = torch.softmax(logits.double(), 1), logits.shape[1]
    found = torch.zeros(len(logits), classes, classes, dtype=torch.float64)
    for i in range(len(logits)):
        for y in range(classes):
            d = -p[i].clone()
            d[y] += 1
            found[i] += p[i, y] * torch.outer(d, d)
    return found


@pytest.mark.parametrize("classes", [2, 3, EXACT_CLASSES])
def test_directions_are_exact_for_few_classes(classes):
    logits = 2 * torch.randn(5, classes, generator=torch.Generator().manual_seed(4))
    directions = fisher_directions(logits, None, torch.Generator())
    assert len(directions) == (1 if classes == 2 else classes)
    torch.testing.assert_close(outer(directions).double(), label_covariance(logits), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("classes", [2, 5, EXACT_CLASSES + 1])
def test_sampled_directions_are_unbiased(classes):
    logits = torch.randn(3, classes, generator=torch.Generator().manual_seed(5))
    draws = 20_000
    directions = fisher_directions(logits, draws, torch.Generator().manual_seed(6))
    assert len(directions) == draws
    single = torch.stack([draws * v[:, :, None] * v[:, None, :] for v in directions]).double()
    error = single.std(0) / draws**0.5
    assert bool(((single.mean(0) - label_covariance(logits)).abs() <= 5 * error + 1e-6).all())


def test_many_classes_are_sampled():
    logits = torch.zeros(3, EXACT_CLASSES + 1)
    first, again, other = (fisher_directions(logits, None, torch.Generator().manual_seed(seed)) for seed in (0, 0, 1))
    assert len(first) == DEFAULT_SAMPLES
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    assert not all(torch.equal(a, b) for a, b in zip(first, other, strict=True))


def test_sampled_statistics_converge_to_the_exact_fisher():
    module = seeded(TinyConvNet())
    exact, sampled = collect(module, images()), collect(module, images(), samples=600)
    for kind in ("gradient_moment", "fisher_diagonal"):
        for name in exact[kind]:
            assert float((sampled[kind][name] - exact[kind][name]).norm()) < 0.1 * float(exact[kind][name].norm())
    few = collect(module, images(), samples=1)
    assert float((few["fisher_diagonal"]["head"] - exact["fisher_diagonal"]["head"]).norm()) > 0


# ----------------------------------------------------------------------------------------------- what must not change


def test_collecting_leaves_no_trace():
    module = seeded(TinyConvNet())
    module.stem.weight.requires_grad_(False)
    flags = [p.requires_grad for p in module.parameters()]
    before, random = state_checksum(module), torch.get_rng_state()
    logits = module(images().inputs["image"])
    collect(module, images(), samples=2)
    assert [p.requires_grad for p in module.parameters()] == flags == [False, *[True] * 4]
    assert torch.equal(torch.get_rng_state(), random)
    assert state_checksum(module) == before and all(p.grad is None for p in module.parameters())
    assert not module.stem._forward_hooks
    assert torch.equal(module(images().inputs["image"]), logits)


def test_a_failing_pass_leaves_no_trace_either():
    module = seeded(TinyConvNet())
    collector = Collector(module, quantizable_layers(module), ["fisher_diagonal"], None, torch.Generator())
    with pytest.raises(RuntimeError):
        collector.add(Batch({"image": torch.zeros(1, 5, 6, 6)}, torch.zeros(1).long(), torch.zeros(1).long()))
    assert all(p.requires_grad for p in module.parameters()) and not module.stem._forward_hooks


class WithIdleLayers(TinyConvNet):
    """A layer that never runs, and one whose output the logits do not depend on."""

    def __init__(self) -> None:
        super().__init__()
        self.unused, self.beside = nn.Conv2d(2, 4, 3, groups=2), nn.Linear(6, 4)

    def forward(self, image: Tensor) -> Tensor:
        self.beside(image.flatten(1)[:, :6])
        return super().forward(image)


@pytest.mark.parametrize("kind", STATISTICS)
def test_unseen_layers_are_reported_and_get_neutral_statistics(kind):
    module = seeded(WithIdleLayers())
    collector = Collector(module, quantizable_layers(module), [kind], None, torch.Generator())
    for batch in images().batches(2, CPU):
        collector.add(batch)
    found, unseen = collector.statistics(kind)
    assert unseen == ["unused"]
    shape = {"input_moment": (2, 9, 9), "gradient_moment": (2, 2, 2), "input_magnitude": (2, 9)}.get(kind, (2, 2, 9))
    neutral = torch.eye(shape[1]).expand(shape) if kind.endswith("moment") else torch.ones(shape)
    assert torch.equal(found["unused"], neutral)
    if kind in ("gradient_moment", "fisher_diagonal"):  # no gradient: the loss does not feel it
        assert not found["beside"].any()
    else:
        assert found["beside"].any()


# ------------------------------------------------------------------------------------------------------------- cache


class Counting(TinyConvNet):
    """Counts forward passes."""

    def __init__(self) -> None:
        super().__init__()
        self.passes = 0

    def forward(self, image: Tensor) -> Tensor:
        self.passes += 1
        return super().forward(image)


SETTINGS = CalibrationSettings(batch_size=2, samples=None, seed=0)
KINDS = frozenset({"input_moment", "gradient_moment"})


@pytest.fixture
def module() -> Counting:
    return seeded(Counting())


def open_calibration(module: nn.Module, folder: Path, examples=None, **changes) -> Calibration:
    return Calibration(
        module,
        state_checksum(module),
        quantizable_layers(module),
        examples or images(),
        dataclasses.replace(SETTINGS, **changes),
        folder,
        CPU,
    )


def test_files_are_computed_once_and_read_afterwards(module, tmp_path):
    first = open_calibration(module, tmp_path)
    first.prepare(KINDS)
    assert module.passes == 6 and first.reused == dict.fromkeys(KINDS, False)  # 3 batches for each family
    second = open_calibration(module, tmp_path)
    second.prepare(iter(KINDS))
    assert module.passes == 6 and second.reused == dict.fromkeys(KINDS, True)
    assert second.seconds == pytest.approx(first.seconds, abs=1e-3) and second.seconds.keys() == KINDS
    expected = collect(module, images())
    for kind in KINDS:
        for name in quantizable_layers(module):
            assert torch.equal(second.statistic(name, kind), expected[kind][name])


def test_only_what_is_missing_is_computed(module, tmp_path):
    open_calibration(module, tmp_path).prepare(["gradient_moment"])
    assert module.passes == 3
    later = open_calibration(module, tmp_path)
    later.prepare(["gradient_moment", "fisher_diagonal", "input_magnitude"])
    assert module.passes == 9
    assert later.reused == {"gradient_moment": True, "fisher_diagonal": False, "input_magnitude": False}


@pytest.mark.parametrize("damage", ["truncate", "flip", "empty", "foreign"])
@pytest.mark.parametrize("kind", sorted(KINDS))
def test_damaged_files_are_noticed_and_computed_again(damage, kind, module, tmp_path, caplog):
    first = open_calibration(module, tmp_path)
    first.prepare(KINDS)
    path = first.path(kind)
    whole = path.read_bytes()
    broken = bytearray(whole)
    if damage == "truncate":
        broken = broken[: len(broken) // 2]
    elif damage == "flip":
        broken[-5] ^= 4
    elif damage == "empty":
        broken = bytearray()
    else:
        broken = bytearray(b"not a safetensors file at all")
    path.write_bytes(bytes(broken))
    second = open_calibration(module, tmp_path)
    with caplog.at_level(logging.WARNING):
        second.prepare(KINDS)
    assert len(caplog.records) == 1 and str(path) in caplog.text and "computing it again" in caplog.text
    assert second.reused == {k: k != kind for k in KINDS} and module.passes == 9
    again = open_calibration(module, tmp_path)
    again.prepare(KINDS)
    assert module.passes == 9
    assert all(torch.equal(again.statistic(n, kind), collect(module, images())[kind][n]) for n in again.layers)


def test_what_changes_a_number_changes_the_file(module, tmp_path):
    base = open_calibration(module, tmp_path)
    other_weights = seeded(Counting(), seed=1)
    excluded = Calibration(
        module, state_checksum(module), quantizable_layers(module, ["head"]), images(), SETTINGS, tmp_path, CPU
    )
    everything = {
        "weights": open_calibration(other_weights, tmp_path),
        "examples": open_calibration(module, tmp_path, images(4)),
        "batch size": open_calibration(module, tmp_path, batch_size=3),
        "layers": excluded,
    }
    for what, changed in everything.items():
        for kind in STATISTICS:
            assert changed.path(kind) != base.path(kind), (what, kind)
    for gradients_only in (open_calibration(module, tmp_path, seed=1), open_calibration(module, tmp_path, samples=2)):
        for kind in STATISTICS:
            assert (gradients_only.path(kind) == base.path(kind)) == kind.startswith("input"), kind
    assert len({base.path(kind) for kind in STATISTICS}) == len(STATISTICS)
    same = open_calibration(seeded(Counting()), tmp_path)
    assert all(same.path(kind) == base.path(kind) for kind in STATISTICS)


def test_seeds_draw_different_labels(module, tmp_path):
    found = []
    for seed in (0, 0, 1):
        folder = tmp_path / str(len(found))
        opened = open_calibration(module, folder, samples=1, seed=seed)
        opened.prepare(["fisher_diagonal"])
        found.append(opened.statistic("head", "fisher_diagonal"))
    assert torch.equal(found[0], found[1]) and not torch.equal(found[0], found[2])


def test_unseen_layers_are_known_from_the_cache_as_well(tmp_path):
    module = seeded(WithIdleLayers())
    for _ in range(2):
        opened = open_calibration(module, tmp_path)
        opened.prepare(["input_moment"])
        assert opened.unseen == {"unused"}


def test_two_processes_at_once_compute_once(tmp_path):
    script = textwrap.dedent("""
        import sys, time, torch
        from pathlib import Path
        import test_calibration as t

        class Slow(t.TinyConvNet):
            def forward(self, image):
                with open(sys.argv[1] + "/passes", "a") as file:
                    file.write("x")
                time.sleep(0.2)
                return super().forward(image)

        folder = Path(sys.argv[1])
        (folder / f"ready{sys.argv[2]}").touch()
        while len(list(folder.glob("ready*"))) < 2:
            time.sleep(0.01)
        opened = t.open_calibration(t.seeded(Slow()), folder)
        opened.prepare(["input_moment"])
        print(opened.reused["input_moment"], float(opened.statistic("head", "input_moment").sum()))
    """)
    here = Path(__file__).parent
    path = [str(here), str(here.parent), str(here.parents[1])]
    code = f"import sys; sys.path[:0] = {path!r}\n{script}"
    running = [
        subprocess.Popen([sys.executable, "-c", code, str(tmp_path), str(i)], stdout=subprocess.PIPE, text=True)
        for i in range(2)
    ]
    outputs = [process.communicate(timeout=100)[0].split() for process in running]
    assert [process.returncode for process in running] == [0, 0]
    assert sorted(output[0] for output in outputs) == ["False", "True"] and outputs[0][1] == outputs[1][1]
    assert (tmp_path / "passes").read_text() == "xxx"


# -------------------------------------------------------------------------------------------------- order, sequential


def test_forward_order_groups_layers_that_read_the_same_tensor():
    module = seeded(TinyEncoder())
    module.first_defined_last_used = nn.Linear(2, 2)
    layers = quantizable_layers(module)
    reordered = {name: layers[name] for name in reversed(layers)}
    batch = next(iter(sentences().batches(2, CPU)))
    groups = forward_order(module, reordered, batch)
    assert [sorted(group) for group in groups] == [
        ["key", "query", "value"],
        ["out"],
        ["up"],
        ["down"],
        ["head"],
        ["first_defined_last_used"],
    ]
    assert not any(layer._forward_pre_hooks for layer in layers.values())


def test_forward_order_follows_calls_not_definitions():
    class Backwards(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.last, self.first = nn.Linear(3, 2), nn.Linear(4, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.last(self.first(x) + self.last.weight.sum())

    module = Backwards()
    batch = Batch({"x": torch.ones(2, 4)}, torch.zeros(2).long(), torch.arange(2))
    assert forward_order(module, quantizable_layers(module), batch) == [["first"], ["last"]]


def test_sequential_inputs_see_the_replaced_prefix():
    module = seeded(Counting())
    layers = quantizable_layers(module)
    examples = images()
    groups = forward_order(module, layers, next(iter(examples.batches(2, CPU))))
    inputs = SequentialInputs(module, layers, groups, examples, 2, CPU)
    for group in groups:
        for name in group:
            for kind in ("input_moment", "input_magnitude"):
                dense = dense_statistics(module, name, one_by_one(examples))  # of the module as it is by now
                np.testing.assert_allclose(inputs.statistic(name, kind), getattr(dense, kind), rtol=1e-4, atol=1e-6)
            with torch.no_grad():  # coarse rounding of what has had its turn
                layers[name].weight.copy_(torch.round(2 * layers[name].weight) / 2)
    assert inputs.seconds > 0
    # the last layer's inputs are not those of the original model
    original = dense_statistics(seeded(Counting()), "head", one_by_one(examples)).input_moment
    assert np.abs(inputs.statistic("head", "input_moment").numpy() - original).max() > 0.01 * np.abs(original).max()


def test_sequential_siblings_share_one_pass_that_stops_at_them():
    module = seeded(TinyEncoder())
    calls: dict[str, int] = {}
    for name, layer in quantizable_layers(module).items():
        layer.register_forward_hook(lambda *_, name=name: calls.update({name: calls.get(name, 0) + 1}))
    groups = [["query", "key", "value"], ["out"], ["up"], ["down"], ["head"]]
    inputs = SequentialInputs(module, quantizable_layers(module), groups, sentences(), 2, CPU)
    found = [inputs.statistic(name, "input_moment") for name in groups[0]]
    assert torch.equal(found[0], found[1]) and torch.equal(found[0], found[2])
    assert calls == {"query": 3, "key": 3, "value": 3}
    expected = dense_statistics(seeded(TinyEncoder()), "query", one_by_one(sentences())).input_moment
    np.testing.assert_allclose(found[0], expected, rtol=1e-4, atol=1e-6)


def test_a_statistic_nobody_collects_is_refused_by_name(tmp_path):
    calibration = open_calibration(seeded(TinyConvNet()), tmp_path)
    with pytest.raises(ValueError, match="no statistic named input_momentum"):
        calibration.prepare({"input_moment", "input_momentum"})
