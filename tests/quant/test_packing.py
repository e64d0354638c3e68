"""Packing: the identity on everything, at exactly the size the formula gives."""

import json
import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from quant_strategies import codebook, identical, overlay_of, quantized_tensors, row_table, tensor_of

from bayesq.quant.accounting import buffer_bytes, code_bits, stored_bytes
from bayesq.quant.bits import from_bits, to_bits
from bayesq.quant.codes import Affine, Codebook, RowTable, SharedTable, Trellis
from bayesq.quant.packing import pack, pack_model, unpack, unpack_model
from bayesq.quant.tensor import QuantizedTensor
from bayesq.tensor_file import HEADER_KEY, CorruptFile, read_tensors, write_tensors


def ceil_bytes(bits: int) -> int:
    return -(-bits // 8)


def formula_bytes(tensor: QuantizedTensor) -> int:
    """ceil(sum(width) * C / 8) codes, the width byte or 3-bit map, 2 bytes a scale, 1 a zero, 2 a column scale.

    A row table takes 2 bytes a level and no scale and zero, an overlay 2 bytes a weight and its bits of positions.
    """
    rows, columns = tensor.codes.shape
    widths = tensor.width.tolist()
    codes = ceil_bytes(sum(widths) * columns)
    width_map = ceil_bytes(3 * rows) if len(set(widths)) > 1 else 1
    column_groups = 1 if tensor.group_size is None else -(-columns // tensor.group_size)
    column_scales = 0 if tensor.column_scale is None else tensor.column_scale.numel()
    if isinstance(tensor.code, RowTable):
        beside = 2 * sum(2**width for width in widths)
    else:
        beside = 3 * rows * column_groups
    if tensor.overlay is not None:
        kept = len(tensor.overlay.value)
        # of each row a count from 0 to C, of each weight a column from 0 to C - 1
        count_bits = math.floor(math.log2(columns)) + 1
        column_bits = max(math.ceil(math.log2(columns)), 1)
        beside += ceil_bytes(rows * count_bits + kept * column_bits) + 2 * kept
    return codes + width_map + beside + 2 * column_scales


def naive_stream(tensor: QuantizedTensor) -> bytes:
    """The documented order as one string of binary digits: narrow rows first, row order kept, MSB first."""
    digits = ""
    for width in range(2, 9):
        for i, row_width in enumerate(tensor.width.tolist()):
            if row_width == width:
                digits += "".join(format(code, f"0{width}b") for code in tensor.codes[i].tolist())
    digits += "0" * (-len(digits) % 8)
    return bytes(int(digits[k : k + 8], 2) for k in range(0, len(digits), 8))


@settings(max_examples=150, deadline=None)
@given(quantized_tensors())
@example(tensor_of(1, 1, [2]))
@example(tensor_of(1, 13, [3]))
@example(tensor_of(13, 1, [5] * 13))
@example(tensor_of(7, 3, [2, 3, 4, 5, 6, 7, 8]))
@example(tensor_of(3, 5, [8, 2, 8]))
@example(tensor_of(1, 3, [2], code=Trellis({}, 4)))
@example(tensor_of(9, 3, [2, 3, 4, 5, 6, 7, 8, 2, 2], code=Trellis({}, 256)))
@example(tensor_of(1, 1, [8], code=row_table([8])))
@example(tensor_of(3, 5, [3, 8, 2], code=row_table([3, 8, 2])))
@example(replace(tensor_of(2, 1, [3, 3]), overlay=overlay_of(2, 1, 2)))
@example(replace(tensor_of(3, 300, [2] * 3), overlay=overlay_of(3, 300, 4)))
@example(replace(tensor_of(2, 512, [2, 4], code=row_table([2, 4])), overlay=overlay_of(2, 512, 512)))
def test_unpack_inverts_pack_at_the_exact_size(tensor: QuantizedTensor) -> None:
    buffers, facts = pack(tensor)
    books = {book.name: book for book in tensor.code.codebooks()}
    found = unpack(buffers, json.loads(json.dumps(facts)), books)
    assert identical(found, tensor)
    assert torch.equal(found.dequantize(), tensor.dequantize())
    assert bytes(buffers["codes"].numpy()) == naive_stream(tensor)
    assert buffer_bytes(buffers) == stored_bytes(tensor) == formula_bytes(tensor)
    assert code_bits(tensor) == sum(tensor.width.tolist()) * tensor.codes.shape[1]


@settings(max_examples=60, deadline=None)
@given(quantized_tensors((Affine,)))
def test_a_trellis_takes_no_bit_of_its_own(tensor: QuantizedTensor) -> None:
    scalar, trellis = (replace(tensor, code=code) for code in (Affine(), Trellis({}, 64)))
    assert code_bits(trellis) == code_bits(scalar) and stored_bytes(trellis) == stored_bytes(scalar)
    buffers, facts = pack(trellis)
    assert facts["trellis"] == 64 and pack(scalar)[1]["trellis"] is None
    assert all(torch.equal(buffer, pack(scalar)[0][key]) for key, buffer in buffers.items())
    assert torch.equal(unpack(buffers, facts, {}).dequantize(), trellis.dequantize())


@pytest.mark.parametrize("width", range(1, 14))
def test_bits_are_most_significant_first_and_invert(width: int) -> None:
    values = np.arange(2**width, dtype=np.uint8 if width <= 8 else np.int64)
    bits = to_bits(values, width)
    assert "".join(map(str, bits)) == "".join(format(v, f"0{width}b") for v in range(2**width))
    assert np.array_equal(from_bits(bits, width), values)


def test_the_width_map_is_three_bits_a_row() -> None:
    buffers, _ = pack(tensor_of(3, 2, [8, 2, 5]))
    assert buffers["width"].tolist() == [0b11000001, 0b10000000]  # 110 000 011, padded
    assert pack(tensor_of(3, 2, [5, 5, 5]))[0]["width"].tolist() == [5]


@settings(max_examples=30, deadline=None)
@given(st.lists(quantized_tensors(), min_size=1, max_size=4))
def test_a_model_survives_the_file_and_its_size_is_the_buffers(
    tmp_path_factory: pytest.TempPathFactory, tensors: list[QuantizedTensor]
) -> None:
    layers = {f"block.{k}/conv": tensor for k, tensor in enumerate(tensors)}
    buffers, header = pack_model(layers)
    names = {book.name: 2 * len(book.levels) for tensor in tensors for book in tensor.code.codebooks()}
    # a shared codebook counts once
    assert buffer_bytes(buffers) == sum(map(formula_bytes, tensors)) + sum(names.values())

    path = tmp_path_factory.mktemp("model") / "quantized.safetensors"
    write_tensors(path, buffers, header)
    raw = path.read_bytes()
    head = int.from_bytes(raw[:8], "little")
    assert len(raw) - 8 - head == buffer_bytes(buffers)
    assert len(json.loads(json.loads(raw[8 : 8 + head])["__metadata__"][HEADER_KEY])["digest"]) == 64

    loaded, metadata = read_tensors(path)
    assert metadata == header
    found = unpack_model(loaded, metadata)
    assert list(found) == list(layers)
    assert all(identical(found[name], layers[name]) for name in layers)
    assert all(torch.equal(found[name].dequantize(), layers[name].dequantize()) for name in layers)


def test_a_flipped_bit_or_a_cut_file_is_noticed(tmp_path: Path) -> None:
    path = tmp_path / "quantized.safetensors"
    write_tensors(path, *pack_model({"layer": tensor_of(4, 9, [3] * 4)}))
    raw = path.read_bytes()
    path.write_bytes(raw[:-1] + bytes([raw[-1] ^ 1]))
    with pytest.raises(CorruptFile):
        read_tensors(path)
    path.write_bytes(raw[:-1])
    with pytest.raises(CorruptFile):
        read_tensors(path)


@pytest.mark.parametrize("widths", [[3, 3, 3, 3], [2, 3, 8, 5]])
@pytest.mark.parametrize("key", ["codes", "width", "scale", "zero", "column_scale"])
@pytest.mark.parametrize("change", ["cut", "extended"])
def test_buffers_of_another_length_are_refused(widths: list[int], key: str, change: str) -> None:
    column_scale = torch.ones(1, 7, dtype=torch.float16)
    buffers, facts = pack(replace(tensor_of(4, 7, widths), column_scale=column_scale))
    along = 1 if key == "column_scale" else 0
    value = buffers[key]
    longer = torch.cat([value, value.narrow(along, 0, 1)], along)
    buffers[key] = value.narrow(along, 0, value.shape[along] - 1) if change == "cut" else longer
    with pytest.raises(ValueError):
        unpack(buffers, facts, {})


def test_codes_that_exceed_the_width_are_refused() -> None:
    tensor = tensor_of(2, 4, [3, 3])
    with pytest.raises(ValueError, match="does not fit"):
        replace(tensor, codes=tensor.codes + 8)


def test_a_missing_codebook_or_buffer_is_named() -> None:
    buffers, header = pack_model({"layer": tensor_of(2, 4, [3, 3], code=SharedTable({3: codebook(3)}))})
    with pytest.raises(ValueError, match="layer 'layer': codebooks: there is no codebook 'book/3'"):
        unpack_model({k: v for k, v in buffers.items() if not k.startswith("codebook/")}, header)
    with pytest.raises(ValueError, match="layer 'layer': zero: there is no such buffer"):
        unpack_model({k: v for k, v in buffers.items() if k != "layer/zero"}, header)


def test_one_name_is_one_codebook() -> None:
    tensor = tensor_of(2, 4, [3, 3])
    other = Codebook("book/3", codebook(3).levels + 1)
    shared = {name: replace(tensor, code=SharedTable({3: codebook(3)})) for name in "ab"}
    buffers, _ = pack_model(shared)
    assert [key for key in buffers if key.startswith("codebook/")] == ["codebook/book/3"]
    with pytest.raises(ValueError, match="two different codebooks are named book/3"):
        pack_model({**shared, "b": replace(tensor, code=SharedTable({3: other}))})
    wider = tensor_of(2, 4, [4, 4], code=SharedTable({4: Codebook("book/3", codebook(4).levels)}))
    with pytest.raises(ValueError, match="two different codebooks are named book/3"):
        pack_model({**shared, "c": wider})


@pytest.mark.parametrize("key", ["table", "overlay_index", "overlay_value"])
@pytest.mark.parametrize("change", ["cut", "extended", "dtype", "missing"])
def test_tables_and_overlays_of_another_length_or_kind_are_refused(key: str, change: str) -> None:
    tensor = replace(tensor_of(3, 9, [2, 3, 2], code=row_table([2, 3, 2])), overlay=overlay_of(3, 9, 5))
    buffers, facts = pack(tensor)
    value = buffers[key]
    changed = {"cut": value[:-1], "extended": torch.cat([value, value[-1:]]), "dtype": value.to(torch.int32)}
    buffers = {name: changed.get(change, value) if name == key else buffers[name] for name in buffers}
    if change == "missing":
        del buffers[key]
    with pytest.raises(ValueError, match=rf"{key}|table: needs|overlay_index"):
        unpack(buffers, facts, {})


def test_overlay_streams_that_contradict_themselves_are_refused() -> None:
    """Nine columns: four bits a count, four bits a column."""
    buffers, facts = pack(replace(tensor_of(2, 9, [3, 3]), overlay=overlay_of(2, 9, 2)))

    def read(counts: list[int], columns: list[int]) -> QuantizedTensor:
        stream = np.packbits(to_bits(np.array(counts + columns, dtype=np.uint8), 4))
        return unpack(buffers | {"overlay_index": torch.from_numpy(stream)}, facts, {})

    assert read([1, 1], [8, 0]).overlay.column.tolist() == [8, 0]
    for counts, columns, message in (
        ([1, 2], [8, 0], "the rows have 3 weights, and there are 2"),
        ([1, 0], [8, 0], "the rows have 1 weights, and there are 2"),
        ([1, 1], [9, 0], "outside the 2 rows and 9 columns"),
        ([2, 0], [5, 5], "positions must increase"),
        ([0, 2], [5, 4], "positions must increase"),
    ):
        with pytest.raises(ValueError, match=message):
            read(counts, columns)


def test_facts_and_buffers_name_one_kind_of_code() -> None:
    rows, affine = tensor_of(2, 4, [3, 3], code=row_table([3, 3])), tensor_of(2, 4, [3, 3])
    buffers, facts = pack(rows)
    assert facts["code"] == "row_table" and "trellis" not in facts and buffers["scale"].numel() == 0
    for name in ("affine", "other", None, 3, ["row_table"]):
        with pytest.raises(ValueError, match="code: needs one of row_table"):
            unpack(buffers, facts | {"code": name}, {})
    with pytest.raises(ValueError, match="the facts of a layer are shape, groups, group_size, mixed, code"):
        unpack(buffers, facts | {"trellis": None}, {})
    with pytest.raises(ValueError, match="scale: needs"):
        unpack(buffers | pack(affine)[0], facts, {})
    with pytest.raises(ValueError, match="buffer 'layer/table' belongs to no layer"):
        affine_buffers, header = pack_model({"layer": affine})
        unpack_model(affine_buffers | {"layer/table": buffers["table"]}, header)
    # rows without scales: nothing but the codes says how many there can be
    with pytest.raises(ValueError, match="codes: 3 bytes cannot hold 1099511627776 rows"):
        empty = {key: torch.empty(2**40, 0, dtype=buffers[key].dtype) for key in ("scale", "zero")}
        unpack(buffers | empty, facts | {"shape": [2**40, 4]}, {})
