"""Random orthogonal transformations of a layer's rows and columns, which make its weights look Gaussian.

A size n is split into the largest factor for which a Hadamard matrix is known here and the rest m:

    R_n = (H kron F_m) diag(signs),   W = R_rT W' R_c

H has entries +-1 / sqrt(n / m): Kronecker products of Sylvester's matrix of order 2 and of Paley's matrices (orders
q + 1 and 2 (q + 1) for primes q). F_m is the real discrete Fourier (Hartley) matrix of the rest. The random signs come
from a seed, which is all that is stored.
"""

import math
from dataclasses import dataclass
from functools import cache

import numpy as np
import torch
from torch import Tensor

# Bytes of a stored seed.
SEED_BYTES = 4
# Seeds have 32 bits. These are flipped for the signs of the columns, so that they differ from those of the rows.
COLUMN_BITS = 0x9E3779B9
# Largest Paley matrix: each factor is a dense product, so large ones would be slow.
LARGEST_ORDER = 512
# Small factors are multiplied up to this order: few dense products are faster than many tiny ones.
LARGEST_PRODUCT = 64


@dataclass(frozen=True)
class Rotation:
    """The transformations of both sides of a layer's matrices, or of the columns only, the same for all of its groups.

    Attributes:
        seed: of the signs, 0 .. 2**32 - 1.
        both: rows are transformed too.
    """

    seed: int
    both: bool = True

    def forward(self, weight: Tensor) -> Tensor:
        """W' [g, r, c] of a layer W [g, r, c]."""
        return self.columns(self.rows(weight) if self.both else weight)

    def inverse(self, weight: Tensor) -> Tensor:
        """W [g, r, c] of W' [g, r, c], differentiable."""
        rows, columns = weight.shape[1:]
        half = multiply(weight, columns, transposed=True) * self._signs(1, columns).to(weight)
        if not self.both:
            return half
        turned = multiply(half.transpose(1, 2), rows, transposed=True) * self._signs(0, rows).to(weight)
        return turned.transpose(1, 2)

    def rows(self, weight: Tensor) -> Tensor:
        """R_r W, [g, r, c]."""
        rows = weight.shape[1]
        return multiply(weight.transpose(1, 2) * self._signs(0, rows).to(weight), rows).transpose(1, 2)

    def columns(self, weight: Tensor) -> Tensor:
        """W R_cT, [g, r, c]."""
        columns = weight.shape[2]
        return multiply(weight * self._signs(1, columns).to(weight), columns)

    def moment(self, moment: Tensor) -> Tensor:
        """R_c A R_cT, the moment of the inputs R_c x, of A [g, c, c]."""
        return self.columns(self.columns(moment).transpose(1, 2)).transpose(1, 2)

    def _signs(self, side: int, size: int) -> Tensor:
        """Random signs [n] of the rows (0) or columns (1)."""
        generator = torch.Generator().manual_seed(self.seed ^ COLUMN_BITS * side)
        return torch.randint(0, 2, (size,), generator=generator) * 2.0 - 1

    def pack(self) -> Tensor:
        """The seed as bytes; without rows, a byte 0 follows."""
        return torch.tensor([*self.seed.to_bytes(SEED_BYTES, "little"), *([] if self.both else [0])], dtype=torch.uint8)

    @classmethod
    def unpack(cls, stored: Tensor) -> "Rotation":
        """Inverse of `pack`.

        Raises:
            ValueError: the buffer has another length or content.
        """
        seed, rest = bytes(stored[:SEED_BYTES].tolist()), stored[SEED_BYTES:].tolist()
        if len(seed) != SEED_BYTES or rest not in ([], [0]):
            raise ValueError(
                f"rotation: needs the {SEED_BYTES} bytes of a seed and at most a byte 0, not {stored.tolist()}"
            )
        return cls(int.from_bytes(seed, "little"), not rest)


