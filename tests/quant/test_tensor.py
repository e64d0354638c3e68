"""QuantizedTensor: what codes stand for, and what it refuses to hold."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from naive_quant import half_steps, trellis_indices
from quant_strategies import codebook, quantized_tensors

from bayesq.quant.tensor import Codebook, QuantizedTensor


def naive_dequantize(tensor: QuantizedTensor) -> np.ndarray:
    """Entry by entry: scale * (level - zero * 2**(width - 8)) / column_scale.

    A code is its level's index, or says with the codes above it, on a trellis, which of twice as many levels is meant.
    """
    rows, columns = tensor.codes.shape
    per_group = rows // tensor.groups
    weight = np.zeros((tensor.groups, per_group, columns))
    codes = tensor.codes.numpy()
    index = codes if tensor.trellis is None else trellis_indices(codes, tensor.trellis, tensor.groups)
    for i in range(rows):
        width = int(tensor.width[i])
        for c in range(columns):
            s = 0 if tensor.group_size is None else c // tensor.group_size
            k = int(index[i, c])
            plain = k if tensor.trellis is None else half_steps(width)[k]
            level = float(tensor.codebooks[width].levels[k]) if width in tensor.codebooks else plain
            value = float(tensor.scale[i, s]) * (level - int(tensor.zero[i, s]) * 2.0 ** (width - 8))
            if tensor.column_scale is not None:
                channels = tensor.column_scale.shape[1]
                value /= float(tensor.column_scale[i // per_group, c // (columns // channels)])
            weight[i // per_group, i % per_group, c] = value
    return weight


@settings(max_examples=60, deadline=None)
@given(quantized_tensors())
def test_dequantize_equals_the_formula_entry_by_entry(tensor: QuantizedTensor) -> None:
    weight = tensor.dequantize()
    assert weight.dtype == torch.float32
    expected = naive_dequantize(tensor)
    assert weight.shape == expected.shape
    np.testing.assert_allclose(weight.numpy(), expected, rtol=3e-6, atol=1e-5)


@settings(max_examples=60, deadline=None)
@given(quantized_tensors())
def test_level_indices_name_the_levels(tensor: QuantizedTensor) -> None:
    index, codes = tensor.level_indices(), tensor.codes.numpy()
    expected = codes if tensor.trellis is None else trellis_indices(codes, tensor.trellis, tensor.groups)
    assert index.dtype == torch.int64 and np.array_equal(index.numpy(), expected)
    for width in set(tensor.width.tolist()):
        levels = tensor.levels(width)
        assert levels.dtype == torch.float32 and bool((levels.diff() > 0).all())
        assert len(levels) == 2**width * (1 if tensor.trellis is None else 2)
        assert bool((index[tensor.width == width] < len(levels)).all())


def plain() -> QuantizedTensor:
    return QuantizedTensor(
        codes=torch.tensor([[0, 3, 1], [7, 2, 5]], dtype=torch.uint8),
        width=torch.tensor([2, 3], dtype=torch.uint8),
        scale=torch.ones(2, 1, dtype=torch.float16),
        zero=torch.zeros(2, 1, dtype=torch.uint8),
    )


REFUSED = {
    "a code beyond its row's width": (
        {"codes": torch.tensor([[0, 4, 1], [7, 2, 5]], dtype=torch.uint8)},
        "does not fit",
    ),
    "wide codes": ({"codes": torch.zeros(2, 3, dtype=torch.int64)}, "uint8"),
    "width 1": ({"width": torch.tensor([1, 3], dtype=torch.uint8)}, r"\[2, 8\]"),
    "width 9": ({"width": torch.tensor([2, 9], dtype=torch.uint8)}, r"\[2, 8\]"),
    "a width too few": ({"width": torch.tensor([3], dtype=torch.uint8)}, "width must be"),
    "float32 scale": ({"scale": torch.ones(2, 1)}, "scale must be float16"),
    "infinite scale": ({"scale": torch.full((2, 1), torch.inf).half()}, "scale must be finite"),
    "scales for other groups": ({"group_size": 2}, r"\[2, 2\]"),
    "float zero": ({"zero": torch.zeros(2, 1)}, "zero must be uint8"),
    "rows that do not divide": ({"groups": 3}, "do not divide"),
    "column scales of another size": ({"column_scale": torch.ones(1, 2).half()}, "column_scale"),
    "column scales for other groups": ({"column_scale": torch.ones(2, 3).half()}, "column_scale"),
    "float32 column scales": ({"column_scale": torch.ones(1, 3)}, "column_scale"),
    "a codebook of another width": ({"codebooks": {2: codebook(3)}}, "8 levels, width 2 needs 4"),
    "a scalar codebook on a trellis": ({"codebooks": {3: codebook(3)}, "trellis": 8}, "8 levels, width 3 needs 16"),
    "a trellis codebook without one": ({"codebooks": {3: codebook(3, trellis=True)}}, "16 levels, width 3 needs 8"),
    "a trellis nobody knows": ({"trellis": 12}, "a trellis has 4, 8, 16, 32, 64, 128, 256 states, not 12"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_a_tensor_that_could_not_be_stored_is_refused(name: str) -> None:
    change, message = REFUSED[name]
    with pytest.raises(ValueError, match=message):
        replace(plain(), **change)


def test_codebooks_are_increasing_fp16() -> None:
    with pytest.raises(ValueError, match="float16"):
        Codebook("book/2", torch.arange(4.0))
    with pytest.raises(ValueError, match="must not decrease"):
        Codebook("book/2", torch.tensor([0.0, 2.0, 1.0, 3.0]).half())
    with pytest.raises(ValueError, match="must not decrease"):
        Codebook("book/2", torch.tensor([0.0, torch.nan, 1.0, 3.0]).half())
