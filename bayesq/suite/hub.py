"""What is asked of the Hugging Face hub, and how it is reported when the hub does not answer."""

from collections.abc import Callable
from typing import TypeVar

from bayesq.suite.config import one_line
from bayesq.suite.errors import UserError

T = TypeVar("T")

PATIENCE_S = 5.0  # the libraries themselves try each file for up to a minute


def reachable() -> bool:
    """Whether the hub answers. HF_HUB_OFFLINE=1, the libraries' own switch, means no without asking."""
    from huggingface_hub import constants, get_session

    if constants.HF_HUB_OFFLINE:
        return False
    try:
        get_session().head(constants.ENDPOINT, timeout=PATIENCE_S)
    except Exception:  # of whichever client the library uses
        return False
    return True


def from_hub(key: str, remedy: str, load: Callable[[], T], online: bool) -> T:
    """`load()`; whatever keeps it from finding its files becomes one line.

    Args:
        key: the key and value that were asked for, as typed.
        remedy: what to do without the hub.
        load: reads the hub, or only the libraries' cache where the hub is out of reach.
        online: whether the hub is `reachable`.

    Raises:
        UserError: it failed.
    """
    try:
        return load()
    except Exception as error:  # the libraries raise errors of half a dozen packages
        reason = one_line(str(error))[:200] or type(error).__name__
        if not online:
            reason = "it cannot be reached, or HF_HUB_OFFLINE is set, and the files are not in its cache here"
        raise UserError(f"{key} could not be read from the hub ({reason}): {remedy}") from error
