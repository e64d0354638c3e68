"""Calibration statistics against dense references, and their cache on disk."""

import dataclasses
import itertools
import logging
import math
import subprocess
import sys
import textwrap
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from naive_fisher import Dense, TinyConvNet, TinyEncoder, dense_statistics, seeded
from torch import Tensor, nn

from bayesq.posterior import DRAWS
from bayesq.quant.blocks import find_blocks
from bayesq.quant.layers import quantizable_layers, weight_to_matrix
from bayesq.quant.method import STATISTICS
from bayesq.suite import calibration
from bayesq.suite.calibration import (
    DEFAULT_SAMPLES,
    EXACT_CLASSES,
    FAMILIES,
    GRADIENT_STATISTICS,
    INPUT_STATISTICS,
    Calibration,
    CalibrationSettings,
    Collector,
    fisher_directions,
    forward_order,
    sketch_rows,
    spread,
    statistic_shape,
    sum_bytes,
    truncate,
)
from bayesq.suite.models.base import Batch, TensorExamples, state_checksum
from bayesq.suite.prefix import PrefixInputs

CPU = torch.device("cpu")
# Those that one pass collects without the results of another.
COLLECTED = ("input_moment", "input_magnitude", "gradient_moment", "fisher_diagonal")
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
    kinds=COLLECTED,
    seed: int = 0,
    **more,
) -> dict[str, dict[str, Tensor]]:
    """Kind -> layer -> statistic."""
    layers = quantizable_layers(module)
    collector = Collector(module, layers, kinds, samples, torch.Generator().manual_seed(seed), **more)
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
    for kind in COLLECTED:
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
        kinds = (*COLLECTED, "fisher_eigenvalues")
        bases = {
            name: tuple(torch.linalg.qr(torch.randn(g, n, n))[0] for n in (c, r))
            for name, layer in quantizable_layers(module).items()
            for g, r, c in [weight_to_matrix(layer).shape]
        }
        whole = collect(module, examples, batch_size=5, kinds=kinds, bases=bases)
        with monkeypatch.context() as patch:
            patch.setattr(calibration, "PART_ELEMENTS", limit)
            parts = collect(module, examples, batch_size=5, kinds=kinds, bases=bases)
        for kind in kinds:
            for name in whole[kind]:
                torch.testing.assert_close(parts[kind][name], whole[kind][name], rtol=1e-5, atol=1e-6)


def test_labels_of_the_data_never_matter():
    module = seeded(TinyConvNet())
    relabelled = dataclasses.replace(images(), labels=torch.tensor([2, 0, 1, 2, 1]))
    for samples in (None, 2):
        one, other = collect(module, images(), samples=samples), collect(module, relabelled, samples=samples)
        for kind in COLLECTED:
            assert all(torch.equal(one[kind][name], other[kind][name]) for name in one[kind])


def test_batch_size_changes_nothing_but_round_off():
    module = seeded(TinyConvNet())
    one, other = collect(module, images(), batch_size=1), collect(module, images(), batch_size=5)
    for kind in COLLECTED:
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


@pytest.mark.parametrize("kind", DRAWS)
@pytest.mark.parametrize("classes", [2, 5, EXACT_CLASSES + 1])
def test_drawn_directions_are_unbiased(classes, kind):
    logits = torch.randn(3, classes, generator=torch.Generator().manual_seed(5))
    count = 20_000
    directions = fisher_directions(logits, count, torch.Generator().manual_seed(6), draws=kind)
    assert len(directions) == count
    single = torch.stack([count * v[:, :, None] * v[:, None, :] for v in directions]).double()
    error = single.std(0) / count**0.5
    assert bool(((single.mean(0) - label_covariance(logits)).abs() <= 5 * error + 1e-6).all())


def test_signs_vary_less_than_labels_where_the_network_is_sure():
    logits = torch.zeros(1, 10)
    logits[0, 3] = 6.0
    spread = {}
    for kind in DRAWS:
        directions = fisher_directions(logits, 5_000, torch.Generator().manual_seed(6), draws=kind)
        spread[kind] = float(torch.stack([v.square().sum() for v in directions]).std())
    assert 10 * spread["signs"] < spread["labels"]


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


# ---------------------------------------------------------------------------------------------------- regression heads


