"""SIGINT and SIGTERM as exceptions that no library can lose.

Python raises where a signal finds the main thread. A library that is just calling back into Python may turn that into
an error of its own (torch answers an interrupted `len` of a storage with "could not determine the shape") or drop it.
So the handlers remember what was asked for, and whoever catches all errors or takes the next long step asks for it.
"""

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NoReturn


class Terminated(KeyboardInterrupt):
    """SIGTERM, as what a user's Ctrl-C raises: whatever is open is closed on the way out, W&B's run among it."""


_EXCEPTIONS = {signal.SIGINT: KeyboardInterrupt, signal.SIGTERM: Terminated}
_asked: type[KeyboardInterrupt] | None = None


def stop_if_asked() -> None:
    """Raise what a signal asked for since `stoppable` began; outside of it nothing.

    Raises:
        KeyboardInterrupt: SIGINT came.
        Terminated: SIGTERM came.
    """
    if _asked is not None:
        raise _asked


@contextmanager
def stoppable() -> Iterator[None]:
    """Raise KeyboardInterrupt or `Terminated` where the first signal finds the main thread, and remember it.

    A second signal of the kind has its usual effect: who cannot wait for the clean end asks twice. A SIGINT that the
    process was started to ignore stays ignored, as a shell wants of what it starts in the background.
    """
    global _asked

    def stop(number: int, frame: object) -> NoReturn:
        global _asked
        signal.signal(number, signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL)
        _asked = _EXCEPTIONS[signal.Signals(number)]
        raise _asked

    before = {number: signal.getsignal(number) for number in _EXCEPTIONS}
    for number, handler in before.items():
        if handler is not signal.SIG_IGN or number == signal.SIGTERM:
            signal.signal(number, stop)
    try:
        yield
    finally:
        _asked = None
        for number, handler in before.items():
            signal.signal(number, handler)
