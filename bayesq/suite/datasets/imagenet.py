"""ImageNet-1k, or any part of it: a tree of photos, val/<wnid>/<photo> and perhaps train/, or parquet files."""

import hashlib
import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from fnmatch import fnmatch
from functools import cache
from pathlib import Path

import torch
from timm.data.imagenet_info import ImageNetInfo

from bayesq.suite.datasets.base import DataSplits, shuffled, stratified
from bayesq.suite.datasets.parquet_files import listed, of_split, shards
from bayesq.suite.datasets.parquet_photos import ParquetPhotos
from bayesq.suite.datasets.photo_tree import PhotoTree
from bayesq.suite.errors import UserError
from bayesq.suite.hub import hub_files

Photos = PhotoTree | ParquetPhotos
SPLITS = ("train", "val", "test")  # beginnings of the names of parquet files


@dataclass(frozen=True)
class ImageNet:
    """Photos with ImageNet's labels: a class is the place of its wnid among all 1,000, even if some classes are empty.

    The validation split is evaluated. If there is a train split, `seed` draws the calibration pool from it, and every
    seed has the same evaluation set. Otherwise `seed` draws the pool from the validation split, and the other photos
    are evaluated: **every seed then has another evaluation set**. (If `split_seed` drew the pool, a small data set
    would give every seed nearly the same calibration set.)

    DataSplits.train is empty: the networks come with trained weights.

    `root` holds a tree of photos (see PhotoTree), or train*.parquet and val*.parquet, in the folder itself or in its
    folder data; if no file there begins with train, val or test, all files hold evaluation photos. Files that state
    their number (`-of-00014`) must all be there, and the names of a split's files must differ in a number only.

    Attributes: the keys of conf/dataset/imagenet.yaml, which explains them.
    """

    root: str | None
    split_seed: int
    calibration_pool: int
    seed: int
    limit: int | None = None
    hub: str | None = None
    revision: str = "main"
    train_files: str | None = None
    val_files: str = "data/validation-*.parquet"

    def __post_init__(self) -> None:
        if (self.root is None) == (self.hub is None):
            raise UserError("dataset=imagenet needs either dataset.root=DIR or dataset.hub=REPOSITORY")

    def load(self, cache_dir: Path) -> DataSplits:
        """Splits with photos as inputs, not opened yet; `cache_dir` stays untouched.

        Raises:
            UserError: there are no validation photos in any of the layouts, a folder is no wnid of ImageNet, a label is
                not possible, the hub does not provide the files, a parquet file is missing or superfluous, or the
                pool or the limit is not possible.
        """
        train, val, source = self._from_hub(self.hub) if self.hub else self._from_root(Path(self.root or "."))
        pool_from = val if train is None else train
        if not 1 <= self.calibration_pool <= len(pool_from) - (1 if train is None else 0):
            kind = "photos, of which some must remain to evaluate" if train is None else "training photos"
            raise UserError(
                f"dataset.calibration_pool={self.calibration_pool} is not possible: {source['origin']} has "
                f"{len(pool_from)} {kind}"
            )
        drawn = shuffled(len(pool_from), self.seed)[: self.calibration_pool]
        # A parquet file is read from its beginning to its end; the files of a tree may be read in any order.
        evaluated = shuffled(len(val), self.split_seed) if isinstance(val, PhotoTree) else torch.arange(len(val))
        if train is None:
            evaluated = evaluated[~torch.isin(evaluated, drawn)]
        evaluated = evaluated[stratified(val.labels[evaluated], self.limit, self.split_seed)]
        ids = val.select(torch.arange(len(val))).ids
        return DataSplits(
            train=val.select(torch.arange(0)),
            calibration_pool=pool_from.select(drawn),
            evaluation=val.select(evaluated),
            num_classes=len(wnids()),
            primary_metric="accuracy",
            source={
                **source,
                "photos": str(len(val)),
                "classes": str(len(val.labels.unique())),
                "names_sha256": hashlib.sha256(json.dumps(ids).encode()).hexdigest(),
                "calibration_from": "val" if train is None else "train",
                "split_seed": str(self.split_seed),
                "seed": str(self.seed),
            },
        )

    def _from_root(self, root: Path) -> tuple[Photos | None, Photos, dict[str, str]]:
        """Train (None: there is none) and validation photos below `root`, and their origin."""
        where, source = f"dataset.root={root}", {"origin": str(root)}
        if (root / "val").is_dir():
            train = PhotoTree(root, "train", wnids()) if (root / "train").is_dir() else None
            val = PhotoTree(root, "val", wnids())
            return train, val, source | ({"left_out": val.left_out} if val.left_out else {})
        files = listed(root / "data", "*.parquet") or listed(root, "*.parquet")
        if not files:
            raise UserError(
                f"{where}: there is no folder {root / 'val'} of val/<wnid>/<photo>, and there are no parquet files "
                "such as validation.parquet or data/validation-*.parquet"
            )
        strays = [file for file in files if not file.name.startswith(SPLITS)]
        if strays == files:
            return *_opened([[], shards(files, where)], where), source
        if strays:
            raise UserError(
                f"{where}: {strays[0]} begins with none of {', '.join(SPLITS)}, as others there do: move it away"
            )
        parts = [of_split([file for file in files if file.name.startswith(split)], where) for split in SPLITS[:2]]
        return *_opened(parts, where), source

    def _from_hub(self, hub: str) -> tuple[Photos | None, Photos, dict[str, str]]:
        """Like `_from_root`, for files on the hub; files in the hub's cache are not fetched again."""
        where = f"dataset.hub={hub}"
        instead = "take files of your own with dataset.root=DIR dataset.hub=null"
        patterns = {"train_files": self.train_files, "val_files": self.val_files}
        folder = hub_files(hub, [pattern for pattern in patterns.values() if pattern], self.revision, where, instead)
        source, files = {"origin": hub, "revision": folder.name}, []
        for key, pattern in patterns.items():
            files.append(self._matching(folder, pattern, f"dataset.{key}={pattern}") if pattern else [])
            source[key] = " ".join(file.name for file in files[-1])
        return *_opened(files, where), source

    def _matching(self, folder: Path, pattern: str, where: str) -> list[Path]:
        """The files in `folder` that match the pattern; UserError if one is missing (a cache may hold a part only)."""
        named = listed(folder, pattern)
        files = shards(named, where, lambda file: fnmatch(file.relative_to(folder).as_posix(), pattern))
        if not files:
            raise UserError(f"{where}: {self.hub} at {self.revision} has no such file")
        return files


def _opened(parts: Iterable[Sequence[Path]], where: str) -> tuple[Photos | None, Photos]:
    """The photos in the train files (None: there are no files) and in the validation files."""
    train, val = (ParquetPhotos(files, where, wnids()) if files else None for files in parts)
    if not val:
        raise UserError(f"{where}: no photo in val*.parquet")
    return train, val


@cache
def wnids() -> tuple[str, ...]:
    """The 1,000 WordNet ids in the order of the class indices."""
    return tuple(sorted(ImageNetInfo().label_names()))
