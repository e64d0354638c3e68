"""QuantizedTensor <-> packed buffers: what a checkpoint holds, to the byte.

Buffers of a layer NAME: NAME/codes (one bit stream), NAME/width, NAME/scale, NAME/zero, NAME/column_scale. Codebooks
are stored once per model as codebook/ID. Shapes and the like go to the file's header as JSON and are not counted, like
any tensor's shape. Bits are written most significant first; rows are grouped by width, narrow rows first, row order
kept, and a layer's stream is padded to whole bytes once.

One model has one packed form, and reading takes nothing else: what `unpack_model` accepts is what `pack_model` writes,
so a file cannot say one thing to a reader and another to the next.
"""

import json
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from bayesq.quant.grids import MAX_WIDTH, MIN_WIDTH
from bayesq.quant.tensor import Codebook, QuantizedTensor
from bayesq.quant.trellis import POLYNOMIALS

# Widths 2..8 fit three bits as width - 2.
WIDTH_MAP_BITS = 3
CODEBOOK_PREFIX = "codebook/"
# Buffers that are no layer's: parameters that a run changed, and the rest of a network in a file that has all of it.
PARAMETER_PREFIX, STATE_PREFIX = "parameter/", "state/"
# Of each buffer: its dtype and number of dimensions.
LAYER_BUFFERS = {
    "codes": (torch.uint8, 1),
    "width": (torch.uint8, 1),
    "scale": (torch.float16, 2),
    "zero": (torch.uint8, 2),
    "column_scale": (torch.float16, 2),
}
OPTIONAL_BUFFERS = ("column_scale",)
RESERVED = (CODEBOOK_PREFIX, PARAMETER_PREFIX, STATE_PREFIX)
FACTS = ("shape", "groups", "group_size", "mixed", "trellis", "codebooks")


def to_bits(values: np.ndarray, width: int) -> np.ndarray:
    """Bits (uint8 0 or 1) of unsigned integers below 2**width, most significant first: [n] -> [n * width]."""
    shifts = np.arange(width - 1, -1, -1, dtype=np.uint8)
    return ((values.reshape(-1, 1).astype(np.uint8) >> shifts) & 1).reshape(-1)


def from_bits(bits: np.ndarray, width: int) -> np.ndarray:
    """Inverse of `to_bits`: [n * width] -> [n] uint8."""
    weights = (1 << np.arange(width - 1, -1, -1)).astype(np.uint8)
    return np.asarray((bits.reshape(-1, width) * weights).sum(1, dtype=np.uint8))


def _unpack_stream(stream: np.ndarray, count: int, what: str) -> np.ndarray:
    """The first `count` bits of whole bytes.

    Raises:
        ValueError: there are more or fewer bytes than they fill, or the padding is not zero.
    """
    if len(stream) != -(-count // 8):
        raise ValueError(f"{what}: {len(stream)} bytes cannot hold exactly {count} bits")
    if count % 8 and int(stream[-1]) & ((1 << (8 - count % 8)) - 1):
        raise ValueError(f"{what}: the bits behind the last one are not zero")
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
    """Inverse of `pack`. Nothing larger than a small multiple of the buffers is allocated, whatever the facts say.

    Raises:
        ValueError: buffers and facts do not fit each other, or a named codebook or buffer is missing.
    """
    rows, columns = _checked(buffers, facts)
    width_map = buffers["width"].numpy()
    if facts["mixed"]:
        width = from_bits(_unpack_stream(width_map, WIDTH_MAP_BITS * rows, "width"), WIDTH_MAP_BITS) + MIN_WIDTH
        if len(np.unique(width)) == 1:
            raise ValueError("width: the rows are said to differ in width and do not")
    else:
        if len(width_map) != 1:
            raise ValueError(f"width: one byte tells the width of all rows, not {len(width_map)}")
        width = np.repeat(width_map, rows)
    width = width.astype(np.uint8)
    if not MIN_WIDTH <= int(width.min()) <= int(width.max()) <= MAX_WIDTH:
        raise ValueError(f"width: rows have {MIN_WIDTH} to {MAX_WIDTH} bits, not {width.min()} to {width.max()}")
    books = _books(facts["codebooks"], codebooks, {int(w) for w in np.unique(width)})
    bits = _unpack_stream(buffers["codes"].numpy(), int(width.sum(dtype=np.int64)) * columns, "codes")
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
        codebooks=books,
        column_scale=buffers.get("column_scale"),
        trellis=facts["trellis"],
    )


