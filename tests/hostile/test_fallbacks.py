"""What a run did instead of what was asked is counted in its result: one constructed layer for each counter."""

import pytest
import torch
from rounding_loop import rounded
from test_numbers import CHOICES, Choice, problem, quantized
from torch import Tensor

from baselines.rtn import RTN
from bayesq.contract import LayerProblem
from bayesq.nearest import clamped_scales
from bayesq.recipe import Quantized
from bayesq.report import FALLBACKS, fallbacks


def choice(name: str) -> Choice:
    return next(one for one in CHOICES if one.name == name)


READ_INPUTS = [
    "gptq auto act_order=True group_size=None",
    "awq",
    "bayesq kfac, trellis, feedback",
    "bayesq ekfac, lloyd, feedback",
]


def dead(layer: LayerProblem, columns: list[int]) -> LayerProblem:
    load = layer.statistic.load  # type: ignore[attr-defined]

    def statistic(kind: str) -> Tensor:
        tensor: Tensor = load(kind).clone()
        if kind == "input_moment":
            tensor[:, columns] = 0
            tensor[:, :, columns] = 0
        return tensor

    return LayerProblem(layer.name, layer.kind, layer.weight, statistic)


@pytest.mark.parametrize("name", READ_INPUTS)
def test_dead_columns_are_counted_once(name: str) -> None:
    layer = dead(problem((1, 9, 20), 0), [2, 5, 11])
    quantized(choice(name), layer, 3, "uniform")
    assert fallbacks(Quantized(problems={layer.name: layer}))["dead_columns"] == 3
    assert layer.fallbacks.get("clamped_scales", 0) == 0


def test_damping_retries_are_counted() -> None:
    layer = problem((1, 9, 20), 0, a="rank 1")
    quantized(choice("gptq without damping"), layer, 3, "uniform")
    assert fallbacks(Quantized(problems={layer.name: layer}))["damping_retries"] >= 1


@pytest.mark.parametrize(("factor", "expected"), [(1e30, 9), (1e-30, 9), (3e5, 9), (1.0, 0), (0.0, 0)])
def test_rows_beyond_fp16_are_counted(factor: float, expected: int) -> None:
    layer = problem((1, 9, 20), 0)
    layer.weight = layer.weight * factor
    widths = {layer.name: torch.full((9,), 3, dtype=torch.uint8)}
    ((_, tensor),) = rounded(RTN("minmax"), [layer], lambda *_, **__: widths)
    assert clamped_scales(layer.weight, tensor) == expected


def test_every_counter_has_a_place_in_the_result() -> None:
    layer = problem((1, 5, 6), 0)
    for kind in FALLBACKS:
        layer.count(kind, 2)
    assert fallbacks(Quantized(problems={"a": layer}, oom_retries=1)) == {
        **dict.fromkeys(FALLBACKS, 2),
        "oom_retries": 3,
    }


@pytest.mark.parametrize(
    "name", ["bayesq kfac, trellis, feedback", "bayesq diag, lloyd, nearest", "bayesq ekfac, uniform, nearest"]
)
def test_rows_of_zeros_stay_zero(name: str) -> None:
    layer = problem((1, 9, 20), 0)
    layer.weight[:, [1, 4]] = 0
    values, _ = quantized(choice(name), layer, 3, "uniform")
    assert float(values[:, [1, 4]].abs().max()) < 1e-6
    assert float((values - layer.weight).abs().max()) > 1e-3
