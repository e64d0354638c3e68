"""CIFAR-10 from parquet files in the layout of the `datasets` library: 32x32 colour images, ten classes."""

import hashlib
import io
from pathlib import Path

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError

from bayesq.suite.datasets.base import DataSplits, Examples, limited
from bayesq.suite.errors import UserError

CLASSES = 10
SIZE = 32


class Cifar10:
    """CIFAR-10; the files decide the splits.

    Calibration sets are drawn from train.parquet, evaluated is test.parquet in its order. There is no train split:
    the CIFAR networks bring their weights, and training rows that calibrate must not train as well.

    Args:
        root: folder with train.parquet and test.parquet (columns `image`, a struct with the encoded image under
            `bytes`, and `label`).
        limit: keep only the first `limit` evaluation images.
    """

    def __init__(self, root: str, limit: int | None = None) -> None:
        self.root = Path(root)
        self.limit = limit

    def load(self, cache_dir: Path) -> DataSplits:
        """Splits with inputs [n, 3, 32, 32] in [0, 1]; `cache_dir` stays untouched.

        Raises:
            UserError: a file is missing or not in that layout, pyarrow is not installed, or `limit` is not possible.
        """
        pool = self._read("train", None)
        return DataSplits(
            train=pool.select(torch.arange(0)),
            calibration_pool=pool,
            evaluation=self._read("test", self.limit),
            num_classes=CLASSES,
            primary_metric="accuracy",
            source={
                "origin": f"CIFAR-10 as parquet in {self.root}",
                "sha256": ", ".join(_sha256(self.root / f"{split}.parquet") for split in ("train", "test")),
            },
        )

    def _read(self, split: str, limit: int | None) -> Examples:
        """The first `limit` rows of a file, only those being decoded."""
        import pandas as pd

        file = self.root / f"{split}.parquet"
        where = f"dataset.root={self.root}"
        try:
            with file.open("rb") as stream:
                table = pd.read_parquet(stream, columns=["image", "label"])
        except ImportError as error:
            raise UserError("dataset=cifar10 needs pyarrow: run `python -m pip install pyarrow`") from error
        except OSError as error:
            raise UserError(f"{where}: {file.name} cannot be read ({error.strerror or error})") from error
        except (ValueError, KeyError) as error:  # pyarrow's own errors are ValueErrors
            raise UserError(f"{where}: {file.name} is not parquet with the columns image and label") from error
        table = table.iloc[: limited(len(table), limit)]
        images = torch.empty(len(table), 3, SIZE, SIZE)
        for row, image in enumerate(table["image"]):
            try:
                pixels = np.asarray(Image.open(io.BytesIO(image["bytes"])).convert("RGB"))
                images[row] = torch.tensor(pixels).permute(2, 0, 1) / 255
            except (UnidentifiedImageError, OSError, TypeError, LookupError, RuntimeError) as error:
                raise UserError(f"{where}: row {row} of {file.name} is not a {SIZE}x{SIZE} image") from error
        labels = torch.tensor(table["label"].to_numpy(dtype=np.int64))
        if not len(labels) or labels.min() < 0 or labels.max() >= CLASSES:
            raise UserError(f"{where}: {file.name} must hold labels from 0 to {CLASSES - 1}")
        return Examples(images, labels, [f"{split}/{row}" for row in range(len(table))])


def _sha256(file: Path) -> str:
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
