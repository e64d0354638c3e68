"""Tensors that wait on disk: a mapping whose values lie in a file without a name, and are mapped when asked for.

The file is unlinked as soon as it is open, so that the operating system frees its space when the process ends, however
it ends. What is read back has the bits, shapes and strides of what was put in.
"""

import tempfile
from collections.abc import Callable, Iterator, MutableMapping
from dataclasses import dataclass, fields, is_dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from bayesq.memory import give_back_freed

# Offsets in the file are multiples of this, so that mapped tensors are aligned as allocated ones are: libraries choose
# their summation order by alignment.
ALIGNMENT = 4096


@dataclass(frozen=True)
class _Place:
    """Where a tensor lies; its bytes are those of the contiguous tensor that `order` permutes it to."""

    offset: int
    dtype: torch.dtype
    shape: tuple[int, ...]
    order: tuple[int, ...]


class DiskShelf(MutableMapping[tuple[object, ...], Any]):
    """Values made of dataclasses, lists and CPU tensors, kept in a file.

    Args:
        folder: where the file is, existing.

    Raises:
        OSError: the folder cannot be written, or the disk is full.
    """

    def __init__(self, folder: Path) -> None:
        self._file = tempfile.TemporaryFile(dir=folder)  # noqa: SIM115  closed with the shelf
        self._values: dict[tuple[object, ...], Any] = {}
        self._end = 0

    def __setitem__(self, key: tuple[object, ...], value: Any) -> None:
        """Append the value's tensors to the file."""
        self._values[key] = _replaced(value, Tensor, lambda tensor: self._write(tensor.detach()))
        self._file.flush()

    def __getitem__(self, key: tuple[object, ...]) -> Any:
        """The value, its tensors mapped from the file; writing to them changes no other reader's."""
        give_back_freed()  # what waits here is large, and so is what will be computed with it
        return _replaced(self._values[key], _Place, self._read)

    def __delitem__(self, key: tuple[object, ...]) -> None:
        """Forget a value; its space in the file is not used again."""
        del self._values[key]

    def __iter__(self) -> Iterator[tuple[object, ...]]:
        """Keys in the order they came."""
        return iter(self._values)

    def __len__(self) -> int:
        """Number of values."""
        return len(self._values)

    def __contains__(self, key: object) -> bool:
        """Whether there is such a value; nothing is read."""
        return key in self._values

    @property
    def nbytes(self) -> int:
        """Size of the file."""
        return self._end

    def close(self) -> None:
        """Give the space back; values that were read stay valid."""
        self._values.clear()
        self._file.close()

    def _write(self, tensor: Tensor) -> _Place:
        # Matrix products of a transposed and of a contiguous matrix may differ in their last bits: strides are kept.
        strides = tensor.stride()
        order = tuple(sorted(range(tensor.dim()), key=lambda axis: -strides[axis]))
        place = _Place(self._end, tensor.dtype, tuple(tensor.shape), order)
        if tensor.numel():
            self._file.seek(self._end)
            self._file.write(tensor.permute(order).contiguous().reshape(-1).view(torch.uint8).numpy().data)
            self._end += tensor.nbytes + -tensor.nbytes % ALIGNMENT
        return place

    def _read(self, place: _Place) -> Tensor:
        shape = [place.shape[axis] for axis in place.order]
        if 0 in shape:
            return torch.empty(place.shape, dtype=place.dtype)
        size = int(np.prod(shape, dtype=np.int64)) * place.dtype.itemsize
        mapped = np.memmap(self._file, np.uint8, "c", place.offset, (size,))
        tensor = torch.from_numpy(mapped).view(place.dtype).reshape(shape)
        return tensor.permute([place.order.index(axis) for axis in range(len(shape))])


def _replaced(value: Any, kind: type, replace: Callable[[Any], Any]) -> Any:
    """`value` with everything of one kind replaced, in lists and dataclasses as deep as they go."""
    if isinstance(value, kind):
        return replace(value)
    if isinstance(value, list):
        return [_replaced(item, kind, replace) for item in value]
    if is_dataclass(value) and not isinstance(value, type):
        return type(value)(**{f.name: _replaced(getattr(value, f.name), kind, replace) for f in fields(value)})
    return value