@pytest.mark.parametrize("outputs", [1, 3, EXACT_CLASSES])
def test_gaussian_directions_are_the_outputs_unit_vectors(outputs):
    directions = fisher_directions(torch.randn(5, outputs), None, torch.Generator(), "gaussian")
    assert len(directions) == outputs
    assert torch.equal(outer(directions), torch.eye(outputs).expand(5, -1, -1))


@pytest.mark.parametrize("outputs", [2, EXACT_CLASSES + 1])
def test_sampled_gaussian_directions_are_unbiased(outputs):
    draws = 20_000
    directions = fisher_directions(torch.zeros(3, outputs), draws, torch.Generator().manual_seed(6), "gaussian")
    assert len(directions) == draws
    torch.testing.assert_close(outer(directions), torch.eye(outputs).expand(3, -1, -1), rtol=0, atol=0.05)
    many = fisher_directions(torch.zeros(1, EXACT_CLASSES + 1), None, torch.Generator(), "gaussian")
    assert len(many) == DEFAULT_SAMPLES


@pytest.mark.parametrize("outputs", [1, 3])
@pytest.mark.parametrize("name", ["stem", "grouped", "head"])
def test_statistics_of_a_regression_head_are_the_dense_ones(name, outputs):
    module = seeded(TinyConvNet(outputs))
    dense = dense_statistics(module, name, one_by_one(images()), likelihood="gaussian")
    found = collect(module, images(), likelihood="gaussian")
    assert_equal(found, name, dense, module.get_submodule(name))
    if outputs == 1:  # a softmax over one logit has nothing to learn from
        assert not collect(module, images())["fisher_diagonal"][name].any()


def test_an_unknown_likelihood_or_draw_is_refused():
    with pytest.raises(ValueError, match="likelihood 'poisson'"):
        fisher_directions(torch.zeros(1, 2), None, torch.Generator(), "poisson")
    with pytest.raises(ValueError, match="draws 'dice'"):
        fisher_directions(torch.zeros(1, 2), None, torch.Generator(), draws="dice")
    with pytest.raises(ValueError, match="likelihood 'poisson'"):
        dataclasses.replace(SETTINGS, likelihood="poisson")


# ------------------------------------------------------------------------------------- gradient directions, eigenvalues


@pytest.mark.parametrize(("module", "examples"), [(TinyConvNet(3), images()), (TinyEncoder(3), sentences(9, False))])
def test_all_gradient_directions_give_the_dense_fisher(module, examples):
    """Five or six examples with three classes: their gradients have rank 12 at most."""
    module = seeded(module)
    found = collect(module, examples, kinds=("gradient_directions",), rank=16)["gradient_directions"]
    for name, layer in quantizable_layers(module).items():
        fisher = dense_statistics(module, name, one_by_one(examples)).fisher
        assert found[name].shape == (16, *weight_to_matrix(layer).shape)
        u = found[name].flatten(1).double().numpy()
        np.testing.assert_allclose(u.T @ u, fisher, rtol=1e-3, atol=1e-5 * np.abs(fisher).max())


def test_few_gradient_directions_are_nearly_the_best_and_never_exceed_the_fisher():
    module, rank = seeded(TinyConvNet(3)), 4
    examples = images(40)
    found = collect(module, examples, kinds=("gradient_directions",), rank=rank)["gradient_directions"]
    for name in ("stem", "grouped"):
        fisher = dense_statistics(module, name, one_by_one(examples)).fisher
        u = found[name].flatten(1).double().numpy()
        values = np.linalg.eigvalsh(fisher)
        assert np.linalg.eigvalsh(fisher - u.T @ u).min() > -1e-6 * values[-1]
        assert (u**2).sum() > 0.9 * values[-rank:].sum()
        assert np.linalg.matrix_rank(fisher, tol=1e-6 * values[-1]) > 2 * sketch_rows(rank)  # something was dropped


def test_truncation_keeps_the_largest_part():
    rows = torch.randn(7, 12, generator=torch.Generator().manual_seed(8))
    kept = truncate(rows, 3).double()
    _, values, right = np.linalg.svd(rows.double().numpy(), full_matrices=False)
    expected = right[:3].T @ np.diag(values[:3] ** 2) @ right[:3]
    np.testing.assert_allclose(kept.T @ kept, expected, rtol=1e-4, atol=1e-4)
    assert truncate(rows, 20).shape == (7, 12)


