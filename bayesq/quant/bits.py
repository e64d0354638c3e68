"""Streams of bits: unsigned integers of any width side by side, most significant bit first, padded to whole bytes."""

import numpy as np

# Widths 2..8 fit three bits as width - 2.
WIDTH_MAP_BITS = 3


def to_bits(values: np.ndarray, width: int) -> np.ndarray:
    """Bits (uint8 0 or 1) of unsigned integers below 2**width, most significant first: [n] -> [n * width]."""
    shifts = np.arange(width - 1, -1, -1, dtype=np.uint8)
    return ((values.reshape(-1, 1) >> shifts) & 1).astype(np.uint8).reshape(-1)


def from_bits(bits: np.ndarray, width: int) -> np.ndarray:
    """Inverse of `to_bits`: [n * width] -> [n], uint8 up to 8 bits, else uint64."""
    dtype = np.uint8 if width <= 8 else np.uint64
    weights = (1 << np.arange(width - 1, -1, -1)).astype(dtype)
    return np.asarray((bits.reshape(-1, width) * weights).sum(1, dtype=dtype))


def unpack_stream(stream: np.ndarray, count: int, name: str) -> np.ndarray:
    """The first `count` bits of whole bytes.

    Args:
        name: of the stream, for the error.

    Raises:
        ValueError: there are more or fewer bytes than the bits fill, or the padding is not zero.
    """
    if len(stream) != -(-count // 8):
        raise ValueError(f"{name}: {len(stream)} bytes cannot hold exactly {count} bits")
    if count % 8 and int(stream[-1]) & ((1 << (8 - count % 8)) - 1):
        raise ValueError(f"{name}: the bits behind the last one are not zero")
    return np.unpackbits(stream, count=count)
