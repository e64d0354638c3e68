"""Tables of texts and labels: tab-separated, CSV, JSON lines and parquet files.

In all functions `where` begins every error line.
"""

import csv
import io
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from bayesq.suite.datasets.parquet_files import read_parquet, recorded_classes
from bayesq.suite.errors import UserError

SUFFIXES = (".csv", ".tsv", ".jsonl", ".parquet")


@dataclass
class Table:
    """The rows of one split.

    Attributes:
        where: the beginning of error lines.
        rows: of each row its name, such as `line 3`, and its cells.
        classes: class names that the files record, by column.
    """

    where: str
    header: list[str]
    rows: list[tuple[str, Sequence[Any]]]
    files: list[Path]
    classes: dict[str, list[str]] = field(default_factory=dict)


def read_table(files: Sequence[Path], where: str) -> Table:
    """The table in one file, or in several parquet files.

    Raises:
        UserError: the file has an unknown ending, cannot be read, or is not what its ending says.
    """
    (file, *_), suffix = files, files[0].suffix.lower()
    if suffix not in SUFFIXES:
        raise UserError(f"{where}: needs a file that ends in one of {', '.join(SUFFIXES)}")
    if suffix == ".parquet":
        return parquet_table(files, where, None)
    text = text_of(file, where)
    if suffix == ".jsonl":
        return _json_table(file, text, where)
    rows = tab_separated(text) if suffix == ".tsv" else _comma_separated(text, where)
    header = [str(name) for name in rows[0][1]] if rows else []
    if len(header) == 1:
        raise UserError(
            f"{where}: its first line has one column, {header[0]!r:.100}: cells of a .csv stand between commas, those "
            "of a .tsv between tabs"
        )
    for number, cells in rows:
        if len(cells) != len(header):
            raise UserError(f"{where}, {number}: has {len(cells)} cells, the header {len(header)}")
    return Table(where, header, rows[1:], [file])


def text_of(file: Path, where: str) -> str:
    """The text of a UTF-8 file, without a byte order mark."""
    try:
        text = file.read_bytes().decode("utf-8-sig")  # the published MRPC files begin with a byte order mark
    except OSError as error:
        raise UserError(f"{where} cannot be read ({error.strerror or error})") from error
    except UnicodeDecodeError as error:
        raise UserError(f"{where} is not UTF-8 text: save it in this encoding, not compressed") from error
    if "\0" in text:
        raise UserError(f"{where} is not text: it holds NUL bytes")
    return text


def tab_separated(text: str) -> list[tuple[str, Sequence[Any]]]:
    """Rows of cells between tabs; quotation marks are part of the text.

    splitlines() and the csv module would be wrong: texts hold rarer line separators and unpaired quotation marks.
    """
    lines = enumerate(text.split("\n"), 1)
    return [(f"line {number}", line.rstrip("\r").split("\t")) for number, line in lines if line.strip()]


def _comma_separated(text: str, where: str) -> list[tuple[str, Sequence[Any]]]:
    """Rows named by their first lines; a quoted cell may hold line ends, even the rest of the file."""
    reader = csv.reader(io.StringIO(text, newline=""), strict=True)
    rows: list[tuple[str, Sequence[Any]]] = []
    line, limit = 1, csv.field_size_limit(len(text) + 1)  # the process's limit is 131,072 characters a cell
    try:
        for cells in reader:
            if cells:
                rows.append((f"line {line}", cells))
            line = reader.line_num + 1
    except csv.Error as error:
        raise UserError(f"{where}, line {line}: is not CSV ({error}); a quotation mark in a cell is doubled") from error
    finally:
        csv.field_size_limit(limit)
    return rows


def _json_table(file: Path, text: str, where: str) -> Table:
    objects: list[tuple[str, Mapping[str, Any]]] = []
    for number, line in enumerate(text.split("\n"), 1):
        if not line.strip():
            continue
        try:
            content = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise UserError(f"{where}, line {number}: is not JSON ({error})") from error
        if not isinstance(content, dict):
            raise UserError(f"{where}, line {number}: needs an object {{...}} per line")
        objects.append((f"line {number}", content))
    header = list(dict.fromkeys(key for _, content in objects for key in content))
    return Table(where, header, [(name, [content.get(key) for key in header]) for name, content in objects], [file])


def parquet_table(files: Sequence[Path], where: str, classes: Sequence[str] | None) -> Table:
    """The rows of parquet files, one after the other; `classes` as in `read_parquet`."""
    header: list[str] = []
    rows: list[tuple[str, Sequence[Any]]] = []
    recorded: dict[str, list[str]] = {}
    for file in files:
        table, _ = read_parquet(file, where, classes)
        header = header or table.column_names
        if set(header) != set(table.column_names):
            raise UserError(f"{where}: {file} has other columns than {files[0].name}")
        of = f" of {file.name}" if len(files) > 1 else ""
        columns = (table[name].to_pylist() for name in header)
        rows += ((f"row {number}{of}", row) for number, row in enumerate(zip(*columns, strict=True)))
        recorded |= {name: names for name in header if (names := recorded_classes(table, name)) is not None}
    return Table(f"{where}: {files[0].parent.name}/{files[0].name}", header, rows, list(files), recorded)