def _checked(buffers: Mapping[str, Tensor], facts: Mapping[str, Any]) -> tuple[int, int]:
    """Rows and columns of a layer whose facts are of the right kind and agree with the shapes of its buffers.

    Raises:
        ValueError: they do not.
    """
    if not isinstance(facts, Mapping) or sorted(facts) != sorted(FACTS):
        raise ValueError(f"the facts of a layer are {', '.join(FACTS)}, not {_shown(facts)}")
    shape, groups, group_size = facts["shape"], facts["groups"], facts["group_size"]
    if not isinstance(shape, list) or len(shape) != 2 or not all(map(_is_count, shape)):
        raise ValueError(f"shape: needs two positive whole numbers, not {_shown(shape)}")
    rows, columns = shape
    if not _is_count(groups) or rows % groups:
        raise ValueError(f"groups: needs a divisor of the {rows} rows, not {_shown(groups)}")
    if group_size is not None and not _is_count(group_size):
        raise ValueError(f"group_size: needs a positive whole number or null, not {_shown(group_size)}")
    if not isinstance(facts["mixed"], bool):
        raise ValueError(f"mixed: needs true or false, not {_shown(facts['mixed'])}")
    if facts["trellis"] is not None and (not _is_count(facts["trellis"]) or facts["trellis"] not in POLYNOMIALS):
        raise ValueError(f"trellis: needs one of {', '.join(map(str, POLYNOMIALS))} or null")
    for key, (dtype, dimensions) in LAYER_BUFFERS.items():
        if key not in buffers:
            if key in OPTIONAL_BUFFERS:
                continue
            raise ValueError(f"{key}: there is no such buffer")
        found = buffers[key]
        if found.dtype != dtype or found.ndim != dimensions:
            raise ValueError(f"{key}: needs {dtype} in {dimensions} dimensions, not {found.dtype} {list(found.shape)}")
    # ceil of a quotient of whole numbers, which floats could not hold
    column_groups = 1 if group_size is None else -(-columns // group_size)
    for key in ("scale", "zero"):
        if list(buffers[key].shape) != [rows, column_groups]:
            raise ValueError(f"{key}: needs [{rows}, {column_groups}], not {list(buffers[key].shape)}")
    if "column_scale" in buffers:
        found = buffers["column_scale"]
        if found.shape[0] != groups or not found.shape[1] or columns % found.shape[1]:
            raise ValueError(f"column_scale: needs [{groups}, a divisor of {columns}], not {list(found.shape)}")
        if not bool((torch.isfinite(found) & (found > 0)).all()):
            raise ValueError("column_scale: needs positive numbers")
    return rows, columns


def _books(named: Any, codebooks: Mapping[str, Codebook], used: set[int]) -> dict[int, Codebook]:
    """The codebooks of a layer by width.

    Raises:
        ValueError: they are not named by width, or one is missing or belongs to a width that no row has.
    """
    if not isinstance(named, Mapping) or list(named) != sorted(named):
        raise ValueError(f"codebooks: needs names by width, not {_shown(named)}")
    found = {}
    for width, name in named.items():
        if width not in {str(w) for w in used}:
            raise ValueError(f"codebooks: no row has {_shown(width)} bits")
        if not isinstance(name, str) or name not in codebooks:
            raise ValueError(f"codebooks: there is no codebook {_shown(name)}")
        found[int(width)] = codebooks[name]
    return found


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 1


def _shown(value: Any) -> str:
    """What a file says, short enough for a line."""
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def pack_model(layers: Mapping[str, QuantizedTensor]) -> tuple[dict[str, Tensor], dict[str, str]]:
    """All buffers of a model by name, each shared codebook once, and the header that `unpack_model` needs.

    Raises:
        ValueError: two different codebooks have the same name, or a layer's name is taken by the format.
    """
    buffers: dict[str, Tensor] = {}
    facts: dict[str, Any] = {}
    for name, tensor in layers.items():
        if f"{name}/".startswith(RESERVED):
            raise ValueError(f"a layer cannot be named {name}: the packed file has buffers of that name")
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
    """Inverse of `pack_model`; buffers behind PARAMETER_PREFIX and STATE_PREFIX are left alone.

    Raises:
        ValueError: the header is not that of these buffers; names the layer and what is wrong with it.
    """
    facts = parsed(header, "layers")
    own: set[str] = set()
    books = {}
    for key, levels in buffers.items():
        if not key.startswith(CODEBOOK_PREFIX):
            continue
        name = key.removeprefix(CODEBOOK_PREFIX)
        if levels.dtype != torch.float16 or levels.ndim != 1 or not bool(torch.isfinite(levels).all()):
            raise ValueError(f"codebook {name}: needs finite float16 levels in one dimension")
        books[name] = Codebook(name, levels)
    layers = {}
    for name, said in facts.items():
        mine = {key: buffers[f"{name}/{key}"] for key in LAYER_BUFFERS if f"{name}/{key}" in buffers}
        try:
            if f"{name}/".startswith(RESERVED):
                raise ValueError("a layer cannot have this name")
            layers[name] = unpack(mine, said, books)
        except ValueError as error:
            raise ValueError(f"layer {_shown(name)}: {error}") from error
        own.update(f"{name}/{key}" for key in mine)
        own.update({CODEBOOK_PREFIX + book.name for book in layers[name].codebooks.values()})
    for key in buffers:
        if key not in own and not key.startswith((PARAMETER_PREFIX, STATE_PREFIX)):
            raise ValueError(f"buffer {_shown(key)} belongs to no layer")
    return layers


def parsed(header: Mapping[str, Any], key: str) -> dict[str, Any]:
    """The JSON object under a key of a file's header.

    Raises:
        ValueError: there is none.
    """

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        if len(found := dict(pairs)) < len(pairs):
            raise ValueError(f"header: {key} names a thing twice")
        return found

    text = header.get(key)
    if not isinstance(text, str):
        raise ValueError(f"header: there is no text under {key}")
    try:
        content = json.loads(text, object_pairs_hook=unique)
    except RecursionError as error:
        raise ValueError(f"header: {key} is nested too deeply") from error
    if not isinstance(content, dict):
        raise ValueError(f"header: {key} is no JSON object")
    return content
