"""How much memory there is, and what to do when it runs out: the same work in smaller batches."""

import ctypes
import gc
import logging
import os
import resource
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
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


def available_memory(root: Path = Path("/")) -> int | None:
    """Bytes this process can still take without swapping or being killed; None where the system does not say.

    The least of what the kernel calls available and of what each control group (v1 and v2) above this process leaves.

    Args:
        root: of the file system with /proc and /sys.
    """
    sizes = [_meminfo(root / "proc/meminfo"), *_control_groups(root)]
    known = [size for size in sizes if size is not None]
    if known:
        return max(min(known), 0)
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (ValueError, OSError, AttributeError):
        return None


def _meminfo(path: Path) -> int | None:
    """MemAvailable in bytes."""
    try:
        lines = path.read_text().splitlines()
    except OSError:
        return None
    for line in lines:
        key, _, value = line.partition(":")
        if key == "MemAvailable":
            return int(value.split()[0]) * 1024
    return None


def _control_groups(root: Path) -> Iterator[int | None]:
    """What each control group above this process leaves: its limit less what it uses, files it may drop not counted."""
    try:
        lines = (root / "proc/self/cgroup").read_text().splitlines()
    except OSError:
        return
    for line in lines:
        _, controllers, name = line.split(":", 2)
        if controllers == "":
            base, limit, usage, cache = root / "sys/fs/cgroup", "memory.max", "memory.current", "inactive_file"
        elif "memory" in controllers.split(","):
            base = root / "sys/fs/cgroup/memory"
            limit, usage, cache = "memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"
        else:
            continue
        group = Path(name.lstrip("/"))
        for folder in (base / group, *(base / parent for parent in group.parents)):  # inside a container: only the last
            yield _left(folder, limit, usage, cache)


def _left(folder: Path, limit: str, usage: str, cache: str) -> int | None:
    try:
        most = (folder / limit).read_text().strip()
        if most == "max":
            return None
        used = int((folder / usage).read_text())
        statistics = dict(line.split() for line in (folder / "memory.stat").read_text().splitlines())
        return int(most) - used + int(statistics.get(cache, 0))
    except (OSError, ValueError):
        return None


def resident_bytes() -> int:
    """Memory this process holds now; what it held at most where the system does not tell."""
    try:
        return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except (OSError, ValueError, IndexError):
        return peak_bytes()


def peak_bytes() -> int:
    """Largest resident size of the process so far (a multirun in one process reports the largest run)."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024  # macOS counts bytes, Linux KiB
