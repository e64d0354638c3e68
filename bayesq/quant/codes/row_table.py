"""Codes whose levels are weights, in a table for each row, for example from row-wise k-means (SqueezeLLM).

    W[r, c] = table_r[code[r, c]],   table_r: 2**width_r levels in fp16

A row stores 16 * 2**width bits for its table and, because levels are weights, neither scale nor zero point: 128 bits
per row at 3 bits, where an affine row stores 24.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Self

import torch
from torch import Tensor

from bayesq.quant.codes.base import Code, Codebook, LevelPart, stored_levels
from bayesq.quant.codes.rate_tables import RateTables
from bayesq.quant.grids import FP16_MAX

LEVEL_BITS = 16


@dataclass(frozen=True, eq=False)
class RowTable(Code):
    """A table of levels for each row.

    Attributes:
        levels: [sum of 2**width over the rows] fp16, the rows' tables one after the other, each non-decreasing.
    """

    levels: Tensor

    absolute = True
    FACTS = ("code",)
    BUFFERS: ClassVar = {"table": (torch.float16, 1)}

    def check(self, width: Tensor) -> None:
        """See `Code`."""
        count = int(sizes(width).sum())
        if self.levels.dtype != torch.float16 or self.levels.shape != (count,):
            raise ValueError(f"table: needs float16 [{count}], not {self.levels.dtype} {list(self.levels.shape)}")
        if not bool(torch.isfinite(self.levels).all()):
            raise ValueError("table: levels must be finite")
        falls = self.levels[1:] < self.levels[:-1]
        falls[starts(width)[1:] - 1] = False
        if bool(falls.any()):
            raise ValueError("table: the levels of a row must not decrease")

    def parts(self, width: Tensor) -> tuple[LevelPart, ...]:
        """One part, not shared between layers; a level unit is the row's mean distance between levels."""
        levels, size = self.levels.to(torch.float32), sizes(width)
        first = starts(width)
        step = (levels[first + size - 1] - levels[first]) / (size - 1)
        return (LevelPart(levels, "table", step=step.repeat_interleave(size)),)

    def positions(self, codes: Tensor, width: Tensor, groups: int) -> Tensor:
        """See `Code`."""
        return codes.long().add_(starts(width)[:, None])

    def with_levels(self, levels: Mapping[str, Tensor], width: Tensor) -> Self:
        """See `Code`."""
        moved, stored = levels["table"].cpu(), torch.empty_like(self.levels)
        for w in width.unique().tolist():
            rows = starts(width)[width == w][:, None] + torch.arange(2**w)
            stored[rows] = stored_levels(moved[rows])
        return replace(self, levels=stored)

    def times(self, factors: Tensor, width: Tensor) -> Self:
        """See `Code`."""
        moved = self.levels.double() * factors.repeat_interleave(sizes(width))
        return replace(self, levels=moved.clamp(-FP16_MAX, FP16_MAX).to(torch.float16))

    @staticmethod
    def table_bits(width: Tensor) -> int:
        """Bits of the tables of rows with these widths."""
        return LEVEL_BITS * int(sizes(width).sum())

    def pack(self, codes: Tensor, width: Tensor, groups: int) -> dict[str, Tensor]:
        """See `Code`."""
        return super().pack(codes, width, groups) | {"table": self.levels}

    def facts(self) -> dict[str, Any]:
        """The name of the code."""
        return {"code": "row_table"}

    @classmethod
    def unpack(
        cls,
        facts: Mapping[str, Any],
        buffers: Mapping[str, Tensor],
        width: Tensor,
        codebooks: Mapping[str, Codebook | RateTables],
    ) -> Self:
        """See `Code`."""
        return cls(buffers["table"])


def sizes(width: Tensor) -> Tensor:
    """Number of levels of each row: int64 [R]."""
    return 2 ** width.long()


def starts(width: Tensor) -> Tensor:
    """Position of each row's first level in the table: int64 [R]."""
    return sizes(width).cumsum(0) - sizes(width)
