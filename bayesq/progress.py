"""What a terminal shows of long work, from its first second; silent where stderr is no terminal."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from threading import Event, Thread
from typing import TypeVar

from tqdm import tqdm

T = TypeVar("T")

# A step that ends within this time shows nothing; afterwards the line is drawn anew as often.
TICK_S = 0.5


def bar(items: Iterable[T], what: str, total: int | None = None) -> Iterable[T]:
    """The items one after the other, with a bar that says `what` on a terminal and goes away at the end.

    Args:
        items: to go through.
        what: the bar says.
        total: number of items where they have no length.
    """
    bars: Iterable[T] = tqdm(items, desc=what, total=total, disable=None, leave=False)
    return bars


@contextmanager
def elapsed(step: str) -> Iterator[None]:
    """Show `step` and the seconds since it began while the block runs; silent where stderr is no terminal.

    Bars that the block opens stand below the line, and log lines above it, under `logging_redirect_tqdm`.
    """
    # miniters and mininterval: an update by nothing draws the line, once `delay` has passed
    with tqdm(
        desc=step,
        bar_format="{desc}: {elapsed}",
        delay=TICK_S,
        miniters=0,
        mininterval=0,
        disable=None,
        leave=False,
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
