"""Photos inside parquet files in the layout of the `datasets` library, each read when it is needed.

Columns: `image`, a struct whose `bytes` is the encoded photo, and `label`. Such files have row groups of about a
hundred photos. A group is read as a whole, and the last few groups stay in memory for neighbouring photos.
"""

import os
import threading
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from itertools import accumulate
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bayesq.suite.datasets.base import Examples
from bayesq.suite.datasets.parquet_files import read_parquet
from bayesq.suite.errors import UserError

CACHED_GROUPS = 2
# By default a writer may put a whole file into one row group; reading one photo would then read the whole file.
LARGEST_GROUP_BYTES = 2**30


@dataclass(frozen=True, order=True)
class ParquetPhoto:
    """One photo: the number of its file, and its row there."""

    file: int
    row: int
    of: "ParquetPhotos" = field(compare=False, repr=False)

    def read_bytes(self) -> bytes:
        """The encoded photo; OSError or ValueError if the file cannot be read, or the row holds no photo."""
        return self.of.read(self)

    def __str__(self) -> str:
        return f"row {self.row} of {self.of.files[self.file]}"


class ParquetPhotos:
    """The photos of one split, in the order of the files and rows; only labels are in memory.

    `where` and `classes` are those of `read_parquet`; `image` and `label` are names of columns.

    Raises:
        UserError: pyarrow is not installed, a file cannot be read or has another layout or other classes, or a label is
            not possible.
    """

    def __init__(
        self, files: Sequence[Path], where: str, classes: Sequence[str], image: str = "image", label: str = "label"
    ) -> None:
        self.files, self._image = list(files), image
        self._names = [file.name for file in self.files]
        if len(set(self._names)) < len(self._names):  # equal names in several folders: ids need the folders
            above = os.path.commonpath(self.files)
            self._names = [file.relative_to(above).as_posix() for file in self.files]
        labels, groups = zip(
            *(_labels_and_groups(file, where, classes, image, label) for file in self.files), strict=True
        )
        self.labels = torch.cat(labels)
        self._group_starts = [[0, *accumulate(rows)] for rows in groups]
        self._file_starts = [0, *accumulate(map(len, labels))]
        self._lock = threading.Lock()
        self._group = lru_cache(CACHED_GROUPS)(self._read_group)

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, position: int) -> ParquetPhoto:
        file = bisect_right(self._file_starts, position) - 1
        return ParquetPhoto(file, position - self._file_starts[file], self)

    def select(self, indices: Tensor) -> Examples:
        """The photos at `indices` [k] int64, in that order."""
        photos = [self[position] for position in indices.tolist()]
        return Examples(photos, self.labels[indices], [f"{self._names[photo.file]}/{photo.row}" for photo in photos])

    def read(self, photo: ParquetPhoto) -> bytes:
        """The encoded photo; raises as ParquetPhoto.read_bytes does."""
        starts = self._group_starts[photo.file]
        group = bisect_right(starts, photo.row) - 1
        with self._lock:  # several threads that need one group read it once
            images = self._group(photo.file, group)
        content: bytes | None = images[photo.row - starts[group]].as_py()
        if content is None:
            raise ValueError(f"its column {self._image} has no bytes")
        return content

    def _read_group(self, file: int, group: int) -> Any:
        """The encoded photos of a row group: an array of pyarrow."""
        import pyarrow.parquet as pq

        with pq.ParquetFile(self.files[file]) as table:
            images = table.read_row_group(group, columns=[self._image]).combine_chunks()[self._image]
        return images.combine_chunks().field("bytes")


def _labels_and_groups(
    file: Path, where: str, classes: Sequence[str], photo: str, label: str
) -> tuple[Tensor, list[int]]:
    """Labels [rows] int64 of a file and the number of rows in each of its row groups."""
    table, metadata = read_parquet(file, where, classes, [label])
    import pyarrow as pa

    where = f"{where}: {file}"
    schema = metadata.schema.to_arrow_schema()
    image = schema.field(photo).type if photo in schema.names else None
    if image is None or not pa.types.is_struct(image) or image.get_field_index("bytes") < 0:
        raise UserError(f"{where} has no column {photo} with the encoded photo under bytes")
    if label not in schema.names or not pa.types.is_integer(schema.field(label).type):
        raise UserError(f"{where} has no column {label} of whole numbers")
    if (column := table[label]).null_count:
        raise UserError(f"{where} has {len(column)} photos, but {column.null_count} have no label")
    labels = torch.tensor(column.to_numpy()).long()
    if len(wrong := labels[(labels < 0) | (labels >= len(classes))]):
        raise UserError(f"{where} must hold labels from 0 to {len(classes) - 1}, and has {wrong[0]}")
    groups = [metadata.row_group(number) for number in range(metadata.num_row_groups)]
    if (size := max((group.total_byte_size for group in groups), default=0)) > LARGEST_GROUP_BYTES:
        raise UserError(
            f"{where} has a row group of {size / 2**30:.1f} GiB, which has to be read for each photo: write it again "
            "with row_group_size=100"
        )
    return labels, [group.num_rows for group in groups]
