"""Code: how the integers of a layer are decoded to levels and packed, and what is stored beside them.

A layer has one table of levels, which consists of parts. `positions` gives the position of each weight's level in the
table, so decoding is one look-up, and distillation trains the parts that are stored.
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Self

import numpy as np
import torch
from torch import Tensor

from bayesq.quant.bits import from_bits, to_bits, unpack_stream
from bayesq.quant.codes.rate_tables import RateTables
from bayesq.quant.grids import FP16_MAX, MAX_WIDTH, MIN_WIDTH


@dataclass(frozen=True)
class Codebook:
    """Increasing levels shared by any number of layers; stored once per model under its name.

    Attributes:
        name: unique within a model, for instance "lloyd/3".
        levels: [2**width] fp16, twice as many for trellis codes.
    """

    name: str
    levels: Tensor

    @property
    def buffer(self) -> Tensor:
        """What is stored."""
        return self.levels

    def __post_init__(self) -> None:
        if self.levels.dtype != torch.float16:
            raise ValueError(f"codebook {self.name}: levels must be stored as float16, not {self.levels.dtype}")
        if not bool((self.levels[1:] >= self.levels[:-1]).all()):
            raise ValueError(f"codebook {self.name}: levels must not decrease")


@dataclass(frozen=True)
class LevelPart:
    """Some neighbouring levels of a layer's table.

    Attributes:
        levels: [K] float32.
        name: under which they are stored; None for levels that follow from the width.
        shared: whether parts of this name are one table for all layers of a model, or one per layer.
        rows: how many rows read each level.
        step: distance that distillation counts as one level step, in the units of the levels; a number or [K].
    """

    levels: Tensor
    name: str | None = None
    shared: bool = False
    rows: int = 1
    step: float | Tensor = 1.0

    def key(self, layer: str) -> str | None:
        """Identifies these levels in a model: parts with the same key are one table; None: not stored."""
        return self.name if self.name is None or self.shared else f"{layer}/{self.name}"


class Code(ABC):
    """Decodes the codes [R, C] of a layer with R rows of `width` [R] bits.

    Attributes:
        uniform: whether the level of a code is the code itself.
        absolute: whether levels are weights, so that rows have neither scale nor zero point.
        centred: whether every zero point is the middle of 8 bits, which is not stored.
        FACTS: entries of the code in a packed file's header.
        BUFFERS: buffers of `pack` besides the codes: dtype and number of dimensions by name.
        LEAST_BITS: least number of bits that a weight takes in `codes`.
    """

    uniform: ClassVar[bool] = False
    absolute: ClassVar[bool] = False
    centred: ClassVar[bool] = False
    FACTS: ClassVar[tuple[str, ...]] = ()
    BUFFERS: ClassVar[Mapping[str, tuple[torch.dtype, int]]] = {}
    LEAST_BITS: ClassVar[float] = MIN_WIDTH

    @abstractmethod
    def check(self, width: Tensor) -> None:
        """Check that the code fits rows of these widths.

        Raises:
            ValueError: it does not fit.
        """

    @abstractmethod
    def parts(self, width: Tensor) -> tuple[LevelPart, ...]:
        """The parts of the layer's table, in order."""

    @abstractmethod
    def positions(self, codes: Tensor, width: Tensor, groups: int) -> Tensor:
        """Position of each weight's level in the table: int64 [R, C].

        Args:
            codes: [R, C] uint8.
            width: [R] bits.
            groups: convolution groups, each of which has R / groups rows.
        """

    def with_levels(self, levels: Mapping[str, Tensor], width: Tensor) -> Self:
        """The same code with other levels, by name of the stored part, made non-decreasing and rounded to fp16."""
        return self

    def times(self, factors: Tensor, width: Tensor) -> Self:
        """The same code with the levels of each row times a positive factor [R]; only if levels are weights."""
        raise NotImplementedError

    def codebooks(self) -> tuple[Codebook | RateTables, ...]:
        """The tables it shares with other layers, which the model stores."""
        return ()

    def code_bits(self, codes: Tensor, width: Tensor, groups: int) -> int:
        """Bits of the codes alone."""
        return int(width.sum()) * codes.shape[1]

    def pack(self, codes: Tensor, width: Tensor, groups: int) -> dict[str, Tensor]:
        """Buffers of the layer: `codes`, one stream of bits, and those of BUFFERS.

        Rows are grouped by width, narrow rows first, row order kept; the stream is padded to whole bytes once.

        Args:
            codes: [R, C] uint8.
            width: [R] bits.
            groups: convolution groups.
        """
        code, bits = codes.numpy(), width.numpy()
        stream = np.concatenate([to_bits(code[bits == w], int(w)) for w in np.unique(bits)])
        return {"codes": torch.from_numpy(np.packbits(stream))}

    @abstractmethod
    def facts(self) -> dict[str, Any]:
        """The entries of the header under FACTS."""

    def unpack_codes(self, buffers: Mapping[str, Tensor], width: Tensor, columns: int, groups: int) -> Tensor:
        """Codes [R, C] of the buffers of `pack`.

        Raises:
            ValueError: the stream does not fit the widths or its tables.
        """
        count = int(width.sum(dtype=torch.int64)) * columns
        stream = unpack_stream(buffers["codes"].numpy(), count, "codes")
        codes, row_width = np.empty((len(width), columns), dtype=np.uint8), width.numpy()
        start = 0
        for w in np.unique(row_width):
            chosen = row_width == w
            stop = start + int(chosen.sum()) * columns * int(w)
            codes[chosen] = from_bits(stream[start:stop], int(w)).reshape(-1, columns)
            start = stop
        return torch.from_numpy(codes)

    @classmethod
    @abstractmethod
    def unpack(
        cls,
        facts: Mapping[str, Any],
        buffers: Mapping[str, Tensor],
        width: Tensor,
        codebooks: Mapping[str, Codebook | RateTables],
    ) -> Self:
        """The code that wrote these facts and buffers.

        Args:
            width: [R] bits of the layer's rows.
            codebooks: of the model, by name.

        Raises:
            ValueError: a fact has the wrong kind, or names a codebook that is missing.
        """


