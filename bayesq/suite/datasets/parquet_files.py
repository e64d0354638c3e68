"""Parquet files in the layout of the `datasets` library: the files of a split, and one file with its class names.

In all functions `where` is the key and value that led to the files; it begins every error line.
"""

import json
import re
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from bayesq.suite.config import one_line
from bayesq.suite.errors import UserError

# name-00000-of-00012.parquet; older releases of `datasets` add a hash, which differs from file to file
SHARD = re.compile(r"(.+?)-(\d+)-of-(\d+)(?!\d)(.*)")


def listed(folder: Path, *patterns: str) -> list[Path]:
    """The files in `folder` that match a glob pattern, sorted, without hidden ones (such as macOS's `._` files)."""
    files = {file for pattern in patterns for file in folder.glob(pattern) if not file.name.startswith(".")}
    return sorted(files)


def of_split(files: Iterable[Path], where: str) -> list[Path]:
    """The files of one split in order: all `shards` of a set, a single file, or files whose names differ in a number.

    Raises:
        UserError: a shard is missing, or a file belongs to another set.
    """
    parts = shards(files, where)
    names = {} if not parts or SHARD.match(parts[0].name) else {re.sub(r"\d+", "#", part.name): part for part in parts}
    if len(names) > 1:
        one, other, *_ = sorted(part.name for part in names.values())
        raise UserError(f"{where}: {one} and {other} in {parts[0].parent} do not belong to one set: keep one of them")
    return parts


def shards(files: Iterable[Path], where: str, wanted: Callable[[Path], bool] = lambda _: True) -> list[Path]:
    """`files` in order; if a name states their number (`train-00000-of-00012.parquet`), the set must be complete.

    Raises:
        UserError: a file of the set for which `wanted` is true is missing, or a file is no part of the set.
    """
    files = sorted(files)
    marks = {file: mark for file in files if (mark := SHARD.match(file.name))}
    if not marks:
        return files
    first, mark = next(iter(marks.items()))
    (stem, digits, total, end), count = mark.groups(), int(mark[3])
    numbers: dict[int, Path] = {}
    for file in files:
        same_set = file in marks and (file.parent, marks[file][1], int(marks[file][3])) == (first.parent, stem, count)
        number = int(marks[file][2]) if same_set else count
        if number >= count or number in numbers:
            which = file if number >= count else f"{numbers[number]} or {file.name}"
            raise UserError(
                f"{where}: {which} is not one of the {count} files that {first.name} says there are: move it away"
            )
        numbers[number] = file
    for number in range(count):
        missing = first.parent / f"{stem}-{number:0{len(digits)}}-of-{total}{end}"
        if number not in numbers and wanted(missing):
            raise UserError(
                f"{where}: {missing} is missing, and {first.name} says that there are {count}: download it too (or, to "
                f"leave it out, remove -of-{total} from the other names)"
            )
    return [numbers[number] for number in sorted(numbers)]


def read_parquet(
    file: Path, where: str, classes: Sequence[str] | None, columns: list[str] | None = None
) -> tuple[Any, Any]:
    """A parquet file's table and metadata, as pyarrow has them.

    Args:
        classes: names of the labels 0, 1, ...; the file may record synonyms of them. None: any classes.
        columns: to read; a column that the file lacks is left out. None: all columns.

    Raises:
        UserError: pyarrow is not installed, the file cannot be read, or it records other classes.
    """
    try:
        import pyarrow.parquet as pq
    except ImportError as error:
        raise UserError(f"{where}: parquet files need pyarrow: run `python -m pip install pyarrow`") from error
    try:
        with pq.ParquetFile(file) as opened:
            table, metadata = opened.read(columns), opened.metadata
        table.validate(full=True)
    except OSError as error:
        raise UserError(f"{where}: {file} cannot be read ({one_line(error.strerror or str(error))[:200]})") from error
    except Exception as error:  # pyarrow raises more for a damaged file than it documents
        raise UserError(f"{where}: {file} is not parquet ({one_line(str(error))[:200]})") from error
    if classes is not None and (names := recorded_classes(table)) is not None:
        _check_classes(names, classes, f"{where}: {file}")
    return table, metadata


def recorded_classes(table: Any, column: str = "label") -> list[str] | None:
    """The class names that the library `datasets` records for a column of a table; None if there are none."""
    try:
        names = json.loads((table.schema.metadata or {})[b"huggingface"])["info"]["features"][column]["names"]
    except (LookupError, TypeError, ValueError):
        return None
    return names if isinstance(names, list) and all(isinstance(name, str) for name in names) else None


def _check_classes(names: Sequence[str], classes: Sequence[str], where: str) -> None:
    """Refuse recorded class names of another number, and names of `classes` in another order."""
    if len(names) != len(classes):
        raise UserError(
            f"{where} names {len(names)} classes in place of {len(classes)}: its labels mean something else"
        )
    labels = {name.casefold(): label for label, name in enumerate(classes)}
    for label, name in enumerate(names):
        if (right := labels.get(name.casefold(), label)) != label:
            needs = f"which must be label {right}: number the classes in that order"
            raise UserError(f"{where} calls label {label} {name!r}, {needs}")
