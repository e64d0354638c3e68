"""The inputs of one block for all calibration batches: in memory, or in a temporary file where memory is short."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from bayesq.scratch_file import TensorFile


class HiddenStates:
    """Arguments of a block, a list of tensors and constants for each batch.

    Tensors in the file are read as memory-mapped copies with the same bits, strides and device.

    Attributes:
        disk_is_full: an entry could not be written, so some entries are missing or still those of the block before.
    """

    def __init__(self) -> None:
        self.disk_is_full = False
        self._entries: list[tuple[TensorFile | None, list[Any], list[Any]]] = []  # file, content, devices
        self._file: TensorFile | None = None

    def __len__(self) -> int:
        return len(self._entries)

    def __getitem__(self, i: int) -> list[Any]:
        """The arguments for batch i."""
        file, content, devices = self._entries[i]
        if file is None:
            return content
        return [x.to(to) if isinstance(x, Tensor) else x for x, to in zip(file.read(content), devices, strict=True)]

    def put(self, i: int, arguments: Sequence[Any], folder: Path | None) -> None:
        """Append the arguments for batch i, or replace those of the block before; batches come in order.

        Args:
            arguments: tensors and constants; they are not copied where they stay in memory.
            folder: of the file, existing; None = memory. It is the same for all batches of a block.
        """
        if i == 0:
            self.disk_is_full, self._file = False, None
        if self.disk_is_full:
            return
        devices = [x.device if isinstance(x, Tensor) else None for x in arguments]
        content = list(arguments)
        try:
            if folder is not None:
                self._file = TensorFile(folder) if self._file is None else self._file
                content = self._file.write([x.cpu() if isinstance(x, Tensor) else x for x in content])
        except OSError:
            self.disk_is_full = True
            return
        before = self._entries[i][0] if i < len(self) else None
        self._entries[i : i + 1] = [(self._file, content, devices)]
        if before is not None and i + 1 == len(self):
            before.close()  # frees the disk space of the block before
