"""Progress of long work on a terminal; silent if stderr is not a terminal."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from threading import Event, Thread
from typing import TypeVar

from tqdm import tqdm

T = TypeVar("T")

# A shorter step shows nothing; a longer step redraws its line at this interval.
TICK_S = 0.5


def bar(items: Iterable[T], what: str, total: int | None = None) -> Iterable[T]:
    """The items, with a progress bar that disappears at the end.

    Args:
        items: to iterate over.
        what: title of the bar.
        total: number of items, if they have no length.
    """
    bars: Iterable[T] = tqdm(items, desc=what, total=total, disable=None, leave=False)
    return bars


@contextmanager
def elapsed(step: str) -> Iterator[None]:
    """Show `step` and its elapsed time while the block runs; silent if stderr is not a terminal.

    Bars of the block appear below the line, and log lines above it under `logging_redirect_tqdm`.
    """
    # With miniters and mininterval 0, update(0) redraws the line once `delay` has passed.
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
