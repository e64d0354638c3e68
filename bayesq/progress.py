"""Progress bars of long loops: silent where stderr is no terminal."""

from collections.abc import Iterable
from typing import TypeVar

from tqdm import tqdm

T = TypeVar("T")


def bar(items: Iterable[T], what: str, total: int | None = None) -> Iterable[T]:
    """The items one after the other, with a bar that says `what` on a terminal and goes away at the end.

    Args:
        items: to go through.
        what: the bar says.
        total: number of items where they have no length.
    """
    bars: Iterable[T] = tqdm(items, desc=what, total=total, disable=None, leave=False)
    return bars
