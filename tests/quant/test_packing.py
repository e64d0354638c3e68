"""Packing: the identity on everything, at exactly the size the formula gives."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from quant_strategies import codebook, identical, quantized_tensors, tensor_of

from bayesq.quant.accounting import buffer_bytes, code_bits, stored_bytes
from bayesq.quant.packing import from_bits, pack, pack_model, to_bits, unpack, unpack_model
from bayesq.quant.tensor import Codebook, QuantizedTensor
from bayesq.tensor_file import HEADER_KEY, CorruptFile, read_tensors, write_tensors


def ceil_bytes(bits: int) -> int:
    return -(-bits // 8)


def formula_bytes(tensor: QuantizedTensor) -> int:
    """ceil(sum(width) * C / 8) codes, the width byte or 3-bit map, 2 bytes a scale, 1 a zero, 2 a column scale."""
    rows, columns = tensor.codes.shape
    widths = tensor.width.tolist()
    codes = ceil_bytes(sum(widths) * columns)
    width_map = ceil_bytes(3 * rows) if len(set(widths)) > 1 else 1
    column_groups = 1 if tensor.group_size is None else -(-columns // tensor.group_size)
    column_scales = 0 if tensor.column_scale is None else tensor.column_scale.numel()
    return codes + width_map + 3 * rows * column_groups + 2 * column_scales


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
@example(tensor_of(1, 3, [2], trellis=4))
@example(tensor_of(9, 3, [2, 3, 4, 5, 6, 7, 8, 2, 2], trellis=256))
def test_unpack_inverts_pack_at_the_exact_size(tensor: QuantizedTensor) -> None:
    buffers, facts = pack(tensor)
    books = {book.name: book for book in tensor.codebooks.values()}
    found = unpack(buffers, json.loads(json.dumps(facts)), books)
    assert identical(found, tensor)
    assert torch.equal(found.dequantize(), tensor.dequantize())
    assert bytes(buffers["codes"].numpy()) == naive_stream(tensor)
    assert buffer_bytes(buffers) == stored_bytes(tensor) == formula_bytes(tensor)
    assert code_bits(tensor) == sum(tensor.width.tolist()) * tensor.codes.shape[1]


@settings(max_examples=60, deadline=None)
@given(quantized_tensors())
def test_a_trellis_takes_no_bit_of_its_own(tensor: QuantizedTensor) -> None:
    scalar, trellis = (replace(tensor, codebooks={}, trellis=states) for states in (None, 64))
    assert code_bits(trellis) == code_bits(scalar) and stored_bytes(trellis) == stored_bytes(scalar)
    buffers, facts = pack(trellis)
    assert facts["trellis"] == 64 and pack(scalar)[1]["trellis"] is None
    assert all(torch.equal(buffer, pack(scalar)[0][key]) for key, buffer in buffers.items())
    assert torch.equal(unpack(buffers, facts, {}).dequantize(), trellis.dequantize())


@pytest.mark.parametrize("width", range(1, 9))
def test_bits_are_most_significant_first_and_invert(width: int) -> None:
    values = np.arange(2**width, dtype=np.uint8)
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
    names = {book.name: 2 * len(book.levels) for tensor in tensors for book in tensor.codebooks.values()}
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
    buffers, header = pack_model({"layer": replace(tensor_of(2, 4, [3, 3]), codebooks={3: codebook(3)})})
    with pytest.raises(ValueError, match="layer 'layer': codebooks: there is no codebook 'book/3'"):
        unpack_model({k: v for k, v in buffers.items() if not k.startswith("codebook/")}, header)
    with pytest.raises(ValueError, match="layer 'layer': zero: there is no such buffer"):
        unpack_model({k: v for k, v in buffers.items() if k != "layer/zero"}, header)


def test_one_name_is_one_codebook() -> None:
    tensor = tensor_of(2, 4, [3, 3])
    other = Codebook("book/3", codebook(3).levels + 1)
    shared = {"a": replace(tensor, codebooks={3: codebook(3)}), "b": replace(tensor, codebooks={3: codebook(3)})}
    buffers, _ = pack_model(shared)
    assert [key for key in buffers if key.startswith("codebook/")] == ["codebook/book/3"]
    with pytest.raises(ValueError, match="two different codebooks are named book/3"):
        pack_model({**shared, "b": replace(tensor, codebooks={3: other})})
    wider = replace(tensor_of(2, 4, [4, 4]), codebooks={4: Codebook("book/3", codebook(4).levels)})
    with pytest.raises(ValueError, match="two different codebooks are named book/3"):
        pack_model({**shared, "c": wider})


def test_a_codebook_no_row_uses_is_refused() -> None:
    with pytest.raises(ValueError, match="no row has 4 bits"):
        pack_model({"layer": replace(tensor_of(2, 4, [3, 3]), codebooks={3: codebook(3), 4: codebook(4)})})
