"""Functions that numba compiles when they are first called."""

from collections.abc import Callable
from typing import Any, TypeVar

import numba

F = TypeVar("F", bound=Callable[..., Any])


def compiled(**options: Any) -> Callable[[F], F]:
    """Decorator: machine code of a function, which other threads may run beside.

    The code is kept for the next process, in NUMBA_CACHE_DIR, beside the module or in the user's cache folder; where
    none of them can be written, each process compiles anew.

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
