"""Check that the objects of a configuration can be made, before anything is loaded."""

from collections.abc import Mapping
from typing import Any

from omegaconf import OmegaConf

from bayesq.defaults import misfits
from bayesq.suite.config import one_line, reads_posterior, refuse
from bayesq.suite.errors import UserError
from bayesq.suite.plan import build, make_recipe


def check(config: Mapping[str, Any]) -> None:
    """Make the objects of a resolved configuration and drop them.

    Raises:
        UserError: a constructor refuses a value, or a class does not exist.
    """
    try:
        for group in ("method", "posterior", "dataset", "model"):
            if group == "posterior" and not reads_posterior(config):
                continue
            for key, needs in misfits(config[group]):
                refuse(f"{group}.{key}", config[group][key], needs)
        cfg = OmegaConf.create(dict(config))
        make_recipe(cfg)
        build(cfg.dataset)
        build(cfg.model)
    except UserError:
        raise
    except Exception as error:
        groups = ["model", "dataset", "method", *(["posterior"] if reads_posterior(config) else [])]
        names = " ".join(f"{group}={config[group].get('name')}" for group in groups)
        raise UserError(f"{names} cannot be made ({one_line(f'{type(error).__name__}: {error}')})") from error
