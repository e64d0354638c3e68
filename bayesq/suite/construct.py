"""Check that the objects of a configuration can be made, before anything is loaded."""

from collections.abc import Iterable, Mapping, Sequence
from inspect import signature
from pkgutil import resolve_name
from types import NoneType, UnionType
from typing import Any, Union, get_args, get_origin

from omegaconf import OmegaConf

from bayesq.defaults import DESCRIPTIVE
from bayesq.suite.config import one_line, reads_posterior, refuse
from bayesq.suite.errors import UserError
from bayesq.suite.plan import build, make_recipe

WORDS = {int: "a whole number", float: "a number", bool: "true or false", str: "text", NoneType: "null"}


def check(configs: Iterable[Mapping[str, Any]]) -> None:
    """Make the objects of each resolved configuration and drop them.

    Raises:
        UserError: a constructor refuses a value, or a class does not exist.
    """
    for config in configs:
        try:
            _make(config)
        except UserError:
            raise
        except Exception as error:
            names = " ".join(f"{group}={config[group].get('name')}" for group in ("model", "dataset", "method"))
            raise UserError(f"{names} cannot be made ({one_line(f'{type(error).__name__}: {error}')})") from error


def _make(config: Mapping[str, Any]) -> None:
    """Check the types of the values, then make the objects."""
    groups = ("method", "posterior", "dataset", "model") if reads_posterior(config) else ("method", "dataset", "model")
    for group in groups:
        check_types(group, config[group])
    cfg = OmegaConf.create(dict(config))
    make_recipe(cfg)
    build(cfg.dataset)
    build(cfg.model)


def check_types(group: str, node: Mapping[str, Any]) -> None:
    """Check the values of a group against the types of its constructor.

    Raises:
        UserError: naming the first key with a value of another type.
    """
    try:
        parameters = signature(resolve_name(node["_target_"]), eval_str=True).parameters
    except Exception:  # the types cannot be read; if the class does not exist, `build` says so
        return
    for key, value in node.items():
        hint = parameters[key].annotation if key in parameters and key not in DESCRIPTIVE else Any
        if not fits(value, hint):
            needed = [WORDS.get(each, str(each)) for each in get_args(hint) or [hint]]
            refuse(f"{group}.{key}", value, f"needs {' or '.join(needed)}")


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
