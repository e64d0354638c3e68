"""QuantizedTensors of every kind a method may return, random ones and hypothesis strategies."""

import numpy as np
import torch
from hypothesis import strategies as st

from bayesq.quant.tensor import Codebook, QuantizedTensor


def codebook(width: int, name: str = "book", trellis: bool = False) -> Codebook:
    """Levels of a width; trellis codes have twice as many, under a name of their own."""
    count, name = (2 ** (width + 1), f"{name}/trellis") if trellis else (2**width, name)
    return Codebook(f"{name}/{width}", (torch.arange(count) * 0.75 - 1).half())


def tensor_of(rows: int, columns: int, widths: list[int], seed: int = 0, trellis: int | None = None) -> QuantizedTensor:
    """A layer without codebooks, with the given row widths."""
    random = np.random.default_rng(seed)
    width = np.array(widths)
    return QuantizedTensor(
        codes=torch.from_numpy(random.integers(0, 2 ** width[:, None], size=(rows, columns)).astype(np.uint8)),
        width=torch.from_numpy(width.astype(np.uint8)),
        scale=torch.from_numpy(random.uniform(0.1, 1, (rows, 1))).half(),
        zero=torch.from_numpy(random.integers(0, 256, (rows, 1)).astype(np.uint8)),
        trellis=trellis,
    )


@st.composite
def quantized_tensors(draw: st.DrawFn) -> QuantizedTensor:
    """Odd shapes, one width or many, with or without groups, column groups, codebooks, column scales and a trellis."""
    groups = draw(st.sampled_from([1, 1, 2, 3]))
    rows = groups * draw(st.integers(1, 5))
    per_channel = draw(st.sampled_from([1, 1, 3, 4]))
    columns = per_channel * draw(st.integers(1, 9))
    if draw(st.booleans()):
        width = np.full(rows, draw(st.integers(2, 8)))
    else:
        width = np.array(draw(st.lists(st.integers(2, 8), min_size=rows, max_size=rows)))
    random = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    codes = random.integers(0, 2 ** width[:, None], size=(rows, columns))
    extreme = draw(st.sampled_from([None, "lowest", "highest"]))
    if extreme is not None:
        codes = np.broadcast_to(0 if extreme == "lowest" else 2 ** width[:, None] - 1, codes.shape)
    group_size = draw(st.sampled_from([None, 1, 3, columns, columns + 5]))
    column_groups = 1 if group_size is None else -(-columns // group_size)
    used = sorted({int(w) for w in width})
    with_book = draw(st.lists(st.sampled_from(used), unique=True))
    trellis = draw(st.sampled_from([None, 4, 8, 64, 256]))
    column_scale = random.uniform(0.1, 10, (groups, columns // per_channel)) if draw(st.booleans()) else None
    return QuantizedTensor(
        codes=torch.from_numpy(codes.astype(np.uint8)),
        width=torch.from_numpy(width.astype(np.uint8)),
        scale=torch.from_numpy(random.uniform(1e-3, 2, (rows, column_groups))).half(),
        zero=torch.from_numpy(random.integers(0, 256, (rows, column_groups)).astype(np.uint8)),
        groups=groups,
        group_size=group_size,
        codebooks={w: codebook(w, trellis=trellis is not None) for w in with_book},
        column_scale=None if column_scale is None else torch.from_numpy(column_scale).half(),
        trellis=trellis,
    )


def identical(a: QuantizedTensor, b: QuantizedTensor) -> bool:
    """Every field equal, dtypes and shapes included."""
    pairs = [(a.codes, b.codes), (a.width, b.width), (a.scale, b.scale), (a.zero, b.zero)]
    if (a.column_scale is None) != (b.column_scale is None):
        return False
    if a.column_scale is not None and b.column_scale is not None:
        pairs.append((a.column_scale, b.column_scale))
    books = [{w: (book.name, book.levels.tolist()) for w, book in t.codebooks.items()} for t in (a, b)]
    return (
        all(x.dtype == y.dtype and torch.equal(x, y) for x, y in pairs)
        and (a.groups, a.group_size, a.trellis) == (b.groups, b.group_size, b.trellis)
        and books[0] == books[1]
    )
