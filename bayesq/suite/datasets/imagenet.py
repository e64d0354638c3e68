"""ImageNet-1k, or any part of it, from a tree of photos: val/<wnid>/<photo> and, where there is one, train/."""

import hashlib
import json
from functools import cache
from pathlib import Path

import torch

from bayesq.suite.datasets.base import DataSplits, Examples, limited
from bayesq.suite.errors import UserError

SUFFIXES = {".jpg", ".jpeg", ".png"}


class ImageNet:
    """Photos with ImageNet's labels; the class is the wnid's place among all 1,000, however many folders exist.

    Evaluated is val/. With a train/ beside it, `seed` draws the calibration pool from there, and every seed has the
    same evaluation set. Without one, as for the 1,000 photos at hand, the pool is taken out of val/: **every seed
    then has its own evaluation set**, the photos that it does not calibrate on. With a pool drawn by `split_seed`
    instead, a pool as small as these data allow would give every seed the same calibration set.

    There is no train split: ImageNet networks bring their weights.

    Args:
        root: folder of the tree.
        split_seed: order of the evaluation photos, which the tree sorts by class and `limit` cuts.
        calibration_pool: number of photos calibration sets are drawn from.
        seed: the run's seed, which draws the pool.
        limit: keep only the first `limit` evaluation photos.
    """

    def __init__(self, root: str, split_seed: int, calibration_pool: int, seed: int, limit: int | None = None) -> None:
        self.root = Path(root)
        self.split_seed = split_seed
        self.calibration_pool = calibration_pool
        self.seed = seed
        self.limit = limit

    def load(self, cache_dir: Path) -> DataSplits:
        """Splits with photo files as inputs, not opened yet; `cache_dir` stays untouched.

        Raises:
            UserError: there is no val/ with photos, a folder in it is no wnid of ImageNet, or the pool or the limit is
                not possible.
        """
        val = self._photos("val")
        order = torch.randperm(len(val), generator=torch.Generator().manual_seed(self.split_seed))
        separate = (self.root / "train").is_dir()
        source = self._photos("train") if separate else val
        if not 1 <= self.calibration_pool <= len(source) - (0 if separate else 1):
            raise UserError(
                f"dataset.calibration_pool={self.calibration_pool} is not possible: {self.root} has {len(source)} "
                f"{'training photos' if separate else 'photos, of which some must remain to evaluate'}"
            )
        drawn = torch.randperm(len(source), generator=torch.Generator().manual_seed(self.seed))[: self.calibration_pool]
        evaluated = order if separate else order[~torch.isin(order, drawn)]
        return DataSplits(
            train=val.select(torch.arange(0)),
            calibration_pool=source.select(drawn),
            evaluation=val.select(evaluated[: limited(len(evaluated), self.limit)]),
            num_classes=len(wnids()),
            primary_metric="accuracy",
            source={
                "origin": str(self.root),
                "photos": str(len(val)),
                "classes": str(len(val.labels.unique())),
                "names_sha256": hashlib.sha256(json.dumps(val.ids).encode()).hexdigest(),
                "calibration_from": "train" if separate else "val",
                "split_seed": str(self.split_seed),
                "seed": str(self.seed),
            },
        )

    def _photos(self, split: str) -> Examples:
        """All photos below `split`, by class and name."""
        folder = self.root / split
        where = f"dataset.root={self.root}"
        if not folder.is_dir():
            raise UserError(f"{where}: there is no folder {folder}; it must hold {split}/<wnid>/<photo>")
        index = {wnid: position for position, wnid in enumerate(wnids())}
        files: list[Path] = []
        for below in sorted(path for path in folder.iterdir() if path.is_dir()):
            if below.name not in index:
                raise UserError(f"{where}: {split}/{below.name} is not a WordNet id of ImageNet-1k")
            files += sorted(file for file in below.iterdir() if file.suffix.lower() in SUFFIXES)
        if not files:
            raise UserError(f"{where}: no photo ({', '.join(sorted(SUFFIXES))}) in {split}/<wnid>/")
        labels = torch.tensor([index[file.parent.name] for file in files])
        return Examples(files, labels, [f"{file.parent.name}/{file.stem}" for file in files])


@cache
def wnids() -> tuple[str, ...]:
    """The 1,000 WordNet ids in the order of the class indices."""
    from timm.data.imagenet_info import ImageNetInfo

    return tuple(sorted(ImageNetInfo().label_names()))
