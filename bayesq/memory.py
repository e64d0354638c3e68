"""Available memory, and retries with smaller batches when memory runs out."""

import ctypes
import gc
import logging
import os
import re
import resource
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TypeVar

import torch

log = logging.getLogger(__name__)

T = TypeVar("T")


def out_of_memory(error: BaseException) -> bool:
    """Whether an error means that memory ran out, on an accelerator or on the CPU."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    text = str(error)
    # PyTorch's CPU and MPS allocators raise a plain RuntimeError.
    return isinstance(error, RuntimeError) and ("DefaultCPUAllocator" in text or "MPS backend out of memory" in text)


def halving(size: int, attempt: Callable[[int], T], what: str) -> tuple[T, int]:
    """`attempt(size)`, repeated from the start with half the size whenever memory runs out.

    Args:
        size: first number of examples per batch.
        attempt: does all of the work in batches of a given size.
        what: name of the work in the log.

    Returns:
        the result of the successful attempt, and the number of failed attempts.

    Raises:
        Exception: any other error of `attempt`, and out of memory with single examples.
    """
    retries = 0
    while True:
        try:
            return attempt(size), retries
        except (RuntimeError, MemoryError) as error:
            if size == 1 or not out_of_memory(error):
                raise
        # Outside the handler: inside it, the traceback holds the tensors of the failed attempt.
        log.warning("%s: out of memory with %d examples at a time; again with %d", what, size, size // 2)
        size //= 2
        retries += 1
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()


def give_back_freed() -> None:
    """Return freed memory to the system, with glibc's malloc_trim.

    Without it, glibc does not return freed blocks below 32 MiB between used ones: up to 300 MiB with ResNet-50.
    """
    try:
        ctypes.CDLL(None).malloc_trim(0)
    except (AttributeError, OSError, TypeError):  # another C library, another system
        return


def available_memory(root: Path = Path("/")) -> int | None:
    """Bytes this process can still allocate without swapping or being killed; None if the system does not report it.

    The minimum of the kernel's available memory and of the free memory of each control group (v1, v2) of this process.

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
        available = re.search(r"^MemAvailable:\s*(\d+)", path.read_text(), re.MULTILINE)
    except OSError:
        return None
    return int(available[1]) * 1024 if available else None


def _control_groups(root: Path) -> Iterator[int | None]:
    """Free memory of each control group of this process: limit less usage, without the inactive file cache."""
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
        # inside a container only the last folder exists
        for folder in (base / group, *(base / parent for parent in group.parents)):
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
    """Resident memory of this process; its peak if the system does not report the current size."""
    try:
        return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except (OSError, ValueError, IndexError):
        return peak_bytes()


def peak_bytes() -> int:
    """Largest resident size of the process so far (in a multirun within one process, of all runs)."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024  # macOS counts bytes, Linux KiB
