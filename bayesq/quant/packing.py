"""QuantizedTensor <-> packed buffers: the bytes of a checkpoint.

Buffers of a layer NAME: NAME/codes (one bit stream), NAME/width, NAME/scale, NAME/zero, and where the layer has them
NAME/column_scale, NAME/overlay_index, NAME/overlay_value, NAME/rotation and those of its code (`bayesq.quant.codes`).
Shared codebooks are stored once per model as codebook/ID. Shapes and the like go to the file's header as JSON and are
not counted, like any tensor's shape. The width is one byte, or three bits per row if rows differ.

A model has exactly one packed form: `unpack_model` accepts only what `pack_model` writes, so two readers cannot decode
a file differently.
"""

import json
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from bayesq.quant.bits import WIDTH_MAP_BITS, from_bits, to_bits, unpack_stream
from bayesq.quant.codes import Code, Codebook, RateTables, SparseOverlay, code_class, is_count, shown
from bayesq.quant.codes.rate_tables import CENTRE
from bayesq.quant.grids import MAX_WIDTH, MIN_WIDTH
from bayesq.quant.rotation import Rotation
from bayesq.quant.tensor import QuantizedTensor, column_groups

CODEBOOK_PREFIX = "codebook/"
# Buffers that belong to no layer: parameters that a run changed, and the rest of the network in a self-contained file.
PARAMETER_PREFIX, STATE_PREFIX = "parameter/", "state/"
RESERVED = (CODEBOOK_PREFIX, PARAMETER_PREFIX, STATE_PREFIX)
# Of each buffer: its dtype and number of dimensions.
BUFFERS = {
    "codes": (torch.uint8, 1),
    "width": (torch.uint8, 1),
    "scale": (torch.float16, 2),
    "zero": (torch.uint8, 2),
    "column_scale": (torch.float16, 2),
    "overlay_index": (torch.uint8, 1),
    "overlay_value": (torch.float16, 1),
    "rotation": (torch.uint8, 1),
}
# Buffers that a layer has together or not at all.
OPTIONAL = (("column_scale",), ("overlay_index", "overlay_value"), ("rotation",))
FACTS = ("shape", "groups", "group_size", "mixed")


