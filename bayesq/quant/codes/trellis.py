"""Trellis codes: better than scalar codes at the same bits, because a column's codes choose among twice as many levels.

A row of width w has 2**(w+1) levels, twice as many as it has codes. The levels, in increasing order, belong in turn to
four subsets 0 1 2 3 0 1 ... A code is one bit b and the number k of a level in a subset. The subset follows from the
bits b of this row and of the m rows above it in the same column:

    window_r = sum_i b_{r-i} 2**i,  i = 0..m        level index = subset(window_r) + 4 k,   code = 2 k + b

The subset's two bits are parities of the window under Ungerboeck's rate-1/2 codes, so that neighbouring paths differ in
far-apart levels (Ungerboeck, IEEE Trans. Inf. Theory 28, 1982; Marcellin and Fischer, IEEE Trans. Commun. 38, 1990).
Decoding needs the codes alone; rows above the first of a convolution group count as zeros. Nothing else is stored.
BayesQ wrote such codes before 2026-11-30, and their files still load. The same subsets choose the level sets of
entropy-coded codes (`bayesq.quant.codes.entropy`).
"""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any, Self

import numpy as np
import torch
from torch import Tensor

from bayesq.quant.codes.base import Codebook, is_count
from bayesq.quant.codes.rate_tables import RateTables
from bayesq.quant.codes.shared_table import TableCode, named_tables
from bayesq.quant.compiled import compiled

# Parity-check polynomials (h0, h1) of Ungerboeck's one-dimensional codes, by number of states.
POLYNOMIALS = {
    4: (0o5, 0o2),
    8: (0o13, 0o4),
    16: (0o23, 0o4),
    32: (0o45, 0o10),
    64: (0o103, 0o24),
    128: (0o235, 0o126),
    256: (0o515, 0o362),
}
SUBSETS = 4


@dataclass(frozen=True, eq=False)
class Trellis(TableCode):
    """Codes along a trellis, with shared tables or, at widths without one, `uniform_levels`.

    Attributes:
        states: of the trellis, 2**m.
    """

    states: int

    def __post_init__(self) -> None:
        subset_table(self.states)

    def level_count(self, width: int) -> int:
        """See `WidthCode`."""
        return 1 << (width + 1)

    def computed_levels(self, width: int) -> Tensor:
        """See `WidthCode`."""
        return uniform_levels(width).to(torch.float32)

    def level_indices(self, codes: Tensor, groups: int) -> Tensor:
        """See `WidthCode`."""
        return level_indices(codes, self.states, groups)

    def facts(self) -> dict[str, Any]:
        """The states, and the tables' names by width."""
        return super().facts() | {"trellis": self.states}

    @classmethod
    def unpack(
        cls,
        facts: Mapping[str, Any],
        buffers: Mapping[str, Tensor],
        width: Tensor,
        codebooks: Mapping[str, Codebook | RateTables],
    ) -> Self:
        """See `Code`."""
        states = facts["trellis"]
        if not is_count(states) or states not in POLYNOMIALS:
            raise ValueError(f"trellis: needs one of {', '.join(map(str, POLYNOMIALS))} or null")
        return cls(named_tables(facts["codebooks"], codebooks, width), states)


@cache
def subset_table(states: int) -> np.ndarray:
    """Subset 0..3 of every window [2 * states].

    Raises:
        ValueError: there is no code with that many states.
    """
    if states not in POLYNOMIALS:
        raise ValueError(f"a trellis has {', '.join(map(str, POLYNOMIALS))} states, not {states}")
    h0, h1 = POLYNOMIALS[states]
    window = np.arange(2 * states)
    subset: np.ndarray = (2 * (np.bitwise_count(window & h0) % 2) + np.bitwise_count(window & h1) % 2).astype(np.int64)
    return subset


def uniform_levels(width: int) -> Tensor:
    """Levels [2**(width+1)] of a trellis row without a codebook: half steps, centred on the codes 0 .. 2**width - 1."""
    return torch.arange(2 ** (width + 1), dtype=torch.float64) / 2 - 0.25


def level_indices(codes: Tensor, states: int, groups: int) -> Tensor:
    """Index int64 [R, C] into the levels of each row's width, from codes [R, C] uint8.

    Args:
        states: 2**m.
        groups: convolution groups; each group's rows begin a new path.
    """
    code = codes.reshape(groups, -1, codes.shape[1]).contiguous()
    index = torch.empty(code.shape, dtype=torch.int64)
    subset = subset_table(states)
    for group_code, group_index in zip(code.numpy(), index.numpy(), strict=True):
        _decode(group_code, subset, group_index)
    return index.reshape(codes.shape)


@compiled()
def _decode(code: Any, subset: Any, index: Any) -> None:
    """`level_indices` of one group: code [n, C] uint8, subset [2 * states], index [n, C] int64 written."""
    window = np.zeros(code.shape[1], np.int64)
    for r in range(code.shape[0]):
        for c in range(code.shape[1]):
            window[c] = (window[c] << 1 | code[r, c] & 1) & (len(subset) - 1)
            index[r, c] = subset[window[c]] + SUBSETS * (code[r, c] >> 1)
