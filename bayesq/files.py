"""Files that appear under their name only when complete, and locks that processes hold on them."""

import hashlib
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


def file_sha256(path: Path) -> str:
    """sha256 hex of a file's content."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def remove_leftovers(folder: Path, name: str = "*") -> None:
    """Remove what killed processes left of writing `name` (a file name or a pattern) in `folder`.

    Call it holding the lock under which `name` is written: then no living process of this machine is writing it.
    Whether a lock reaches other machines depends on the file system, so their files go only when a day old.
    """
    for leftover in folder.glob(f".{name}.*.tmp"):
        try:
            of_this_machine = f".{socket.gethostname()}." in leftover.name
            if of_this_machine or time.time() - leftover.stat().st_mtime > ABANDONED_S:
                leftover.unlink()
        except FileNotFoundError:  # its writer was alive elsewhere and has finished
            continue


@contextmanager
def lock(path: Path) -> Iterator[None]:
    """Hold the inter-process lock of `path`, the file `<path>.lock`; say once, in one line, if it has to be waited for.

    The lock is flock(2): the operating system drops it when its holder ends, however it ends. The file stays and means
    nothing. It reaches other machines over NFS (unless mounted with local_lock=flock) and over file systems with
    cluster-wide flock. Where it does not, two machines may compute the same entry twice, which harms neither: files are
    replaced as a whole and have the same content. Without any flock, filelock warns and the file's existence is the
    lock; the line names the file, so that one left by a killed process can be deleted.
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
