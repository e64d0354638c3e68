"""Progress bars for long steps; silent if stderr is no terminal."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from threading import Event, Thread
from typing import TypeVar

from tqdm import tqdm

T = TypeVar("T")

# Seconds before a step is shown, and between two updates of its line.
TICK_S = 0.5


def bar(items: Iterable[T], what: str, total: int | None = None) -> Iterable[T]:
    """Iterate over the items and show a bar with the text `what`; `total` is needed if they have no length."""
    bars: Iterable[T] = tqdm(items, desc=what, total=total, disable=None, leave=False)
    return bars


@contextmanager
def elapsed(step: str) -> Iterator[None]:
    """Show `step` and its elapsed seconds while the block runs; silent if stderr is no terminal.

    Bars of the block appear below the line; log lines appear above it, under `logging_redirect_tqdm`.
    """
    # miniters=0 and mininterval=0: update(0) draws the line as soon as `delay` has passed
    with tqdm(
        desc=step, bar_format="{desc}: {elapsed}", delay=TICK_S, miniters=0, mininterval=0, disable=None, leave=False
    ) as line:
        if line.disable:
            yield
            return
        over = Event()

        def tick() -> None:
            while not over.wait(TICK_S):
                line.update(0)

        ticking = Thread(target=tick, daemon=True)
        ticking.start()
        try:
            yield
        finally:
            over.set()
            ticking.join()
