"""Where the YAML files of conf/ are, what they say about a choice, and the help for a mistyped name or value."""

import difflib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from importlib import import_module
from inspect import signature
from pathlib import Path
from pkgutil import resolve_name
from types import NoneType, UnionType
from typing import Any, Union, get_args, get_origin

import yaml

from bayesq.errors import Refused

# Bits per weight that a budget and a layer may have.
MIN_BITS, MAX_BITS = 2, 8
# Least budget with codec=entropy.
MIN_STREAM_BITS = 1
# Keys that describe a method: its constructor does not take them, and run_id leaves them out.
METHOD_METADATA = (
    "allocator",
    "inputs",
    "codec",
    "correction",
    "rotate",
    "sequential",
    "uses_posterior",
    "data_free",
    "display",
    "neutral",
    "required",
)
# Keys that describe a choice; its constructor does not take them.
DESCRIPTIVE = ("name", "tasks", *METHOD_METADATA)
WORDS = {int: "a whole number", float: "a number", bool: "true or false", str: "text", NoneType: "null"}


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
    """The object that a choice's `_target_` names, made with the other keys as arguments.

    Raises:
        Refused: the class cannot be imported; constructors may raise more.
    """
    arguments = {key: value for key, value in content.items() if key not in (*DESCRIPTIVE, "_target_")}
    return _class_of(content["_target_"])(**arguments, **more)


def _class_of(target: str) -> Any:
    """The class `package.module.Class`.

    Raises:
        Refused: there is no such module or class; the message says what to do.
    """
    try:
        return resolve_name(target)
    except (ImportError, AttributeError, ValueError) as error:
        module, _, name = target.rpartition(".")
        try:
            import_module(module)  # resolve_name hides why a module inside a package cannot be imported
        except ModuleNotFoundError as missing:
            if f"{module}.".startswith(f"{missing.name}."):
                raise Refused(
                    f"_target_={target}: Python finds no module '{missing.name}': add the folder that holds it to "
                    "PYTHONPATH (in that folder: export PYTHONPATH=$PWD)"
                ) from missing
            raise Refused(f"_target_={target}: {module} imports {missing.name}, which is not installed") from missing
        except (ImportError, ValueError) as broken:
            what = f"{module} cannot be imported ({broken})" if module else "it needs package.module.Class"
            raise Refused(f"_target_={target}: {what}") from broken
        raise Refused(f"_target_={target}: module {module} has no {name}") from error


def fits(value: Any, hint: Any) -> bool:
    """Whether a plain value has a declared type; a type that no YAML value can have accepts everything."""
    origin, arguments = get_origin(hint), get_args(hint)
    if origin in (Union, UnionType):
        return any(fits(value, each) for each in arguments)
    if hint is float:
        return type(value) in (int, float)
    if isinstance(origin, type) and issubclass(origin, Sequence):
        return isinstance(value, list) and all(fits(item, arguments[0]) for item in value)
    if isinstance(origin, type) and issubclass(origin, Mapping):
        return isinstance(value, Mapping) and all(fits(item, arguments[1]) for item in value.values())
    return hint not in WORDS or type(value) is hint


def misfits(content: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """The keys of a choice whose value has another type than the constructor declares, with the type needed.

    There are none if the types cannot be read; if the class does not exist, `construct` says so.
    """
    try:
        parameters = signature(_class_of(content["_target_"]), eval_str=True).parameters
    except Exception:
        return
    for key, value in content.items():
        hint = parameters[key].annotation if key in parameters and key not in DESCRIPTIVE else Any
        if not fits(value, hint):
            needed = [WORDS.get(each, str(each)) for each in get_args(hint) or [hint]]
            yield key, f"needs {' or '.join(needed)}"


def without_effect(content: Mapping[str, Any], codec: str) -> Iterator[tuple[str, str]]:
    """The keys of a method whose values would have no effect, with the values that they may have.

    `required` in the method's YAML maps a condition, such as `codec=entropy`, to the keys that have no effect under it.
    Each key has the list of values that are accepted then, usually its default alone.
    """
    facts = {"codec": codec} | {f"method.{key}": value for key, value in content.items()}
    for conditions, values in (content.get("required") or {}).items():
        pairs = [condition.partition("=") for condition in conditions.split()]
        if all(facts.get(key) == yaml.safe_load(value) for key, _, value in pairs):
            for key, allowed in values.items():
                if content[key] not in allowed:
                    needed = " or ".join("null" if one is None else str(one).lower() for one in allowed)
                    yield key, f"has no effect with {conditions}; choose {needed}"


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
