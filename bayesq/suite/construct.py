"""The objects that a configuration names, and a check that all of them can be made, before anything is loaded."""

import json
from collections.abc import Callable, Iterable, Mapping
from functools import cache, partial
from typing import Any

from hydra.errors import InstantiationException
from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf

from bayesq.suite.config import DESCRIPTIVE, one_line
from bayesq.suite.errors import UserError

# what a call without enough, with too many or with the wrong kinds of arguments raises, and what values out of range do
REFUSALS = (TypeError, ValueError, AttributeError, LookupError, ArithmeticError)
# what the constructors below read of a configuration
READ = ("method", "posterior", "model", "dataset", "allocator", "allocation", "distill", "distillation")


def build(node: DictConfig | Mapping[str, Any], **more: Any) -> Any:
    """Instantiate a config group without its descriptive keys.

    Raises:
        UserError: the constructor refused a value.
    """
    arguments = {key: value for key, value in node.items() if key not in DESCRIPTIVE}
    try:
        return instantiate(arguments, **more)
    except InstantiationException as error:
        if isinstance(error.__cause__, ValueError):
            raise UserError(str(error.__cause__)) from error
        raise


def check(configs: Iterable[Mapping[str, Any]]) -> None:
    """Make what each configuration names, and drop it again; what several share is made once.

    Args:
        configs: plain and resolved, after `config.validate`.

    Raises:
        UserError: a constructor refuses a value, or there is no such class.
    """
    for config in configs:
        try:
            _check(json.dumps({key: config.get(key) for key in READ}, sort_keys=True, default=str))
        except InstantiationException:  # no refusal of values: the run says what it is, with its traceback
            continue


@cache
def _check(text: str) -> None:
    """`check` of one configuration, as JSON."""
    config = json.loads(text)
    # the numerical libraries are imported for runs only: a command without any has to be quick
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
    """`build` of a group whose errors name it."""
    return _attempt(f"{group}={node.get('name')}", partial(build, OmegaConf.create(dict(node)), **more))


def _attempt(what: str, make: Callable[[], Any]) -> Any:
    """`make()` with one line for whatever it refuses.

    Raises:
        UserError: naming `what`, unless the refusal names a key itself.
    """
    try:
        return make()
    except ValueError as error:
        raise UserError(str(error)) from error
    except REFUSALS as error:
        raise UserError(f"{what} cannot be made with these values ({_kind(error)})") from error
    except InstantiationException as error:
        cause = error.__cause__
        if isinstance(cause, UserError):
            raise cause from error
        if cause is None or isinstance(cause, (*REFUSALS, ImportError)):
            reason = one_line(str(error)).partition(" full_key:")[0] if cause is None else _kind(cause)
            raise UserError(f"{what} cannot be made with these values ({reason})") from error
        raise


def _kind(error: BaseException) -> str:
    return f"{type(error).__name__}: {one_line(str(error))}"
