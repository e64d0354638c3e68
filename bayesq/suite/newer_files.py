"""Files that were modified after a finished run had read them; its run id covers settings only and stays the same."""

from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

from bayesq.suite.config import flatten

# Keys of a model or a data set that hold paths.
PLACES = ("adapter", "calibration_source", "checkpoint", "file", "folder", "path", "root", "source", "val")


def newer_than(result: Path, config: Mapping[str, Any]) -> list[str]:
    """The keys of a resolved config, each with its path, whose files were modified after the file `result`."""
    written = result.stat().st_mtime
    places = flatten({group: config.get(group) or {} for group in ("model", "dataset")})
    return [
        f"{key}={place}"
        for key, place in places.items()
        if key.rpartition(".")[2] in PLACES and isinstance(place, str) and _modified(Path(place).absolute()) > written
    ]


@cache
def _modified(path: Path) -> float:
    """When a file or folder was last modified; 0 if it cannot be read. Cached, for the many runs of a sweep.

    Of a folder: the newest of itself, its entries and their subfolders. A new photo changes the folder DIR/train/CLASS,
    so the many photos in it are not checked.
    """
    try:
        return max(place.stat().st_mtime for place in (path, *path.glob("*"), *path.glob("*/*/")))
    except OSError:
        return 0.0
