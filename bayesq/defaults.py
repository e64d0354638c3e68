"""Where the YAML files of conf/ are, what they say about a choice, and the help for a mistyped name."""

import difflib
from collections.abc import Iterable, Mapping
from pathlib import Path
from pkgutil import resolve_name
from typing import Any

import yaml

from bayesq.errors import Refused

# Bits per weight that a budget and a layer may have.
MIN_BITS, MAX_BITS = 2, 8
# Least budget with codec=entropy.
MIN_STREAM_BITS = 1
# Keys that describe a method: its constructor does not take them, and run_id leaves them out.
METHOD_METADATA = ("allocator", "inputs", "sequential", "uses_posterior", "data_free", "display")
# Keys that describe a choice; its constructor does not take them.
DESCRIPTIVE = ("name", "tasks", *METHOD_METADATA)


def conf_dir() -> Path:
    """The folder of the YAML files: inside the installed package, or beside it in a checkout.

    Raises:
        FileNotFoundError: neither folder exists.
    """
    package = Path(__file__).parent
    for folder in (package / "conf", package.parent / "conf"):
        if (folder / "config.yaml").is_file():
            return folder.absolute()
    raise FileNotFoundError(f"no conf/config.yaml in {package} or beside it: install bayesq again")


def choices(group: str) -> list[str]:
    """Names of the files of a group, such as "method"."""
    return sorted(path.stem for path in (conf_dir() / group).glob("*.yaml"))


def settings(group: str, name: str) -> dict[str, Any]:
    """The content of the file of a choice.

    Raises:
        Refused: there is no such file; the message names the group.
    """
    if name not in choices(group):
        raise Refused(f"{group}={name}: choose one of {', '.join(choices(group))}{suggestion(name, choices(group))}")
    content: dict[str, Any] = yaml.safe_load((conf_dir() / group / f"{name}.yaml").read_text(encoding="utf-8"))
    return content


def construct(content: Mapping[str, Any], **more: Any) -> Any:
    """The object that a choice's `_target_` names, made with the other keys as arguments."""
    arguments = {key: value for key, value in content.items() if key not in (*DESCRIPTIVE, "_target_")}
    return resolve_name(content["_target_"])(**arguments, **more)


def suggestion(word: str, known: Iterable[str]) -> str:
    """`; did you mean 'x'?` for the known word closest to `word`, or nothing.

    Of dotted keys the last parts are compared, those below the same parent first.
    """
    parent, _, last = word.rpartition(".")
    names = sorted(known)
    for pool in ([name for name in names if name.rpartition(".")[0] == parent], names):
        by_last = {name.rpartition(".")[2]: name for name in reversed(pool)}
        if close := difflib.get_close_matches(last, list(by_last), n=1):
            return f"; did you mean '{by_last[close[0]]}'?"
    return ""
