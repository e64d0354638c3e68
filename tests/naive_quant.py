"""Slow float64 references for bayesq.quant and the baselines, written from the published equations.

Nothing here calls the code under test: plain loops over numpy arrays, one matrix [r, c] at a time.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from statistics import NormalDist

import numpy as np
import torch
from torch import Tensor

from bayesq.contract import LayerProblem
from bayesq.quant.codes import Affine, Bitshift, Code, Congruential, RowTable, Trellis
from bayesq.quant.codes.bitshift import MULTIPLIERS, normal_levels
from bayesq.quant.tensor import QuantizedTensor

Rounder = Callable[[float, int, int], tuple[int, float]]  # (entry, row, original column) -> code, value


def fp16(value: float) -> float:
    return float(np.float16(min(value, 65504.0)))


def clip(value: float, low: float, high: float) -> float:
    return max(low, min(high, value))


def affine_nearest(entry: float, scale: float, zero: float, width: int) -> tuple[int, float]:
    """Nearest value of scale * (k - zero), k = 0 .. 2**width - 1."""
    code = int(clip(np.rint(entry / scale) + zero, 0, 2**width - 1))
    return code, scale * (code - zero)


def range_grid(low: float, high: float, width: int, single: bool = False) -> tuple[float, float]:
    """Scale and zero of the grid on [low, high]; fp16 scale unless `single` (float32)."""
    if low == high == 0:
        low, high = -1.0, 1.0
    top = 2**width - 1
    scale = (high - low) / top
    scale = float(np.float32(scale)) if single else fp16(scale)
    return scale, clip(float(np.rint(-low / scale)), 0, top)


def minmax(row: np.ndarray, width: int, single: bool = False) -> tuple[float, float]:
    return range_grid(min(0.0, float(row.min())), max(0.0, float(row.max())), width, single)


def mse(row: np.ndarray, width: int, single: bool = False, gain: np.ndarray | None = None) -> tuple[float, float]:
    """The range times 1.00, 0.99, .. 0.21 with the least sum |w - q(w)|**2.4; the widest of equals.

    With a gain [C]: the least sum gain (w - q(w))**2.
    """
    costs, power = (np.ones(len(row)), 2.4) if gain is None else (gain, 2.0)
    low, high = min(0.0, float(row.min())), max(0.0, float(row.max()))
    best, least = range_grid(low, high, width, single), math.inf
    for step in range(80):
        shrink = 1 - step / 100
        grid = range_grid(shrink * low, shrink * high, width, single)
        errors = (abs(affine_nearest(float(w), *grid, width)[1] - float(w)) ** power for w in row)
        error = sum(cost * each for cost, each in zip(costs, errors, strict=True))
        if error < least:
            best, least = grid, error
    return best


RULES = {"minmax": minmax, "mse": mse}


@dataclass
class Naive:
    """What naive_gptq found; original column order."""

    codes: np.ndarray
    values: np.ndarray
    target: np.ndarray
    gain: np.ndarray  # [c] 1 / [H^-1]_jj with the columns visited before j eliminated


def damped(moment: np.ndarray, damping: float) -> np.ndarray:
    """A + damping * mean(diag A) I, dead columns (diagonal 0) with the mean of the others on their diagonal."""
    a = moment.astype(np.float64).copy()
    live = np.diag(a) != 0
    mean = np.diag(a)[live].mean() if live.any() else 1.0
    return a + np.diag(np.where(live, 0.0, mean) + damping * mean)


def visiting_order(moment: np.ndarray, act_order: bool) -> list[int]:
    diagonal = np.diag(damped(moment, 0.0))
    columns = list(range(len(diagonal)))
    return sorted(columns, key=lambda j: -diagonal[j]) if act_order else columns


def naive_gptq(weight: np.ndarray, moment: np.ndarray, damping: float, act_order: bool, rounder: Rounder) -> Naive:
    """Optimal brain quantization in a fixed order: H^-1 is formed once and downdated by Gaussian elimination.

    delta_F = -(w_j - q_j) / [H^-1]_jj * [H^-1]_jF over the columns F still free, then
    H^-1 <- H^-1 - [H^-1]_:j [H^-1]_j: / [H^-1]_jj.
    """
    x = weight.astype(np.float64).copy()
    inverse = np.linalg.inv(damped(moment, damping))
    rows, columns = x.shape
    result = Naive(np.zeros((rows, columns), int), np.zeros_like(x), np.zeros_like(x), np.zeros(columns))
    free = visiting_order(moment, act_order)
    while free:
        j = free.pop(0)
        pivot = inverse[j, j]
        result.gain[j] = 1 / pivot
        for r in range(rows):
            result.target[r, j] = x[r, j]
            result.codes[r, j], result.values[r, j] = rounder(float(x[r, j]), r, j)
        error = (x[:, j] - result.values[:, j]) / pivot
        x[:, free] -= np.outer(error, inverse[j, free])
        inverse = inverse - np.outer(inverse[:, j], inverse[j]) / pivot
    return result


def row_errors(delta: np.ndarray, moment: np.ndarray) -> np.ndarray:
    """sum_ij delta_ri A_ij delta_rj of each row."""
    return np.array([float(d @ moment.astype(np.float64) @ d) for d in np.asarray(delta, dtype=np.float64)])


def moment_of(columns: int, samples: int, generator: torch.Generator, dead: tuple[int, ...] = ()) -> Tensor:
    """Second moment [c, c] float64 of correlated inputs with very unequal column energies."""
    mix = torch.randn(columns, columns, generator=generator, dtype=torch.float64) / columns**0.5
    x = torch.randn(samples, columns, generator=generator, dtype=torch.float64)
    x = (x @ mix + 0.5 * x) * torch.rand(columns, generator=generator, dtype=torch.float64).mul(3).exp()
    x[:, list(dead)] = 0
    return x.T @ x / samples


def problem(weight: Tensor, moment: Tensor, magnitude: Tensor | None = None, positions: int = 1) -> LayerProblem:
    """A layer with given statistics; moment [g, c, c]."""
    statistics = {"input_moment": moment}
    if magnitude is not None:
        statistics["input_magnitude"] = magnitude
    return LayerProblem("layer", "Linear", weight, statistics.__getitem__, positions)


class FixedWidths:
    """An allocator that hands out given widths."""

    def __init__(self, **widths: Tensor) -> None:
        self.widths = widths

    def __call__(self, layers: object, *_: object, **__: object) -> dict[str, Tensor]:
        return self.widths


# Ungerboeck (1982), table I: parity checks h0, h1 and squared free distance of the codes for amplitude modulation.
UNGERBOECK = {
    4: ("101", "010", 9),
    8: ("1011", "0100", 10),
    16: ("10011", "00100", 11),
    32: ("100101", "001000", 13),
    64: ("1000011", "0010100", 14),
    128: ("10011101", "01010110", 16),
    256: ("101001101", "011110010", 16),
}


def shift_register(bits: list[int], states: int) -> list[int]:
    """Subset of every row from the bits of one path: a register of the newest m + 1 bits, zeros to begin with.

    subset = 2 z1 + z0, where z1 and z0 are the parities of the bits that h0 and h1 tap.
    """
    h0, h1, _ = UNGERBOECK[states]
    register = [0] * len(h0)  # newest bit first
    subsets = []
    for bit in bits:
        register = [bit, *register[:-1]]
        # polynomials are written highest power, the oldest bit, first
        z1, z0 = (sum(int(tap) * b for tap, b in zip(reversed(h), register, strict=True)) % 2 for h in (h0, h1))
        subsets.append(2 * z1 + z0)
    return subsets


def trellis_indices(codes: np.ndarray, states: int, groups: int) -> np.ndarray:
    """Level index of every code [R, C]: column by column, every group's rows a path of their own."""
    rows, columns = codes.shape
    index = np.zeros((rows, columns), int)
    each = rows // groups
    for g in range(groups):
        for c in range(columns):
            path = [int(code) for code in codes[g * each : (g + 1) * each, c]]
            subsets = shift_register([code % 2 for code in path], states)
            for r, (code, subset) in enumerate(zip(path, subsets, strict=True)):
                index[g * each + r, c] = subset + 4 * (code // 2)
    return index


def half_steps(width: int) -> list[float]:
    """Levels of a trellis row without a codebook: -1/4, 1/4, 3/4, ..., 2**width - 3/4."""
    return [(2 * k - 1) / 4 for k in range(2 ** (width + 1))]


def ring_states(codes: np.ndarray, widths: list[int], states: int, groups: int) -> np.ndarray:
    """The last digits of each weight's column, written row by row, as a number; above the first row is the last."""
    each, memory = len(codes) // groups, states.bit_length() - 1
    state = np.zeros(codes.shape, int)
    for row, column in np.ndindex(*codes.shape):
        rows = range(row // each * each, row // each * each + each)
        digits = {r: format(codes[r, column], f"0{widths[r]}b") for r in rows}
        ring = "".join(digits.values()) * memory + "".join(digits[r] for r in rows if r <= row)
        state[row, column] = int(ring[-memory:], 2)
    return state


def naive_levels(code: Code, width: int, row: int, widths: list[int]) -> list[float]:
    """The levels that a row of this width reads, from what is stored."""
    if isinstance(code, RowTable):
        start = sum(2**w for w in widths[:row])
        return [float(level) for level in code.levels[start : start + 2**width]]
    if isinstance(code, Congruential):
        factor, n = MULTIPLIERS[code.states][width - 2], code.states
        quantiles = [float(np.float16(NormalDist().inv_cdf((factor * s % n + 0.5) / n))) for s in range(n)]
        return [2 ** (width - 1) + 2.0 ** (width - 3) * q for q in quantiles]
    if isinstance(code, Bitshift):
        return normal_levels(code.states).tolist()
    table = {} if isinstance(code, Affine) else code.tables
    if width in table:
        return [float(level) for level in table[width].levels]
    return half_steps(width) if isinstance(code, Trellis) else [float(k) for k in range(2**width)]


def naive_dequantize(tensor: QuantizedTensor) -> np.ndarray:
    """Entry by entry: scale * (level - zero * 2**(width - 8)) / column_scale, or what the overlay says, [g, r, c].

    A code is its level's index, or says with the codes above it, on a trellis, which of twice as many levels is meant.
    Levels of a row's table are weights already.
    """
    rows, columns = tensor.codes.shape
    per_group = rows // tensor.groups
    codes, widths = tensor.codes.numpy(), tensor.width.tolist()
    index = trellis_indices(codes, tensor.code.states, tensor.groups) if isinstance(tensor.code, Trellis) else codes
    if isinstance(tensor.code, Bitshift):
        index = ring_states(codes, widths, tensor.code.states, tensor.groups)
    weight = np.zeros((tensor.groups, per_group, columns))
    for i in range(rows):
        width = widths[i]
        levels = naive_levels(tensor.code, width, i, widths)
        for c in range(columns):
            value = levels[int(index[i, c])]
            if not isinstance(tensor.code, RowTable):
                s = 0 if tensor.group_size is None else c // tensor.group_size
                value = float(tensor.scale[i, s]) * (value - int(tensor.zero[i, s]) * 2.0 ** (width - 8))
            if tensor.column_scale is not None:
                channels = tensor.column_scale.shape[1]
                value /= float(tensor.column_scale[i // per_group, c // (columns // channels)])
            weight[i // per_group, i % per_group, c] = value
    if tensor.overlay is not None:
        overlay = tensor.overlay
        for i, c, x in zip(overlay.row.tolist(), overlay.column.tolist(), overlay.value.tolist(), strict=True):
            weight[i // per_group, i % per_group, c] = x
    return weight
