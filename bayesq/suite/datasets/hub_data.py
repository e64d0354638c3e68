"""Any data set of texts or photos on the Hugging Face hub, by its id, splits and columns."""

import re
from dataclasses import dataclass
from pathlib import Path

from bayesq.defaults import suggestion
from bayesq.suite.datasets.base import DataSplits
from bayesq.suite.datasets.parquet_files import listed, of_split, read_parquet, recorded_classes
from bayesq.suite.datasets.parquet_photos import ParquetPhotos
from bayesq.suite.datasets.tables import SUFFIXES, read_table
from bayesq.suite.datasets.text_columns import TextColumns
from bayesq.suite.errors import UserError
from bayesq.suite.hub import dataset_files, hub_files

# The branch with the hub's conversion of a data set to parquet.
CONVERTED = "refs/convert/parquet"


@dataclass(frozen=True, kw_only=True)
class HubData(TextColumns):
    """A data set repository, read from files; its code is never run.

    The hub converts every public data set to parquet on the branch refs/convert/parquet, which is the default
    revision: SUBSET/SPLIT/0000.parquet. On other revisions SPLIT is read from SPLIT-*.parquet or from a file SPLIT.csv,
    .tsv, .jsonl or .parquet, in the folder SUBSET, or in data/ or the repository itself.

    Attributes: the keys of conf/dataset/hub.yaml, which explains them.
    """

    id: str
    subset: str | None = None
    train: str = "train"
    val: str | None = "validation"
    image: str | None = None
    revision: str = CONVERTED

    def load(self, cache_dir: Path) -> DataSplits:
        """Splits with texts, pairs, or photos as inputs; `cache_dir` stays untouched (the hub has its own).

        Raises:
            UserError: the hub does not provide the files, there is no such split, or as `TextColumns.data_splits`.
        """
        where = f"dataset.name={self.id}"
        splits = {"train": self.train, **({"val": self.val} if self.val is not None else {})}
        patterns = [pattern for split in splits.values() for pattern in self._patterns(split)]
        instead = "take files of your own with dataset=csv or dataset=image_folder"
        if self.revision == CONVERTED:
            instead = f"dataset.revision=main reads the files that its authors stored; or {instead}"
        asked = f"{where} at dataset.revision={self.revision}"
        folder = hub_files(self.id, patterns, self.revision, asked, instead)
        files = [self._files(folder, split, f"{where} dataset.{key}={split}") for key, split in splits.items()]
        source = {"origin": self.id, "subset": self.subset or "", "splits": ", ".join(splits.values())}
        source["revision"] = folder.name
        if self.image is not None:
            return self._photos(files, where, source)
        return self.data_splits([read_table(split, where) for split in files], source)

    def _patterns(self, split: str) -> list[str]:
        """Where a split's files may be, the hub's conversion first."""
        converted = [f"{self.subset or 'default'}/{part}/*.parquet" for part in (split, f"partial-{split}")]
        folders = [f"{self.subset}/"] if self.subset else ["data/", ""]
        stored = [f"{folder}{split}{end}" for folder in folders for end in ("-*.parquet", *SUFFIXES)]
        return converted + stored

    def _files(self, folder: Path, split: str, where: str) -> list[Path]:
        for pattern in self._patterns(split):
            if files := listed(folder, pattern):
                return of_split(files, where)
        more = "" if split == self.train else "; dataset.val=null holds out a part of the training examples"
        subset = f"dataset.subset={self.subset}" if self.subset else "dataset.subset=null (a data set may need one)"
        had = (file for file in dataset_files(self.id, folder.name) if file.endswith(SUFFIXES))
        # files of the conversion are numbers in the folder SUBSET/SPLIT
        named = (file.rpartition("/")[0] if re.search(r"/\d+\.parquet$", file) else file for file in had)
        there = ", ".join(dict.fromkeys(named))
        parts = f"; it has {there:.300}" if there else ""
        raise UserError(f"{where}: there is no such split at {self.revision} with {subset}{more}{parts}")

    def _photos(self, files: list[list[Path]], where: str, source: dict[str, str]) -> DataSplits:
        """Splits with photos; labels without recorded names are classes 0, 1, ... without names."""
        tables = [read_parquet(file, where, None, [self.label]) for split in files for file in split]
        header = tables[0][1].schema.to_arrow_schema().names
        for key, column in (("image", str(self.image)), ("label", self.label)):
            if column not in header:
                hint = suggestion(column, header)
                raise UserError(f"dataset.{key}={column}: {where} has no such column, but {', '.join(header)}{hint}")
        names = recorded_classes(tables[0][0], self.label)
        labels = [label for table, _ in tables for label in table[self.label].to_pylist() if isinstance(label, int)]
        classes = names or [str(number) for number in range(max(labels, default=0) + 1)]
        photos = (ParquetPhotos(split, where, classes, str(self.image), self.label) for split in files)
        return DataSplits(
            *self.parts(*photos, fitted=False),
            num_classes=len(classes),
            primary_metric="accuracy",
            source={**source, "split_seed": str(self.split_seed)},
            classes=tuple(names or ()),
        )
