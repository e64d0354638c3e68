"""Sizes foretold before anything is packed, against what packing makes."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from quant_strategies import codebook, overlay_of, row_table, tensor_of

from bayesq.quant.accounting import affine_overhead_bits, code_bits, mixed_overhead_bits, stored_bytes
from bayesq.quant.codes import RowTable, SharedTable


def test_code_bits_are_the_widths_times_the_columns() -> None:
    assert code_bits(tensor_of(3, 7, [2, 8, 3])) == (2 + 8 + 3) * 7
    assert code_bits(tensor_of(300, 5, [8] * 300)) == 8 * 300 * 5  # more than a byte's sum


def test_stored_bytes_leave_the_shared_codebooks_out() -> None:
    tensor = tensor_of(2, 4, [3, 3])
    with_book = replace(tensor, code=SharedTable({3: codebook(3)}))
    assert stored_bytes(with_book) == stored_bytes(tensor) == 3 + 1 + 2 * 2 + 2


def test_column_scales_cost_two_bytes_each() -> None:
    tensor = tensor_of(2, 6, [4, 4])
    scaled = replace(tensor, column_scale=torch.ones(1, 3).half())
    assert stored_bytes(scaled) == stored_bytes(tensor) + 6


def test_row_tables_cost_two_bytes_a_level_in_place_of_scales() -> None:
    widths = [3, 2, 8]
    tensor, affine = tensor_of(3, 5, widths, code=row_table(widths)), tensor_of(3, 5, widths)
    assert code_bits(tensor) == code_bits(affine)
    assert stored_bytes(tensor) == stored_bytes(affine) - 3 * 3 + 2 * (8 + 4 + 256)
    assert RowTable.table_bits(tensor.width) == 16 * (8 + 4 + 256)


def test_kept_weights_cost_their_bits_and_positions() -> None:
    tensor = tensor_of(4, 1000, [3] * 4)
    kept = replace(tensor, overlay=overlay_of(4, 1000, 18))  # .45 %
    assert code_bits(kept) == code_bits(tensor)
    # ten bits a count, ten bits a column
    assert stored_bytes(kept) == stored_bytes(tensor) + 2 * 18 + (4 * 10 + 18 * 10 + 7) // 8


@pytest.mark.parametrize("columns", [1, 3, 8, 27])
@pytest.mark.parametrize("rows", [1, 2, 3, 11, 64])
@pytest.mark.parametrize("seed", range(3))
def test_overheads_are_what_packing_adds(rows: int, columns: int, seed: int) -> None:
    uniform = tensor_of(rows, columns, [2 + seed * 3] * rows, seed)
    beyond = 8 * stored_bytes(uniform) - code_bits(uniform) - affine_overhead_bits([rows])
    assert beyond == -code_bits(uniform) % 8  # the codes' last byte

    widths = np.random.default_rng(seed).integers(2, 9, rows).tolist()
    mixed = tensor_of(rows, columns, widths, seed)
    slack = code_bits(mixed) + mixed_overhead_bits([rows]) - 8 * stored_bytes(mixed)
    assert slack >= 0
    if len(set(widths)) > 1:
        assert slack <= 16


def test_overheads_add_up_over_layers() -> None:
    assert affine_overhead_bits([3, 5]) == affine_overhead_bits([3]) + affine_overhead_bits([5]) == 8 * 24 + 16
    assert mixed_overhead_bits([3, 5]) == mixed_overhead_bits([3]) + mixed_overhead_bits([5])
