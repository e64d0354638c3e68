"""Bitshift trellis codes (QTIP; Tseng et al., arXiv 2406.11235): a level for each of the last bits of a column.

The codes of a column, row by row, are one stream of bits. The last L of them, up to and with those of row r, are the
state of row r, and each of the 2**L states has a level:

    W[r, c] = scale_r (level(state) - zero_r),   level(state) ~ the normal quantile of rank(state)

The stream is a ring: the last row of a convolution group is above its first. So nothing is stored beside the codes, and
rows of any widths can share a column. `bayesq.quant.bitshift` searches the best path.

Two orders of the levels:

Bitshift      Ranks from a hash, so that states with common bits have unrelated levels, as QTIP has them.
Congruential  rank = multiplier * state mod 2**L, with a multiplier for each width, after the linear congruential
              trellis source codes of Eriksson, Johannesson, Novak and Anderson (IEEE Trans. Commun. 55, 2007). Paths
              that split or merge at a row have levels spread over the whole distribution. With 1,024 states its
              squared error for normal weights is below that of hashed levels with 4,096.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any, ClassVar, Self

import numpy as np
import torch
from torch import Tensor

from bayesq.quant.codes.base import Code, Codebook, LevelPart, is_count
from bayesq.quant.codes.rate_tables import RateTables
from bayesq.quant.compiled import compiled
from bayesq.quant.grids import MIN_WIDTH

# States 2**L. A row of 8 bits needs L >= 8; with L > 16 the search does not fit in the caches.
STATES = tuple(1 << bits for bits in range(8, 17))
# Multipliers for rows of 2 to 8 bits, by the number of states: of all odd numbers those with the least squared error
# for normal weights in long columns (a slow test in tests/quant/test_bitshift.py searches those of 256 states again).
MULTIPLIERS = {
    256: (69, 95, 81, 113, 95, 107, 107),
    1024: (265, 123, 61, 199, 347, 223, 383),
    4096: (1049, 1543, 249, 131, 1693, 1817, 1619),
}
# Least bits of a column for each number of states. A path has to close to a ring, which costs more if a state is long
# compared to the column. Shorter columns have scalar codes. Best for normal weights at 2 to 6 bits in columns of 6 to
# 64 rows, by `bayesq.quant.bitshift.bitshift_distortion`.
LEAST_RING_BITS = {256: 12, 1024: 60, 4096: 128}


@dataclass(frozen=True)
class Bitshift(Code):
    """Codes along a ring of bits in each column, with hashed levels.

    Attributes:
        states: 2**L.
    """

    states: int

    NAME: ClassVar[str] = "bitshift"
    FACTS = ("code", "states")

    def __post_init__(self) -> None:
        if self.states not in STATES:
            raise ValueError(f"states: needs one of {', '.join(map(str, STATES))}, not {self.states}")

    def check(self, width: Tensor) -> None:
        """See `Code`; it fits rows of any width."""

    def levels(self, width: int) -> Tensor:
        """Levels [2**L] float32 of the states in rows of a width, in level units."""
        return normal_levels(self.states)

    def middle(self, width: int) -> float:
        """The middle of the levels of rows of a width."""
        return 0.0

    def unit(self, width: int) -> float:
        """A level unit, in standard deviations of the levels of a width."""
        return 1.0

    def parts(self, width: Tensor) -> tuple[LevelPart, ...]:
        """The levels of all states, which are not stored."""
        return (LevelPart(normal_levels(self.states)),)

    def positions(self, codes: Tensor, width: Tensor, groups: int) -> Tensor:
        """The state of each weight."""
        state = torch.empty(codes.shape, dtype=torch.int64)
        rows = len(codes) // groups
        parts = (part.contiguous().split(rows) for part in (codes, width.long(), state))
        for code, bits, written in zip(*parts, strict=True):
            turns = 1 + -(-(self.states - 1).bit_length() // int(bits.sum()))
            _states(code.numpy(), bits.numpy(), self.states - 1, turns, written.numpy())
        return state

    def facts(self) -> dict[str, Any]:
        """The name of the code, and its states."""
        return {"code": self.NAME, "states": self.states}

    @classmethod
    def unpack(
        cls,
        facts: Mapping[str, Any],
        buffers: Mapping[str, Tensor],
        width: Tensor,
        codebooks: Mapping[str, Codebook | RateTables],
    ) -> Self:
        """See `Code`."""
        if not is_count(facts["states"]):
            raise ValueError(f"states: needs one of {', '.join(map(str, STATES))}")
        return cls(facts["states"])


class Congruential(Bitshift):
    """Codes along a ring of bits in each column, with the levels of the linear congruential order.

    A standard deviation of the levels is 2**(width - 3) level units, and their middle is 2**(width - 1).
    """

    NAME = "congruential"

    def __post_init__(self) -> None:
        if self.states not in MULTIPLIERS:
            raise ValueError(f"states: needs one of {', '.join(map(str, MULTIPLIERS))}, not {self.states}")

    def levels(self, width: int) -> Tensor:
        """See `Bitshift`."""
        return congruential_levels(self.states, width)

    def middle(self, width: int) -> float:
        """See `Bitshift`."""
        return 2.0 ** (width - 1)

    def unit(self, width: int) -> float:
        """See `Bitshift`."""
        return 2.0 ** (3 - width)

    def parts(self, width: Tensor) -> tuple[LevelPart, ...]:
        """The levels of all states for each width of the rows, narrow widths first."""
        return tuple(LevelPart(self.levels(w)) for w in width.unique().tolist())

    def positions(self, codes: Tensor, width: Tensor, groups: int) -> Tensor:
        """See `Code`."""
        start = torch.searchsorted(width.unique(), width) * self.states
        return super().positions(codes, width, groups).add_(start[:, None])


def trellis_for(bits: int, most_states: int) -> Congruential | None:
    """The trellis code of columns of `bits` bits; None: scalar codes are better."""
    states = [states for states, least in LEAST_RING_BITS.items() if bits >= least and states <= most_states]
    return Congruential(max(states)) if states else None


@compiled()
def _states(code: Any, width: Any, mask: Any, turns: Any, state: Any) -> None:
    """Write the state [n, C] of each weight of one group from its codes [n, C]; the first turns fill the window."""
    window = np.zeros(code.shape[1], np.int64)
    for _ in range(turns):
        for r in range(code.shape[0]):
            for c in range(code.shape[1]):
                window[c] = (window[c] << width[r] | code[r, c]) & mask
                state[r, c] = window[c]


@cache
def normal_levels(states: int) -> Tensor:
    """Hashed level of every state: float32 with the precision of fp16, so that all machines compute the same."""
    mixed = np.arange(1, states + 1, dtype=np.uint64)
    for factor, shift in ((0x9E3779B1, 15), (0x85EBCA77, 13)):  # a hash of 32 bits: multiply, then fold
        mixed = mixed * np.uint64(factor) % np.uint64(2**32)
        mixed ^= mixed >> np.uint64(shift)
    rank = np.empty(states, dtype=np.int64)
    rank[np.argsort(mixed, kind="stable")] = np.arange(states)
    levels: Tensor = torch.special.ndtri((torch.from_numpy(rank).double() + 0.5) / states)
    return levels.to(torch.float16).to(torch.float32)


@cache
def congruential_levels(states: int, width: int) -> Tensor:
    """Levels [2**L] of rows of a width, float32: see `Congruential`."""
    rank = MULTIPLIERS[states][width - MIN_WIDTH] * torch.arange(states) % states
    quantile: Tensor = torch.special.ndtri((rank.double() + 0.5) / states).to(torch.float16).to(torch.float32)
    return 2.0 ** (width - 1) + 2.0 ** (width - 3) * quantile
