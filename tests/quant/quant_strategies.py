"""QuantizedTensors of every kind a method may return, random ones and hypothesis strategies."""

from collections.abc import Mapping

import numpy as np
import torch
from hypothesis import strategies as st

from bayesq.quant.codes import (
    Affine,
    Bitshift,
    Code,
    Codebook,
    Congruential,
    RowTable,
    SharedTable,
    SparseOverlay,
    Trellis,
)
from bayesq.quant.tensor import QuantizedTensor

KINDS = (Affine, SharedTable, RowTable, Trellis, Bitshift, Congruential)


def codebook(width: int, name: str = "book", trellis: bool = False) -> Codebook:
    """Levels of a width; trellis codes have twice as many, under another name."""
    count, name = (2 ** (width + 1), f"{name}/trellis") if trellis else (2**width, name)
    return Codebook(f"{name}/{width}", (torch.arange(count) * 0.75 - 1).half())


def tensor_of(rows: int, columns: int, widths: list[int], seed: int = 0, code: Code | None = None) -> QuantizedTensor:
    """A layer with the given row widths; affine unless another code is given."""
    random = np.random.default_rng(seed)
    width = np.array(widths)
    code = code or Affine()
    scales = 0 if code.absolute else 1
    return QuantizedTensor(
        codes=torch.from_numpy(random.integers(0, 2 ** width[:, None], size=(rows, columns)).astype(np.uint8)),
        width=torch.from_numpy(width.astype(np.uint8)),
        scale=torch.from_numpy(random.uniform(0.1, 1, (rows, scales))).half(),
        zero=torch.from_numpy(random.integers(0, 256, (rows, scales)).astype(np.uint8)),
        code=code,
    )


def row_table(widths: list[int], seed: int = 0) -> RowTable:
    """Increasing random levels for each row; neighbours may be equal."""
    random = np.random.default_rng(seed)
    levels = [np.sort(random.normal(0, 0.1, 2**width).round(2)) for width in widths]
    return RowTable(torch.from_numpy(np.concatenate(levels)).half())


def overlay_of(rows: int, columns: int, count: int, seed: int = 0) -> SparseOverlay:
    """`count` random positions with random values."""
    random = np.random.default_rng(seed)
    chosen = np.zeros(rows * columns, dtype=bool)
    chosen[random.choice(rows * columns, count, replace=False)] = True
    weight = torch.from_numpy(random.normal(0, 10, (rows, columns)))
    return SparseOverlay.of(weight, torch.from_numpy(chosen.reshape(rows, columns)))


@st.composite
def quantized_tensors(draw: st.DrawFn, kinds: tuple[type[Code], ...] = KINDS) -> QuantizedTensor:
    """Odd shapes, one width or many, codes of all kinds; groups, column groups, column scales and overlays or none."""
    kind = draw(st.sampled_from(kinds))
    groups = draw(st.sampled_from([1, 1, 2, 3]))
    rows = groups * draw(st.integers(1, 5))
    per_channel = draw(st.sampled_from([1, 1, 3, 4]))
    columns = per_channel * draw(st.integers(1, 9))
    if draw(st.booleans()):
        width = np.full(rows, draw(st.integers(2, 8)))
    else:
        width = np.array(draw(st.lists(st.integers(2, 8), min_size=rows, max_size=rows)))
    seed = draw(st.integers(0, 2**32 - 1))
    random = np.random.default_rng(seed)
    codes = random.integers(0, 2 ** width[:, None], size=(rows, columns))
    extreme = draw(st.sampled_from([None, "lowest", "highest"]))
    if extreme is not None:
        codes = np.broadcast_to(0 if extreme == "lowest" else 2 ** width[:, None] - 1, codes.shape)
    group_size = None if kind.absolute else draw(st.sampled_from([None, 1, 3, columns, columns + 5]))
    scales = 0 if kind.absolute else 1 if group_size is None else -(-columns // group_size)
    column_scale = random.uniform(0.1, 10, (groups, columns // per_channel)) if draw(st.booleans()) else None
    kept = draw(st.sampled_from([0, 0, 1, rows * columns // 3, rows * columns]))
    return QuantizedTensor(
        codes=torch.from_numpy(codes.astype(np.uint8)),
        width=torch.from_numpy(width.astype(np.uint8)),
        scale=torch.from_numpy(random.uniform(1e-3, 2, (rows, scales))).half(),
        zero=torch.from_numpy(random.integers(0, 256, (rows, scales)).astype(np.uint8)),
        groups=groups,
        group_size=group_size,
        code=draw(codes_of(kind, width.tolist(), seed)),
        column_scale=None if column_scale is None else torch.from_numpy(column_scale).half(),
        overlay=overlay_of(rows, columns, kept, seed) if kept else None,
    )


@st.composite
def codes_of(draw: st.DrawFn, kind: type[Code], widths: list[int], seed: int) -> Code:
    """A code of this kind; tables at some of the widths."""
    if kind is Affine:
        return Affine()
    if kind is RowTable:
        return row_table(widths, seed)
    if issubclass(kind, Bitshift):
        return kind(draw(st.sampled_from([256, 1024])))
    with_table = draw(st.lists(st.sampled_from(sorted(set(widths))), unique=True, min_size=int(kind is SharedTable)))
    tables = {w: codebook(w, trellis=kind is Trellis) for w in with_table}
    return Trellis(tables, draw(st.sampled_from([4, 8, 64, 256]))) if kind is Trellis else SharedTable(tables)


def identical(a: QuantizedTensor, b: QuantizedTensor) -> bool:
    """Every field equal, dtypes and shapes included, and codes of one kind."""
    return type(a.code) is type(b.code) and contents(a) == contents(b)


def contents(thing: object) -> object:
    """What an object holds, as plain values that can be compared."""
    if isinstance(thing, torch.Tensor):
        return str(thing.dtype), list(thing.shape), thing.tolist()
    if isinstance(thing, Mapping):
        return {key: contents(value) for key, value in thing.items()}
    return contents(vars(thing)) if hasattr(thing, "__dict__") else thing
