"""A user's photos in a tree of folders, one folder for each class."""

import hashlib
import json
import logging
from dataclasses import dataclass
from pathlib import Path

import torch

from bayesq.suite.datasets.base import DataSplits, UserSplits
from bayesq.suite.datasets.photo_tree import PhotoTree, visible
from bayesq.suite.errors import UserError

log = logging.getLogger(__name__)

TRAIN, EVALUATED = "train", ("val", "valid", "validation", "test")


@dataclass(frozen=True, kw_only=True)
class ImageFolder(UserSplits):
    """Photos below train/<class>/ and val/<class>/, or below <class>/; classes are the folders' names in order.

    The first folder of EVALUATED is evaluated. Without it, or without train, a share of the photos is held out.
    DataSplits.train is empty: the networks come with trained weights.

    Attributes: the keys of conf/dataset/image_folder.yaml, which explains them.
    """

    folder: str

    def load(self, cache_dir: Path) -> DataSplits:
        """Splits with photos as inputs, not opened yet; `cache_dir` stays untouched.

        Raises:
            UserError: there is no such folder, no photo in it, a single class, or a split would be empty.
        """
        folder, where = Path(self.folder), f"dataset.folder={self.folder}"
        if not folder.is_dir():
            raise UserError(f"{where}: there is no such folder")
        splits = [split for split in (TRAIN, *EVALUATED) if _classes(folder / split)]
        if splits[:1] != [TRAIN]:
            splits = splits[:1] or [""]
        unread = [entry.name for entry in visible(folder) if entry.is_dir() and entry.name not in splits]
        if len(splits) == 1 and splits != [""] and unread:
            log.warning(
                f"{where}: {splits[0]}/ is calibrated on and evaluated, {'/, '.join(unread)}/ is not read: a folder of "
                f"classes to calibrate on is called {TRAIN}, one to evaluate {' or '.join(EVALUATED)}"
            )
        classes = sorted({name for split in splits[:2] for name in _classes(folder / split)})
        if len(classes) < 2:
            raise UserError(f"{where}: needs a folder for each class, as in {folder}/train/CLASS/PHOTO.jpg")
        trees = {split: PhotoTree(folder, split, classes, where, "CLASS") for split in splits[:2]}
        ids = [name for tree in trees.values() for name in tree.select(torch.arange(len(tree))).ids]
        left_out = "; ".join(tree.left_out for tree in trees.values() if tree.left_out)
        return DataSplits(
            *self.parts(*trees.values(), fitted=False),
            num_classes=len(classes),
            primary_metric="accuracy",
            source={
                "origin": self.folder,
                "photos": ", ".join(f"{split or 'all'} {len(tree)}" for split, tree in trees.items()),
                "names_sha256": hashlib.sha256(json.dumps(ids).encode()).hexdigest(),
                "split_seed": str(self.split_seed),
                **({"left_out": left_out} if left_out else {}),
            },
            classes=tuple(classes),
        )


def _classes(folder: Path) -> list[str]:
    """The names of the folders in a folder, without hidden ones; none if it does not exist."""
    return [entry.name for entry in visible(folder) if entry.is_dir()] if folder.is_dir() else []