def multiply(x: Tensor, size: int, transposed: bool = False) -> Tensor:
    """(H kron F_m) applied to the last dimension [.., n], factor by factor; `transposed` applies the transpose."""
    y, inner = x, size
    for factor in factors_of(size):
        matrix = torch.from_numpy(factor).to(x)
        matrix = matrix.T if transposed else matrix
        inner //= len(factor)
        y = matrix @ y.reshape(-1, len(factor), inner) if inner > 1 else y.reshape(-1, len(factor)) @ matrix.T
    return y.reshape(x.shape)


@cache
def factors_of(size: int) -> tuple[np.ndarray, ...]:
    """Orthogonal matrices float64 whose Kronecker product is H kron F_m of a size."""
    best: tuple[int, ...] = ()
    for part in range(size, 0, -1):
        orders = hadamard_orders(part) if size % part == 0 else None
        if orders is not None:
            best = orders
            break
    rest = size // math.prod(best)
    matrices: list[np.ndarray] = []
    for matrix in map(hadamard, best):
        if matrices and len(matrices[-1]) * len(matrix) <= LARGEST_PRODUCT:
            matrices[-1] = np.kron(matrices[-1], matrix)
        else:
            matrices.append(matrix)
    matrices = [matrix / math.sqrt(len(matrix)) for matrix in matrices]
    return (*matrices, *([hartley(rest)] if rest > 1 or not matrices else []))


@cache
def hadamard_orders(size: int) -> tuple[int, ...] | None:
    """Orders of `hadamard` whose product is a size, as many as possible; None if there are none."""
    if size == 1:
        return ()
    for order in range(2, min(size, LARGEST_ORDER) + 1):
        if size % order == 0 and _paley(order) is not None:
            rest = hadamard_orders(size // order)
            if rest is not None:
                return order, *rest
    return None


def hadamard(order: int) -> np.ndarray:
    """A Hadamard matrix of order 2, q + 1 or 2 (q + 1): entries +-1, H HT = order I.

    Raises:
        ValueError: there is none of this order here.
    """
    kind = _paley(order)
    if kind is None:
        raise ValueError(f"no Hadamard matrix of order {order} is known here")
    if order == 2:
        return np.array([[1.0, 1.0], [1.0, -1.0]])
    prime, twice = kind
    residues = {k * k % prime for k in range(1, prime)}
    character = np.array([0.0 if k == 0 else 1.0 if k in residues else -1.0 for k in range(prime)])
    core = np.zeros((prime + 1, prime + 1))
    core[1:, 1:] = character[np.subtract.outer(np.arange(prime), np.arange(prime)) % prime]
    core[0, 1:], core[1:, 0] = 1.0, 1.0 if twice else -1.0
    if not twice:  # Paley's first construction: the core is skew
        return core + np.eye(order)
    ones = np.array([[1.0, 1.0], [1.0, -1.0]])
    return np.kron(core, ones) + np.kron(np.eye(prime + 1), np.array([[1.0, -1.0], [-1.0, -1.0]]))


def hartley(size: int) -> np.ndarray:
    """The orthogonal matrix (cos + sin)(2 pi j k / n) / sqrt(n)."""
    angle = 2 * np.pi * (np.outer(np.arange(size), np.arange(size)) % size) / size
    matrix: np.ndarray = (np.cos(angle) + np.sin(angle)) / math.sqrt(size)
    return matrix


def _paley(order: int) -> tuple[int, bool] | None:
    """The prime of Paley's construction, and whether it is the second one; (1, False) for order 2; None: no matrix."""
    if order == 2:
        return 1, False
    if order % 4 == 0 and _is_prime(order - 1):
        return order - 1, False
    if order % 4 == 0 and _is_prime(order // 2 - 1) and (order // 2 - 1) % 4 == 1:
        return order // 2 - 1, True
    return None


def _is_prime(number: int) -> bool:
    return number > 1 and all(number % k for k in range(2, math.isqrt(number) + 1))
