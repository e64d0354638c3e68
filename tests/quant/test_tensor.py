"""QuantizedTensor: what codes stand for, and what it refuses to hold."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from naive_quant import naive_dequantize, naive_levels, trellis_indices
from quant_strategies import codebook, quantized_tensors, row_table

from bayesq.quant.codes import Affine, Codebook, RowTable, SharedTable, SparseOverlay, Trellis
from bayesq.quant.tensor import QuantizedTensor


@settings(max_examples=60, deadline=None)
@given(quantized_tensors())
def test_dequantize_equals_the_formula_entry_by_entry(tensor: QuantizedTensor) -> None:
    weight = tensor.dequantize()
    assert weight.dtype == torch.float32
    expected = naive_dequantize(tensor)
    assert weight.shape == expected.shape
    np.testing.assert_allclose(weight.numpy(), expected, rtol=3e-6, atol=1e-5)


@settings(max_examples=60, deadline=None)
@given(quantized_tensors((Affine, SharedTable, Trellis)))
def test_positions_name_the_levels_of_each_width(tensor: QuantizedTensor) -> None:
    """The table holds the levels of the widths that occur, narrow widths first; a trellis has twice as many."""
    codes, code = tensor.codes.numpy(), tensor.code
    index = trellis_indices(codes, code.states, tensor.groups) if isinstance(code, Trellis) else codes
    table, start = tensor.table(), {}
    for width in sorted(set(tensor.width.tolist())):
        start[width] = sum(len(naive_levels(code, w, 0, [])) for w in start)
        levels = table[start[width] :][: 2**width * (2 if isinstance(code, Trellis) else 1)]
        assert levels.tolist() == naive_levels(code, width, 0, []) and bool((levels.diff() > 0).all())
    expected = index + np.array([start[width] for width in tensor.width.tolist()])[:, None]
    positions = tensor.positions()
    assert positions.dtype == torch.int64 and np.array_equal(positions.numpy(), expected)
    assert len(table) == sum(len(naive_levels(code, w, 0, [])) for w in start)
    assert np.array_equal(codes, tensor.codes.numpy())


@settings(max_examples=30, deadline=None)
@given(quantized_tensors())
def test_gradients_reach_levels_and_scales_and_not_what_the_overlay_replaces(tensor: QuantizedTensor) -> None:
    level = tensor.table()[tensor.positions()].requires_grad_(True)
    scale = tensor.scale.to(torch.float32).requires_grad_(True)
    weight = tensor.weights(level, scale)
    assert torch.equal(weight.detach(), tensor.dequantize())
    (gradient,) = torch.autograd.grad(weight.sum(), level, retain_graph=True)
    replaced = torch.zeros(tensor.codes.shape, dtype=torch.bool)
    if tensor.overlay is not None:
        replaced[tensor.overlay.row, tensor.overlay.column] = True
    assert torch.equal(gradient == 0, replaced)
    if scale.numel():
        assert torch.autograd.grad(weight.sum(), scale)[0].isfinite().all()


def plain() -> QuantizedTensor:
    return QuantizedTensor(
        codes=torch.tensor([[0, 3, 1], [7, 2, 5]], dtype=torch.uint8),
        width=torch.tensor([2, 3], dtype=torch.uint8),
        scale=torch.ones(2, 1, dtype=torch.float16),
        zero=torch.zeros(2, 1, dtype=torch.uint8),
    )


def overlay(rows: list[int], columns: list[int]) -> SparseOverlay:
    positions = torch.tensor(rows, dtype=torch.int64), torch.tensor(columns, dtype=torch.int64)
    return SparseOverlay(*positions, torch.ones(len(rows)).half())


NO_SCALE = {"scale": torch.empty(2, 0).half(), "zero": torch.empty(2, 0, dtype=torch.uint8)}
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
    "infinite scale": ({"scale": torch.full((2, 1), torch.inf).half()}, "a scale is NaN, or too large for float16"),
    "scales for other groups": ({"group_size": 2}, r"\[2, 2\]"),
    "float zero": ({"zero": torch.zeros(2, 1)}, "zero must be uint8"),
    "rows that do not divide": ({"groups": 3}, "do not divide"),
    "column scales of another size": ({"column_scale": torch.ones(1, 2).half()}, "column_scale"),
    "column scales for other groups": ({"column_scale": torch.ones(2, 3).half()}, "column_scale"),
    "float32 column scales": ({"column_scale": torch.ones(1, 3)}, "column_scale"),
    "a codebook of another width": ({"code": SharedTable({2: codebook(3)})}, "8 levels, width 2 needs 4"),
    "a codebook no row reads": ({"code": SharedTable({4: codebook(4)})}, "no row has 4 bits"),
    "a scalar codebook on a trellis": ({"code": Trellis({3: codebook(3)}, 8)}, "8 levels, width 3 needs 16"),
    "a trellis codebook without one": (
        {"code": SharedTable({3: codebook(3, trellis=True)})},
        "16 levels, width 3 needs 8",
    ),
    "scales beside a row table": ({"code": row_table([2, 3])}, r"scale must be float16 \[2, 0\]"),
    "column groups beside a row table": ({"code": row_table([2, 3]), "group_size": 2}, "group_size=2 has no meaning"),
    "row tables of other widths": (NO_SCALE | {"code": row_table([2, 2])}, r"table: needs float16 \[12\], not .*\[8\]"),
    "float32 row tables": (NO_SCALE | {"code": RowTable(torch.arange(12.0))}, r"table: needs float16 \[12\]"),
    "infinite row tables": (
        NO_SCALE | {"code": RowTable(torch.cat([torch.arange(11.0), torch.tensor([torch.inf])]).half())},
        "levels must be finite",
    ),
    "falling levels in a row": (
        NO_SCALE | {"code": RowTable(torch.tensor([0.0, 1, 2, 3, 0, 1, 2, 3, 4, 5, 7, 6]).half())},
        "the levels of a row must not decrease",
    ),
    "an overlay beyond the rows": ({"overlay": overlay([2], [0])}, "outside the 2 rows and 3 columns"),
    "an overlay beyond the columns": ({"overlay": overlay([0, 1], [1, 3])}, "outside the 2 rows and 3 columns"),
    "an overlay before the columns": ({"overlay": overlay([0], [-1])}, "outside the 2 rows and 3 columns"),
    "a position twice": ({"overlay": overlay([0, 0], [1, 1])}, "positions must increase"),
    "positions out of order": ({"overlay": overlay([1, 0], [0, 2])}, "positions must increase"),
    "an empty overlay": ({"overlay": overlay([], [])}, "at least one"),
    "an infinite overlay": (
        {"overlay": replace(overlay([0], [0]), value=torch.tensor([torch.nan]).half())},
        "needs finite float16",
    ),
    "a float32 overlay": ({"overlay": replace(overlay([0], [0]), value=torch.ones(1))}, "needs finite float16"),
    "narrow positions": (
        {"overlay": replace(overlay([0], [0]), column=torch.zeros(1, dtype=torch.uint8))},
        "needs int64 positions",
    ),
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


def test_codes_of_unknown_kinds_are_refused() -> None:
    with pytest.raises(ValueError, match="a trellis has 4, 8, 16, 32, 64, 128, 256 states, not 12"):
        Trellis({}, 12)
    with pytest.raises(ValueError, match="a code without tables is Affine"):
        SharedTable({})


def test_levels_of_a_row_table_are_put_in_order_row_by_row() -> None:
    width = torch.tensor([3, 2, 3], dtype=torch.uint8)
    code = RowTable(torch.cat([torch.arange(8.0), torch.arange(4.0), torch.arange(8.0)]).half())
    wanted = [[0.0, 3, 2, 1, 4, 6, 5, 7], [9.0, 9, 1e9, 1e9], [-5.0, -4, -3, -2, -1, 0, 1, 2]]
    moved = code.with_levels({"table": torch.cat([torch.tensor(row) for row in wanted])}, width)
    expected = [[0.0, 2, 2, 2, 4, 5.5, 5.5, 7], [9.0, 9, 65504, 65504], wanted[2]]
    assert torch.equal(moved.levels, torch.cat([torch.tensor(row) for row in expected]).half())


def test_an_overlay_keeps_the_chosen_weights_within_the_range_of_fp16() -> None:
    weight = torch.tensor([[1.5, -2.0, 3.0], [1e9, 0.1, -1e9]])
    chosen = torch.tensor([[False, True, False], [True, True, True]])
    overlay = SparseOverlay.of(weight, chosen)
    assert overlay.row.tolist() == [0, 1, 1, 1] and overlay.column.tolist() == [1, 0, 1, 2]
    expected = torch.tensor([[9.0, -2.0, 9.0], [65504.0, 0.1, -65504.0]]).half().float()
    assert torch.equal(overlay.replace_in(torch.full((1, 2, 3), 9.0))[0], expected)
