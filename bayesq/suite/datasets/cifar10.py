"""CIFAR-10 from parquet files in the layout of the `datasets` library: 32x32 colour images, ten classes."""

import io
from pathlib import Path

import numpy as np
import torch

from bayesq.files import file_sha256
from bayesq.suite.datasets.base import DataSplits, Examples, limited, stratified
from bayesq.suite.datasets.parquet_files import listed, of_split
from bayesq.suite.datasets.parquet_photos import ParquetPhoto, ParquetPhotos
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
                "sha256": ", ".join(file_sha256(file) for file in (*train, *test)),
                "subset": "all" if self.limit is None else self.subset,
                "split_seed": str(self.split_seed),
            },
        )

    def _files(self, split: str) -> list[Path]:
        where = f"dataset.root={self.root}"
        files = of_split(listed(self.root, f"{split}.parquet", f"{split}-*.parquet"), where)
        if not files:
            raise UserError(f"{where}: there is no {split}.parquet")
        return files

    def _read(self, split: str, files: list[Path], limit: int | None) -> Examples:
        """`limit` rows of the files in their order, only those being decoded."""
        where = f"dataset.root={self.root}"
        photos = ParquetPhotos(files, where, len(CLASSES), CLASSES)
        size = limited(len(photos), limit)
        rows = stratified(photos.labels, size, self.split_seed) if self.subset == "stratified" else torch.arange(size)
        chosen = photos.select(rows)
        images = torch.empty(size, 3, SIZE, SIZE)
        for place, photo in enumerate(chosen.inputs):
            assert isinstance(photo, ParquetPhoto)
            try:
                pixels = torch.tensor(np.asarray(decoded(io.BytesIO(photo.read()))))
                if pixels.shape != (SIZE, SIZE, 3):  # a single row or column would fill the whole image
                    raise ValueError(f"it has {pixels.shape[1]}x{pixels.shape[0]} pixels")
            except (OSError, ValueError) as error:
                raise UserError(f"{where}: {photo} is not a {SIZE}x{SIZE} image ({error})") from error
            images[place] = pixels.permute(2, 0, 1) / 255
        return Examples(images, chosen.labels, [f"{split}/{row}" for row in rows.tolist()])
