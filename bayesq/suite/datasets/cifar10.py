"""CIFAR-10 from parquet files in the layout of the `datasets` library: 32x32 colour images, ten classes."""

import hashlib
import io
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from bayesq.suite.datasets.base import DataSplits, Examples, limited, stratified
from bayesq.suite.datasets.parquet_files import check_classes, listed, of_split, recorded_classes
from bayesq.suite.datasets.pictures import decoded
from bayesq.suite.errors import UserError

CLASSES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
SUBSETS = ("stratified", "first")
SIZE = 32


class Cifar10:
    """CIFAR-10; the files decide the splits.

    Calibration sets are drawn from train.parquet, evaluated is test.parquet in its order. There is no train split:
    the CIFAR networks bring their weights, and training rows that calibrate must not train as well.

    Args:
        root: folder with train.parquet and test.parquet, or with all of train-00000-of-00002.parquet and so on
            (columns `image`, a struct with the encoded image under `bytes`, and `label`).
        limit: evaluate only so many images.
        subset: which: `stratified`, every class keeping its share, or the `first` rows of the file.
        split_seed: draws the stratified subset.
    """

    def __init__(self, root: str, limit: int | None = None, subset: str = "stratified", split_seed: int = 0) -> None:
        if subset not in SUBSETS:
            raise UserError(f"dataset.subset={subset}: choose one of {', '.join(SUBSETS)}")
        self.root = Path(root)
        self.limit = limit
        self.subset = subset
        self.split_seed = split_seed

    def load(self, cache_dir: Path) -> DataSplits:
        """Splits with inputs [n, 3, 32, 32] in [0, 1]; `cache_dir` stays untouched.

        Raises:
            UserError: a file is missing, one too many, not in that layout or of other classes, pyarrow is not
                installed, or `limit` is not possible.
        """
        train, test = self._files("train"), self._files("test")
        pool = self._read("train", train, None)
        return DataSplits(
            train=pool.select(torch.arange(0)),
            calibration_pool=pool,
            evaluation=self._read("test", test, self.limit),
            num_classes=len(CLASSES),
            primary_metric="accuracy",
            source={
                "origin": f"CIFAR-10 as parquet in {self.root}",
                "sha256": ", ".join(_sha256(file) for file in (*train, *test)),
                "subset": "all" if self.limit is None else self.subset,
                "split_seed": str(self.split_seed),
            },
        )

    def _files(self, split: str) -> list[Path]:
        """The files of a split; the plain one, if there is none."""
        plain = f"{split}.parquet"
        found = of_split(listed(self.root, plain, f"{split}-*.parquet"), f"dataset.root={self.root}")
        return found or [self.root / plain]

    def _read(self, split: str, files: list[Path], limit: int | None) -> Examples:
        """`limit` rows of the files in their order, only those being decoded."""
        tables = [self._table(file) for file in files]
        labels = torch.cat([self._labels(table["label"], file) for table, file in zip(tables, files, strict=True)])
        places = [
            (table["image"], row, file) for table, file in zip(tables, files, strict=True) for row in range(len(table))
        ]
        size = limited(len(labels), limit)
        rows = stratified(labels, size, self.split_seed) if self.subset == "stratified" else torch.arange(size)
        images = torch.empty(len(rows), 3, SIZE, SIZE)
        for place, row in enumerate(rows.tolist()):
            column, number, file = places[row]
            try:
                pixels = torch.tensor(np.asarray(decoded(io.BytesIO(column.iloc[number]["bytes"]))))
            except (ValueError, TypeError, LookupError) as error:
                raise self._no_image(file, number, str(error)) from error
            if pixels.shape != (SIZE, SIZE, 3):  # a single row or column would fill the whole image
                raise self._no_image(file, number, f"it has {pixels.shape[1]}x{pixels.shape[0]} pixels")
            images[place] = pixels.permute(2, 0, 1) / 255
        return Examples(images, labels[rows], [f"{split}/{row}" for row in rows.tolist()])

    def _table(self, file: Path) -> pd.DataFrame:
        """The columns image and label of a file.

        Raises:
            UserError: it has none such, its labels are other classes, or it cannot be read.
        """
        where = f"dataset.root={self.root}"
        try:
            with file.open("rb") as stream:
                table = pd.read_parquet(stream, columns=["image", "label"])
            names = recorded_classes(file)
        except ImportError as error:
            raise UserError("dataset=cifar10 needs pyarrow: run `python -m pip install pyarrow`") from error
        except OSError as error:
            raise UserError(f"{where}: {file.name} cannot be read ({error.strerror or error})") from error
        except Exception as error:  # of a damaged file pandas and pyarrow raise more than they document
            raise UserError(f"{where}: {file.name} is not parquet with the columns image and label") from error
        check_classes(names, len(CLASSES), CLASSES, f"{where}: {file.name}")
        return table

    def _no_image(self, file: Path, row: int, reason: str) -> UserError:
        return UserError(f"dataset.root={self.root}: row {row} of {file.name} is not a {SIZE}x{SIZE} image ({reason})")

    def _labels(self, column: pd.Series, file: Path) -> Tensor:
        """Labels [rows] int64.

        Raises:
            UserError: there are none, one is missing, or one is no class.
        """
        whole = pd.to_numeric(column, errors="coerce")
        if not len(whole) or not whole.isin(range(len(CLASSES))).all():
            raise UserError(f"dataset.root={self.root}: {file.name} must hold labels from 0 to {len(CLASSES) - 1}")
        return torch.tensor(whole.to_numpy(dtype=np.int64))


def _sha256(file: Path) -> str:
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
