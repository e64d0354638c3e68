"""Check that the objects of a configuration can be made, before anything is loaded."""

from collections.abc import Iterable, Mapping
from inspect import signature
from pkgutil import resolve_name
from typing import Any, get_args

from omegaconf import OmegaConf

from bayesq.defaults import DESCRIPTIVE
from bayesq.suite.config import one_line, reads_posterior, refuse
from bayesq.suite.errors import UserError
from bayesq.suite.plan import build, make_recipe
from bayesq.suite.schema import WORDS, fits


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
