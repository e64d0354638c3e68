"""RTN against a loop over rows and entries."""

import numpy as np
import pytest
import torch
from naive_quant import RULES, FixedWidths, affine_nearest, problem
from rounding_loop import rounded

from baselines.rtn import RTN


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


def test_no_statistic_is_read() -> None:
    layer = problem(torch.randn(1, 2, 3, generator=torch.Generator().manual_seed(2)), torch.eye(3))
    layer.statistic = None  # type: ignore[assignment]
    assert RTN.statistics == frozenset()
    assert len(list(rounded(RTN("mse"), [layer], FixedWidths(layer=torch.tensor([3, 3], dtype=torch.uint8))))) == 1


def test_bad_input_is_refused() -> None:
    with pytest.raises(ValueError, match=r"method\.clip=best: choose from minmax, mse"):
        RTN("best")
    broken = problem(torch.full((1, 1, 2), torch.nan), torch.eye(2))
    with pytest.raises(ValueError, match="layer layer: the weights have NaN"):
        list(rounded(RTN("mse"), [broken], FixedWidths(layer=torch.tensor([3], dtype=torch.uint8))))
