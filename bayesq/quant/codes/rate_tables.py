"""Code tables of entropy-coded rows: for each rate class and set of levels, frequencies of symbols, and their levels.

Tables are symmetric about the symbol 0. Sizes |s| share bins: one for each of 0 .. 15, then wider ones, about eight for
each doubling. Stored are bytes:

    classes, then for each class and each of the two sets: n, shift of |s| = 1, shift of |s| > 1, b_0 .. b_{n-1}

    frequency of s in bin i:   2**20 2**(-b_i / 8) rounded down, at least 1;   1 in later bins
    level of s:                sign(s) (|s| - set / 2 + (shift - 128) / 512)

Frequencies are whole numbers from a table of eight constants, so every machine computes the same ones; their quotients
by the sum are the probabilities that constriction gets in float64.
"""

from dataclasses import dataclass
from functools import cache
from typing import Any

import constriction
import numpy as np
import torch
from torch import Tensor

ALPHABET, CENTRE, SETS = 256, 128, 2
MOST_CLASSES = 16
# From this size on, a bin that begins at size s holds 2 s // LAST_SINGLE sizes.
LAST_SINGLE = 16
# 2**(20 - j / 8) for j = 0 .. 7
EIGHTHS = (1048576, 961548, 881743, 808562, 741455, 679917, 623487, 571740)
# Count that is added to each bin, and the largest b, which is frequency 1.
UNSEEN, LEAST_LOG = 0.25, 160
# Levels move in units of 1 / SHIFT_UNIT of a step.
SHIFT_UNIT = 512


@dataclass(frozen=True)
class RateTables:
    """Tables of a model, stored once under their name.

    Attributes:
        name: unique within a model.
        buffer: [bytes] uint8, see above.
    """

    name: str
    buffer: Tensor

    def __post_init__(self) -> None:
        _parsed(self._key())

    def _key(self) -> bytes:
        if self.buffer.dtype != torch.uint8 or self.buffer.ndim != 1:
            raise ValueError(f"tables {self.name}: needs uint8 in one dimension")
        return self.buffer.numpy().tobytes()

    @property
    def classes(self) -> int:
        """How many rate classes there are."""
        return int(self.buffer[0])

    @property
    def class_bits(self) -> int:
        """Bits of a row's class."""
        return max(1, (self.classes - 1).bit_length())

    def levels(self) -> Tensor:
        """Levels float32 [classes, sets, 256] by code, in units of a row's step."""
        return torch.from_numpy(_parsed(self._key())[1])

    def lengths(self) -> np.ndarray:
        """Ideal code lengths in bits, float64 [classes, sets, 256] by code."""
        frequency = _parsed(self._key())[0]
        lengths: np.ndarray = -np.log2(frequency / frequency.sum(-1, keepdims=True))
        return lengths

    def models(self) -> tuple[tuple[Any, ...], ...]:
        """constriction's models by class and set."""
        return _models(self._key())

    @classmethod
    def of(cls, counts: np.ndarray, moments: np.ndarray | None = None, name: str = "entropy") -> "RateTables":
        """Tables for symbols with these counts.

        Args:
            counts: [classes, sets, 256] by code, any weights of at least 0.
            moments: [classes, sets, 256, 2] weighted sums over the weights of each code: of the weight, and of the
                targets in level units times the weight; levels become centroids. None = no shifts.
        """
        stored = [len(counts)]
        for k in range(len(counts)):
            for t in range(SETS):
                stored += _table(counts[k, t], None if moments is None else moments[k, t], t)
        return cls(name, torch.tensor(stored, dtype=torch.uint8))


def _bins() -> np.ndarray:
    """The bin of each size 0 .. 128: int64 [129]."""
    bins, size, index = np.zeros(CENTRE + 1, np.int64), 0, 0
    while size <= CENTRE:
        width = max(1, 2 * size // LAST_SINGLE)
        bins[size : size + width] = index
        size, index = size + width, index + 1
    return bins


BINS = _bins()
SIZE = np.abs(np.arange(ALPHABET) - CENTRE)
SIGN = np.sign(np.arange(ALPHABET) - CENTRE)


def _table(counts: np.ndarray, moments: np.ndarray | None, which: int) -> list[int]:
    """The bytes of one table."""
    mass = np.bincount(BINS[SIZE], counts, minlength=BINS[-1] + 1)
    symbols = np.bincount(BINS[SIZE], minlength=BINS[-1] + 1)
    used = np.nonzero(mass)[0]
    n = int(used[-1]) + 1 if len(used) else 1
    # UNSEEN is added to each bin, so that symbols that did not occur do not get very long codes
    each = (mass[:n] + UNSEEN) / symbols[:n]
    total = (each * symbols[:n]).sum()
    logs = np.clip(np.rint(-8 * np.log2(each / total)), 0, LEAST_LOG).astype(int)
    shifts = [CENTRE, CENTRE]
    if moments is not None:
        for j, chosen in enumerate((SIZE == 1, SIZE > 1)):
            weight = moments[chosen, 0]
            if weight.sum() > 0:
                off = (SIGN[chosen] * moments[chosen, 1] - (SIZE[chosen] - which / 2) * weight).sum() / weight.sum()
                shifts[j] = int(np.clip(np.rint(SHIFT_UNIT * off) + CENTRE, 0, ALPHABET - 1))
    return [n, *shifts, *logs.tolist()]


@cache
def _parsed(stored: bytes) -> tuple[np.ndarray, np.ndarray]:
    """Frequencies int64 and levels float32, [classes, sets, 256] by code.

    Raises:
        ValueError: the bytes are no tables.
    """
    classes = stored[0] if stored else 0
    if not 1 <= classes <= MOST_CLASSES:
        raise ValueError(f"tables: needs 1 to {MOST_CLASSES} classes, not {classes}")
    frequency = np.ones((classes, SETS, ALPHABET), np.int64)
    levels = np.zeros((classes, SETS, ALPHABET), np.float32)
    place = 1
    for k in range(classes):
        for t in range(SETS):
            head = stored[place : place + 3]
            if len(head) < 3 or not 1 <= head[0] <= BINS[-1] + 1:
                raise ValueError(f"tables: class {k} needs 1 to {BINS[-1] + 1} bins")
            logs = np.frombuffer(stored[place + 3 : place + 3 + head[0]], np.uint8).astype(np.int64)
            if len(logs) < head[0]:
                raise ValueError("tables: the bytes end too early")
            place += 3 + head[0]
            by_bin = np.ones(BINS[-1] + 1, np.int64)
            by_bin[: head[0]] = np.maximum(np.array(EIGHTHS)[logs % 8] >> (logs // 8), 1)
            frequency[k, t] = by_bin[BINS[SIZE]]
            shift = np.where(SIZE == 1, head[1], head[2]) - CENTRE
            levels[k, t] = SIGN * (SIZE - t / 2 + shift / SHIFT_UNIT)
    if place != len(stored):
        raise ValueError(f"tables: {len(stored) - place} bytes too many")
    return frequency, levels


@cache
def _models(stored: bytes) -> tuple[tuple[Any, ...], ...]:
    frequency, _ = _parsed(stored)
    probability = frequency / frequency.sum(-1, keepdims=True)
    make = constriction.stream.model.Categorical
    return tuple(tuple(make(p, lazy=False, perfect=False) for p in by_set) for by_set in probability)
