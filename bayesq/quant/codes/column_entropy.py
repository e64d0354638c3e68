"""Entropy-coded scalar codes whose rate varies along rows and along columns (WaterSIC).

A weight's table is that of its row's class plus its column's class, at most the last one. The stream has the weights of
table 0 first, row by row, then those of table 1, and so on.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar, Self

import constriction
import numpy as np
import torch
from torch import Tensor

from bayesq.quant.bits import from_bits, to_bits, unpack_stream
from bayesq.quant.codes.base import Codebook
from bayesq.quant.codes.entropy import EntropyCode
from bayesq.quant.codes.rate_tables import ALPHABET, SETS, RateTables


@dataclass(frozen=True, eq=False)
class ColumnEntropyCode(EntropyCode):
    """Scalar codes in a stream of entropy-coded symbols.

    Attributes:
        column_class: [C] uint8, added to each row's class.
    """

    column_class: Tensor = field(kw_only=True)

    FACTS: ClassVar[tuple[str, ...]] = ("code", "tables")
    BUFFERS: ClassVar = {"rate_class": (torch.uint8, 1), "column_class": (torch.uint8, 1)}

    def check(self, width: Tensor) -> None:
        """See `Code`."""
        super().check(width)
        if self.states is not None:
            raise ValueError("states: codes with column classes have no trellis")
        if self.column_class.dtype != torch.uint8 or self.column_class.ndim != 1:
            raise ValueError(f"column_class: needs uint8 in one dimension, not {list(self.column_class.shape)}")
        if int(self.column_class.max()) >= self.tables.classes:
            raise ValueError(f"column_class: the tables have {self.tables.classes} classes")

    def weight_classes(self) -> Tensor:
        """The table of each weight, uint8 [R, C]."""
        return (self.rate_class[:, None] + self.column_class).clamp(max=self.tables.classes - 1)

    def positions(self, codes: Tensor, width: Tensor, groups: int) -> Tensor:
        """See `Code`."""
        return self.weight_classes().long().mul_(SETS * ALPHABET).add_(codes)

    def stream(self, codes: Tensor, groups: int) -> np.ndarray:
        """The stream of codes [R, C] as bytes [n] uint8."""
        models, encoder = self.tables.models(), constriction.stream.queue.RangeEncoder()
        classes, symbols = self.weight_classes().numpy(), codes.numpy().astype(np.int32)
        for k in np.unique(classes):
            encoder.encode(symbols[classes == k], models[k][0])
        return self._padded(encoder, codes.numel())

    def pack(self, codes: Tensor, width: Tensor, groups: int) -> dict[str, Tensor]:
        """See `Code`."""
        packed = np.packbits(to_bits(self.column_class.numpy(), self.tables.class_bits))
        return {**super().pack(codes, width, groups), "column_class": torch.from_numpy(packed)}

    def _decoded(self, words: np.ndarray, rows: int, columns: int, groups: int) -> np.ndarray:
        models, decoder = self.tables.models(), constriction.stream.queue.RangeDecoder(words)
        classes, codes = self.weight_classes().numpy(), np.empty((rows, columns), np.uint8)
        for k in np.unique(classes):
            chosen = classes == k
            codes[chosen] = decoder.decode(models[k][0], int(chosen.sum()))
        return codes

    def facts(self) -> dict[str, Any]:
        """The name of the code, and that of its tables."""
        return {"code": "column_entropy", "tables": self.tables.name}

    @classmethod
    def unpack(
        cls,
        facts: Mapping[str, Any],
        buffers: Mapping[str, Tensor],
        width: Tensor,
        codebooks: Mapping[str, Codebook | RateTables],
    ) -> Self:
        """See `Code`."""
        rows = EntropyCode.unpack({**facts, "states": None}, buffers, width, codebooks)
        size, columns = rows.tables.class_bits, facts["shape"][1]
        bits = unpack_stream(buffers["column_class"].numpy(), columns * size, "column_class")
        code = cls(rows.tables, rows.rate_class, column_class=torch.from_numpy(from_bits(bits, size)))
        code.check(width)
        return code