class WidthCode(Code):
    """A code whose levels depend on a row's width alone.

    The header has the entries `trellis` and `codebooks` for these codes, so that old files can be read.
    """

    FACTS = ("trellis", "codebooks")

    def level_count(self, width: int) -> int:
        """How many levels rows of a width have."""
        return 1 << width

    def computed_levels(self, width: int) -> Tensor:
        """Increasing levels of a width that has no table, float32."""
        return torch.arange(2**width, dtype=torch.float32)

    def table(self, width: int) -> Codebook | None:
        """The table of a width; None where its levels are computed."""
        return None

    def check(self, width: Tensor) -> None:
        """See `Code`; computed levels fit rows of any width."""

    def parts(self, width: Tensor) -> tuple[LevelPart, ...]:
        """The levels of each width of the rows, in level units, narrow widths first."""
        parts = []
        for w, rows in zip(*(column.tolist() for column in width.unique(return_counts=True)), strict=True):
            table = self.table(w)
            if table is None:
                parts.append(LevelPart(self.computed_levels(w)))
            else:
                parts.append(LevelPart(table.levels.to(torch.float32), table.name, shared=True, rows=rows))
        return tuple(parts)

    def level_indices(self, codes: Tensor, groups: int) -> Tensor:
        """Index of each weight's level among those of its row: int64 [R, C], in other memory than `codes`."""
        return codes.long()

    def positions(self, codes: Tensor, width: Tensor, groups: int) -> Tensor:
        """See `Code`."""
        start, offset = torch.zeros(MAX_WIDTH + 1, dtype=torch.int64), 0
        for w in width.unique().tolist():
            start[w], offset = offset, offset + self.level_count(w)
        return self.level_indices(codes, groups).add_(start[width.long()][:, None])

    def facts(self) -> dict[str, Any]:
        """No trellis, no tables."""
        return {"trellis": None, "codebooks": {}}


def stored_levels(levels: Tensor) -> Tensor:
    """Levels as they are stored: fp16 on the CPU, non-decreasing along the last dimension.

    Levels out of order become the mean of the running maximum from below and the running minimum from above; both are
    non-decreasing, and both do not change ordered levels.
    """
    below, above = levels.cummax(-1).values, levels.flip(-1).cummin(-1).values.flip(-1)
    return ((below + above) / 2).clamp(-FP16_MAX, FP16_MAX).to("cpu", torch.float16)


def is_count(value: Any) -> bool:
    """Whether a value from a header is a positive whole number."""
    return isinstance(value, int) and not isinstance(value, bool) and value >= 1


def shown(value: Any) -> str:
    """A value from a header, short enough for a line."""
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
