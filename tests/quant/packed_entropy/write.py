"""Writes golden.safetensors: entropy-coded layers made from whole numbers alone. Run once, with constriction 0.5.0."""

from pathlib import Path

import numpy as np
import torch

from bayesq.quant.codes import EntropyCode, RateTables
from bayesq.quant.file import Packed, write_packed
from bayesq.quant.tensor import QuantizedTensor

FILE = Path(__file__).parent / "golden.safetensors"


def golden_layers() -> dict[str, QuantizedTensor]:
    """A layer on a trellis, one with groups, and one of scalar codes; the numbers come from 31 k^3 mod 65521."""
    numbers = np.array([31 * k**3 % 65521 for k in range(4096)], dtype=np.int64)
    tables = RateTables("entropy", golden_tables())
    layers = {}
    for name, rows, columns, groups, states in (
        ("trellis", 24, 40, 1, 64),
        ("groups", 12, 9, 3, 8),
        ("scalar", 8, 16, 1, None),
    ):
        count = rows * columns
        # differences of two uniform numbers: small symbols are frequent
        codes = 128 + (numbers[:count] % 13 - numbers[count : 2 * count] % 13).reshape(rows, columns) // 2
        layers[name] = QuantizedTensor(
            codes=torch.from_numpy(codes.astype(np.uint8)),
            width=torch.full((rows,), 8, dtype=torch.uint8),
            scale=torch.from_numpy(((numbers[:rows] % 64 + 1) / 256).reshape(rows, 1)).half(),
            zero=torch.full((rows, 1), 128, dtype=torch.uint8),
            groups=groups,
            code=EntropyCode(tables, torch.from_numpy((numbers[:rows] % 2).astype(np.uint8)), states),
        )
    return layers


def golden_tables() -> torch.Tensor:
    """Two classes, written byte by byte: n, two shifts, then n logarithms."""
    narrow = [5, 120, 130, 10, 20, 26, 34, 44], [6, 150, 128, 30, 14, 22, 30, 38, 50]
    wide = [9, 126, 128, 22, 24, 26, 29, 32, 36, 41, 47, 55], [9, 140, 127, 40, 23, 25, 28, 31, 35, 40, 46, 54]
    return torch.tensor([2, *narrow[0], *narrow[1], *wide[0], *wide[1]], dtype=torch.uint8)


if __name__ == "__main__":
    write_packed(FILE, Packed(golden_layers()))
