"""A user's texts in a CSV, TSV, JSON-lines or parquet file."""

from dataclasses import dataclass
from pathlib import Path

from bayesq.suite.datasets.base import DataSplits
from bayesq.suite.datasets.tables import read_table
from bayesq.suite.datasets.text_columns import TextColumns


@dataclass(frozen=True, kw_only=True)
class CsvFiles(TextColumns):
    """Texts with classes or scores, in one file or in one for training and one for evaluation.

    Attributes: the keys of conf/dataset/csv.yaml, which explains them.
    """

    file: str
    val: str | None = None

    def load(self, cache_dir: Path) -> DataSplits:
        """Splits with texts, or pairs of them, as inputs; `cache_dir` stays untouched.

        Raises:
            UserError: a file cannot be read, or as `TextColumns.data_splits`.
        """
        train = read_table([Path(self.file)], f"dataset.file={self.file}")
        val = None if self.val is None else read_table([Path(self.val)], f"dataset.val={self.val}")
        return self.data_splits(train, val, {"origin": self.file if self.val is None else f"{self.file}, {self.val}"})
