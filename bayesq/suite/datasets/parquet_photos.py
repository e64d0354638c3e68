"""Photos inside parquet files in the layout of the `datasets` library, read when they are asked for.

Columns: `image`, a struct whose `bytes` is the encoded photo, and `label`. Such files come in row groups of about a
hundred photos; one is read whole, and the last few read are kept, for neighbours.
"""

import os
import threading
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import accumulate
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bayesq.suite.config import one_line
from bayesq.suite.datasets.base import Examples
from bayesq.suite.datasets.parquet_files import check_classes, class_names
from bayesq.suite.errors import UserError

CACHED_GROUPS = 2
# A writer that was not told otherwise puts a whole file into one row group, and one photo would cost all of it.
LARGEST_GROUP_BYTES = 2**30


@dataclass(frozen=True, order=True)
class ParquetPhoto:
    """One photo: its file's place among all, and its row there."""

    file: int
    row: int
    of: "ParquetPhotos" = field(compare=False, repr=False)

    def read(self) -> bytes:
        """The encoded photo.

        Raises:
            OSError, ValueError: the file cannot be read, or the row holds no photo.
        """
        return self.of.read(self)

    def __str__(self) -> str:
        return f"row {self.row} of {self.of.files[self.file]}"


class ParquetPhotos:
    """The photos of one split, in the order of the files and rows; only labels are in memory.

    Args:
        files: the split's files.
        where: key and value that led to them, the beginning of every error line.
        num_classes: labels must lie below.
        classes: names that a file may record for its labels, if they are known (see `check_classes`).

    Raises:
        UserError: pyarrow is not installed, a file cannot be read or has another layout or other classes, or a label is
            not possible.
    """

    def __init__(self, files: Sequence[Path], where: str, num_classes: int, classes: Sequence[str] = ()) -> None:
        self.files = list(files)
        self._names = [file.name for file in self.files]
        if len(set(self._names)) < len(self._names):  # of several folders, which ids must tell apart
            above = os.path.commonpath(self.files)
            self._names = [file.relative_to(above).as_posix() for file in self.files]
        self._groups: OrderedDict[tuple[int, int], Any] = OrderedDict()
        self._lock = threading.Lock()
        labels, self._rows = [], []
        for file in self.files:
            file_labels, groups = _labels_and_groups(file, where, num_classes, classes)
            labels.append(file_labels)
            self._rows.append([0, *accumulate(groups)])
        self.labels = torch.cat(labels)
        self._first = [0, *accumulate(rows[-1] for rows in self._rows)]

    def __len__(self) -> int:
        return len(self.labels)

    def select(self, indices: Tensor) -> Examples:
        """The photos at `indices` [k] int64, in that order."""
        bounds = torch.tensor(self._first[1:])
        files = torch.bucketize(indices, bounds, right=True).tolist()
        photos = [
            ParquetPhoto(file, position - self._first[file], self)
            for position, file in zip(indices.tolist(), files, strict=True)
        ]
        ids = [f"{self._names[photo.file]}/{photo.row}" for photo in photos]
        return Examples(photos, self.labels[indices], ids)

    def read(self, photo: ParquetPhoto) -> bytes:
        """The encoded photo; raises as ParquetPhoto.read does."""
        rows = self._rows[photo.file]
        group = next(number for number, end in enumerate(rows[1:]) if photo.row < end)
        content = self._group(photo.file, group)[photo.row - rows[group]].as_py()
        if content is None:
            raise ValueError("its column image has no bytes")
        photo_bytes: bytes = content
        return photo_bytes

    def _group(self, file: int, group: int) -> Any:
        """The encoded photos of a row group: a chunked array of pyarrow."""
        import pyarrow.parquet as pq

        with self._lock:
            if (file, group) not in self._groups:
                with pq.ParquetFile(self.files[file]) as table:
                    images = table.read_row_group(group, columns=["image"]).combine_chunks()["image"]
                self._groups[file, group] = images.combine_chunks().field("bytes")
                if len(self._groups) > CACHED_GROUPS:
                    self._groups.popitem(last=False)
            self._groups.move_to_end((file, group))
            return self._groups[file, group]


def _labels_and_groups(file: Path, where: str, num_classes: int, classes: Sequence[str]) -> tuple[Tensor, list[int]]:
    """Labels [rows] int64 of a file and the number of rows in each of its row groups."""
    try:
        import pyarrow as pa
        import pyarrow.parquet as pq
    except ImportError as error:
        raise UserError(f"{where}: parquet files need pyarrow: run `python -m pip install pyarrow`") from error
    try:
        with pq.ParquetFile(file) as table:
            schema, metadata = table.schema_arrow, table.metadata
            fields = {name: schema.field(name).type for name in ("image", "label") if name in schema.names}
            groups = [metadata.row_group(number) for number in range(metadata.num_row_groups)]
            labels = table.read(columns=["label"])["label"] if "label" in fields else None
    except OSError as error:
        raise UserError(f"{where}: {file} cannot be read ({error.strerror or error})") from error
    except Exception as error:  # of a damaged file pyarrow raises more than it documents
        raise UserError(f"{where}: {file} is not parquet ({one_line(str(error))[:200]})") from error
    image = fields.get("image")
    if image is None or not pa.types.is_struct(image) or image.get_field_index("bytes") < 0:
        raise UserError(f"{where}: {file} has no column image with the encoded photo under bytes")
    if labels is None or not pa.types.is_integer(labels.type):
        raise UserError(f"{where}: {file} has no column label of whole numbers")
    if labels.null_count:
        raise UserError(f"{where}: {file} has {len(labels)} photos, but {labels.null_count} have no label")
    check_classes(class_names(schema.metadata), num_classes, classes, f"{where}: {file}")
    row_labels = torch.tensor(labels.to_numpy()).long()
    if len(row_labels) and not 0 <= int(row_labels.min()) <= int(row_labels.max()) < num_classes:
        wrong = row_labels[(row_labels < 0) | (row_labels >= num_classes)][0]
        raise UserError(f"{where}: {file} must hold labels from 0 to {num_classes - 1}, and has {wrong}")
    if (size := max((group.total_byte_size for group in groups), default=0)) > LARGEST_GROUP_BYTES:
        raise UserError(
            f"{where}: {file} has a row group of {size / 2**30:.1f} GiB, which one photo would cost: write it again "
            "with row_group_size=100"
        )
    return row_labels, [group.num_rows for group in groups]
