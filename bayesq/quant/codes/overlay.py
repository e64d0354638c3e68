"""SparseOverlay: a few weights of a layer in fp16, in place of their decoded values (SpQR, SqueezeLLM).

Packed as compressed sparse rows: the number of fp16 weights in each row, then their columns, as one stream of bits, and
their values. With n such weights in R rows of C columns this takes

    ceil((R b(C) + n max(b(C - 1), 1)) / 8) + 2 n bytes,   b(x) = number of binary digits of x

beside the codes, which also exist at those positions.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from bayesq.quant.bits import from_bits, to_bits, unpack_stream
from bayesq.quant.grids import FP16_MAX


@dataclass(frozen=True, eq=False)
class SparseOverlay:
    """Weights that replace the decoded ones.

    Attributes:
        row, column: [n] int64 positions in the codes [R, C], without duplicates, ordered by row and then by column; n
            >= 1.
        value: [n] fp16 weights.
    """

    row: Tensor
    column: Tensor
    value: Tensor

    @classmethod
    def of(cls, weight: Tensor, chosen: Tensor) -> "SparseOverlay":
        """The chosen entries of a matrix, clamped to the range of fp16.

        Args:
            weight: [R, C], all groups' rows stacked.
            chosen: [R, C] bool.
        """
        row, column = chosen.nonzero(as_tuple=True)
        return cls(row, column, weight[row, column].clamp(-FP16_MAX, FP16_MAX).to(torch.float16))

    def check(self, rows: int, columns: int) -> None:
        """Check that the positions lie in a matrix [rows, columns].

        Raises:
            ValueError: they do not, are out of order, or a tensor has the wrong type or shape.
        """
        count = len(self.value)
        if self.value.dtype != torch.float16 or not count or not bool(torch.isfinite(self.value).all()):
            raise ValueError("overlay: needs finite float16 values, at least one")
        for index, size in ((self.row, rows), (self.column, columns)):
            if index.dtype != torch.int64 or index.shape != (count,):
                raise ValueError(f"overlay: needs int64 positions [{count}]")
            if not bool(((index >= 0) & (index < size)).all()):
                raise ValueError(f"overlay: a position is outside the {rows} rows and {columns} columns")
        if not bool((self._places(columns).diff() > 0).all()):
            raise ValueError("overlay: positions must increase")

    def replace_in(self, weight: Tensor) -> Tensor:
        """A copy of a layer's weights [g, r, c] with these values; gradients pass through the others."""
        places, value = self._places(weight.shape[-1]).to(weight.device), self.value.to(weight)
        return weight.flatten().index_copy(0, places, value).reshape(weight.shape)

    def _places(self, columns: int) -> Tensor:
        return self.row * columns + self.column

    def pack(self, rows: int, columns: int) -> dict[str, Tensor]:
        """Buffers `overlay_index` [bytes] uint8 and `overlay_value` [n] fp16."""
        count_bits, column_bits = _index_bits(columns)
        counts = torch.bincount(self.row, minlength=rows).numpy()
        stream = np.concatenate([to_bits(counts, count_bits), to_bits(self.column.numpy(), column_bits)])
        return {"overlay_index": torch.from_numpy(np.packbits(stream)), "overlay_value": self.value}

    @classmethod
    def unpack(cls, buffers: Mapping[str, Tensor], rows: int, columns: int) -> "SparseOverlay":
        """Inverse of `pack`.

        Raises:
            ValueError: the stream's length or its counts do not fit rows, columns and values.
        """
        count_bits, column_bits = _index_bits(columns)
        value = buffers["overlay_value"]
        length = rows * count_bits + len(value) * column_bits
        bits = unpack_stream(buffers["overlay_index"].numpy(), length, "overlay_index")
        counts = from_bits(bits[: rows * count_bits], count_bits).astype(np.int64)
        if int(counts.sum()) != len(value):
            raise ValueError(f"overlay_index: the rows have {counts.sum()} weights, and there are {len(value)}")
        column = from_bits(bits[rows * count_bits :], column_bits).astype(np.int64)
        row = np.repeat(np.arange(rows), counts)
        return cls(torch.from_numpy(row), torch.from_numpy(column), value)


def _index_bits(columns: int) -> tuple[int, int]:
    """Bits of a row's count, 0 to `columns`, and of a column, 0 to `columns` - 1."""
    return columns.bit_length(), max((columns - 1).bit_length(), 1)