@pytest.mark.parametrize(
    ("kinds", "inputs", "gradients"),
    [
        (["gradient_directions"], 0, 1),
        (["input_moment", "input_magnitude", "gradient_moment", "fisher_diagonal"], 1, 1),
        (["fisher_eigenvalues"], 1, 2),
    ],
)
@pytest.mark.parametrize("gradient_examples", [None, 2])
@pytest.mark.parametrize(("network", "examples"), [(TinyConvNet, images()), (TinyEncoder, sentences(9))])
def test_layers_whose_sums_do_not_fit_take_further_passes_and_keep_their_bits(
    kinds, inputs, gradients, gradient_examples, network, examples, tmp_path
):
    module = seeded(network(5))
    passes = []
    module.register_forward_pre_hook(lambda *_: passes.append(1))
    whole = open_calibration(module, tmp_path / "whole", examples, samples=2, gradient_examples=gradient_examples)
    whole.prepare(kinds)
    passes.clear()
    parts = open_calibration(
        module, tmp_path / "parts", examples, room=1, samples=2, gradient_examples=gradient_examples
    )
    parts.prepare(kinds)
    # 3 batches, of which gradients may need one only; a pass for each layer's inputs and one for its gradients
    assert len(passes) == (3 * inputs + (3 if gradient_examples is None else 1) * gradients) * len(parts.layers)
    for kind in kinds:
        for name in parts.layers:  # the same signs were drawn in every pass
            assert torch.equal(parts.statistic(name, kind), whole.statistic(name, kind)), (kind, name)


@pytest.mark.parametrize("own", [["input_moment", "input_magnitude"], ["gradient_moment", "fisher_diagonal"]])
def test_passes_hold_as_many_layers_as_fit(own, module, tmp_path):
    sizes = {
        name: 4 * sum(math.prod(statistic_shape(layer, kind, 1)) for kind in own)
        for name, layer in quantizable_layers(module).items()
    }
    room = sizes["grouped"] + sizes["head"]
    found = open_calibration(module, tmp_path, room=room).passes([*FAMILIES[0]])
    passes = [layers for layers, kinds in found if kinds == own]
    assert [name for layers in passes for name in layers] == list(sizes)
    sums = [sum(sizes[name] for name in layers) for layers in passes]
    assert 1 < len(passes) < len(sizes) and max(sums) <= room
    for layers, total in zip(passes[1:], sums, strict=False):  # the next layer had no room in the pass before
        assert total + sizes[next(iter(layers))] > room


def test_what_fits_takes_one_pass_with_inputs_and_gradients(module, tmp_path):
    found = open_calibration(module, tmp_path)
    ((layers, kinds),) = found.passes(["input_moment", "gradient_moment"])
    assert list(layers) == list(found.layers) and kinds == ["input_moment", "gradient_moment"]


class Sometimes(TinyConvNet):
    """A layer of it runs for dark pictures only."""

    def __init__(self) -> None:
        super().__init__()
        self.dark = nn.Linear(6, 2)

    def forward(self, image: Tensor) -> Tensor:
        logits = super().forward(image)
        return logits + self.dark(image.flatten(1)[:, :6]).sum() if bool((image < 0).all()) else logits


def test_a_layer_that_only_examples_without_gradients_reach_keeps_its_bits_in_passes_of_its_own(tmp_path):
    examples = images(4)
    examples.inputs["image"][0].abs_().neg_()  # the gradients come from the last of the batches
    found = [
        open_calibration(seeded(Sometimes()), tmp_path / str(room), examples, room, batch_size=1, gradient_examples=1)
        for room in (2**29, 1)
    ]
    for opened in found:
        opened.prepare(["input_moment", "gradient_moment"])
        assert not opened.unseen and not opened.statistic("dark", "gradient_moment").any()
        assert torch.equal(opened.statistic("dark", "input_moment"), found[0].statistic("dark", "input_moment"))


