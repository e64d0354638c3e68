"""Errors of a network's own code as one line that names the model."""

from collections.abc import Iterator
from contextlib import contextmanager

from bayesq.memory import out_of_memory
from bayesq.suite.config import one_line
from bayesq.suite.errors import UserError


@contextmanager
def naming_model(name: str, step: str) -> Iterator[None]:
    """Turn an error in the block into a UserError that names the model.

    The code of a network can raise any error, for example NotImplementedError, or RuntimeError for shapes that do not
    fit. UserError, OSError and out-of-memory errors pass unchanged, because the network is not their cause.

    `step` is what the block does, for example "its forward pass".
    """
    try:
        yield
    except (UserError, MemoryError, OSError):
        raise
    except Exception as error:
        if out_of_memory(error):
            raise
        reason = one_line(f"{type(error).__name__}: {error}".rstrip(": "))[:300]
        raise UserError(
            f"model={name}: {step} fails ({reason}): choose another model or other data; HYDRA_FULL_ERROR=1 tells where"
        ) from error
