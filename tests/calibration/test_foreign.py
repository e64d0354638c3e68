"""Statistics from outside the package work everywhere, only by being declared."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import pytest
import torch
from estimates import needs_of
from naive_fisher import TinyConvNet, seeded
from tiny_sets import images, in_memory, open_calibration
from torch import Tensor, nn

from bayesq.calibration.inputs import INPUT_MOMENT, InputStatistic
from bayesq.calibration.statistic import Source, Statistic
from bayesq.contract import LayerProblem
from bayesq.errors import Refused
from bayesq.fisher import FISHER_DIAGONAL
from bayesq.posterior import Diagonal
from bayesq.quant.layers import quantizable_layers, weight_to_matrix
from bayesq.suite.rehearsal import random_statistic


@dataclass(frozen=True)
class InputRange(InputStatistic):
    """max_n |x|  [g, c]: no sum at all."""

    name: ClassVar[str] = "input_range"

    def shape(self, groups: int, rows: int, columns: int) -> tuple[int, ...]:
        return groups, columns

    def contribution(self, values: Tensor) -> Tensor:
        return values.abs().amax(1)

    def add(self, total: Tensor | None, contribution: Tensor) -> Tensor:
        return contribution if total is None else torch.maximum(total, contribution)

    def finish(self, total: Tensor, count: Tensor | int, shape: tuple[int, int, int]) -> Tensor:
        return total


@dataclass(frozen=True)
class GradientPower(Statistic):
    """E_example[|dl/dW|^p]  [g, r, c]."""

    name: ClassVar[str] = "gradient_power"
    source: ClassVar[Source] = Source.WEIGHT_GRADIENTS

    power: float

    def shape(self, groups: int, rows: int, columns: int) -> tuple[int, ...]:
        return groups, rows, columns

    def contribution(self, values: Tensor) -> Tensor:
        return values.abs().pow(self.power).sum(0)


@dataclass(frozen=True)
class InputTrace(Statistic):
    """tr A of each group  [g]."""

    name: ClassVar[str] = "input_trace"
    source: ClassVar[Source] = Source.STATISTICS
    requires: ClassVar[tuple[Statistic, ...]] = (INPUT_MOMENT,)

    def shape(self, groups: int, rows: int, columns: int) -> tuple[int, ...]:
        return (groups,)

    def derive(self, required: Mapping[str, Tensor]) -> Tensor:
        return required["input_moment"].diagonal(dim1=-2, dim2=-1).sum(-1)


@dataclass(frozen=True)
class Later(InputStatistic):
    """E_n[x^2]  [g, c], collected in a pass after that of the trace."""

    name: ClassVar[str] = "later"
    source: ClassVar[Source] = Source.INPUTS
    requires: ClassVar[tuple[Statistic, ...]] = (InputTrace(),)

    def shape(self, groups: int, rows: int, columns: int) -> tuple[int, ...]:
        return groups, columns

    def contribution(self, values: Tensor) -> Tensor:
        return values.square().sum(1)


class Foreign(Diagonal):
    """A posterior that reads them."""

    statistics = Diagonal.statistics | {InputRange(), GradientPower(3.0), InputTrace(), Later()}

    def spectrum(self, layer: LayerProblem) -> Tensor:
        return layer.statistic("gradient_power").double()


NAMES = {"fisher_diagonal", "input_range", "gradient_power", "input_trace", "later"}


@pytest.fixture
def module() -> nn.Module:
    return seeded(TinyConvNet(2))


def cubes(module: nn.Module, name: str) -> Tensor:
    """E_example[|dl/dW|^3] of two classes, whose Fisher has one direction, one example at a time."""
    layer, total = module.get_submodule(name), 0.0
    for x in images().inputs["image"].split(1):
        logits = module(x)[0]
        direction = logits.detach().softmax(0).prod().sqrt() * torch.tensor([1.0, -1.0])
        (gradient,) = torch.autograd.grad(logits @ direction, layer.weight)
        total = total + gradient.abs() ** 3 / len(images())
    return total.reshape(weight_to_matrix(layer).shape)


def test_they_are_collected_in_memory(module):
    layers = quantizable_layers(module)
    found = in_memory(module, Foreign.statistics)
    for name, layer in layers.items():
        given = []
        handle = layer.register_forward_hook(lambda _, x, __, given=given: given.append(x[0].detach().clone()))
        torch.testing.assert_close(found.statistic(name, "gradient_power"), cubes(module, name), rtol=1e-4, atol=1e-9)
        handle.remove()
        largest = float(found.statistic(name, "input_range").max())
        assert largest == pytest.approx(max(float(x.abs().max()) for x in given))
        moment = found.statistic(name, "input_moment")  # nobody declared it, but others require it
        diagonal = moment.diagonal(dim1=-2, dim2=-1)
        torch.testing.assert_close(found.statistic(name, "input_trace"), diagonal.sum(-1))
        torch.testing.assert_close(found.statistic(name, "later"), diagonal)
    with pytest.raises(ValueError, match="layer head: statistic gradient_moment was not computed, only"):
        found.statistic("head", "gradient_moment")


def test_they_are_kept_on_disk_under_their_parameters(module, tmp_path):
    opened = open_calibration(module, tmp_path)
    opened.prepare(Foreign.statistics)
    again = open_calibration(module, tmp_path)
    assert again.missing(Foreign.statistics) == []
    again.prepare(Foreign.statistics)
    assert again.reused == dict.fromkeys(NAMES | {"input_moment"}, True)
    expected = in_memory(module, Foreign.statistics)
    parts = open_calibration(module, tmp_path / "parts", room=1)
    parts.prepare(Foreign.statistics)
    for kind in NAMES:
        for name in opened.layers:
            for other in (again, parts):
                assert torch.equal(other.statistic(name, kind), expected.statistic(name, kind)), (kind, name)
    assert opened.path(GradientPower(3.0)) != opened.path(GradientPower(2.0))
    assert sorted(one.name for one in opened.missing([GradientPower(2.0), FISHER_DIAGONAL])) == ["gradient_power"]


def test_a_posterior_reads_them_by_name(module, tmp_path):
    opened = open_calibration(module, tmp_path)
    opened.prepare(Foreign.statistics)
    weight = weight_to_matrix(module.head)
    fitted = Foreign(2.0, 10, None).fit(LayerProblem("head", "Linear", weight, lambda k: opened.statistic("head", k)))
    torch.testing.assert_close(fitted.diagonal(), cubes(module, "head").double() + 0.2, rtol=1e-4, atol=1e-9)


def test_they_count_in_the_estimate_of_memory_and_disk(module):
    layers = quantizable_layers(module)
    without, found = (
        needs_of(module, Foreign(2.0, 10, None), Foreign.statistics, missing)
        for missing in ([], [GradientPower(3.0), InputTrace()])
    )
    sizes = [math.prod(weight_to_matrix(layer).shape) + weight_to_matrix(layer).shape[0] for layer in layers.values()]
    assert found.disk["cache_dir"] - without.disk["cache_dir"] == 4 * sum(sizes)
    assert found.stages["calibration"] - without.stages["calibration"] == 4 * (sum(sizes) + max(sizes))


def test_a_rehearsal_has_them():
    for statistic in Foreign.statistics:
        values = random_statistic((2, 3, 4), statistic)
        assert tuple(values.shape) == statistic.shape(2, 3, 4)
        statistic.check("layer", values)


def test_a_tensor_of_another_shape_than_the_statistic_says_is_refused():
    class Flat(InputRange):
        name: ClassVar[str] = "flat"

        def shape(self, groups: int, rows: int, columns: int) -> tuple[int, ...]:
            return 1, 1

    with pytest.raises(Refused, match=r"layer \S+: the statistic flat has shape .*, and its `shape` says \[1, 1\]"):
        in_memory(seeded(TinyConvNet()), [Flat()])