def pack(tensor: QuantizedTensor) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Buffers of one layer and the shape facts needed to read them back; codebooks are named, not included."""
    rows, columns = tensor.codes.shape
    width = tensor.width.numpy()
    mixed = len(np.unique(width)) > 1
    width_map = np.packbits(to_bits(width - MIN_WIDTH, WIDTH_MAP_BITS)) if mixed else width[:1].copy()
    buffers = {
        "width": torch.from_numpy(width_map),
        "scale": tensor.scale,
        "zero": tensor.zero,
        **tensor.code.pack(tensor.codes, tensor.width, tensor.groups),
    }
    if tensor.code.centred:
        del buffers["zero"]
    if tensor.column_scale is not None:
        buffers["column_scale"] = tensor.column_scale
    if tensor.overlay is not None:
        buffers |= tensor.overlay.pack(rows, columns)
    if tensor.rotation is not None:
        buffers["rotation"] = tensor.rotation.pack()
    facts = {"shape": [rows, columns], "groups": tensor.groups, "group_size": tensor.group_size, "mixed": mixed}
    return buffers, facts | tensor.code.facts()


def unpack(
    buffers: Mapping[str, Tensor], facts: Mapping[str, Any], codebooks: Mapping[str, Codebook | RateTables]
) -> QuantizedTensor:
    """Inverse of `pack`. For any facts, no more than a small multiple of the buffers' size is allocated.

    Raises:
        ValueError: buffers and facts do not fit each other, or a named codebook or buffer is missing.
    """
    kind = _kind(facts)
    rows, columns = _checked_shape(facts)
    _check_buffers(buffers, kind, facts)
    width = torch.from_numpy(row_widths(buffers["width"].numpy(), rows, facts["mixed"]))
    if not MIN_WIDTH <= int(width.min()) <= int(width.max()) <= MAX_WIDTH:
        raise ValueError(f"width: rows have {MIN_WIDTH} to {MAX_WIDTH} bits, not {width.min()} to {width.max()}")
    code = kind.unpack(facts, buffers, width, codebooks)
    zero = torch.full_like(buffers["scale"], CENTRE, dtype=torch.uint8) if kind.centred else buffers["zero"]
    return QuantizedTensor(
        codes=code.unpack_codes(buffers, width, columns, facts["groups"]),
        width=width,
        scale=buffers["scale"],
        zero=zero,
        groups=facts["groups"],
        group_size=facts["group_size"],
        code=code,
        column_scale=buffers.get("column_scale"),
        overlay=SparseOverlay.unpack(buffers, rows, columns) if "overlay_value" in buffers else None,
        rotation=Rotation.unpack(buffers["rotation"]) if "rotation" in buffers else None,
    )


def row_widths(stored: np.ndarray, rows: int, mixed: bool) -> np.ndarray:
    """Bits of each row [R] uint8, from the buffer `width`.

    Args:
        mixed: whether rows differ.

    Raises:
        ValueError: the buffer has another length, or `mixed` is true and the rows do not differ.
    """
    if not mixed:
        if len(stored) != 1:
            raise ValueError(f"width: one byte tells the width of all rows, not {len(stored)}")
        return np.repeat(stored, rows)
    width = from_bits(unpack_stream(stored, WIDTH_MAP_BITS * rows, "width"), WIDTH_MAP_BITS) + np.uint8(MIN_WIDTH)
    if len(np.unique(width)) == 1:
        raise ValueError("width: mixed is true, but all rows have one width")
    return width


def _kind(facts: Mapping[str, Any]) -> type[Code]:
    """The class of a layer's code.

    Raises:
        ValueError: there is no such class, or the facts are not those of its layers.
    """
    if not isinstance(facts, Mapping):
        raise ValueError(f"the facts of a layer are {', '.join(FACTS)}, not {shown(facts)}")
    kind = code_class(facts)
    expected = (*FACTS, *kind.FACTS)
    if sorted(facts) != sorted(expected):
        raise ValueError(f"the facts of a layer are {', '.join(expected)}, not {shown(facts)}")
    return kind


def _checked_shape(facts: Mapping[str, Any]) -> tuple[int, int]:
    """Rows and columns of a layer, after a check of its facts under FACTS.

    Raises:
        ValueError: a fact is of the wrong kind.
    """
    shape, groups, group_size = facts["shape"], facts["groups"], facts["group_size"]
    if not isinstance(shape, list) or len(shape) != 2 or not all(map(is_count, shape)):
        raise ValueError(f"shape: needs two positive whole numbers, not {shown(shape)}")
    if not is_count(groups) or shape[0] % groups:
        raise ValueError(f"groups: needs a divisor of the {shape[0]} rows, not {shown(groups)}")
    if group_size is not None and not is_count(group_size):
        raise ValueError(f"group_size: needs a positive whole number or null, not {shown(group_size)}")
    if not isinstance(facts["mixed"], bool):
        raise ValueError(f"mixed: needs true or false, not {shown(facts['mixed'])}")
    return shape[0], shape[1]


def _check_buffers(buffers: Mapping[str, Tensor], kind: type[Code], facts: Mapping[str, Any]) -> None:
    """Check that a layer has its buffers, and that their types and shapes agree with its facts.

    Raises:
        ValueError: one is missing or of another kind.
    """
    absent = {key for together in OPTIONAL if not any(key in buffers for key in together) for key in together}
    absent |= {"zero"} if kind.centred else set()
    for key, (dtype, dimensions) in {**BUFFERS, **kind.BUFFERS}.items():
        if key in absent:
            continue
        if key not in buffers:
            raise ValueError(f"{key}: there is no such buffer")
        buffer = buffers[key]
        if buffer.dtype != dtype or buffer.ndim != dimensions:
            raise ValueError(
                f"{key}: needs {dtype} in {dimensions} dimensions, not {buffer.dtype} {list(buffer.shape)}"
            )
    rows, columns = facts["shape"]
    expected = [rows, column_groups(kind, columns, facts["group_size"])]
    for key in ("scale", "zero"):
        if key not in absent and list(buffers[key].shape) != expected:
            raise ValueError(f"{key}: needs {expected}, not {list(buffers[key].shape)}")
    # for rows without scales, only this bounds the memory of their widths
    if rows * columns * kind.LEAST_BITS > 8 * len(buffers["codes"]):
        raise ValueError(f"codes: {len(buffers['codes'])} bytes cannot hold {rows} rows of {columns} codes")
    if "column_scale" in buffers:
        factors, groups = buffers["column_scale"], facts["groups"]
        if factors.shape[0] != groups or not factors.shape[1] or columns % factors.shape[1]:
            raise ValueError(f"column_scale: needs [{groups}, a divisor of {columns}], not {list(factors.shape)}")
        if not bool((torch.isfinite(factors) & (factors > 0)).all()):
            raise ValueError("column_scale: needs positive numbers")


def pack_model(layers: Mapping[str, QuantizedTensor]) -> tuple[dict[str, Tensor], dict[str, str]]:
    """All buffers of a model by name, each shared codebook once, and the header that `unpack_model` needs.

    Raises:
        ValueError: two different codebooks have the same name, or the format reserves a layer's name.
    """
    buffers: dict[str, Tensor] = {}
    facts: dict[str, Any] = {}
    for name, tensor in layers.items():
        if f"{name}/".startswith(RESERVED):
            raise ValueError(f"a layer cannot be named {name}: the packed file has buffers of that name")
        packed, facts[name] = pack(tensor)
        buffers.update({f"{name}/{key}": value for key, value in packed.items()})
        for book in tensor.code.codebooks():
            key = CODEBOOK_PREFIX + book.name
            if not torch.equal(buffers.setdefault(key, book.buffer), book.buffer):
                raise ValueError(f"two different codebooks are named {book.name}")
    return buffers, {"layers": json.dumps(facts)}


def unpack_model(buffers: Mapping[str, Tensor], header: Mapping[str, str]) -> dict[str, QuantizedTensor]:
    """Inverse of `pack_model`; buffers with PARAMETER_PREFIX or STATE_PREFIX are ignored.

    Raises:
        ValueError: the header does not fit these buffers; names the layer and the mistake.
    """
    books: dict[str, Codebook | RateTables] = {}
    for key, levels in buffers.items():
        if not key.startswith(CODEBOOK_PREFIX):
            continue
        name = key.removeprefix(CODEBOOK_PREFIX)
        if levels.dtype == torch.uint8:
            books[name] = RateTables(name, levels)
            continue
        if levels.dtype != torch.float16 or levels.ndim != 1 or not bool(torch.isfinite(levels).all()):
            raise ValueError(f"codebook {name}: needs finite float16 levels in one dimension")
        books[name] = Codebook(name, levels)
    layers = {}
    read: set[str] = set()
    for name, facts in parsed(header, "layers").items():
        try:
            if f"{name}/".startswith(RESERVED):
                raise ValueError("a layer cannot have this name")
            kind = _kind(facts)
            names = [key for key in (*BUFFERS, *kind.BUFFERS) if key != "zero" or not kind.centred]
            keys = [key for key in names if f"{name}/{key}" in buffers]
            layers[name] = unpack({key: buffers[f"{name}/{key}"] for key in keys}, facts, books)
        except ValueError as error:
            raise ValueError(f"layer {shown(name)}: {error}") from error
        read.update(f"{name}/{key}" for key in keys)
        read.update(CODEBOOK_PREFIX + book.name for book in layers[name].code.codebooks())
    for key in buffers:
        if key not in read and not key.startswith((PARAMETER_PREFIX, STATE_PREFIX)):
            raise ValueError(f"buffer {shown(key)} belongs to no layer")
    return layers


def parsed(header: Mapping[str, Any], key: str) -> dict[str, Any]:
    """The JSON object under a key of a file's header.

    Raises:
        ValueError: there is none.
    """

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        if len(entries := dict(pairs)) < len(pairs):
            raise ValueError(f"header: {key} has the same name twice")
        return entries

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
