"""Statistics against dense references, one example at a time."""

import dataclasses

import numpy as np
import pytest
import torch
from naive_fisher import TinyConvNet, TinyEncoder, dense_statistics, seeded
from tiny_sets import (
    COLLECTED,
    STATISTICS,
    WithIdleLayers,
    assert_equal,
    collect,
    images,
    one_by_one,
    open_calibration,
    sentences,
)
from torch import Tensor, nn

from bayesq.batches import TensorExamples
from bayesq.calibration import samples
from bayesq.calibration.statistic import LayerStatistics, Source
from bayesq.fisher import FISHER_EIGENVALUES, GradientDirections
from bayesq.likelihood import LIKELIHOODS
from bayesq.quant.layers import quantizable_layers, weight_to_matrix


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
    for kind in trimmed:
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
        statistics = (*COLLECTED, FISHER_EIGENVALUES)
        bases = {
            name: {
                f"{side}_basis": torch.linalg.qr(torch.randn(g, n, n))[0] for side, n in (("input", c), ("gradient", r))
            }
            for name, layer in quantizable_layers(module).items()
            for g, r, c in [weight_to_matrix(layer).shape]
        }
        whole = collect(module, examples, batch_size=5, statistics=statistics, required=bases)
        with monkeypatch.context() as patch:
            patch.setattr(samples, "PART_ELEMENTS", limit)
            parts = collect(module, examples, batch_size=5, statistics=statistics, required=bases)
        for kind in whole:
            for name in whole[kind]:
                torch.testing.assert_close(parts[kind][name], whole[kind][name], rtol=1e-5, atol=1e-6)


def test_labels_of_the_data_never_matter():
    module = seeded(TinyConvNet())
    relabelled = dataclasses.replace(images(), labels=torch.tensor([2, 0, 1, 2, 1]))
    for draws in (None, 2):
        one, other = collect(module, images(), samples=draws), collect(module, relabelled, samples=draws)
        for kind in one:
            assert all(torch.equal(one[kind][name], other[kind][name]) for name in one[kind])


def test_batch_size_changes_nothing_but_round_off():
    module = seeded(TinyConvNet())
    one, other = collect(module, images(), batch_size=1), collect(module, images(), batch_size=5)
    for kind in one:
        for name in one[kind]:
            torch.testing.assert_close(one[kind][name], other[kind][name], rtol=1e-5, atol=1e-6)


def test_sampled_statistics_converge_to_the_exact_fisher():
    module = seeded(TinyConvNet())
    exact, sampled = collect(module, images()), collect(module, images(), samples=600)
    for kind in ("gradient_moment", "fisher_diagonal"):
        for name in exact[kind]:
            assert float((sampled[kind][name] - exact[kind][name]).norm()) < 0.1 * float(exact[kind][name].norm())
    few = collect(module, images(), samples=1)
    assert float((few["fisher_diagonal"]["head"] - exact["fisher_diagonal"]["head"]).norm()) > 0


@pytest.mark.parametrize("outputs", [1, 3])
@pytest.mark.parametrize("name", ["stem", "grouped", "head"])
def test_statistics_of_a_regression_head_are_the_dense_ones(name, outputs):
    module = seeded(TinyConvNet(outputs))
    dense = dense_statistics(module, name, one_by_one(images()), likelihood="gaussian")
    found = collect(module, images(), likelihood=LIKELIHOODS["gaussian"])
    assert_equal(found, name, dense, module.get_submodule(name))
    if outputs == 1:  # a softmax over one logit has nothing to learn from
        assert not collect(module, images())["fisher_diagonal"][name].any()


@pytest.mark.parametrize("kind", STATISTICS)
def test_unseen_layers_are_reported_and_get_neutral_statistics(kind, tmp_path):
    opened = open_calibration(seeded(WithIdleLayers()), tmp_path)
    statistic = GradientDirections(3) if kind == "gradient_directions" else STATISTICS[kind]
    opened.prepare([statistic])
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
    if statistic.source in (Source.OUTPUT_GRADIENTS, Source.WEIGHT_GRADIENTS):  # no gradient: the loss does not feel it
        assert not beside.any()
    else:
        assert beside.any()


@pytest.mark.parametrize("kind", STATISTICS)
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_values_that_are_no_numbers_are_refused_by_layer_and_name(kind, value):
    tensor = torch.ones(STATISTICS[kind].shape(2, 3, 4))
    read = LayerStatistics("body", STATISTICS, lambda _: tensor)
    assert read(kind) is tensor
    tensor.view(-1)[-1] = value
    what = "inputs" if kind.startswith("input") else "gradients"
    with pytest.raises(ValueError, match=f"layer body: its {kind} has NaN or infinite entries.* its {what} are"):
        read(kind)


@pytest.mark.parametrize("kind", STATISTICS)
def test_mean_squares_below_zero_are_refused(kind):
    tensor = -torch.ones(STATISTICS[kind].shape(2, 3, 4))
    if kind in ("gradient_directions", "input_basis", "gradient_basis"):  # signs of these mean nothing
        STATISTICS[kind].check("body", tensor)
        return
    with pytest.raises(ValueError, match=f"layer body: its {kind} has a mean square below zero"):
        STATISTICS[kind].check("body", tensor)
