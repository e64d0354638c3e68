"""What to do when memory runs out: the same work in smaller batches. And giving back what is not needed."""

import ctypes
import gc
import logging
from collections.abc import Callable
from typing import TypeVar

import torch

log = logging.getLogger(__name__)

T = TypeVar("T")


def out_of_memory(error: BaseException) -> bool:
    """Whether an error says that memory ran out, on an accelerator or on the CPU."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    text = str(error)
    # PyTorch's CPU and MPS allocators raise a plain RuntimeError.
    return isinstance(error, RuntimeError) and ("DefaultCPUAllocator" in text or "MPS backend out of memory" in text)


def halving(size: int, attempt: Callable[[int], T], what: str) -> tuple[T, int]:
    """`attempt(size)`; each time memory runs out once more from the beginning, with half the size.

    Args:
        size: examples per batch at first.
        attempt: does all of the work in batches of a given size.
        what: names the work in the log.

    Returns:
        what the attempt that succeeded returned, and how many failed before it.

    Raises:
        Exception: what `attempt` raises, out of memory with single examples included.
    """
    retries = 0
    while True:
        try:
            return attempt(size), retries
        except (RuntimeError, MemoryError) as error:
            if size == 1 or not out_of_memory(error):
                raise
        # Not in the handler: there the traceback keeps the failed attempt's tensors alive.
        log.warning("%s: out of memory with %d examples at a time; again with %d", what, size, size // 2)
        size //= 2
        retries += 1
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()


def give_back_freed() -> None:
    """Have the C library return freed memory to the system, where it knows how (glibc).

    Of blocks below 32 MiB it keeps what lies between others. After the statistics and some rounds of rounding that was
    up to 300 MiB with ResNet-50.
    """
    try:
        ctypes.CDLL(None).malloc_trim(0)
    except (AttributeError, OSError, TypeError):  # another C library, another system
        return
