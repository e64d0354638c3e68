"""Entropy-coded codes: a row has a step instead of a width, and the codes of a layer are one compressed stream.

A code k = 0 .. 255 stands for the symbol s = k - 128. All rows of a layer have width 8, stored as one byte, and zero
point 128, which is not stored. A trellis gives each weight one of two sets of levels, in units of the row's step:

    set 0:  s = ... -2, -1, 0, 1, 2 ...        set 1:  s - sign(s) / 2 = ... -3/2, -1/2, 0, 1/2, 3/2 ...

The set follows from the symbols above the weight in its column: the four subsets of `bayesq.quant.codes.trellis` are

    subset = set + 2 parity,    parity = s mod 2, flipped in set 1 for s < 0

and the window of this row's bit and the bits above it gives the subset, as in that module. Without a trellis, all
weights have set 0. This is entropy-coded trellis quantization (Fischer and Wang, IEEE Trans. Inf. Theory 38, 1992;
Marcellin, IEEE Trans. Commun. 42, 1994) with both sets containing 0, so that rows of few bits can be mostly zeros.

Rows of similar rate share a table with the frequencies of the symbols in each set (`bayesq.quant.codes.rate_tables`).
The stream is a range coder's (package constriction), row by row, first the weights of set 0 and then those of set 1, so
layers are decoded one by one.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Self

import constriction
import numpy as np
import torch
from torch import Tensor

from bayesq.quant.bits import from_bits, to_bits, unpack_stream
from bayesq.quant.codes.base import Code, Codebook, LevelPart, is_count, shown
from bayesq.quant.codes.rate_tables import ALPHABET, CENTRE, SETS, RateTables
from bayesq.quant.codes.trellis import POLYNOMIALS, subset_table
from bayesq.quant.compiled import compiled

# A stream has at least one bit per this many weights, so that a small file cannot claim a large layer.
MOST_WEIGHTS_PER_BIT = 64
# Bytes of a word of constriction's range coder.
WORD = 4


@dataclass(frozen=True, eq=False)
class EntropyCode(Code):
    """Codes in a stream of entropy-coded symbols.

    Attributes:
        tables: of all layers.
        rate_class: [R] uint8, which of the tables each row uses.
        states: of the trellis, 2**m; None = scalar codes.
    """

    tables: RateTables
    rate_class: Tensor
    states: int | None = None

    centred = True
    LEAST_BITS = 1 / MOST_WEIGHTS_PER_BIT
    FACTS: ClassVar[tuple[str, ...]] = ("code", "tables", "states")
    BUFFERS: ClassVar = {"rate_class": (torch.uint8, 1)}

    def check(self, width: Tensor) -> None:
        """See `Code`."""
        if self.states is not None and self.states not in POLYNOMIALS:
            raise ValueError(f"states: needs one of {', '.join(map(str, POLYNOMIALS))} or null")
        if self.rate_class.dtype != torch.uint8 or self.rate_class.shape != width.shape:
            raise ValueError(f"rate_class: needs uint8 [{len(width)}], not {list(self.rate_class.shape)}")
        if int(self.rate_class.max()) >= self.tables.classes:
            raise ValueError(f"rate_class: the tables have {self.tables.classes} classes, not {self.rate_class.max()}")
        if not bool((width == 8).all()):
            raise ValueError("width: rows of an entropy-coded layer have width 8")

    def parts(self, width: Tensor) -> tuple[LevelPart, ...]:
        """One part: the levels of each class and set, in order; they follow from the tables."""
        return (LevelPart(self.tables.levels().flatten() + CENTRE),)

    def positions(self, codes: Tensor, width: Tensor, groups: int) -> Tensor:
        """See `Code`."""
        which = torch.from_numpy(level_sets(codes.numpy(), self.states, groups)).long()
        start = SETS * self.rate_class.long()[:, None]
        return (start + which).mul_(ALPHABET).add_(codes)

    def codebooks(self) -> tuple[RateTables, ...]:
        """See `Code`."""
        return (self.tables,)

    def code_bits(self, codes: Tensor, width: Tensor, groups: int) -> int:
        """Bits of the stream."""
        return 8 * len(self.stream(codes, groups))

    def stream(self, codes: Tensor, groups: int) -> np.ndarray:
        """The stream of codes [R, C] as bytes [n] uint8."""
        models, encoder = self.tables.models(), constriction.stream.queue.RangeEncoder()
        for r, which, symbols in self._parts_of(codes.numpy().astype(np.int32), groups):
            encoder.encode(symbols, models[self.rate_class[r]][which])
        return self._padded(encoder, codes.numel())

    @staticmethod
    def _padded(encoder: Any, weights: int) -> np.ndarray:
        """The stream of constriction's encoder, padded to the least length for this number of weights."""
        stream = encoder.get_compressed().astype("<u4").view(np.uint8)
        least = -(-weights // (8 * MOST_WEIGHTS_PER_BIT))
        return np.concatenate([stream, np.zeros(max(0, least - len(stream)), np.uint8)])

    def _parts_of(self, codes: np.ndarray, groups: int) -> Iterator[tuple[int, int, np.ndarray]]:
        """Row, set and symbols of each part of the stream, in order."""
        if self.states is None:
            yield from ((r, 0, row) for r, row in enumerate(codes))
            return
        for r, (row, upper) in enumerate(zip(codes, level_sets(codes, self.states, groups) > 0, strict=True)):
            yield r, 0, row[~upper]
            yield r, 1, row[upper]

    def pack(self, codes: Tensor, width: Tensor, groups: int) -> dict[str, Tensor]:
        """See `Code`."""
        classes = np.packbits(to_bits(self.rate_class.numpy(), self.tables.class_bits))
        return {"codes": torch.from_numpy(self.stream(codes, groups)), "rate_class": torch.from_numpy(classes)}

    def unpack_codes(self, buffers: Mapping[str, Tensor], width: Tensor, columns: int, groups: int) -> Tensor:
        """See `Code`; a stream is accepted only if encoding its codes gives the same bytes."""
        stream = buffers["codes"].numpy()
        words = np.frombuffer(stream.tobytes() + bytes(-len(stream) % WORD), "<u4").astype(np.uint32)
        try:
            codes = torch.from_numpy(self._decoded(words, len(width), columns, groups))
        except AssertionError as error:  # raised by constriction
            raise ValueError("codes: the stream does not fit its tables") from error
        if not np.array_equal(self.stream(codes, groups), stream):
            raise ValueError("codes: encoding the decoded codes gives another stream")
        return codes

    def _decoded(self, words: np.ndarray, rows: int, columns: int, groups: int) -> np.ndarray:
        models, decoder = self.tables.models(), constriction.stream.queue.RangeDecoder(words)
        codes, classes = np.empty((rows, columns), np.uint8), self.rate_class.tolist()
        if self.states is None:
            for r in range(rows):
                codes[r] = decoder.decode(models[classes[r]][0], columns)
            return codes
        state, subset = np.zeros(columns, np.int64), subset_table(self.states)
        for r in range(rows):
            if r % (rows // groups) == 0:
                state[:] = 0
            upper = subset[2 * state] % 2 > 0
            for which, chosen in enumerate((~upper, upper)):
                codes[r, chosen] = decoder.decode(models[classes[r]][which], int(chosen.sum()))
            _advance(codes[r], state, subset)
        return codes

    def facts(self) -> dict[str, Any]:
        """The name of the code, that of its tables, and the states."""
        return {"code": "entropy", "tables": self.tables.name, "states": self.states}

    @classmethod
    def unpack(
        cls,
        facts: Mapping[str, Any],
        buffers: Mapping[str, Tensor],
        width: Tensor,
        codebooks: Mapping[str, "Codebook | RateTables"],
    ) -> Self:
        """See `Code`."""
        name, states = facts["tables"], facts["states"]
        tables = codebooks.get(name) if isinstance(name, str) else None
        if not isinstance(tables, RateTables):
            raise ValueError(f"tables: there are no code tables {shown(name)}")
        if states is not None and not (is_count(states) and states in POLYNOMIALS):
            raise ValueError(f"states: needs one of {', '.join(map(str, POLYNOMIALS))} or null")
        bits = unpack_stream(buffers["rate_class"].numpy(), len(width) * tables.class_bits, "rate_class")
        code = cls(tables, torch.from_numpy(from_bits(bits, tables.class_bits)), states)
        code.check(width)
        return code


def level_sets(codes: np.ndarray, states: int | None, groups: int) -> np.ndarray:
    """Which set of levels each weight has: uint8 [R, C] of 0 and 1.

    Args:
        codes: [R, C].
        states: of the trellis; None = all 0.
        groups: convolution groups; each group's rows begin a new path.
    """
    which = np.zeros(codes.shape, np.uint8)
    if states is not None:
        _level_sets(
            codes.reshape(groups, -1, codes.shape[1]), subset_table(states), which.reshape(groups, -1, codes.shape[1])
        )
    return which


@compiled()
def _level_sets(codes: Any, subset: Any, which: Any) -> None:
    for g in range(codes.shape[0]):
        state = np.zeros(codes.shape[2], np.int64)
        for r in range(codes.shape[1]):
            for c in range(codes.shape[2]):
                which[g, r, c] = subset[2 * state[c]] & 1
            _advance(codes[g, r], state, subset)


@compiled()
def _advance(code: Any, state: Any, subset: Any) -> None:
    """Move the trellis states [C] of a row's columns past its codes [C]; subset [2 * states]."""
    for c in range(len(code)):
        low = subset[2 * state[c]]
        parity = (code[c] & 1) ^ ((low & 1) & (code[c] < CENTRE))
        state[c] = (2 * state[c] + (parity ^ (low >> 1))) & (len(subset) // 2 - 1)
