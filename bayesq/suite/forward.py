"""One line for a network that cannot be built, fed or run, whatever its library raises."""

from collections.abc import Iterator
from contextlib import contextmanager

from bayesq.memory import out_of_memory
from bayesq.suite.config import one_line
from bayesq.suite.errors import UserError


@contextmanager
def naming_model(name: str, step: str) -> Iterator[None]:
    """Turn what a network's own code raises the first time it is used into a line that names the model.

    Libraries raise anything, from NotImplementedError of a method that an architecture lacks to RuntimeError of shapes
    that do not fit. Full memory and full disks are not the network's fault and pass as they are.

    Args:
        name: of the model.
        step: what the block does, as in "its forward pass".

    Raises:
        UserError: the block raised.
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
