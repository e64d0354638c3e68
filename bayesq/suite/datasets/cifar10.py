"""CIFAR-10 from parquet files in the layout of the `datasets` library: 32x32 colour images, ten classes."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from bayesq.files import file_sha256
from bayesq.suite.datasets.base import DataSplits, Examples, limited, stratified
from bayesq.suite.datasets.parquet_files import listed, of_split
from bayesq.suite.datasets.parquet_photos import ParquetPhotos
from bayesq.suite.datasets.pictures import decoded
from bayesq.suite.errors import UserError

CLASSES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
SUBSETS = ("stratified", "first")
SIZE = 32


@dataclass(frozen=True)
class Cifar10:
    """CIFAR-10 with the splits of its files: calibration images from train, evaluation images from test in order.

    There is no train split: the CIFAR networks have published weights, and no image may both train and calibrate.

    Columns of the files: `image`, a struct with the encoded image under `bytes`, and `label`.

    Attributes: the keys of conf/dataset/cifar10.yaml, which explains them.
    """

    root: str
    limit: int | None = None
    subset: str = "stratified"
    split_seed: int = 0

    def __post_init__(self) -> None:
        if self.subset not in SUBSETS:
            raise UserError(f"dataset.subset={self.subset}: choose one of {', '.join(SUBSETS)}")

    def load(self, cache_dir: Path) -> DataSplits:
        """Splits with inputs [n, 3, 32, 32] in [0, 1]; `cache_dir` stays untouched.

        Raises:
            UserError: a file is missing or superfluous, not in that layout or of other classes, pyarrow is not
                installed, or `limit` is not possible.
        """
        train, test = self._photos("train"), self._photos("test")
        if self.subset == "stratified":
            rows = stratified(test.labels, self.limit, self.split_seed)
        else:
            rows = torch.arange(limited(len(test), self.limit))
        pool = self._examples("train", train, torch.arange(len(train)))
        return DataSplits(
            train=pool.select(torch.arange(0)),
            calibration_pool=pool,
            evaluation=self._examples("test", test, rows),
            num_classes=len(CLASSES),
            primary_metric="accuracy",
            source={
                "origin": f"CIFAR-10 as parquet in {Path(self.root)}",
                "sha256": ", ".join(file_sha256(file) for file in (*train.files, *test.files)),
                "subset": "all" if self.limit is None else self.subset,
                "split_seed": str(self.split_seed),
            },
        )

    def _photos(self, split: str) -> ParquetPhotos:
        where = f"dataset.root={self.root}"
        files = of_split(listed(Path(self.root), f"{split}.parquet", f"{split}-*.parquet"), where)
        if not files:
            raise UserError(f"{where}: there is no {split}.parquet")
        return ParquetPhotos(files, where, CLASSES)

    def _examples(self, split: str, photos: ParquetPhotos, rows: Tensor) -> Examples:
        """The photos at `rows`, decoded."""
        images = torch.empty(len(rows), 3, SIZE, SIZE)
        for image, row in zip(images, rows.tolist(), strict=True):
            photo = photos[row]
            try:
                pixels = torch.tensor(np.asarray(decoded(photo.read_bytes())))
                if pixels.shape != (SIZE, SIZE, 3):  # copy_ would stretch a single row or column
                    raise ValueError(f"it has {pixels.shape[1]}x{pixels.shape[0]} pixels")
            except (OSError, ValueError) as error:
                reason = f"{photo} is not a {SIZE}x{SIZE} image ({error})"
                raise UserError(f"dataset.root={self.root}: {reason}") from error
            image.copy_(pixels.permute(2, 0, 1) / 255)
        return Examples(images, photos.labels[rows], [f"{split}/{row}" for row in rows.tolist()])
