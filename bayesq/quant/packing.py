"""QuantizedTensor <-> packed buffers: what a checkpoint holds, to the byte.

Buffers of a layer NAME: NAME/codes (one bit stream), NAME/width, NAME/scale, NAME/zero, NAME/column_scale. Codebooks
are stored once per model as codebook/ID. Shapes and the like go to the file's header as JSON and are not counted, like
any tensor's shape. Bits are written most significant first; rows are grouped by width, narrow rows first, row order
kept, and a layer's stream is padded to whole bytes once.
"""

import json
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from bayesq.quant.grids import MIN_WIDTH
from bayesq.quant.tensor import Codebook, QuantizedTensor

# Widths 2..8 fit three bits as width - 2.
WIDTH_MAP_BITS = 3
CODEBOOK_PREFIX = "codebook/"


def to_bits(values: np.ndarray, width: int) -> np.ndarray:
    """Bits (uint8 0 or 1) of unsigned integers below 2**width, most significant first: [n] -> [n * width]."""
    shifts = np.arange(width - 1, -1, -1, dtype=np.uint8)
    return ((values.reshape(-1, 1).astype(np.uint8) >> shifts) & 1).reshape(-1)


def from_bits(bits: np.ndarray, width: int) -> np.ndarray:
    """Inverse of `to_bits`: [n * width] -> [n] uint8."""
    weights = (1 << np.arange(width - 1, -1, -1)).astype(np.uint8)
    return np.asarray((bits.reshape(-1, width) * weights).sum(1, dtype=np.uint8))


def _unpack_stream(stream: np.ndarray, count: int) -> np.ndarray:
    if len(stream) != -(-count // 8):
        raise ValueError(f"{len(stream)} bytes cannot hold exactly {count} bits")
    return np.unpackbits(stream, count=count)


def pack(tensor: QuantizedTensor) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Buffers of one layer and the shape facts needed to read them back; codebooks are named, not included."""
    codes, width = tensor.codes.numpy(), tensor.width.numpy()
    stream = np.concatenate([to_bits(codes[width == w], int(w)) for w in np.unique(width)])
    mixed = len(np.unique(width)) > 1
    width_map = np.packbits(to_bits(width - MIN_WIDTH, WIDTH_MAP_BITS)) if mixed else width[:1].copy()
    buffers = {
        "codes": torch.from_numpy(np.packbits(stream)),
        "width": torch.from_numpy(width_map),
        "scale": tensor.scale,
        "zero": tensor.zero,
    }
    if tensor.column_scale is not None:
        buffers["column_scale"] = tensor.column_scale
    facts = {
        "shape": list(codes.shape),
        "groups": tensor.groups,
        "group_size": tensor.group_size,
        "mixed": mixed,
        "trellis": tensor.trellis,
        "codebooks": {str(w): book.name for w, book in sorted(tensor.codebooks.items())},
    }
    return buffers, facts


def unpack(
    buffers: Mapping[str, Tensor], facts: Mapping[str, Any], codebooks: Mapping[str, Codebook]
) -> QuantizedTensor:
    """Inverse of `pack`.

    Raises:
        ValueError: buffers and facts do not fit each other.
        KeyError: a named codebook or buffer is missing.
    """
    rows, columns = facts["shape"]
    width_map = buffers["width"].numpy()
    if facts["mixed"]:
        width = from_bits(_unpack_stream(width_map, WIDTH_MAP_BITS * rows), WIDTH_MAP_BITS) + MIN_WIDTH
    else:
        width = np.repeat(width_map, rows)
    width = width.astype(np.uint8)
    bits = _unpack_stream(buffers["codes"].numpy(), int(width.sum(dtype=np.int64)) * columns)
    codes = np.empty((rows, columns), dtype=np.uint8)
    start = 0
    for w in np.unique(width):
        chosen = width == w
        stop = start + int(chosen.sum()) * columns * int(w)
        codes[chosen] = from_bits(bits[start:stop], int(w)).reshape(-1, columns)
        start = stop
    return QuantizedTensor(
        codes=torch.from_numpy(codes),
        width=torch.from_numpy(width),
        scale=buffers["scale"],
        zero=buffers["zero"],
        groups=facts["groups"],
        group_size=facts["group_size"],
        codebooks={int(w): codebooks[name] for w, name in facts["codebooks"].items()},
        column_scale=buffers.get("column_scale"),
        trellis=facts["trellis"],
    )


def pack_model(layers: Mapping[str, QuantizedTensor]) -> tuple[dict[str, Tensor], dict[str, str]]:
    """All buffers of a model by name, each shared codebook once, and the header that `unpack_model` needs.

    Raises:
        ValueError: two different codebooks have the same name.
    """
    buffers: dict[str, Tensor] = {}
    facts: dict[str, Any] = {}
    for name, tensor in layers.items():
        packed, facts[name] = pack(tensor)
        buffers.update({f"{name}/{key}": value for key, value in packed.items()})
        used = {int(w) for w in torch.unique(tensor.width)}
        for width, book in tensor.codebooks.items():
            if width not in used:
                raise ValueError(f"{name}: codebook {book.name} is attached but no row has {width} bits")
            key = CODEBOOK_PREFIX + book.name
            if not torch.equal(buffers.setdefault(key, book.levels), book.levels):
                raise ValueError(f"two different codebooks are named {book.name}")
    return buffers, {"layers": json.dumps(facts)}


def unpack_model(buffers: Mapping[str, Tensor], header: Mapping[str, str]) -> dict[str, QuantizedTensor]:
    """Inverse of `pack_model`."""
    books = {
        key.removeprefix(CODEBOOK_PREFIX): Codebook(key.removeprefix(CODEBOOK_PREFIX), levels)
        for key, levels in buffers.items()
        if key.startswith(CODEBOOK_PREFIX)
    }
    layers = {}
    for name, facts in json.loads(header["layers"]).items():
        keys = ("codes", "width", "scale", "zero", "column_scale")
        own = {key: buffers[f"{name}/{key}"] for key in keys if f"{name}/{key}" in buffers}
        layers[name] = unpack(own, facts, books)
    return layers
