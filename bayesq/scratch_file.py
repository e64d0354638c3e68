"""Tensors in a temporary file without a name, memory-mapped when they are read.

The file is unlinked as soon as it is open, so that the operating system frees its space when the process ends for any
reason. Tensors are read back with the same bits, shapes and strides.
"""

import tempfile
from collections.abc import Callable
from dataclasses import dataclass, fields, is_dataclass
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor

# Offsets in the file are multiples of this, so that mapped tensors are aligned as allocated ones are: libraries choose
# their summation order by alignment.
ALIGNMENT = 4096

T = TypeVar("T")


@dataclass(frozen=True)
class _Place:
    """Position of a tensor in the file, which has the bytes of `tensor.permute(order).contiguous()`."""

    offset: int
    dtype: torch.dtype
    shape: tuple[int, ...]
    order: tuple[int, ...]


class TensorFile:
    """A file of tensors, for values made of dataclasses, lists and CPU tensors.

    Args:
        folder: where the file is, existing.

    Attributes:
        nbytes: size of the file.

    Raises:
        OSError: the folder cannot be written.
    """

    def __init__(self, folder: Path) -> None:
        # Unbuffered: data that a full disk refused would stay in a buffer, and fail again at every read.
        self._file = tempfile.TemporaryFile(dir=folder, buffering=0)  # noqa: SIM115  closed by `close`
        self.nbytes = 0

    def write(self, value: T) -> T:
        """Append the value's tensors to the file.

        Returns:
            the value with places in the file instead of tensors, for `read`.

        Raises:
            OSError: the disk is full.
        """
        written: T = _replaced(value, Tensor, lambda tensor: self._write(tensor.detach()))
        return written

    def read(self, written: T) -> T:
        """What was written, its tensors mapped from the file; writing to them changes no other reader's."""
        value: T = _replaced(written, _Place, self._read)
        return value

    def close(self) -> None:
        """Free the disk space; values that were read stay valid."""
        self._file.close()

    def _write(self, tensor: Tensor) -> _Place:
        # Matrix products of a transposed and of a contiguous matrix may differ in their last bits, so the file
        # preserves strides.
        strides = tensor.stride()
        order = tuple(sorted(range(tensor.dim()), key=lambda axis: -strides[axis]))
        place = _Place(self.nbytes, tensor.dtype, tuple(tensor.shape), order)
        if tensor.numel():
            self._file.seek(self.nbytes)
            data = tensor.permute(order).contiguous().reshape(-1).view(torch.uint8).numpy().data
            while len(data):  # a single call writes 2 GiB at most
                data = data[self._file.write(data) :]
            self.nbytes += tensor.nbytes + -tensor.nbytes % ALIGNMENT
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
    """`value` with all objects of one kind replaced, also inside nested lists and dataclasses."""
    if isinstance(value, kind):
        return replace(value)
    if isinstance(value, list):
        return [_replaced(item, kind, replace) for item in value]
    if is_dataclass(value) and not isinstance(value, type):
        return type(value)(**{f.name: _replaced(getattr(value, f.name), kind, replace) for f in fields(value)})
    return value
