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
        files = {"file": self.file} | ({} if self.val is None else {"val": self.val})
        tables = [read_table([Path(file)], f"dataset.{key}={file}") for key, file in files.items()]
        return self.data_splits(tables, {"origin": ", ".join(files.values())})
