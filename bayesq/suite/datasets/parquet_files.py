"""Parquet files as data sets come in: which of them make up a split, and what they call their classes."""

import json
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path

from bayesq.suite.errors import UserError

# name-00000-of-00012.parquet; older releases of `datasets` add a hash, which differs from file to file
SHARD = re.compile(r"(.+?)-(\d+)-of-(\d+)(?!\d)(.*)")


def listed(folder: Path, *patterns: str) -> list[Path]:
    """What matches one of the glob patterns in `folder`, sorted, but nothing hidden (as macOS's `._` files are)."""
    files = {file for pattern in patterns for file in folder.glob(pattern) if not file.name.startswith(".")}
    return sorted(files)


def of_split(files: Iterable[Path], where: str) -> list[Path]:
    """The files of one split in order: a set of `shards`, a single file, or files that only a number tells apart.

    Args:
        files: those whose names say that they belong to the split.
        where: key and value that led to them, the beginning of every error line.

    Raises:
        UserError: a shard is missing, or a file belongs to something else.
    """
    parts = shards(files, where)
    if parts and not SHARD.match(parts[0].name):
        patterns = {re.sub(r"\d+", "#", file.name): file for file in parts}
        if len(patterns) > 1:
            one, other, *_ = sorted(file.name for file in patterns.values())
            raise UserError(
                f"{where}: {one} and {other} in {parts[0].parent} are no parts of one set: keep one of them"
            )
    return parts


def shards(files: Iterable[Path], where: str, wanted: Callable[[Path], bool] = lambda _: True) -> list[Path]:
    """`files` in order, none being amiss where a name says how many there are (`train-00000-of-00012.parquet`).

    Args:
        files: in one folder or several.
        where: key and value that led to them, the beginning of every error line.
        wanted: tells whether a missing file was asked for.

    Raises:
        UserError: a wanted file of the set is missing, or a file is no part of it.
    """
    files = sorted(files)
    first, mark = next(((file, mark) for file in files if (mark := SHARD.match(file.name))), (None, None))
    if first is None or mark is None:
        return files
    (stem, digits, total, end), count = mark.groups(), int(mark[3])
    numbers: dict[int, Path] = {}
    for file in files:
        mark = SHARD.match(file.name)
        of_set = mark is not None and (file.parent, mark[1], int(mark[3])) == (first.parent, stem, count)
        number = int(mark[2]) if mark is not None and of_set else count
        if number >= count or (twin := numbers.setdefault(number, file)) != file:
            which = f"{file}" if number >= count else f"{twin} or {file.name}"
            raise UserError(
                f"{where}: {which} is not one of the {count} files that {first.name} says there are: move it away"
            )
    for number in range(count):
        missing = first.parent / f"{stem}-{number:0{len(digits)}}-of-{total}{end}"
        if number not in numbers and wanted(missing):
            raise UserError(
                f"{where}: {missing} is missing, and {first.name} says that there are {count}: fetch it too (or, to do "
                f"without it, take -of-{total} out of the other names)"
            )
    return [numbers[number] for number in sorted(numbers)]


def class_names(metadata: Mapping[bytes, bytes] | None) -> list[str] | None:
    """Names of the labels 0, 1, ... as `datasets` records them in the schema of a parquet file; None: unknown."""
    try:
        names = json.loads((metadata or {})[b"huggingface"])["info"]["features"]["label"]["names"]
    except (LookupError, TypeError, ValueError):
        return None
    return names if isinstance(names, list) and all(isinstance(name, str) for name in names) else None


def recorded_classes(file: Path) -> list[str] | None:
    """`class_names` of a file's column `label`.

    Raises:
        ImportError: pyarrow is not installed.
        Exception: the file is damaged; pyarrow raises more than it documents.
    """
    from pyarrow.parquet import read_schema

    return class_names(read_schema(file).metadata)


def check_classes(names: Sequence[str] | None, count: int, expected: Sequence[str], where: str) -> None:
    """Refuse recorded names of classes that show labels of another meaning.

    Args:
        names: of the classes 0, 1, ... as recorded; None: nothing is recorded.
        count: number of classes.
        expected: what they may be called; others than these may well be synonyms.
        where: the beginning of the error line.

    Raises:
        UserError: there are more or fewer, or an expected name stands at another place.
    """
    if names is None:
        return
    if len(names) != count:
        raise UserError(f"{where} names {len(names)} classes in place of {count}: its labels mean something else")
    places = {name.casefold(): place for place, name in enumerate(expected)}
    for label, name in enumerate(names):
        place = places.get(name.casefold(), label)
        if place != label:
            raise UserError(f"{where} calls label {label} {name!r}, which must be label {place}: number the classes so")
