"""Whether the code that computes a run has been edited since it ran: a digest of its sources, kept in result.json.

The sources are those of bayesq and baselines, and of the packages that the configuration names (`_target_`). All of
them count, also those that a run does not read: a remark may be needless, but none is missing.
"""

import hashlib
import sys
from collections.abc import Iterator, Mapping
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

KEY = "code"
OURS = ("baselines", "bayesq")


def packages(config: Mapping[str, Any]) -> tuple[str, ...]:
    """Top-level names of the `_target_`s of a resolved config that are not ours."""
    return tuple(sorted({target.partition(".")[0] for target in _targets(config)} - {*OURS}))


def _targets(node: Any) -> Iterator[str]:
    if isinstance(node, Mapping):
        if isinstance(node.get("_target_"), str):
            yield node["_target_"]
        for value in node.values():
            yield from _targets(value)


@cache
def digest(packages: tuple[str, ...]) -> str | None:
    """16 hexadecimal digits of our sources and those of `packages`; None where one of these is not there any more.

    Computed once a process: what is edited later is not what runs.
    """
    total = hashlib.sha256()
    for package in (*OURS, *packages):
        files = sources(package)
        if not files:
            return None
        for file in files:
            content = file.read_bytes()
            total.update(f"{package}\0{file.name}\0{len(content)}\0".encode() + content)
    return total.hexdigest()[:16]


def has_changed(result: Mapping[str, Any]) -> bool:
    """Whether the code of a finished run is known to differ from what is there now.

    Results of earlier versions keep no such digest, and a package may not be here any more: then nothing is known.
    """
    recorded, config = result.get(KEY), result.get("config")
    if not isinstance(recorded, str) or not isinstance(config, Mapping):
        return False
    now = digest(packages(config))
    return now is not None and now != recorded


@cache
def sources(package: str) -> tuple[Path, ...]:
    """Source files of a top-level module or package, in order; nothing is imported.

    If it lies in a folder of the user's, then also those of the modules and packages beside it, which it may import.
    """
    try:
        spec = find_spec(package)
    except (ImportError, ValueError):  # __main__, for one
        spec = None
    if spec is None or not (spec.origin or "").endswith(".py"):
        return ()
    file = Path(str(spec.origin))
    folders = [file.parent] if spec.submodule_search_locations else []
    files = {file}
    if is_users(package, file):
        home = file.parents[1] if folders else file.parent
        files |= {*home.glob("*.py")}
        folders = [below.parent for below in home.glob("*/__init__.py")]
    return tuple(sorted(files.union(*(folder.rglob("*.py") for folder in folders))))


def is_users(package: str, file: Path) -> bool:
    """Whether a top-level module or package is neither installed, nor Python's, nor ours."""
    installed = {"site-packages", "dist-packages"} & set(file.parts)
    return not installed and package not in (*OURS, *sys.stdlib_module_names)
