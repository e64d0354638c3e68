"""Files that appear under their name only when complete, and locks that processes hold on them."""

import logging
import os
import socket
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock, Timeout

log = logging.getLogger(__name__)

# No write takes a day: what is older than that and still temporary belongs to nobody.
ABANDONED_S = 24 * 60 * 60


@contextmanager
def atomic_path(path: Path) -> Iterator[Path]:
    """Yield a temporary name beside `path`; it becomes `path` when the block succeeds and vanishes when it raises.

    The name is unique across processes and machines that share the folder, and the file gets the permissions
    the user's umask gives, so that colleagues can read what a shared results folder holds. A killed process leaves
    its temporary file behind; `remove_leftovers` finds it by its name.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{socket.gethostname()}.{uuid.uuid4().hex}.tmp")
    try:
        temporary.touch()
        permissions = temporary.stat().st_mode
        with _naming(path):
            yield temporary
        if temporary.stat().st_mode != permissions:  # safetensors writes files that only their owner can read
            temporary.chmod(permissions)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


@contextmanager
def _naming(path: Path) -> Iterator[None]:
    """Put the file's name into errors of writing, which know none: which of two disks is full depends on it.

    Raises:
        OSError: what the block raised.
    """
    try:
        yield
    except OSError as error:
        if error.filename is not None or error.errno is None:
            raise
        raise OSError(error.errno, error.strerror, str(path)) from error


def remove_leftovers(folder: Path, name: str = "*") -> None:
    """Remove what killed processes left of writing `name` (a file name or a pattern) in `folder`.

    Call it holding the lock under which `name` is written: then no living process of this machine is writing it.
    Whether a lock reaches other machines depends on the file system, so their files go only when a day old.
    """
    for leftover in folder.glob(f".{name}.*.tmp"):
        try:
            from_here = f".{socket.gethostname()}." in leftover.name
            if from_here or time.time() - leftover.stat().st_mtime > ABANDONED_S:
                leftover.unlink()
        except FileNotFoundError:  # its writer was alive elsewhere and has finished
            continue


@contextmanager
def lock(path: Path) -> Iterator[None]:
    """Hold the inter-process lock of `path`, the file `<path>.lock`; say once, in one line, if it has to be waited for.

    The lock is flock(2): the operating system drops it when its holder ends, however it ends, so a killed run leaves
    nothing stale behind. The file itself stays and means nothing. How far that reaches:
      * between processes of one machine, on every local file system;
      * between machines over NFS as Linux mounts it by default (not with local_lock=flock) and over file systems with
        cluster-wide flock (GPFS, BeeGFS and Lustre mounted or tuned for it); if a whole machine dies, its server
        drops the lock once the lease has run out, after a minute or two;
      * where flock holds for one machine only (Lustre with localflock), two machines may compute the same entry
        twice. Neither harms the other: files are replaced as a whole and have the same content;
      * where the file system has no flock at all, filelock warns and the existence of the file is the lock. One left
        by a killed process is taken over on the machine where it ran; on another machine it blocks until it is
        deleted, and the line names it.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    inter_process = FileLock(f"{path}.lock")
    try:
        inter_process.acquire(timeout=0)
    except Timeout:
        log.info("waiting for another process, which holds %s.lock", path)
        inter_process.acquire()
    try:
        remove_leftovers(path.parent, path.name)
        yield
    finally:
        inter_process.release()


def is_locked(path: Path) -> bool:
    """Whether a process holds the `lock` of `path` right now; False where this user may not find out."""
    file = Path(f"{path}.lock")
    if not file.exists():
        return False
    probe = FileLock(file)
    try:
        probe.acquire(timeout=0)
    except Timeout:
        return True
    except OSError:  # a folder of somebody else's
        return False
    probe.release()
    return False