@pytest.mark.parametrize("limit", [1, 2**25])
@pytest.mark.parametrize(("module", "examples"), [(TinyConvNet(3), images()), (TinyEncoder(3), sentences(9, False))])
def test_eigenvalues_are_the_dense_fishers_diagonal_in_the_factors_eigenbasis(
    module, examples, limit, tmp_path, monkeypatch
):
    monkeypatch.setattr(calibration, "PART_ELEMENTS", limit)
    module = seeded(module)
    opened = open_calibration(module, tmp_path, examples)
    opened.prepare(["fisher_eigenvalues"])
    for name, layer in quantizable_layers(module).items():
        groups, rows, columns = weight_to_matrix(layer).shape
        dense = dense_statistics(module, name, one_by_one(examples))
        for g in range(groups):
            q_a, q_g = (opened.statistic(name, f"{kind}_basis")[g].double().numpy() for kind in ("input", "gradient"))
            for q, moment in ((q_a, dense.input_moment[g]), (q_g, dense.gradient_moment[g])):
                np.testing.assert_allclose(q.T @ q, np.eye(len(q)), atol=1e-6)
                turned = q.T @ moment @ q
                assert np.abs(turned - np.diag(np.diag(turned))).max() < 1e-5 * np.abs(moment).max()
            block = slice(g * rows * columns, (g + 1) * rows * columns)
            basis = np.kron(q_g, q_a)
            expected = np.diag(basis.T @ dense.fisher[block, block] @ basis).reshape(rows, columns)
            found = opened.statistic(name, "fisher_eigenvalues")[g]
            np.testing.assert_allclose(found, expected, rtol=1e-3, atol=1e-5 * expected.max())


# -------------------------------------------------------------------------------------- gradients from fewer examples


@pytest.mark.parametrize("kinds", FAMILIES)
def test_gradients_come_from_batches_spread_over_the_set_and_inputs_from_all(kinds, tmp_path):
    """Three of six sentences in batches of one: of the order by falling length, the second, the fourth, the sixth."""
    module, examples = seeded(TinyEncoder(3)), sentences()
    order = [int(batch.index) for batch in examples.batches(1, CPU)]
    chosen = torch.tensor(order[1::2])
    assert LENGTHS[order].tolist() == sorted(LENGTHS.tolist(), reverse=True)
    some = TensorExamples({k: v[chosen] for k, v in examples.inputs.items()}, examples.labels[chosen], LENGTHS[chosen])
    limited = open_calibration(module, tmp_path / "limited", examples, gradient_examples=3, batch_size=1)
    alone, whole = (
        open_calibration(module, tmp_path / folder, given, batch_size=1)
        for folder, given in (("alone", some), ("whole", examples))
    )
    for opened in (limited, alone, whole):
        opened.prepare(kinds)
    for kind in kinds:
        if kind == "fisher_eigenvalues":  # A comes from all examples, and with it the basis
            continue
        for name in limited.layers:
            found, other = limited.statistic(name, kind), alone.statistic(name, kind)
            if kind in INPUT_STATISTICS or kind == "input_basis":
                assert torch.equal(found, whole.statistic(name, kind))
                other = found
            if kind == "gradient_directions":
                found, other = (x.flatten(1).T @ x.flatten(1) for x in (found, other))
            if kind != "gradient_basis":  # only unique where eigenvalues are
                torch.testing.assert_close(found, other, rtol=1e-4, atol=1e-6)
            if kind == "fisher_diagonal":
                assert not torch.allclose(found, whole.statistic(name, kind), rtol=1e-2)


@given(total=st.integers(1, 60), data=st.data())
def test_batches_are_spread_evenly(total, data):
    count = data.draw(st.integers(1, total))
    marks = spread(count, total)
    assert len(marks) == total and sum(marks) == count and marks[-1]
    ends = [i for i, mark in enumerate(marks) if mark]
    gaps = [b - a for a, b in itertools.pairwise([-1, *ends])]
    assert max(gaps) - min(gaps) <= 1


def test_batches_that_give_no_gradient_run_only_for_the_inputs(module, tmp_path):
    opened = open_calibration(module, tmp_path, images(9), gradient_examples=3)
    opened.prepare(["gradient_moment"])
    assert module.passes == 2  # of 5 batches
    opened.prepare(["gradient_moment", "input_moment"])
    assert module.passes == 7


