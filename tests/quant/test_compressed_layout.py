"""The layout of compressed-tensors, against a reader that takes it apart number by number, and the package itself."""

from dataclasses import replace

import pytest
import torch
from quant_strategies import tensor_of

from bayesq.quant.codes import Trellis
from bayesq.quant.compressed_layout import CompressedLayout
from bayesq.quant.grids import zero_code
from bayesq.quant.tensor import QuantizedTensor

SHAPES = [(32, 64, None), (17, 35, None), (20, 48, 8), (3, 32, 32)]


def affine(rows: int, columns: int, width: int, group_size: int | None, symmetric: bool = False) -> QuantizedTensor:
    """A random layer; its whole zero points have both ends, or all are in the middle."""
    tensor = tensor_of(rows, columns, [width] * rows, seed=width)
    groups = columns // (group_size or columns)
    generator = torch.Generator().manual_seed(rows)
    zero = torch.randint(2**width, (rows, groups), generator=generator).float()
    zero[0], zero[-1] = 0, 2**width - 1
    if symmetric:
        zero[:] = 2 ** (width - 1)
    scale = torch.rand(rows, groups, generator=generator).half() + 0.01
    return replace(tensor, group_size=group_size, scale=scale, zero=zero_code(zero, tensor.width[:, None]))


def numbers(words: list[int], width: int, count: int) -> list[int]:
    """The first numbers in a stream of int32 words, which is one large number, least significant word first."""
    stream = sum((word % 2**32) << (32 * k) for k, word in enumerate(words))
    return [(stream >> (width * i)) % 2**width for i in range(count)]


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("width", [4, 8])
@pytest.mark.parametrize(("rows", "columns", "group_size"), SHAPES)
def test_a_reader_finds_the_weights(
    rows: int, columns: int, group_size: int | None, width: int, symmetric: bool
) -> None:
    tensor = affine(rows, columns, width, group_size, symmetric)
    found = CompressedLayout.of([tensor], "float32").buffers(tensor)
    groups = tensor.scale.shape[1]
    shapes = {
        "weight_packed": (torch.int32, [rows, -(-columns * width // 32)]),
        "weight_scale": (torch.float32, [rows, groups]),
        "weight_zero_point": (torch.int32, [-(-rows * width // 32), groups]),
        "weight_shape": (torch.int64, [2]),
    }
    if symmetric:
        del shapes["weight_zero_point"]
    assert {key: (value.dtype, list(value.shape)) for key, value in found.items()} == shapes
    assert found["weight_shape"].tolist() == [rows, columns]
    codes = [numbers(row, width, columns) for row in found["weight_packed"].tolist()]
    zeros = [[2 ** (width - 1)] * rows] * groups
    if not symmetric:
        zeros = [numbers(column, width, rows) for column in found["weight_zero_point"].T.tolist()]
    expected, size = tensor.dequantize()[0], group_size or columns
    for r in range(rows):
        for c in range(columns):
            weight = float(found["weight_scale"][r, c // size]) * (codes[r][c] - zeros[c // size][r])
            assert weight == pytest.approx(float(expected[r, c]), rel=1e-6)


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("width", [4, 8])
@pytest.mark.parametrize(("rows", "columns", "group_size"), SHAPES)
def test_the_package_finds_the_weights(
    rows: int, columns: int, group_size: int | None, width: int, symmetric: bool
) -> None:
    pytest.importorskip("compressed_tensors")
    from compressed_tensors.compressors import PackedQuantizationCompressor
    from compressed_tensors.quantization import QuantizationConfig

    tensor = affine(rows, columns, width, group_size, symmetric)
    layout = CompressedLayout.of([tensor], "float32")
    config = QuantizationConfig.model_validate(layout.config({"one": tensor}, ["one", "head"]))
    assert config.ignore == ["head"]
    found = PackedQuantizationCompressor.decompress(layout.buffers(tensor), config.config_groups["group_0"])
    assert torch.equal(found["weight"], tensor.dequantize()[0])


def test_layers_of_other_widths_are_told_apart() -> None:
    tensors = {"a": affine(3, 32, 4, 8), "b": affine(3, 32, 8, 8), "c": affine(3, 32, 4, 8)}
    groups = CompressedLayout().config(tensors, [*tensors, "head"])["config_groups"].values()
    assert [(group["targets"], group["weights"]["num_bits"]) for group in groups] == [(["a", "c"], 4), (["b"], 8)]


@pytest.mark.parametrize(
    ("tensor", "reason"),
    [
        (replace(affine(32, 32, 4, None), code=Trellis({}, 8)), "levels are not uniform: choose method=gptq"),
        (tensor_of(32, 32, [4] * 31 + [8]), r"different widths \(4, 8 bits\): choose allocator=uniform"),
        (affine(32, 32, 3, None), "it has 3 bits: choose bits=4, 8"),
        (replace(affine(32, 32, 4, None), column_scale=torch.ones(1, 32).half()), "scales for its inputs"),
        (tensor_of(32, 32, [4] * 32), "zero points lie between levels"),
        (
            replace(
                affine(32, 40, 4, 8), group_size=16, scale=torch.ones(32, 3).half(), zero=torch.zeros(32, 3).byte()
            ),
            "its 40 inputs do not come in whole groups of 16",
        ),
    ],
)
def test_what_has_no_place_is_said(tensor: QuantizedTensor, reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        CompressedLayout().buffers(tensor)
