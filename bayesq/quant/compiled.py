"""Functions that numba compiles when they are first called."""

from collections.abc import Callable
from typing import Any, TypeVar

import numba

F = TypeVar("F", bound=Callable[..., Any])


def compiled(**options: Any) -> Callable[[F], F]:
    """Decorator: compile a function to machine code that runs without Python's global lock.

    The code is cached in NUMBA_CACHE_DIR, beside the module or in the user's cache folder; if none of them can be
    written, each process compiles again.

    Args:
        options: further ones of numba.njit.
    """

    def decorate(function: F) -> F:
        try:
            made: F = numba.njit(cache=True, nogil=True, **options)(function)
        except RuntimeError:  # no folder to write to
            made = numba.njit(nogil=True, **options)(function)
        return made

    return decorate