def test_more_examples_than_there_are_mean_all(module, tmp_path):
    every = [open_calibration(module, tmp_path, gradient_examples=n) for n in (None, 5, 100)]
    assert len({opened.path("gradient_moment") for opened in every}) == 1
    with pytest.raises(ValueError, match=r"posterior\.examples=0"):
        open_calibration(module, tmp_path, gradient_examples=0)


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
def test_unseen_layers_are_reported_and_get_neutral_statistics(kind, tmp_path):
    opened = open_calibration(seeded(WithIdleLayers()), tmp_path, rank=3)
    opened.prepare([kind])
    assert opened.unseen == {"unused"}
    square = {"input_moment": 9, "input_basis": 9, "gradient_moment": 2, "gradient_basis": 2}
    if kind in square:
        neutral = torch.eye(square[kind]).expand(2, -1, -1)
    elif kind == "gradient_directions":
        neutral = torch.zeros(3, 2, 2, 9)
    else:
        neutral = torch.ones((2, 9) if kind == "input_magnitude" else (2, 2, 9))
    assert torch.equal(opened.statistic("unused", kind), neutral)
    beside = opened.statistic("beside", kind)
    if kind in GRADIENT_STATISTICS:  # no gradient: the loss does not feel it
        assert not beside.any()
    else:
        assert beside.any()


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


def open_calibration(module: nn.Module, folder: Path, examples=None, room: int = 2**29, **changes) -> Calibration:
    return Calibration(
        module,
        state_checksum(module),
        quantizable_layers(module),
        examples or images(),
        dataclasses.replace(SETTINGS, **changes),
        folder,
        CPU,
        room,
    )


def test_files_are_computed_once_and_read_afterwards(module, tmp_path):
    first = open_calibration(module, tmp_path)
    first.prepare(KINDS)
    assert module.passes == 3 and first.reused == dict.fromkeys(KINDS, False)  # 3 batches, inputs and gradients at once
    second = open_calibration(module, tmp_path)
    second.prepare(iter(KINDS))
    assert module.passes == 3 and second.reused == dict.fromkeys(KINDS, True)
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
    assert module.passes == 6
    assert later.reused == {"gradient_moment": True, "fisher_diagonal": False, "input_magnitude": False}


@pytest.mark.parametrize("gradient_examples", [None, 2])
def test_one_pass_gives_the_bits_of_two(gradient_examples, module, tmp_path):
    both = open_calibration(module, tmp_path / "both", gradient_examples=gradient_examples)
    both.prepare(KINDS)
    assert module.passes == 3
    apart = open_calibration(module, tmp_path / "apart", gradient_examples=gradient_examples)
    for kind in sorted(KINDS):
        apart.prepare([kind])
    assert module.passes == 3 + 3 + (3 if gradient_examples is None else 1)
    for kind in KINDS:
        for name in quantizable_layers(module):
            assert torch.equal(both.statistic(name, kind), apart.statistic(name, kind))


def test_what_a_run_is_charged_with_does_not_depend_on_what_was_computed_before(module, tmp_path, monkeypatch):
    """AWQ's two statistics and BayesQ's two share the forward pass, whichever of them comes first."""
    now = [0.0]

    def passing(seconds: float, function):
        def timed(*args, **options):
            now[0] += seconds
            return function(*args, **options)

        return timed

    monkeypatch.setattr(calibration.time, "perf_counter", lambda: now[0])
    monkeypatch.setattr(calibration, "fisher_directions", passing(10.0, calibration.fisher_directions))
    module.register_forward_pre_hook(passing(1.0, lambda *_: None))
    wanted = (["input_moment", "input_magnitude"], ["input_moment", "gradient_moment"], ["fisher_diagonal"])
    for order in itertools.permutations(range(3)):
        for run in order:
            found = open_calibration(module, tmp_path / "".join(map(str, order)))
            found.prepare(wanted[run])
            backward = 0.0 if run == 0 else 30.0
            assert (found.forward_s, sum(found.seconds.values())) == (3.0, backward), (order, run)
            assert found.total_s == 3.0 + backward


