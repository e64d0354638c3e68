"""Texts, or pairs of texts, with classes or scores, from the columns of a user's tables."""

import logging
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from bayesq.defaults import suggestion
from bayesq.files import file_sha256
from bayesq.metrics import ACCURACY, METRICS
from bayesq.suite.datasets.base import DataSplits, Examples, UserSplits
from bayesq.suite.datasets.tables import Table
from bayesq.suite.errors import UserError
from bayesq.suite.tasks import TEXT_CLASSIFICATION, TEXT_REGRESSION

log = logging.getLogger(__name__)

# A column with more classes than this, and with more classes than half of the rows, holds something else.
MANY_CLASSES = 20
# Half of a surrogate pair, which JSON can hold and tokenizers refuse.
SURROGATE = re.compile("[\ud800-\udfff]")
SCORE_METRICS = ("pearson", "spearman")


@dataclass(frozen=True, kw_only=True)
class TextColumns(UserSplits):
    """Which columns are read; the keys of conf/dataset/csv.yaml, which explains them."""

    text: str = "text"
    pair: str | None = None
    label: str = "label"
    score: str | None = None

    def data_splits(self, tables: Sequence[Table], source: Mapping[str, str]) -> DataSplits:
        """Splits with texts as inputs, or pairs if `pair` is given; a second table has the evaluated ones.

        Labels 0, 1, ... stay as they are; the files may record names of them. All other labels are names, in
        alphabetical order, or in the order of their numbers.

        Raises:
            UserError: a column, a text or a label is missing, a label is none of the recorded classes, a score is no
                number, or a split would be empty.
        """
        columns = [self._columns(table) for table in tables]
        if self.score is None:
            names, numbers = _classes(tables, [labels for _, labels in columns], self.label)
            targets = [_labels(table, labels, numbers) for table, (_, labels) in zip(tables, columns, strict=True)]
        else:
            names, numbers = [], {"": 0}
            targets = [_scores(table, cells) for table, (_, cells) in zip(tables, columns, strict=True)]
        parts = [
            Examples(texts, target, [f"{split}/{row}" for row in range(len(target))])
            for split, (texts, _), target in zip(("train", "val"), columns, targets, strict=False)
        ]
        splits = self.parts(*parts, fitted=True)
        _tell_odd(*splits, names, tables[0].where)
        metrics = (ACCURACY,) if self.score is None else tuple(METRICS[name] for name in SCORE_METRICS)
        return DataSplits(
            *splits,
            num_classes=max(numbers.values()) + 1,
            primary_metric=metrics[0].name,
            source={
                **source,
                "sha256": ", ".join(file_sha256(file) for table in tables for file in table.files),
                "split_seed": str(self.split_seed),
            },
            metrics=metrics,
            task=TEXT_CLASSIFICATION if self.score is None else TEXT_REGRESSION,
            classes=tuple(names),
        )

    def _columns(self, table: Table) -> tuple[list[Any], list[Any]]:
        """Texts, and labels or scores as the file has them."""
        if not table.rows:
            raise UserError(f"{table.where} has no rows")
        keys = ("text", "pair", "label" if self.score is None else "score")
        columns = {key: name for key in keys if (name := getattr(self, key)) is not None}
        for key, name in columns.items():
            if name not in table.header:
                had, hint = ", ".join(table.header), suggestion(name, table.header)
                raise UserError(f"dataset.{key}={name}: {table.where} has no such column, but {had:.300}{hint:.100}")
            if table.header.count(name) > 1:
                raise UserError(f"dataset.{key}={name}: {table.where} has more than one such column: rename one")
        *texts, targets = ([cells[table.header.index(name)] for _, cells in table.rows] for name in columns.values())
        for name, column in zip(columns.values(), texts, strict=False):
            for (number, _), text in zip(table.rows, column, strict=True):
                if not isinstance(text, str) or SURROGATE.search(text):
                    raise UserError(f"{table.where}, {number}: needs text in {name}, got {text!r:.60}")
        rows = list(zip(*texts, strict=True))
        empty = [number for (number, _), row in zip(table.rows, rows, strict=True) if not all(map(str.strip, row))]
        if empty:
            log.warning(f"{table.where}: {len(empty)} of {len(rows)} texts are empty ({empty[0]}); they count")
        return rows if self.pair else texts[0], targets


