"""The layout of GPTQ tools, against a reader that takes its numbers apart one by one."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from quant_strategies import codebook, overlay_of, row_table, tensor_of

from bayesq.entropy import coded_tensor
from bayesq.quant.codes import RateTables, SharedTable, Trellis
from bayesq.quant.codes.rate_tables import ALPHABET, SETS
from bayesq.quant.gptq_layout import FORMATS, GPTQLayout
from bayesq.quant.grids import zero_code
from bayesq.quant.tensor import QuantizedTensor


def affine(rows: int, columns: int, width: int, group_size: int | None = None, lowest: int = 1) -> QuantizedTensor:
    """A random layer with whole zero points, `lowest` to 2**width - 1, both of which occur."""
    tensor = tensor_of(rows, columns, [width] * rows, seed=width)
    groups = -(-columns // (group_size or columns))
    generator = torch.Generator().manual_seed(width)
    zero = torch.randint(lowest, 2**width, (rows, groups), generator=generator).float()
    zero[0], zero[-1] = lowest, 2**width - 1
    scale = torch.rand(rows, groups, generator=generator).half() + 0.01
    return replace(tensor, group_size=group_size, scale=scale, zero=zero_code(zero, tensor.width[:, None]))


def codes_in(words: list[int], width: int) -> list[int]:
    """Codes of a stream of int32 words; three bits as documented: the 11th and the 22nd of 32 lie across two words."""
    words = [word % 2**32 for word in words]
    if width != 3:
        return [word >> shift & 2**width - 1 for word in words for shift in range(0, 32, width)]
    found = []
    for a, b, c in zip(words[::3], words[1::3], words[2::3], strict=True):
        found += [a >> 3 * i & 7 for i in range(10)] + [a >> 30 | (b & 1) << 2]
        found += [b >> 1 + 3 * i & 7 for i in range(10)] + [b >> 31 | (c & 3) << 1]
        found += [c >> 2 + 3 * i & 7 for i in range(10)]
    return found


@pytest.mark.parametrize("checkpoint_format", FORMATS)
@pytest.mark.parametrize("width", [2, 3, 4, 8])
@pytest.mark.parametrize(("rows", "columns", "group_size"), [(32, 64, None), (64, 32, 8), (32, 96, 36), (32, 32, 128)])
def test_a_reader_finds_the_weights(
    rows: int, columns: int, group_size: int | None, width: int, checkpoint_format: str
) -> None:
    tensor = affine(rows, columns, width, group_size, lowest=FORMATS[checkpoint_format])
    found = GPTQLayout(checkpoint_format).buffers(tensor)
    groups = tensor.scale.shape[1]
    assert {key: (value.dtype, list(value.shape)) for key, value in found.items()} == {
        "qweight": (torch.int32, [columns * width // 32, rows]),
        "qzeros": (torch.int32, [groups, rows * width // 32]),
        "scales": (torch.float16, [groups, rows]),
        "g_idx": (torch.int32, [columns]),
    }
    less = 1 if checkpoint_format == "gptq" else 0
    codes = torch.tensor([codes_in(column, width) for column in found["qweight"].T.tolist()])
    zeros = torch.tensor([codes_in(row, width) for row in found["qzeros"].tolist()]) + less
    group = found["g_idx"].long()
    assert group.tolist() == [c // (group_size or columns) for c in range(columns)]
    weight = found["scales"].float()[group].T * (codes - zeros[group].T)
    assert torch.equal(weight, tensor.dequantize()[0])


def entropy_coded() -> QuantizedTensor:
    tables = RateTables.of(np.ones((1, SETS, ALPHABET)))
    return coded_tensor(torch.full((32, 32), 128, dtype=torch.uint8), torch.ones(32), tables, None, 1, None)


@pytest.mark.parametrize(
    ("tensor", "reason"),
    [
        (tensor_of(32, 32, [3] * 31 + [4]), r"different widths \(3, 4 bits\): choose allocator=uniform"),
        (affine(32, 32, 5), "it has 5 bits: choose bits=2, 3, 4, 8"),
        (replace(affine(32, 32, 3), code=SharedTable({3: codebook(3)})), "levels are not uniform"),
        (replace(affine(32, 32, 3), code=Trellis({}, 8)), "levels are not uniform"),
        (tensor_of(32, 32, [3] * 32, code=row_table([3] * 32)), "levels are not uniform"),
        (entropy_coded(), "entropy coded: choose method=gptq or method=rtn with codec=fixed"),
        (replace(affine(32, 32, 3), overlay=overlay_of(32, 32, 4)), "some of its weights are in fp16"),
        (replace(affine(32, 32, 3), column_scale=torch.ones(1, 32).half()), "scales for its inputs"),
        (tensor_of(32, 32, [4] * 32), "zero points lie between levels: .*distill=false"),
        (affine(32, 48, 4), "48 inputs and 32 outputs, which are not both multiples of 32"),
        (affine(48, 32, 4), "32 inputs and 48 outputs, which are not both multiples of 32"),
        (affine(32, 32, 4, lowest=0), "a zero point of 0, which the format gptq cannot hold: use --format gptq_v2"),
    ],
)
def test_what_has_no_place_is_said(tensor: QuantizedTensor, reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        GPTQLayout().buffers(tensor)
