"""Photos in a tree of folders: what is listed, what it is called, and what is left out, which is said."""

import logging
import os
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from torch import Tensor

from bayesq.suite.config import one_line
from bayesq.suite.datasets.base import Examples
from bayesq.suite.errors import UserError

log = logging.getLogger(__name__)

SUFFIXES = {".jpg", ".jpeg", ".png"}
CLUTTER = {"thumbs.db", "desktop.ini"}  # what Windows leaves in folders; other systems' files are hidden


class PhotoTree:
    """Photos below <root>/<split>/<wnid>/, by class and name; hidden files and folders do not count.

    An id is <wnid>/<name without suffix>. Of a class with two photos of one such name all ids keep the suffix.

    Args:
        root: folder of the splits.
        split: name of the folder below.
        wnids: the classes in the order of their labels.

    Attributes:
        labels: [n] int64.
        left_out: what else there is and is not read, in words; "" for nothing. A warning says it as well.

    Raises:
        UserError: a folder is no wnid of ImageNet or the same as another, a link leads nowhere, something cannot be
            read, or there is no photo.
    """

    def __init__(self, root: Path, split: str, wnids: Sequence[str]) -> None:
        where = f"dataset.root={root}"
        self.folder = root / split
        # A train split has 1.3 million photos: their names are kept as plain strings, the rest is made on demand.
        self._names: list[tuple[str, str]] = []
        self._with_suffix: set[str] = set()
        self._others, self._example, self._empty = Counter[str](), "", list[str]()
        try:
            self._list({wnid: label for label, wnid in enumerate(wnids)}, where)
        except OSError as error:
            raise UserError(f"{where}: {error.filename or split} cannot be read ({error.strerror or error})") from error
        self.left_out = self._remark()
        if not self._names:
            found = f"; left out: {self.left_out}" if self.left_out else ""
            raise UserError(f"{where}: no photo ({', '.join(sorted(SUFFIXES))}) in {split}/<wnid>/{found}")
        if self.left_out:
            log.warning(f"{where}: {len(self)} photos of {split}/ are read; left out: {self.left_out}")
        index = {wnid: label for label, wnid in enumerate(wnids)}
        self.labels = torch.tensor([index[wnid] for wnid, _ in self._names])

    def __len__(self) -> int:
        return len(self._names)

    def select(self, indices: Tensor) -> Examples:
        """The photos at `indices` [k] int64, in that order."""
        names = [self._names[i] for i in indices.tolist()]
        files = [self.folder / wnid / name for wnid, name in names]
        return Examples(files, self.labels[indices], [self._id(wnid, name) for wnid, name in names])

    def _id(self, wnid: str, name: str) -> str:
        return f"{wnid}/{_storable(name if wnid in self._with_suffix else os.path.splitext(name)[0])}"

    def _list(self, known: dict[str, int], where: str) -> None:
        """Fill in the names and what is left out."""
        split, folders = self.folder.name, dict[Path, str]()
        for below in sorted(_visible(self.folder), key=lambda entry: entry.name):
            if not below.is_dir():
                _refuse_dangling(below, where)
                self._leave_out(f"{_suffix(below.name)} outside of the class folders", below.name)
                continue
            if below.name not in known:
                raise UserError(f"{where}: {split}/{below.name} is not a WordNet id of ImageNet-1k")
            real = Path(below.path).resolve()
            if (other := folders.setdefault(real, below.name)) != below.name:
                raise UserError(f"{where}: {split}/{below.name} and {split}/{other} are one folder, of two classes")
            if names := sorted(self._photos(below.path, where)):
                stems = Counter(os.path.splitext(name)[0] for name in names)
                if len(stems) < len(names):
                    self._with_suffix.add(below.name)
                    twice = next(stem for stem, count in stems.items() if count > 1)
                    log.warning(
                        f"{where}: {split}/{below.name} has photos whose names differ in the suffix alone, such as "
                        f"{_printable(twice)}; each counts"
                    )
                self._names += [(below.name, name) for name in names]
            else:
                self._empty.append(below.name)

    def _photos(self, folder: str, where: str) -> Iterator[str]:
        """Names of the photos of one class."""
        wnid = os.path.basename(folder)
        for entry in _visible(folder):
            if entry.is_dir():
                for path, folders, files in os.walk(entry.path):
                    folders[:] = [name for name in folders if not _is_clutter(name)]
                    inside = os.path.relpath(path, self.folder)
                    for name in files:
                        if not _is_clutter(name):
                            self._leave_out(f"{_suffix(name)} in folders deeper down", f"{inside}/{name}")
            elif _suffix(entry.name) in SUFFIXES and entry.is_file():
                yield entry.name
            else:
                _refuse_dangling(entry, where)
                self._leave_out(_suffix(entry.name), f"{wnid}/{entry.name}")

    def _leave_out(self, kind: str, example: str) -> None:
        """Count a file that is not read."""
        self._others[kind] += 1
        self._example = min(self._example or example, example)  # folders list their files in any order

    def _remark(self) -> str:
        """The value of `left_out`."""
        parts = []
        if self._others:
            kinds = ", ".join(f"{count} {kind}" for kind, count in sorted(self._others.items()))
            parts.append(_printable(f"{kinds} (such as {self._example})"))
        if self._empty:
            parts.append(f"{len(self._empty)} class folders without a photo (such as {self._empty[0]})")
        return "; ".join(parts)


def _suffix(name: str) -> str:
    return os.path.splitext(name)[1].lower() or "(no suffix)"


def _visible(folder: str | Path) -> Iterator["os.DirEntry[str]"]:
    with os.scandir(folder) as entries:
        yield from (entry for entry in entries if not _is_clutter(entry.name))


def _is_clutter(name: str) -> bool:
    return name.startswith(".") or name.lower() in CLUTTER


def _refuse_dangling(entry: "os.DirEntry[str]", where: str) -> None:
    """A link that leads nowhere stands for photos that are missing.

    Raises:
        UserError: `entry` is one.
    """
    if entry.is_symlink() and not os.path.exists(entry.path):
        raise UserError(f"{where}: {_printable(entry.path)} is a link that leads nowhere")


def _storable(name: str) -> str:
    """`name` with escapes for what a text file or a CSV reader could not keep: bytes that are no UTF-8, and returns."""
    return name.encode("utf-8", "backslashreplace").decode().replace("\r", "\\r")


def _printable(name: str) -> str:
    return one_line(_storable(name))
