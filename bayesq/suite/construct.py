"""Make the objects that a configuration names; check that all can be made, before anything is loaded."""

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import cache, partial
from inspect import signature
from pkgutil import resolve_name
from types import MappingProxyType, NoneType, UnionType
from typing import Any, Union, get_args, get_origin

from omegaconf import DictConfig

from bayesq.defaults import DESCRIPTIVE, construct
from bayesq.suite.config import one_line, plain, refuse
from bayesq.suite.errors import UserError

# the keys of a configuration that the constructors below read
READ = ("method", "posterior", "model", "dataset", "allocator", "allocation", "distill", "distillation")
WORDS = {int: "a whole number", float: "a number", bool: "true or false", str: "text", NoneType: "null"}


def build(node: DictConfig, **more: Any) -> Any:
    """The object that a config group describes.

    Raises:
        UserError: the constructor refused a value.
    """
    try:
        return construct(plain(node, resolve=True), **more)
    except ValueError as error:
        raise UserError(str(error)) from error


def check(configs: Iterable[Mapping[str, Any]]) -> None:
    """Make the objects of each resolved configuration and drop them; objects of equal settings are made once.

    Raises:
        UserError: a constructor refuses a value, or the class does not exist.
    """
    for config in configs:
        _check(json.dumps({key: config.get(key) for key in READ}, sort_keys=True, default=str))


@cache
def _check(text: str) -> None:
    """`check` of one configuration, as JSON."""
    config = json.loads(text)
    # imported late, so that a command without runs does not wait for the numerical libraries
    from bayesq.allocation import DAMPING, make_allocator
    from bayesq.distillation import DistillationSettings
    from bayesq.posterior import WhiteningStore

    method = config["method"]
    knapsack, uses = config["allocator"] == "knapsack", method.get("uses_posterior") is True
    whitenings = WhiteningStore(_made("posterior", config["posterior"])) if knapsack or uses else None
    _made("method", method, **({"whitenings": whitenings} if uses else {}))
    damping = method.get("damping", DAMPING)
    _attempt(
        "allocation", partial(make_allocator, config["allocator"], whitenings, **config["allocation"], damping=damping)
    )
    if config["distill"]:
        options = {key: config["distillation"][key] for key in ("steps", "evaluations", "held_out")}
        _attempt("distillation", partial(DistillationSettings, **options))
    for group in ("dataset", "model"):
        _made(group, config[group])


def _made(group: str, node: Mapping[str, Any], **more: Any) -> Any:
    """Check the values of a group against the types of its constructor, then call it."""
    try:
        parameters = signature(resolve_name(node["_target_"]), eval_str=True).parameters
    except Exception:  # the class does not exist or has no signature; `construct` raises the error
        parameters = MappingProxyType({})
    for key, value in node.items():
        hint = parameters[key].annotation if key in parameters and key not in DESCRIPTIVE else Any
        if not fits(value, hint):
            needed = [WORDS.get(each, str(each)) for each in get_args(hint) or [hint]]
            refuse(f"{group}.{key}", value, f"needs {' or '.join(needed)}")
    return _attempt(f"{group}={node.get('name')}", partial(construct, node, **more))


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


def _attempt(what: str, make: Callable[[], Any]) -> Any:
    """`make()`, with a UserError in place of its errors. A ValueError names its key; `what` introduces the others."""
    try:
        return make()
    except UserError:
        raise
    except ValueError as error:
        raise UserError(str(error)) from error
    except Exception as error:
        reason = one_line(f"{type(error).__name__}: {error}")
        raise UserError(f"{what} cannot be made with these values ({reason})") from error
