"""A line on the terminal for steps that cannot count what is left: what is being done, and for how long by now."""

from collections.abc import Iterator
from contextlib import contextmanager
from threading import Event, Thread

from tqdm import tqdm

# A step that ends within this time shows nothing; afterwards the line is drawn anew as often.
TICK_S = 0.5


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