def _tell_odd(train: Examples, pool: Examples, evaluation: Examples, names: Sequence[str], where: str) -> None:
    """Warn about evaluated texts that are also in the train split or the pool, and evaluated classes that are not."""
    known = {*train.inputs, *pool.inputs}
    if repeated := sum(text in known for text in evaluation.inputs):
        log.warning(
            f"{where}: {repeated} of {len(evaluation)} evaluated texts are also calibrated or fitted on, which "
            "inflates the scores: remove the duplicates"
        )
    if evaluation.labels.is_floating_point():
        return
    lacking = {*evaluation.labels.tolist()} - {*train.labels.tolist(), *pool.labels.tolist()}
    if lacking:
        which = ", ".join(names[label] if names else str(label) for label in sorted(lacking))
        log.warning(f"{where}: only evaluated examples have the labels {which:.200}: check how they are written")


def _name_of(cell: Any) -> str:
    """A label as text, "" if it is missing. Whole numbers in a column with gaps are floats, so 1.0 becomes 1."""
    text = re.sub(r"^(-?\d+)\.0+$", r"\1", str(cell).strip())
    return "" if cell is None or text.lower() == "nan" or isinstance(cell, list | dict | bytes) else text


def _classes(tables: Sequence[Table], labels: Sequence[list[Any]], column: str) -> tuple[list[str], dict[str, int]]:
    """The names of the classes in order, or none if the labels are 0, 1, ...; and the number of each label."""
    if recorded := tables[0].classes.get(column):
        numbers = {name: label for label, name in enumerate(recorded)}
        return recorded, {str(label): label for label in range(len(recorded))} | numbers
    cells = [_name_of(cell) for split in labels for cell in split]
    names = sorted(set(cells) - {""})
    if len(names) < 2:
        raise UserError(f"dataset.label={column}: needs at least two classes, has {', '.join(names) or 'none'}")
    fractions = any(re.fullmatch(r"-?\d*\.\d+", name) for name in names)
    if len(names) > MANY_CLASSES and (fractions or len(names) > len(cells) / 2):
        raise UserError(
            f"dataset.label={column}: has {len(names)} values in {len(cells)} rows, too many for classes; "
            "dataset.score=COLUMN reads numbers"
        )
    if all(re.fullmatch(r"-?\d+", name) for name in names):
        names = sorted(names, key=int)
        if names == [str(number) for number in range(len(names))]:
            return [], {name: label for label, name in enumerate(names)}
    return names, {name: label for label, name in enumerate(names)}


def _labels(table: Table, cells: Sequence[Any], numbers: Mapping[str, int]) -> torch.Tensor:
    for (row, _), cell in zip(table.rows, cells, strict=True):
        if _name_of(cell) not in numbers:
            raise UserError(f"{table.where}, {row}: label {cell!r:.60} is none of the classes {', '.join(numbers)}")
    return torch.tensor([numbers[_name_of(cell)] for cell in cells])


def _scores(table: Table, cells: Sequence[Any]) -> torch.Tensor:
    for (row, _), cell in zip(table.rows, cells, strict=True):
        try:
            fits = not isinstance(cell, bool) and abs(float(cell)) <= torch.finfo(torch.float32).max
        except (TypeError, ValueError):
            fits = False
        if not fits:
            raise UserError(f"{table.where}, {row}: score {cell!r:.60} is not a number in the range of float32")
    return torch.tensor([float(cell) for cell in cells])