def test_gradients_are_charged_with_the_backward_passes_only(module, tmp_path, monkeypatch):
    clock = iter(range(1000))
    monkeypatch.setattr(calibration.time, "perf_counter", lambda: float(next(clock)))
    found = open_calibration(module, tmp_path)
    found.prepare(["input_moment", "gradient_moment"])
    # three readings about the pass, two about the gradients of each of the 3 batches: 8 ticks, 3 of them backward
    assert found.seconds == {"input_moment": 0.0, "gradient_moment": 3.0} and found.forward_s == 5.0
    fits = max(sum(sum_bytes(layer, [kind], 1) for layer in found.layers.values()) for kind in KINDS)
    apart = open_calibration(module, tmp_path / "apart", room=fits)
    assert len(apart.passes(sorted(KINDS))) == 2
    apart.prepare(["input_moment", "gradient_moment"])
    # a pass of their own is theirs, from the reading before it to the one after it
    assert apart.seconds == {"input_moment": 0.0, "gradient_moment": 7.0} and apart.forward_s == 3.0


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
    assert second.reused == {k: k != kind for k in KINDS} and module.passes == 6
    again = open_calibration(module, tmp_path)
    again.prepare(KINDS)
    assert module.passes == 6
    assert all(torch.equal(again.statistic(n, kind), collect(module, images())[kind][n]) for n in again.layers)


class Narrow(Counting):
    """Runs out of memory with more than two images at a time, once its first layer has run."""

    def forward(self, image: Tensor) -> Tensor:
        self.stem(image)
        if len(image) > 2:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return super().forward(image)


def test_running_out_of_memory_halves_the_batch_begins_again_and_is_remembered(tmp_path):
    narrow = seeded(Narrow())
    found = open_calibration(narrow, tmp_path, batch_size=5, gradient_examples=3)
    found.prepare(KINDS)
    assert sum(found.oom_retries.values()) == 1
    again = open_calibration(narrow, tmp_path, batch_size=5, gradient_examples=3)
    again.prepare(KINDS)
    assert narrow.passes == 3 and again.oom_retries == found.oom_retries
    twos = open_calibration(seeded(Counting()), tmp_path / "twos", batch_size=2, gradient_examples=3)
    twos.prepare(KINDS)
    for kind in KINDS:
        for name in ("grouped", "head"):
            assert torch.equal(found.statistic(name, kind), twos.statistic(name, kind))


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
    for changes in (
        {"seed": 1},
        {"samples": 2},
        {"gradient_examples": 3},
        {"likelihood": "gaussian"},
        {"draws": "labels"},
    ):
        gradients_only = open_calibration(module, tmp_path, **changes)
        for kind in STATISTICS:
            assert (gradients_only.path(kind) == base.path(kind)) == kind.startswith("input"), kind
    other_rank = open_calibration(module, tmp_path, rank=3)
    changed = [kind for kind in STATISTICS if other_rank.path(kind) != base.path(kind)]
    assert changed == ["gradient_directions"]
    with pytest.raises(ValueError, match=r"posterior\.rank=0"):
        open_calibration(module, tmp_path, rank=0)
    assert len({base.path(kind) for kind in STATISTICS}) == len(STATISTICS)
    same = open_calibration(seeded(Counting()), tmp_path)
    assert all(same.path(kind) == base.path(kind) for kind in STATISTICS)


def test_sums_are_handed_over_once():
    collector = Collector(seeded(TinyConvNet()), {}, ["input_moment"], None, torch.Generator())
    assert collector.statistics("input_moment") == ({}, [])
    for kind in ("input_moment", "gradient_moment"):
        with pytest.raises(ValueError, match=f"{kind} was not collected, or"):
            collector.statistics(kind)


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
    inputs = PrefixInputs(module, find_blocks(module), layers, groups, examples, 2, CPU)
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
    layers = quantizable_layers(module)
    inputs = PrefixInputs(module, find_blocks(module), layers, groups, sentences(), 2, CPU, dict.fromkeys(layers, 1))
    found = [inputs.statistic(name, "input_moment") for name in groups[0]]
    assert torch.equal(found[0], found[1]) and torch.equal(found[0], found[2])
    assert calls == {"query": 3, "key": 3, "value": 3}
    expected = dense_statistics(seeded(TinyEncoder()), "query", one_by_one(sentences())).input_moment
    np.testing.assert_allclose(found[0], expected, rtol=1e-4, atol=1e-6)


def test_a_statistic_nobody_collects_is_refused_by_name(tmp_path):
    calibration = open_calibration(seeded(TinyConvNet()), tmp_path)
    with pytest.raises(ValueError, match="no statistic named input_momentum"):
        calibration.prepare({"input_moment", "input_momentum"})
