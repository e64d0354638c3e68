"""Sizes: bits counted on packed buffers, and what a plain affine layer stores beside its codes."""

from collections.abc import Iterable, Mapping

from torch import Tensor

from bayesq.quant.bits import WIDTH_MAP_BITS
from bayesq.quant.packing import pack
from bayesq.quant.tensor import QuantizedTensor

# Per row of an affine layer: fp16 scale and uint8 zero point. Per layer: one byte for the width.
AFFINE_ROW_BITS = 16 + 8
LAYER_BITS = 8


def code_bits(tensor: QuantizedTensor) -> int:
    """Bits of the layer's codes alone, the literature's "bits per weight" times the number of weights."""
    return tensor.code.code_bits(tensor.codes, tensor.width, tensor.groups)


def buffer_bytes(buffers: Mapping[str, Tensor]) -> int:
    """Bytes of packed buffers."""
    return sum(buffer.numel() * buffer.element_size() for buffer in buffers.values())


def stored_bytes(tensor: QuantizedTensor) -> int:
    """Bytes of one layer's buffers, see `bayesq.quant.packing`; not of the codebooks it shares with other layers."""
    return buffer_bytes(pack(tensor)[0])


def affine_overhead_bits(rows: Iterable[int]) -> int:
    """Bits that layers with these row counts store beside their codes in the plain affine per-row format.

    A format that stores more than this has to save the difference on its codes (`Budget.capacity`).
    """
    return sum(count * AFFINE_ROW_BITS + LAYER_BITS for count in rows)


def group_scale_bits(rows: int, columns: int, group_size: int | None) -> int:
    """Bits of a layer's scales and zero points of column groups, beyond one of each per row."""
    return 0 if group_size is None else rows * (-(-columns // group_size) - 1) * AFFINE_ROW_BITS


def mixed_overhead_bits(rows: Iterable[int]) -> int:
    """As `affine_overhead_bits`, for rows of different widths; an upper bound of the stored bits.

    The width map replaces the layer's width byte. The map and the codes are each padded by less than a byte.
    """
    return sum(count * (AFFINE_ROW_BITS + WIDTH_MAP_BITS) + 2 * LAYER_BITS for count in rows)
