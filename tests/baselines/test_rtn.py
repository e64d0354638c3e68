"""RTN against a loop over rows and entries."""

import itertools

import numpy as np
import pytest
import torch
from naive_quant import RULES, FixedWidths, affine_nearest, problem
from rounding_loop import rounded

from baselines.rtn import RTN
from bayesq.quant.accounting import stored_bytes


@pytest.mark.parametrize("clip", ["minmax", "mse"])
@pytest.mark.parametrize("groups", [1, 3])
def test_every_weight_goes_to_the_nearest_value_of_its_rows_grid(clip: str, groups: int) -> None:
    generator = torch.Generator().manual_seed(1)
    weight = torch.randn(groups, 4, 11, generator=generator) * 0.2
    weight[0, 1] = 0
    widths = torch.tensor([2, 3, 4, 8] * groups, dtype=torch.uint8)
    ((layer, tensor),) = rounded(RTN(clip), [problem(weight, torch.eye(11))], FixedWidths(layer=widths))
    assert layer.fallbacks == {}
    found = tensor.dequantize()
    assert found.shape == weight.shape
    for i in range(groups * 4):
        row = weight[i // 4, i % 4].double().numpy()
        scale, zero = RULES[clip](row, int(widths[i]))
        for c in range(11):
            code, value = affine_nearest(float(row[c]), scale, zero, int(widths[i]))
            assert int(tensor.codes[i, c]) == code
            assert float(found[i // 4, i % 4, c]) == np.float32(value)
    assert not found[0, 1].any()


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("clip", ["minmax", "mse"])
@pytest.mark.parametrize("group_size", [None, 4, 11, 50])
def test_column_groups_and_symmetric_grids(group_size: int | None, clip: str, symmetric: bool) -> None:
    weight = torch.randn(1, 4, 11, generator=torch.Generator().manual_seed(3)) - 0.3
    weight[0, 1, :4] = 0
    widths = torch.tensor([2, 3, 4, 8], dtype=torch.uint8)
    method = RTN(clip, group_size=group_size, symmetric=symmetric)
    ((_, tensor),) = rounded(method, [problem(weight, torch.eye(11))], FixedWidths(layer=widths))
    found = tensor.dequantize()[0]
    size = group_size or 11
    for i, first in itertools.product(range(4), range(0, 11, size)):
        columns, width = slice(first, first + size), int(widths[i])
        part = weight[0, i, columns].double().numpy()
        if not symmetric:
            scale, zero = RULES[clip](part, width)
        else:
            high = abs(part).max() or 1.0
            shrinks = [1.0] if clip == "minmax" else [1 - step / 100 for step in range(80)]
            grids = [(float(np.float16(2 * high * shrink / (2**width - 1))), 2 ** (width - 1)) for shrink in shrinks]
            costs = [sum(abs(affine_nearest(float(w), *grid, width)[1] - w) ** 2.4 for w in part) for grid in grids]
            scale, zero = grids[int(np.argmin(costs))]
        values = [affine_nearest(float(w), scale, zero, width)[1] for w in part]
        assert found[i, columns].tolist() == [np.float32(value) for value in values]
    scales = -(-11 // size)
    assert tensor.scale.shape == (4, scales)
    codes, width_map = -(-17 * 11 // 8), -(-4 * 3 // 8)
    assert stored_bytes(tensor) == codes + width_map + 4 * 3 * scales
    assert not symmetric or bool((tensor.zero == 128).all())


def test_no_statistic_is_read() -> None:
    layer = problem(torch.randn(1, 2, 3, generator=torch.Generator().manual_seed(2)), torch.eye(3))
    layer.statistic = None  # type: ignore[assignment]
    assert RTN.statistics == frozenset()
    assert len(list(rounded(RTN("mse"), [layer], FixedWidths(layer=torch.tensor([3, 3], dtype=torch.uint8))))) == 1


def test_bad_input_is_refused() -> None:
    with pytest.raises(ValueError, match=r"method\.clip=best: choose from minmax, mse"):
        RTN("best")
    with pytest.raises(ValueError, match=r"method\.group_size=0: must be at least 1"):
        RTN("mse", group_size=0)
    with pytest.raises(ValueError, match=r"method\.symmetric=1: needs true or false"):
        RTN("mse", symmetric=1)
    broken = problem(torch.full((1, 1, 2), torch.nan), torch.eye(2))
    with pytest.raises(ValueError, match="layer layer: the weights have NaN"):
        list(rounded(RTN("mse"), [broken], FixedWidths(layer=torch.tensor([3], dtype=torch.uint8))))
