"""Check that the objects of a configuration can be made, before anything is loaded."""

from collections.abc import Mapping
from inspect import signature
from pkgutil import resolve_name
from typing import Any, get_args

from omegaconf import OmegaConf

from bayesq.defaults import DESCRIPTIVE
from bayesq.suite.config import one_line, reads_posterior, refuse
from bayesq.suite.errors import UserError
from bayesq.suite.plan import build, make_recipe
from bayesq.suite.schema import WORDS, fits


def check(config: Mapping[str, Any]) -> None:
    """Make the objects of a resolved configuration and drop them.

    Raises:
        UserError: a constructor refuses a value, or a class does not exist.
    """
    try:
        for group in ("method", "posterior", "dataset", "model"):
            if group != "posterior" or reads_posterior(config):
                check_types(group, config[group])
        cfg = OmegaConf.create(dict(config))
        make_recipe(cfg)
        build(cfg.dataset)
        build(cfg.model)
    except UserError:
        raise
    except Exception as error:
        names = " ".join(f"{group}={config[group].get('name')}" for group in ("model", "dataset", "method"))
        raise UserError(f"{names} cannot be made ({one_line(f'{type(error).__name__}: {error}')})") from error


def check_types(group: str, node: Mapping[str, Any]) -> None:
    """Raise UserError at the first key of a group whose value has not the type that its constructor declares."""
    try:
        parameters = signature(resolve_name(node["_target_"]), eval_str=True).parameters
    except Exception:  # the types cannot be read; if the class does not exist, `build` says so
        return
    for key, value in node.items():
        hint = parameters[key].annotation if key in parameters and key not in DESCRIPTIVE else Any
        if not fits(value, hint):
            needed = [WORDS.get(each, str(each)) for each in get_args(hint) or [hint]]
            refuse(f"{group}.{key}", value, f"needs {' or '.join(needed)}")
