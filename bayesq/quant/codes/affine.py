"""Affine codes: the level of a code is the code itself, level(k) = k."""

from collections.abc import Mapping
from typing import Any, Self

from torch import Tensor

from bayesq.quant.codes.base import Codebook, WidthCode
from bayesq.quant.codes.rate_tables import RateTables


class Affine(WidthCode):
    """level(k) = k; nothing is stored beside the codes."""

    uniform = True

    @classmethod
    def unpack(
        cls,
        facts: Mapping[str, Any],
        buffers: Mapping[str, Tensor],
        width: Tensor,
        codebooks: Mapping[str, Codebook | RateTables],
    ) -> Self:
        """See `Code`."""
        return cls()
